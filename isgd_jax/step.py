"""The jitted update: draw, gather, differentiate once, reweight, update, and send the fresh scores home."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from isgd_jax import table
from isgd_jax.factoring import factored
from isgd_jax.gradients import per_example_value_and_grad
from isgd_jax.parallel import OneDevice
from isgd_jax.typing import Batch, Key, LossFn, Params, Sampler


class TrainState(NamedTuple):
    """All that the next step needs and a step changes."""

    params: Params
    opt_state: optax.OptState
    table: table.ScoreTable
    step: Int[Array, ""]


class StepInfo(NamedTuple):
    """What a person looks at."""

    loss: Float[Array, ""]
    """mean(s * L): an unbiased estimate of the training loss, whatever the proposal."""
    max_weight: Float[Array, ""]
    """The largest weight s = 1/(N q) in the batch."""
    rejected: Int[Array, ""]
    """Fresh scores that were not finite, and so were not recorded."""


FreshScores = Callable[[Float[Array, " m"], Params], Float[Array, " m"]]
"""Scores of the drawn examples from what the step has anyway: (losses, per-example gradients) -> scores."""


def norms_as_scores(losses: Float[Array, " m"], grads: Params) -> Float[Array, " m"]:
    """Fresh scores of the grad_norm scorer."""
    return factored.norms(grads)


def losses_as_scores(losses: Float[Array, " m"], grads: Params) -> Float[Array, " m"]:
    """Fresh scores of the loss scorer."""
    return jnp.abs(losses)


def init_state(params: Params, tx: optax.GradientTransformationExtraArgs, num_examples: int) -> TrainState:
    """The state before the first step: nothing scored yet."""
    return TrainState(params, tx.init(params), table.create(num_examples), jnp.zeros((), jnp.int32))


def make_update(
    loss_fn: LossFn,
    tx: optax.GradientTransformationExtraArgs,
    sampler: Sampler,
    *,
    num_draws: int,
    fresh_scores: FreshScores | None = None,
    place: OneDevice | None = None,
) -> Callable[[TrainState, Any, Batch, Key, Float[Array, ""]], tuple[TrainState, StepInfo]]:
    """Build ``update(state, law, data, key, seconds) -> (state, info)``, jitted, its state donated.

    Guarantees:
        * It traces once: steps, laws and clocks of one shape share one program.
        * One backward pass gives both the update and the fresh scores of the drawn examples.
        * The draw of step ``t`` depends on ``fold_in(key, t)`` alone, so resuming needs no saved key.
        * With uniform probabilities the update is that of plain SGD on the same indices.

    Args:
        loss_fn: ``(params, example) -> scalar``.
        tx: an Optax chain that begins with `isgd_jax.importance_weighting`.
        sampler: ``(key, law, num_draws=...) -> Draw``.
        num_draws: draws in a step, M.
        place: where the step is made, by default on one device; else each device handles its share of the draw, and
            the reweighting of ``tx`` must average over them (`parallel.OneDevice.averaged`).
        fresh_scores: how the drawn examples are scored for the table; `None` leaves the table alone, and costs nothing.
    """

    where = place or OneDevice()

    def update(
        state: TrainState, law: Any, data: Batch, key: Key, seconds: Float[Array, ""]
    ) -> tuple[TrainState, StepInfo]:
        draw = sampler(jax.random.fold_in(key, state.step), law, num_draws=num_draws)
        mine = where.share(draw)
        batch = jax.tree.map(lambda x: x[mine.indices], data)
        losses, grads = per_example_value_and_grad(loss_fn)(state.params, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, probs=mine.probs)
        scored, rejected = state.table, jnp.zeros((), jnp.int32)
        if fresh_scores is not None:
            fresh = where.gather(fresh_scores(losses, grads))
            scored, rejected = table.record(scored, draw.indices, fresh, version=state.step, seconds=seconds)
        weights = 1.0 / (len(scored.scores) * draw.probs)
        loss = where.mean(jnp.mean(losses / (len(scored.scores) * mine.probs)))
        info = StepInfo(loss, jnp.max(weights), rejected)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, scored, state.step + 1), info

    return where.jit(update)
