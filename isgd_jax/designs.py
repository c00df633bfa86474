"""The sampling design of a run: how scores become probabilities, in which order they lie, and who draws."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

from isgd_jax import proposal, samplers, table
from isgd_jax.config import Config

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
