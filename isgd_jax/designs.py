"""The sampling design of a run: how scores become probabilities, in which order they lie, and who draws."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from isgd_jax import proposal, samplers, table
from isgd_jax.config import Config
from isgd_jax.typing import Draw, Key, Sampler

Maker = Callable[..., tuple[samplers.Law, proposal.Proposal]]
"""``(table, version, seconds, labels) -> (law, proposal)``, jitted."""


def make_maker(config: Config) -> Maker:
    """How the law of the next steps is made from the table, by the options of a configuration."""

    def make(
        scores: table.ScoreTable, version: Int[Array, ""], seconds: Float[Array, ""], labels: Int[Array, " n"]
    ) -> tuple[samplers.Law, proposal.Proposal]:
        made = proposal.propose(
            scores,
            version=version,
            seconds=seconds,
            mixture=config.mixture,
            additive=config.additive,
            max_age=config.max_age,
            max_age_seconds=config.max_age_seconds,
            min_trusted=config.min_trusted,
        )
        keys = {"label": (labels,), "score": (made.probs,), "label-score": (labels, made.probs)}
        order = samplers.order_by(*keys[config.order]) if config.order in keys else None
        return samplers.prepare(made.probs, order), made

    return jax.jit(make)


def with_coin(sampler: Sampler, probability: float) -> Sampler:
    """Toss a coin before each draw: the sampler with this probability, else a uniform step.

    Each draw carries the probabilities it was made with, so the estimate is unbiased whatever falls.
    """
    if probability == 1.0:
        return sampler

    def draw(key: Key, law: Any, /, *, num_draws: int) -> Draw:
        toss, rest = jax.random.split(key)
        importance, plain = (functools.partial(draw, num_draws=num_draws) for draw in (sampler, samplers.uniform))
        return jax.lax.cond(jax.random.bernoulli(toss, probability), importance, plain, rest, law)

    return draw
