"""The sampling design of a run: how scores become probabilities, in which order they lie, and who draws.

The defaults are what measured best with scores 200 updates old (`experiments/benchmarks/estimators.py`): stratified
draws along cells of gradient sketches, from calibrated scores, with the share of uniform draws chosen from the draws.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from isgd_jax import calibration, mixtures, orders, proposal, samplers, table
from isgd_jax.config import Config
from isgd_jax.draws import Choose, make_choose
from isgd_jax.proposal import Frozen
from isgd_jax.typing import Sampler
from isgd_jax.watch import Watch

SAMPLERS: dict[str, Sampler] = {
    "uniform": samplers.uniform,
    "independent": samplers.independent,
    "stratified": samplers.stratified,
    "systematic": samplers.systematic,
    "without_replacement": samplers.systematic,  # from a law that was capped when it was frozen
}
APART = {"uniform", "independent"}
"""Samplers whose draws know nothing of each other."""

Maker = Callable[..., tuple[Frozen, proposal.Proposal]]
"""``(table, watch, version, seconds, labels, sketches, example_weights) -> (frozen law, proposal)``, jitted."""


def choose_by(config: Config) -> Choose:
    """How a step of this configuration draws."""
    name = config.sampler_in_use
    return make_choose(
        SAMPLERS[name],
        num_draws=config.batch_size,
        is_watched=config.monitor == "on",
        is_apart=name in APART,
        is_gated=config.gate == "on" and config.mode in ("exact", "relaxed", "static"),
    )


def make_maker(config: Config) -> Maker:
    """How the law of the next steps is made from the table and from what the draws have taught."""

    def make(
        scores: table.ScoreTable,
        watch: Watch,
        version: Int[Array, ""],
        seconds: Float[Array, ""],
        labels: Int[Array, " n"],
        sketches: Float[Array, "n dims"] | None,
        example_weights: Float[Array, " n"] | None,
    ) -> tuple[Frozen, proposal.Proposal]:
        chosen = config.mixture
        mixture = mixtures.choose(watch.mixtures) if isinstance(chosen, str) else jnp.float32(chosen)
        made = proposal.propose(
            scores._replace(scores=_believed(config, scores, watch, version)),
            version=version,
            seconds=seconds,
            mixture=mixture,
            additive=config.additive,
            max_age=config.max_age,
            max_age_seconds=config.max_age_seconds,
            min_trusted=config.min_trusted,
            example_weights=example_weights,
        )
        law = prepared(config, made.probs, labels, sketches)
        return Frozen(law, mixture, scores.scores, scores.versions), made

    return jax.jit(make)


def prepared(
    config: Config, probs: Float[Array, " n"], labels: Int[Array, " n"], sketches: Float[Array, "n dims"] | None
) -> samplers.Law:
    """The law of these probabilities, in the order of the configuration, and as its sampler wants it."""
    law = samplers.prepare(probs, _order(config, probs, labels, sketches))
    return samplers.capped(law, num_draws=config.batch_size) if _is_capped(config) else law


def learning_time(config: Config, num_examples: int) -> int:
    """Steps before calibrated scores are used: the first period knows nothing, and the second only the first norms.

    In relaxed mode a period is a whole sweep of the data.
    """
    sweeps = -(-1 // config.share_scored(num_examples))
    return int(2 * sweeps * config.refresh_every)


def _believed(config: Config, scores: table.ScoreTable, watch: Watch, version: Int[Array, ""]) -> Float[Array, " n"]:
    """The scores, or what they have turned out to be worth in the middle of the law's life."""
    if config.calibrate == "off" or not config.is_scored:
        return scores.scores
    ages = table.ages(scores, version) + config.refresh_every // 2
    predicted = calibration.predict(watch.calibration, scores.scores, ages)
    return jnp.where(version >= learning_time(config, len(predicted)), predicted, scores.scores)


def _is_capped(config: Config) -> bool:
    return config.sampler_in_use == "without_replacement"


def _order(
    config: Config,
    probs: Float[Array, " n"],
    labels: Int[Array, " n"],
    sketches: Float[Array, "n dims"] | None,
) -> Int[Array, " n"] | None:
    if config.order_in_use == "cells":
        if sketches is None:
            raise ValueError("an order by cells is made of sketches, and there are none: pass them")
        num_cells = min(config.batch_size, len(probs))
        return orders.by_cells(jax.random.key(config.seed), sketches, probs, num_cells=num_cells)
    keys = {"label": (labels,), "score": (probs,), "label-score": (labels, probs)}
    return samplers.order_by(*keys[config.order_in_use]) if config.order_in_use in keys else None
