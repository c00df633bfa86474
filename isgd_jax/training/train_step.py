"""The jitted step: draw, gather, differentiate once, reweight, update, and learn from the fresh norms."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Bool, Float

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients.per_example import per_example_value_and_grad
from isgd_jax.gradients.weights import draw_weights
from isgd_jax.sampling.gates import is_open, ratio
from isgd_jax.sampling.state import BatchSampler, SamplerState
from isgd_jax.training.data_parallel import DataParallel
from isgd_jax.training.problem import Problem
from isgd_jax.types import Batch, Draw, Key, Params
from isgd_jax.variance.gate import Gate
from isgd_jax.variance.rolling import Band

PICTURES = 0x70696374
"""Folded into a step's key, it gives the keys of augmentation. Splitting, which samplers do, never gets so far."""

LOOK_EVERY = 16
"""While the gate is shut, steps from one that looks at the gradients one by one to the next."""

FreshScores = Callable[[Float[Array, " m"], Params], Float[Array, " m"]]
"""Scores of the drawn examples from what the step has anyway: (losses, per-example gradients) -> scores."""


class TrainState(NamedTuple):
    """All that the next step needs and a step changes: save this, and a run goes on bit for bit."""

    params: Params
    opt_state: optax.OptState
    sampler: SamplerState


class StepInfo(NamedTuple):
    """What a person looks at."""

    loss: Float[Array, ""]
    """mean(weight * loss): an unbiased estimate of the training loss, whatever the proposal."""
    max_weight: Float[Array, ""]
    """The largest weight target / probs in the batch."""
    gate_is_open: Bool[Array, ""]
    gate_ratio: Band | None
    """What the gate judged: above 1 the scores do harm."""


class Steps(NamedTuple):
    """The jitted functions of a run. The state is donated."""

    step: Callable[..., tuple[TrainState, StepInfo]]
    """``(state, frozen, data, key, seconds)``: draws, gathers from the data on the device, learns."""
    draw_ahead: Callable[..., Draw]
    """``(sampler state, key, num_steps)``: the draws of the steps to come, stacked."""
    step_drawn: Callable[..., tuple[TrainState, StepInfo]]
    """``(state, frozen, draw, batch, key, seconds)``: learns from draws that were made and fetched ahead."""


