"""The jitted update: draw, gather, differentiate once, reweight, update, and send the fresh scores home."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from isgd_jax import monitor, table, watch
from isgd_jax.draws import Choice, Choose, make_choose
from isgd_jax.factoring import factored
from isgd_jax.gate import Verdict
from isgd_jax.gradients import per_example_value_and_grad
from isgd_jax.parallel import OneDevice
from isgd_jax.proposal import Frozen
from isgd_jax.reweight import draw_weights
from isgd_jax.typing import Batch, Draw, Example, Key, LossFn, Params, Sampler
from isgd_jax.watch import Watch

PICTURES = 0x70696374
"""Folded into a step's key, it gives the keys of augmentation. Splitting, which samplers do, never gets so far."""


class TrainState(NamedTuple):
    """All that the next step needs and a step changes."""

    params: Params
    opt_state: optax.OptState
    table: table.ScoreTable
    step: Int[Array, ""]
    watch: Watch


class StepInfo(NamedTuple):
    """What a person looks at."""

    loss: Float[Array, ""]
    """mean(s * L): an unbiased estimate of the training loss, whatever the proposal."""
    max_weight: Float[Array, ""]
    """The largest weight s = 1/(N q) in the batch."""
    rejected: Int[Array, ""]
    """Fresh scores that were not finite, and so were not recorded."""
    verdict: Verdict
    """Whether the gate has just moved, and the ratio STALE/UNIFORM that moved it."""
    is_open: Bool[Array, ""]


FreshScores = Callable[[Float[Array, " m"], Params], Float[Array, " m"]]
"""Scores of the drawn examples from what the step has anyway: (losses, per-example gradients) -> scores."""

Augment = Callable[[Key, Example], Example]
"""Another picture of an example: ``(key, example) -> example``."""


class Options(NamedTuple):
    """What a step does beside the update."""

    fresh_scores: FreshScores | None = None
    """How the drawn examples are scored for the table; `None` leaves the table alone."""
    is_watched: bool = False
    """Watch what proposals cost, from the drawn norms."""
    augment: Augment | None = None
    """Draw another picture of each drawn example, by a key of its own."""
    memory: float = 0.0
    """The share of the old mean square that a score keeps when a fresh one arrives; for augmented examples."""
    example_weights: Float[Array, " n"] | None = None
    """a_n, where sum(a_n g_n) is wanted in place of the mean."""


class Updates(NamedTuple):
    """The jitted updates of a run. The state is donated."""

    update: Callable[[TrainState, Any, Batch, Key, Float[Array, ""]], tuple[TrainState, StepInfo]]
    """``(state, law, data, key, seconds)``: draws from the law, gathers from the data, learns."""
    ahead: Callable[..., Choice]
    """``(state, law, key, num_steps)``: the draws of the steps to come, stacked; the law must stay until then."""
    update_drawn: Callable[[TrainState, Any, Choice, Batch, Key, Float[Array, ""]], tuple[TrainState, StepInfo]]
    """``(state, law, choice, batch, key, seconds)``: learns from draws that were made and fetched ahead."""


def norms_as_scores(losses: Float[Array, " m"], grads: Params) -> Float[Array, " m"]:
    """Fresh scores of the grad_norm scorer."""
    return factored.norms(grads)


def losses_as_scores(losses: Float[Array, " m"], grads: Params) -> Float[Array, " m"]:
    """Fresh scores of the loss scorer."""
    return jnp.abs(losses)


def init_state(
    params: Params, tx: optax.GradientTransformationExtraArgs, num_examples: int, *, num_draws: int = 128
) -> TrainState:
    """The state before the first step: nothing scored yet. ``num_draws`` sets the monitor's window."""
    scores = table.create(num_examples)
    return TrainState(params, tx.init(params), scores, jnp.zeros((), jnp.int32), watch.create(num_draws))


def make_update(
    loss_fn: LossFn,
    tx: optax.GradientTransformationExtraArgs,
    sampler: Sampler,
    *,
    num_draws: int,
    fresh_scores: FreshScores | None = None,
    place: OneDevice | None = None,
) -> Callable[[TrainState, Any, Batch, Key, Float[Array, ""]], tuple[TrainState, StepInfo]]:
    """Build ``update(state, law, data, key, seconds) -> (state, info)`` of a plain sampler: see `make_updates`."""
    choose = make_choose(sampler, num_draws=num_draws, is_watched=False, is_apart=False, is_gated=False)
    return make_updates(loss_fn, tx, choose, Options(fresh_scores=fresh_scores), place).update


