"""The jitted step: draw, gather, differentiate once, reweight, update, and learn from the fresh norms."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Bool, Float

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients.captured import CapturingJit
from isgd_jax.gradients.factors import wide
from isgd_jax.gradients.one_pass import favored_size, sums_by_slices, weighted_gradient
from isgd_jax.gradients.plan import Plan, make_plan
from isgd_jax.gradients.weights import draw_weights
from isgd_jax.sampling.gates import is_open, ratio
from isgd_jax.sampling.state import BatchSampler, Clock, SamplerState, advanced
from isgd_jax.training.cost_gate import CostGate
from isgd_jax.training.data_parallel import DataParallel
from isgd_jax.training.prefetch import Block
from isgd_jax.training.problem import Problem
from isgd_jax.types import Batch, Draw, Key, Params
from isgd_jax.variance.gate import Gate
from isgd_jax.variance.rolling import Band

__all__ = [
    "LOOK_EVERY",
    "PICTURES",
    "FreshScores",
    "JittedStep",
    "Moving",
    "StepInfo",
    "Steps",
    "TrainState",
    "beside",
    "check_chain",
    "make_steps",
    "moving",
]

PICTURES = 0x70696374
"""Folded into a step's key, it gives the keys of augmentation. Splitting, which samplers do, never gets so far."""

LOOK_EVERY = 4
"""While the gate is shut, steps from one that looks at the gradients one by one to the next."""

FreshScores = Callable[[Float[Array, " m"], Params], Float[Array, " m"]]
"""Scores of the drawn examples from what the step has anyway: (losses, per-example gradients) -> scores. Of each
example by itself, since a batch may come in slices."""


class TrainState(NamedTuple):
    """All that the next step needs and a step changes: save this, and a run goes on bit for bit."""

    params: Params
    opt_state: optax.OptState
    sampler: SamplerState
    cost_gate: CostGate | None = None
    """Whether steps learn from single gradients; None where nobody asks what that costs. It stays on the host: steps
    are given None, and return None."""
    plain: SamplerState | None = None
    """Of the shuffled epochs that steps take while norms do not pay; None where there is no cost gate."""
    block: Block | None = None
    """Which draws are made already; None where the data are on the device. It stays on the host too."""


class StepInfo(NamedTuple):
    """What a person looks at."""

    loss: Float[Array, ""]
    """mean(weight * loss): an unbiased estimate of the training loss, whatever the proposal."""
    max_weight: Float[Array, ""]
    """The largest weight target / probs in the batch."""
    gate_is_open: Bool[Array, ""]
    gate_ratio: Band | None
    """What the gate judged: above 1 the scores do harm."""


@runtime_checkable
class JittedStep(Protocol):
    """A step that donates the state it is given."""

    __wrapped__: Callable[..., tuple[TrainState, StepInfo]]
    """Not jitted."""

    def __call__(self, state: TrainState, /, *given: Any) -> tuple[TrainState, StepInfo]:
        """The state after the step, and what a person looks at."""


class Steps(NamedTuple):
    """The jitted functions of a run, their arguments given by position. The state is donated."""

    step: JittedStep
    """``(state, frozen, data, key, seconds)``: draws, gathers from the data on the device, learns."""
    draw_ahead: Callable[..., Draw]
    """``(sampler state, key, num_steps)``: the draws of the steps to come, stacked."""
    step_drawn: JittedStep
    """``(state, frozen, draw, batch, key, seconds)``: learns from draws that were made and fetched ahead."""
    rest: JittedStep | None = None
    """As ``step``, but plain SGD on the epochs of ``state.plain``, which teaches nothing, at its price."""
    rest_ahead: Callable[..., Draw] | None = None
    """As ``draw_ahead``, of ``state.plain``."""
    rest_drawn: JittedStep | None = None
    """As ``step_drawn``, of such draws."""