def make_steps(
    problem: Problem,
    sampler: BatchSampler,
    tx: optax.GradientTransformationExtraArgs,
    *,
    parallel: DataParallel | None = None,
    fresh_scores: FreshScores | None = None,
) -> Steps:
    """The step of a problem.

    Guarantees:
        * Each function traces once: steps, proposals and clocks of one shape share one program.
        * One backward pass gives the update, the fresh scores of the drawn examples, and all that is monitored.
        * The draw of step t depends on ``fold_in(key, t)`` alone, so resuming needs no saved key.
        * With uniform probabilities the update is that of plain SGD on the same indices.
        * While the gate is shut a step takes the ordinary gradient of the weighted mean loss, which costs no norms and
          teaches nothing; each `LOOK_EVERY`-th looks again, so that the gate can open. Which it is, the state says.

    Args:
        problem: what is trained.
        sampler: which batches.
        tx: an Optax chain that begins with `isgd_jax.importance_weighting`.
        parallel: several devices, each with a part of the batch.
        fresh_scores: what the table gets of the drawn examples; their norms by default.

    Raises:
        ValueError: the chain leaves one gradient for each draw.
    """
    tx = optax.with_extra_args_support(tx)

    def draw(state: SamplerState, key: Key, ahead: int | Array = 0, **scoring: Any) -> Draw:
        return sampler.sample(jax.random.fold_in(key, state.clock.step + ahead), state, ahead=ahead, **scoring)

    def step(
        state: TrainState, frozen: Any, data: Batch, key: Key, seconds: Float[Array, ""]
    ) -> tuple[TrainState, StepInfo]:
        drawn = draw(state.sampler, key, params=state.params, data=data)
        return learn(state, frozen, drawn, jax.tree.map(lambda x: x[drawn.indices], data), key, seconds)

    def draw_ahead(state: SamplerState, key: Key, num_steps: int) -> Draw:
        return jax.lax.map(lambda ahead: draw(state, key, ahead), jnp.arange(num_steps, dtype=jnp.int32))

    def learn(
        state: TrainState, frozen: Any, drawn: Draw, batch: Batch, key: Key, seconds: Float[Array, ""]
    ) -> tuple[TrainState, StepInfo]:
        keys = (
            _keys(jax.random.fold_in(key, state.sampler.clock.step), sampler.batch_size) if problem.is_random else None
        )
        batch = problem.pictures(keys, batch)
        batch = batch if parallel is None else parallel.split(batch)
        if isinstance(state.sampler.gate, Gate):
            rests = ~is_open(state.sampler) & (state.sampler.clock.step % LOOK_EVERY != 0)
            made, info = jax.lax.cond(rests, together, one_by_one, state, frozen, drawn, batch, seconds)
        else:
            made, info = one_by_one(state, frozen, drawn, batch, seconds)
        return (made, info) if parallel is None else parallel.same((made, info))

    def one_by_one(
        state: TrainState, frozen: Any, drawn: Draw, batch: Any, seconds: Float[Array, ""]
    ) -> tuple[TrainState, StepInfo]:
        losses, grads = per_example_value_and_grad(problem.loss)(state.params, frozen, batch)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, probs=drawn.probs, mask=drawn.mask, target=drawn.target
        )
        scores = None if fresh_scores is None else fresh_scores(losses, grads)
        after = sampler.observe(state.sampler, drawn, grads, scores=scores, seconds=seconds)
        loss = jnp.mean(_weights(drawn) * losses)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, after), info_of(loss, drawn, after)

    def together(
        state: TrainState, frozen: Any, drawn: Draw, batch: Any, seconds: Float[Array, ""]
    ) -> tuple[TrainState, StepInfo]:
        def mean_loss(params: Params) -> Float[Array, ""]:
            losses = jax.vmap(problem.loss, in_axes=(None, None, 0))(params, frozen, batch)
            return jnp.mean(_weights(drawn) * losses)

        loss, gradient = jax.value_and_grad(mean_loss)(state.params)
        one, alone = jnp.ones(1, jnp.float32), jax.tree.map(lambda g: g[None], gradient)  # to the chain, a single draw
        updates, opt_state = tx.update(alone, state.opt_state, state.params, probs=one, target=one)
        after = sampler.observe(state.sampler, drawn, seconds=seconds)
        return TrainState(optax.apply_updates(state.params, updates), opt_state, after), info_of(loss, drawn, after)

    def info_of(loss: Float[Array, ""], drawn: Draw, after: SamplerState) -> StepInfo:
        return StepInfo(loss, jnp.max(_weights(drawn)), is_open(after), ratio(after))

    return Steps(
        jax.jit(step, donate_argnames="state"),
        jax.jit(draw_ahead, static_argnames="num_steps"),
        jax.jit(learn, donate_argnames="state"),
    )


def _weights(drawn: Draw) -> Float[Array, " m"]:
    return draw_weights(drawn.probs, drawn.mask, 1.0 if drawn.target is None else drawn.target)


def _keys(step_key: Key, count: int) -> Array:
    """A key for each place of the batch, which no draw uses."""
    own = jax.random.fold_in(step_key, PICTURES)
    return jax.vmap(lambda place: jax.random.fold_in(own, place))(jnp.arange(count, dtype=jnp.int32))


def check_chain(tx: optax.GradientTransformation, params: Params, num_draws: int) -> None:
    """See, from shapes alone, that an optimizer takes one gradient for each draw and gives one update.

    Raises:
        ValueError: it does not begin with the reweighting.
    """
    tx = optax.with_extra_args_support(tx)

    def update(params: Params) -> Params:
        grads = jax.tree.map(lambda x: jnp.zeros((num_draws, *x.shape), x.dtype), params)
        ones = jnp.ones(num_draws, jnp.float32)
        given = {"probs": ones, "mask": ones > 0.0, "target": ones}
        return tx.update(grads, tx.init(params), params, **given)[0]

    try:
        updates: Any = jax.eval_shape(update, params)
        fits = jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
        error: Exception | None = None
    except (ValueError, TypeError) as raised:
        fits, error = False, raised
    if not fits:
        raise ArgumentError(
            "the optimizer must begin with the reweighting, optax.chain(isgd_jax.importance_weighting(num_examples), "
            f"...): it is given one gradient for each draw and must give one update{f' ({error})' if error else ''}"
        ) from error