def make_updates(
    loss_fn: LossFn,
    tx: optax.GradientTransformationExtraArgs,
    choose: Choose,
    options: Options,
    place: OneDevice | None = None,
) -> Updates:
    """Build the updates of a run, jitted, their state donated.

    Guarantees:
        * Each traces once: steps, laws and clocks of one shape share one program.
        * One backward pass gives the update, the fresh scores of the drawn examples, and all that is watched.
        * The draw of step ``t`` depends on ``fold_in(key, t)`` alone, so resuming needs no saved key.
        * With uniform probabilities the update is that of plain SGD on the same indices.
        * Scores are judged by what they were when the law was made, before fresh ones take their place.

    Args:
        loss_fn: ``(params, example) -> scalar``.
        tx: an Optax chain that begins with `isgd_jax.importance_weighting`.
        choose: how a step draws (`isgd_jax.draws`).
        options: what else it does.
        place: where the step is made, by default on one device; else each device handles its share of the draw, and
            the reweighting of ``tx`` must average over them (`parallel.OneDevice.averaged`).
    """
    where = place or OneDevice()

    def draw(state: TrainState, law: Any, data: Batch, key: Key) -> Choice:
        return choose(jax.random.fold_in(key, state.step), law, state, data)

    def update(
        state: TrainState, law: Any, data: Batch, key: Key, seconds: Float[Array, ""]
    ) -> tuple[TrainState, StepInfo]:
        choice = draw(state, law, data, key)
        mine = where.share(choice.draw)
        return learn(state, law, choice, jax.tree.map(lambda x: x[mine.indices], data), key, seconds)

    def ahead(state: TrainState, law: Any, key: Key, num_steps: int) -> Choice:
        steps = state.step + jnp.arange(num_steps, dtype=jnp.int32)
        return jax.lax.map(lambda step: draw(state._replace(step=step), law, None, key), steps)

    def learn(
        state: TrainState, law: Any, choice: Choice, batch: Batch, key: Key, seconds: Float[Array, ""]
    ) -> tuple[TrainState, StepInfo]:
        drawn, mine = choice.draw, where.share(choice.draw)
        batch = batch if options.augment is None else _augmented(options.augment, key, state.step, drawn, where, batch)
        losses, grads = per_example_value_and_grad(loss_fn)(state.params, batch)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, probs=mine.probs, mask=mine.mask, indices=mine.indices
        )
        scored, rejected = state.table, jnp.zeros((), jnp.int32)
        if options.fresh_scores is not None:
            fresh = where.gather(options.fresh_scores(losses, grads))
            scored, rejected = _recorded(options, state, drawn, fresh, seconds)
        watched, verdict = _watch(options, state, law, choice, grads, where)
        losses, weights = where.gather(losses), _weights(options, len(scored.scores), drawn)
        info = StepInfo(jnp.mean(weights * losses), jnp.max(weights), rejected, verdict, watched.gate.is_open)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, scored, state.step + 1, watched), info

    return Updates(
        where.jit(update),
        jax.jit(ahead, static_argnames="num_steps"),
        jax.jit(learn, donate_argnames="state"),
    )


def _augmented(augment: Augment, key: Key, step: Int[Array, ""], drawn: Draw, where: OneDevice, batch: Batch) -> Batch:
    """Another picture of each drawn example, by a key that no draw uses; the same on however many devices."""
    places = where.share(drawn._replace(indices=jnp.arange(len(drawn.indices), dtype=jnp.int32))).indices
    own = jax.random.fold_in(jax.random.fold_in(key, step), PICTURES)
    return jax.vmap(augment)(jax.vmap(lambda place: jax.random.fold_in(own, place))(places), batch)


def _recorded(
    options: Options, state: TrainState, drawn: Any, fresh: Float[Array, " m"], seconds: Float[Array, ""]
) -> tuple[table.ScoreTable, Int[Array, ""]]:
    at = jnp.where(drawn.mask, drawn.indices, len(state.table.scores))
    return table.record(state.table, at, fresh, version=state.step, seconds=seconds, memory=options.memory)


def _weights(options: Options, size: int, drawn: Draw) -> Float[Array, " m"]:
    """The weight of each draw in the loss and in the gradient."""
    return draw_weights(drawn.probs, drawn.mask, _wanted(options, size, drawn.indices))


def _wanted(options: Options, size: int, indices: Int[Array, " m"]) -> Float[Array, " m"] | float:
    """The factor of each draw's gradient in the target: a_n, or 1/N."""
    return 1.0 / size if options.example_weights is None else options.example_weights[indices]


def _watch(
    options: Options, state: TrainState, law: Any, choice: Choice, grads: Params, where: OneDevice
) -> tuple[Watch, Verdict]:
    """What the norms of this step's draws say of the monitor and, where there are scores, of all the rest."""
    seen, verdict = watch.hear(state.watch, choice.promise), watch.no_verdict()
    if not options.is_watched:
        return seen, verdict
    drawn, size = choice.draw, len(state.table.scores)
    wanted = _wanted(options, size, drawn.indices)
    norms = where.gather(factored.norms(grads))
    if isinstance(law, Frozen):
        seen, verdict = watch.learn(seen, law, choice, norms, step=state.step, scale=size * wanted)
    if len(drawn.probs) < 2:
        return seen, verdict
    weights = _weights(options, size, where.share(drawn))
    mean = jax.tree.map(where.mean, factored.weighted_mean(grads, weights))  # the update's own: XLA computes it once
    own = _inner(mean, mean)
    square = jax.lax.cond(
        choice.is_apart,
        lambda: _halves_inner(grads, weights, mean, drawn, where),
        lambda: jnp.asarray(jnp.nan, jnp.float32),
    )
    draw_scale = 1.0 / (size * drawn.probs)
    watched = monitor.observe(seen.monitor, draw_scale, size * wanted * norms, square, drawn.mask, own)
    return seen._replace(monitor=watched), verdict


def _halves_inner(
    grads: Params, weights: Float[Array, " m"], mean: Params, drawn: Draw, where: OneDevice
) -> Float[Array, ""]:
    """The inner product of the mean gradients of the two halves of a batch, for one half's contraction."""
    size, half = len(drawn.probs), len(drawn.probs) // 2
    if where.num_devices == 1:
        first = factored.weighted_mean(factored.first(grads, half), weights[:half])
    else:
        is_first = where.share(drawn._replace(mask=jnp.arange(size) < half)).mask
        part = factored.weighted_mean(grads, jnp.where(is_first, weights, 0.0) * (size / half))
        first = jax.tree.map(where.mean, part)
    second = jax.tree.map(lambda whole, part: (size * whole - half * part) / (size - half), mean, first)
    return _inner(first, second)


def _inner(one: Params, other: Params) -> Float[Array, ""]:
    products = jax.tree.map(lambda a, b: jnp.vdot(a, b, precision="highest").astype(jnp.float32), one, other)
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))