def make_steps(
    problem: Problem,
    sampler: BatchSampler,
    tx: optax.GradientTransformationExtraArgs,
    *,
    parallel: DataParallel | None = None,
    fresh_scores: FreshScores | None = None,
    plain: BatchSampler | None = None,
) -> Steps:
    """The step of a problem, jitted: `fit` calls it, and so may a loop of one's own.

    Guarantees:
        * Each function compiles once: steps, proposals and clocks of one shape share one program.
        * One backward pass gives the update, the fresh scores of the drawn examples, and all that is monitored. On a
          CPU it takes a few examples at a time where that is faster; the numbers are the same to rounding.
        * Large arrays that the loss captures are arguments of the program, not written into it.
        * The draw of a step depends on the key of the run and the sampler's state alone: resuming needs no saved key.
        * With uniform probabilities the update is that of plain SGD on the same indices.
        * While the gate is shut a step takes the ordinary gradient of the weighted mean loss, which needs no norms and
          teaches nothing; each `LOOK_EVERY`-th looks again, so that the gate can open. Which it is, the state says. The
          chain then gets one gradient, with ``probs`` and ``target`` of length 1.
        * So it is in every step of a sampler that makes nothing of gradients: plain SGD has its usual price.

    Args:
        problem: what is trained.
        sampler: which batches.
        tx: an Optax chain that begins with `isgd_jax.importance_weighting`.
        parallel: several devices, each with a part of the batch.
        fresh_scores: what the table gets of the drawn examples; their norms by default.
        plain: of the same examples, for the caller that decides itself between ``step`` and ``rest``; a step then does
            not take the ordinary gradient while the gate is shut.

    Returns:
        The functions. Each donates the state it is given; those that rest hand all but the clock of the sampler's on.

    Source: the paper, section 4, with scores from the update's own backward pass; the gate is ours.
    """
    tx = optax.with_extra_args_support(tx)
    made = _Step(problem, sampler, tx, parallel, fresh_scores, rests_if_shut=plain is None)
    steps = Steps(
        CapturingJit(made.step, donate_argnums=(0,)),
        jax.jit(made.draw_ahead, static_argnames="num_steps"),
        CapturingJit(made.step_drawn, donate_argnums=(0,)),
    )
    if plain is None:
        return steps
    other = _Step(problem, plain, tx, parallel, None, rests_if_shut=False)
    return steps._replace(
        rest=_Resting(other.rest),
        rest_ahead=jax.jit(other.draw_ahead, static_argnames="num_steps"),
        rest_drawn=_Resting(other.rest_drawn),
    )


class Moving(NamedTuple):
    """What a step that rests takes of the state: to hand arrays in and out costs as much as a small step."""

    params: Params
    opt_state: optax.OptState
    plain: SamplerState
    clock: Clock


def moving(state: TrainState) -> Moving:
    """What a step that rests takes and changes.

    Args:
        state: with shuffled epochs to rest by, in ``plain``.
    """
    assert state.plain is not None
    return Moving(state.params, state.opt_state, state.plain, state.sampler.clock)


class _Resting:
    """A step of the whole state from one of what moves, jitted; ``__wrapped__`` is not.

    Args:
        step: ``(moving, *given) -> (moving, info)``.
    """

    def __init__(self, step: Callable[..., tuple[Moving, StepInfo]]) -> None:
        self.__wrapped__: Callable[..., tuple[TrainState, StepInfo]] = partial(self._whole, step)
        self._program = CapturingJit(step, donate_argnums=(0,))

    def __call__(self, state: TrainState, *given: Any) -> tuple[TrainState, StepInfo]:
        """The state after a step, and what a person looks at."""
        return self._whole(self._program, state, *given)

    @staticmethod
    def _whole(
        program: Callable[..., tuple[Moving, StepInfo]], state: TrainState, *given: Any
    ) -> tuple[TrainState, StepInfo]:
        after, info = program(moving(state), *given)
        sampler = state.sampler._replace(clock=after.clock)
        return TrainState(after.params, after.opt_state, sampler, None, after.plain), info


def beside(step: Callable[..., tuple[TrainState, StepInfo]]) -> Callable[..., tuple[TrainState, StepInfo]]:
    """The step that leaves ``plain`` as it is: what a step that learns neither needs nor changes.

    Args:
        step: of states without it.
    """

    def learn(state: TrainState, *given: Any) -> tuple[TrainState, StepInfo]:
        after, info = step(state._replace(plain=None), *given)
        return after._replace(plain=state.plain), info

    return learn


@dataclass(frozen=True)
class _Step:
    """The functions of `Steps`, not yet jitted.

    ``frozen`` is what the loss needs and nobody trains; ``seconds`` the caller's clock, a float32, by which scores
    age where ``max_age_seconds`` is set; ``key`` that of the run, into which the step's number is folded.
    """

    problem: Problem
    sampler: BatchSampler
    tx: optax.GradientTransformationExtraArgs
    parallel: DataParallel | None
    fresh_scores: FreshScores | None
    rests_if_shut: bool

    def step(
        self, state: TrainState, frozen: Any, data: Batch, key: Key, seconds: Float[Array, ""]
    ) -> tuple[TrainState, StepInfo]:
        """Draw, gather from data on the device, learn."""
        scoring = {"params": state.params, "data": data}
        if self.sampler.candidates is not None:
            scoring["frozen"] = frozen
        drawn = self._draw(state.sampler, key, **scoring)
        return self.step_drawn(state, frozen, drawn, jax.tree.map(lambda x: x[drawn.indices], data), key, seconds)

    def draw_ahead(self, state: SamplerState, key: Key, num_steps: int) -> Draw:
        """The draws of the next ``num_steps`` steps, stacked, from the proposal and the gate as they are now."""
        return jax.lax.map(lambda ahead: self._draw(state, key, ahead), jnp.arange(num_steps, dtype=jnp.int32))

    def step_drawn(
        self, state: TrainState, frozen: Any, drawn: Draw, batch: Batch, key: Key, seconds: Float[Array, ""]
    ) -> tuple[TrainState, StepInfo]:
        """Learn from a draw whose batch has been fetched."""
        seen = self._seen(batch, jax.random.fold_in(key, state.sampler.clock.step))
        given = (state, frozen, drawn, seen, seconds)
        if not self.sampler.learns:
            made = self._together(self._favored_size(state.params, frozen, seen), *given)
        else:
            shared = (state.params, frozen)
            plan = make_plan(self.problem.loss, 0, False, shared, seen)
            size = None if self.parallel is not None else plan.examples_at_a_time(shared, seen)
            one_by_one = partial(self._one_by_one, plan, size)
            if self.rests_if_shut and isinstance(state.sampler.gate, Gate):
                rests = ~is_open(state.sampler) & (state.sampler.clock.step % LOOK_EVERY != 0)
                made = jax.lax.cond(rests, partial(self._together, size), one_by_one, *given)
            else:
                made = one_by_one(*given)
        return made if self.parallel is None else _where_they_belong(self.parallel, *made)

    def rest(
        self, moving: Moving, frozen: Any, data: Batch, key: Key, seconds: Float[Array, ""]
    ) -> tuple[Moving, StepInfo]:
        """Draw, gather from data on the device, take the ordinary gradient."""
        drawn = self._draw(moving.plain, key)
        return self.rest_drawn(moving, frozen, drawn, jax.tree.map(lambda x: x[drawn.indices], data), key, seconds)

    def rest_drawn(
        self, moving: Moving, frozen: Any, drawn: Draw, batch: Batch, key: Key, seconds: Float[Array, ""]
    ) -> tuple[Moving, StepInfo]:
        """Take the ordinary gradient of a draw whose batch has been fetched; both samplers' clocks move on."""
        state = TrainState(moving.params, moving.opt_state, moving.plain)
        seen = self._seen(batch, jax.random.fold_in(key, moving.clock.step))
        size = self._favored_size(moving.params, frozen, seen)
        after, info = self._together(size, state, frozen, drawn, seen, seconds)
        if self.parallel is not None:
            after, info = _where_they_belong(self.parallel, after, info)
        clock = advanced(moving.clock, steps_per_update=self.sampler.steps_per_update, seconds=seconds)
        return Moving(after.params, after.opt_state, after.sampler, clock), info

    def _draw(self, state: SamplerState, key: Key, ahead: int | Array = 0, **scoring: Any) -> Draw:
        return self.sampler.sample(key, state, ahead=ahead, **scoring)

    def _seen(self, batch: Batch, step_key: Key) -> tuple[Batch, Array | None]:
        """The batch as the loss takes it: augmented, with a key for each example, on all devices."""
        keys = _keys(step_key, self.sampler.batch_size) if self.problem.is_random else None
        seen = self.problem.pictures(keys, batch)
        return seen if self.parallel is None else self.parallel.split(seen)

    def _favored_size(self, params: Params, frozen: Any, seen: Any) -> int | None:
        """How many examples to differentiate at a time where the ordinary gradient is taken; None: all of them."""
        return None if self.parallel is not None else favored_size(self.problem.loss, (params, frozen), seen)

    def _one_by_one(
        self,
        plan: Plan,
        size: int | None,
        state: TrainState,
        frozen: Any,
        drawn: Draw,
        seen: Any,
        seconds: Float[Array, ""],
    ) -> tuple[TrainState, StepInfo]:
        """By the gradients of single examples, which teach the sampler."""
        if size is not None:
            return self._by_slices(plan, size, state, frozen, drawn, seen, seconds)
        (losses, _), grads = plan.run((state.params, frozen), seen, joint=True)
        updates, opt_state = self.tx.update(
            grads, state.opt_state, state.params, probs=drawn.probs, mask=drawn.mask, target=drawn.target
        )
        scores = None if self.fresh_scores is None else self.fresh_scores(losses, grads)
        after = self.sampler.observe(state.sampler, drawn, grads, scores=scores, seconds=seconds)
        return _updated(state, updates, opt_state, after, _mean_loss(drawn, losses), drawn)

    def _by_slices(
        self, plan: Plan, size: int, state: TrainState, frozen: Any, drawn: Draw, seen: Any, seconds: Float[Array, ""]
    ) -> tuple[TrainState, StepInfo]:
        """The same with ``size`` examples at a time, of which norms and sums are kept."""

        def also(losses: Array, grads: Any) -> tuple[Array | None, Array | None]:
            scores = None if self.fresh_scores is None else self.fresh_scores(losses, grads)
            return scores, None if self.sampler.sketch is None else self.sampler.sketch(grads)

        weights = _weights(drawn)
        shares = weights * (2 / weights.shape[0])
        made = sums_by_slices(plan, (state.params, frozen), seen, shares, size, halves=True, also=also)
        mean = jax.tree.map(lambda p, one, other: ((one + other) / 2).astype(p.dtype), state.params, *made.sums)
        updates, opt_state = self._update(mean, state)
        scores, sketches = made.also
        after = self.sampler.observe(
            state.sampler,
            drawn,
            norms=made.norms,
            halves=made.sums,
            scores=scores,
            sketches=sketches,
            seconds=seconds,
        )
        return _updated(state, updates, opt_state, after, _mean_loss(drawn, made.value[0]), drawn)

    def _together(
        self, size: int | None, state: TrainState, frozen: Any, drawn: Draw, seen: Any, seconds: Float[Array, ""]
    ) -> tuple[TrainState, StepInfo]:
        """By the ordinary gradient, of ``size`` examples at a time: the same update, and nothing is learnt."""
        weights, shared = _weights(drawn), (state.params, frozen)
        largest = jnp.max(jnp.abs(weights))
        # The backward pass begins with numbers up to 1, as that of each example does: 1/m of them, or less, would be
        # lost in float16. What is left over is the weight of the whole.
        over = jnp.where(largest > 0.0, largest, 1.0)
        losses, gradient = weighted_gradient(self.problem.loss, shared, seen, weights / over, size)
        rest = over / weights.shape[0]
        mean = jax.tree.map(lambda p, g: (rest * g.astype(wide(g.dtype))).astype(p.dtype), state.params, gradient)
        updates, opt_state = self._update(mean, state)
        after = self.sampler.observe(state.sampler, drawn, seconds=seconds)
        return _updated(state, updates, opt_state, after, _mean_loss(drawn, losses), drawn)

    def _update(self, mean: Params, state: TrainState) -> tuple[Params, optax.OptState]:
        """The chain takes one gradient a draw: to it, the mean is the only one of a single draw."""
        one = jnp.ones(1, jnp.float32)
        alone = jax.tree.map(lambda x: x[None], mean)
        return self.tx.update(alone, state.opt_state, state.params, probs=one, target=one)


def _updated(
    state: TrainState, updates: Any, opt_state: Any, after: SamplerState, loss: Float[Array, ""], drawn: Draw
) -> tuple[TrainState, StepInfo]:
    made = TrainState(optax.apply_updates(state.params, updates), opt_state, after)
    return made, StepInfo(loss, jnp.max(_weights(drawn)), is_open(after), ratio(after))


def _mean_loss(drawn: Draw, losses: Float[Array, " m"]) -> Float[Array, ""]:
    weights = _weights(drawn)
    return jnp.mean(weights * losses.astype(weights.dtype))


def _where_they_belong(parallel: DataParallel, state: TrainState, info: StepInfo) -> tuple[TrainState, StepInfo]:
    params, opt_state = parallel.parted((state.params, state.opt_state))
    return TrainState(params, opt_state, parallel.same(state.sampler)), parallel.same(info)


def _weights(drawn: Draw) -> Float[Array, " m"]:
    return draw_weights(drawn.probs, drawn.mask, 1.0 if drawn.target is None else drawn.target)


def _keys(step_key: Key, count: int) -> Array:
    """A key for each place of the batch, which no draw uses."""
    own = jax.random.fold_in(step_key, PICTURES)
    return jax.vmap(lambda place: jax.random.fold_in(own, place))(jnp.arange(count, dtype=jnp.int32))


def check_chain(tx: optax.GradientTransformation, params: Params, num_draws: int) -> None:
    """See, from shapes alone, that an optimizer takes one gradient for each draw and gives one update.

    Traced, not run: nothing is compiled, and parameters of any size cost no memory. It cannot see what a transformation
    does with the numbers, such as clipping before the reweighting.

    Args:
        tx: the Optax chain.
        params: of the model, or their shapes.
        num_draws: m.

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
