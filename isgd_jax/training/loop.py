"""The training loop, in time order: `fit`, which is the loop of the README with checks, progress and many devices.

Guarantees:

* before the first step everything that can be seen not to fit is refused; after it nothing is done silently otherwise;
* what a run does depends on its arguments, on the scores that engines deliver with their clock, and on one ratio of
  times, measured once, kept in the state and told (``step_cost``): with a ratio given, on no clock at all;
* a run that a callback sets back to a saved state (`Callback.begin`) goes on as if it had never stopped, without an
  engine or with ``inline`` bit for bit;
* engines are the caller's to close: prefetching threads and callbacks end here, whatever ends the run.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from isgd_jax.errors import ArgumentError, ArgumentTypeError, check_whole
from isgd_jax.sampling.state import BatchSampler, begun_anew
from isgd_jax.training.background import Refresher, refresher
from isgd_jax.training.callbacks import Callback, History, PlainProgress, Record
from isgd_jax.training.cost_gate import CostGate, CostWatch, check_step_cost, create, epochs_of
from isgd_jax.training.data_parallel import DataParallel, local_copy
from isgd_jax.training.packing import Held, Packing
from isgd_jax.training.prefetch import BLOCK, NO_BLOCK, Prefetch
from isgd_jax.training.problem import Problem
from isgd_jax.training.train_step import (
    FreshScores,
    StepInfo,
    TrainState,
    beside,
    check_chain,
    make_steps,
    moving,
)
from isgd_jax.types import Batch, Key, Params

__all__ = ["STEPS_IN_FLIGHT", "FitResult", "Run", "fit"]

STEPS_IN_FLIGHT = 8
"""Steps dispatched ahead of the device: more gains nothing, and before JAX 0.12 a loop without a fence can hang."""


class FitResult(NamedTuple):
    """What a run leaves."""

    params: Params
    state: TrainState
    """All of it: parameters, the optimizer's state and the sampler's."""
    step: int
    history: list[Record]
    """What was recorded, a dict every so many steps."""
    stopped: Any = None
    """The reason that a callback gave for ending the run early; None where it made all steps."""


@dataclass
class Run:
    """A run as its callbacks see it."""

    problem: Problem
    sampler: BatchSampler
    refresher: Refresher
    num_steps: int
    key: Key
    """Of the draws."""
    held: Held
    """The state but for ``cost_gate``; callbacks look at ``state``."""
    cost_gate: CostGate | None
    learn: Callable[..., tuple[Any, StepInfo]]
    """A step as ``held`` makes it."""
    rest: Callable[..., tuple[Any, StepInfo]] | None
    """One that takes the ordinary gradient."""
    data: Batch
    step: int = 0
    parallel: DataParallel | None = None
    prefetch: Prefetch | None = None
    prefetch_plain: Prefetch | None = None
    costs: CostWatch | None = None
    """Who decides whether steps learn from norms; None where they always do."""
    stopped: Any = field(default=None)

    @property
    def state(self) -> TrainState:
        """The whole state now; the next step takes its arrays over, so that who keeps it copies it."""
        block = None if self.prefetch is None else self.prefetch.block
        return self.held.state._replace(cost_gate=self.cost_gate, block=block)

    @state.setter
    def state(self, state: TrainState) -> None:
        self.held.state, self.cost_gate = state._replace(cost_gate=None, block=None), state.cost_gate
        if self.prefetch is not None and state.block is not None:
            self.prefetch.block = state.block

    def stop(self, reason: Any) -> None:
        """End the run after this step.

        Args:
            reason: anything but None; it comes back as ``FitResult.stopped``.
        """
        self.stopped = reason

    def refreshes(self) -> bool:
        """Whether the proposal is renewed, or parameters are published, before the next step."""
        is_due = self.refresher.is_due(self.step) or self.refresher.publishes(self.step)
        return is_due and not (self.costs and self.cost_gate and self.costs.skips_refresh(self.cost_gate, self.step))

    def advance(self, seconds: float) -> StepInfo:
        """Make a step.

        Args:
            seconds: by the clock that scores age by.
        """
        costs, gate = self.costs, self.cost_gate
        if costs is None or gate is None:
            return self._advance(self.held, seconds, rests=False)
        rests = costs.rests(gate, self.step)
        if costs.is_known(gate):
            return self._advance(self.held, seconds, rests=rests)
        return costs.advance(gate, self.step, self.held.ready, lambda: self._advance(self.held, seconds, rests=rests))

    def rehearse(self, num_steps: int, *, rests: bool = False, look: bool = False) -> Any:
        """Make steps from a copy of the state, one dispatched behind the other as in training, and forget them.

        Args:
            num_steps: how many.
            rests: whether they take the ordinary gradient.
            look: whether the whole state is asked for after them, as refreshes and callbacks ask.

        Returns:
            What to wait for.
        """
        held, block = self.held.copy(), None if self.prefetch is None else self.prefetch.block
        for _ in range(num_steps):
            self._advance(held, 0.0, rests=rests)
        if self.prefetch is not None and block is not None:
            self.prefetch.block = block
        return held.state if look else held.ready()

    def weigh_costs(self) -> str | None:
        """After a step: decide whether the next ones learn from norms; what a person should hear of it."""
        if self.costs is None or self.cost_gate is None or not self.costs.weighs(self.cost_gate, self.step):
            return None
        was_open = bool(self.cost_gate.is_open)
        self.cost_gate, told = self.costs.after(self.cost_gate, lambda: self.held.state.sampler, self.step)
        if bool(self.cost_gate.is_open) != was_open:  # decided from draws: the next ones are to know nothing of them
            state = self.held.state
            self.held.state = state._replace(sampler=begun_anew(state.sampler))
            if self.prefetch is not None:
                self.prefetch.block = NO_BLOCK
        return told

    def _advance(self, held: Held, seconds: float, *, rests: bool) -> StepInfo:
        program = self.rest if rests else self.learn
        assert program is not None
        frozen, now = self.problem.frozen, np.float32(seconds)
        if self.prefetch is None:
            return held.advance(program, frozen, self.data, self.key, now)
        if rests:
            assert self.prefetch_plain is not None
            draw, batch = self.prefetch_plain.next(self.step, held.state.plain, self._same_for())
        else:
            left = min(self.refresher.steps_left(self.step), self._same_for())
            draw, batch = self.prefetch.next(self.step, held.state.sampler, left)
        return held.advance(program, frozen, draw, batch, self.key, now)

    def _same_for(self) -> int:
        """For how many steps, this one included and within a block, norms are learnt from or not as in this one."""
        costs, gate = self.costs, self.cost_gate
        if costs is None or gate is None:
            return BLOCK
        kinds = [costs.rests(gate, self.step + ahead) for ahead in range(BLOCK)]
        return next((ahead for ahead, kind in enumerate(kinds) if kind != kinds[0]), BLOCK)


def fit(
    problem: Problem,
    sampler: BatchSampler,
    tx: optax.GradientTransformation,
    *,
    num_steps: int,
    key: Key,
    engine: Any = None,
    devices: Sequence[jax.Device] | None = None,
    shard_params: bool = False,
    callbacks: Sequence[Callback] | None = None,
    refresh_every: int = 100,
    fresh_scores: FreshScores | None = None,
    make_refresher: Callable[..., Refresher] = refresher,
    step_cost: float | Literal["measured"] | None = "measured",
) -> FitResult:
    """Train by importance sampling, or by whatever the sampler does.

    >>> import jax, jax.numpy as jnp, optax
    >>> import isgd_jax as isgd
    >>> problem = isgd.Problem(lambda w, x: (w - x) ** 2, params=jnp.zeros(()), train=jnp.arange(4.0))
    >>> tx = optax.chain(isgd.importance_weighting(4), optax.sgd(0.05))
    >>> sampler = isgd.importance_sampler(4, batch_size=2)
    >>> result = isgd.fit(problem, sampler, tx, num_steps=100, key=jax.random.key(0), callbacks=[])
    >>> bool(abs(result.params - 1.5) < 0.3)  # the mean of 0, 1, 2, 3
    True

    Args:
        problem: the loss, the parameters and the data.
        sampler: which examples (`isgd_jax.importance_sampler`, `shuffled_epochs`, ...).
        tx: an Optax chain that begins with `isgd_jax.importance_weighting`.
        num_steps: in all; a run that goes on from a checkpoint makes the rest.
        key: of parameters, draws and the sampler, one for each by ``jax.random.split``.
        engine: who scores besides (`isgd_jax.engines`), with a scorer made by `Problem.scorer`; None scores only what
            is drawn. The caller closes it.
        devices: that train, each with an equal part of the batch; one by default.
        shard_params: each device holds an equal part of the parameters and of the optimizer's state, for models that
            are too large for one; ``engine`` is then None or ``inline``.
        callbacks: in place of the lines of text that are printed by default; an empty list is silent.
        refresh_every: steps between two refreshes of the proposal.
        fresh_scores: what the table gets of the drawn examples, ``(losses, gradients) -> scores``; norms by default.
        make_refresher: with other options than `refresher` has by default.
        step_cost: time of a step that learns from norms, its share of a refresh included, over that of a plain step.
            Where norms promise fewer steps than that, `fit` goes over to shuffled epochs, which need none, and looks
            now and then (`isgd_jax.training.cost_gate`). "measured" times 64 of the first 72 steps of the run and tells
            the ratio; a number is gone by in its place, so that a run can be repeated bit for bit; None learns in every
            step while draws go by score. Asked only where nothing but draws is scored, and monitored, without groups:
            with an engine, whoever gave it has chosen to score.

    Returns:
        Parameters, the whole state, and the history.

    Raises:
        TypeError: ``key`` is no key, or ``callbacks`` are no list.
        ValueError: the parts do not fit each other, held-out data are not such as the loss or a metric takes; before
            the first step.
        FloatingPointError: the loss is no longer finite, at the next record. Where no callback keeps any, a warning
            tells it at the end.

    Source: the paper, section 4; scores from the updates' own gradients are ours.
    """
    _check_fit(problem, sampler, key)
    num_steps = check_whole("num_steps", num_steps, least=0)
    check_step_cost(step_cost)
    if isinstance(callbacks, Callback):
        raise ArgumentTypeError(f"callbacks must be a list of them, got one {type(callbacks).__name__}")
    callbacks = [PlainProgress()] if callbacks is None else list(callbacks)
    parallel = _parallel(sampler.batch_size, devices, shard_params)
    init_key, draw_key, sampler_key, picture_key = jax.random.split(key, 4)
    state = _first_state(problem, tx, sampler, parallel, init_key, sampler_key)
    _check_scorer(problem, sampler, state)
    problem.check_measures(state.params)
    data = problem.train
    if problem.hold == "device":
        data = jax.device_put(data) if parallel is None else parallel.replicate(data)
    published = problem.published(picture_key)
    scored_by = make_refresher(engine, sampler, every=refresh_every, published=published)
    costs = plain = gate = None
    if step_cost is not None and CostWatch.suits(sampler, engine, state.sampler):
        rehearse = functools.partial(scored_by.rehearse, chunks=0)
        costs = CostWatch(sampler, scored_by.every, rehearse, step_cost)
        plain, gate = epochs_of(sampler, state.sampler), create()
        first = plain.init(sampler_key)
        state = state._replace(plain=first if parallel is None else parallel.replicate(first))
    steps = make_steps(problem, sampler, tx, parallel=parallel, fresh_scores=fresh_scores, plain=plain)
    is_fetched = problem.hold != "device"
    learn, rest = (steps.step_drawn, steps.rest_drawn) if is_fetched else (steps.step, steps.rest)
    packing = Packing(state, None if plain is None else moving) if parallel is None and not is_fetched else None
    run = Run(
        problem=problem,
        sampler=sampler,
        refresher=scored_by,
        num_steps=num_steps,
        key=draw_key,
        held=Held(state, packing),
        cost_gate=gate,
        learn=beside(learn) if packing is None else packing.step(beside(learn.__wrapped__)),
        rest=rest if packing is None or rest is None else packing.moving_step(rest.__wrapped__),
        data=data,
        parallel=parallel,
        prefetch=Prefetch(data, steps.draw_ahead, draw_key) if is_fetched else None,
        prefetch_plain=Prefetch(data, steps.rest_ahead, draw_key) if is_fetched and steps.rest_ahead else None,
        costs=costs,
    )
    try:
        return _loop(run, callbacks)
    finally:
        for prefetch in (run.prefetch, run.prefetch_plain):
            if prefetch is not None:
                prefetch.close()
        for callback in callbacks:
            callback.close()


def _loop(run: Run, callbacks: Sequence[Callback]) -> FitResult:
    for callback in callbacks:
        callback.begin(run)
    _check_costs(run)
    given = run.held.state
    run.held.state = local_copy(given) if run.parallel is None else run.parallel.moved(given)
    seconds, info = float(run.state.sampler.clock.seconds), None
    while run.step < run.num_steps and run.stopped is None:
        if run.refreshes():
            refreshed = run.refresher(run.step, run.state.params, run.state.sampler)
            run.state = run.state._replace(sampler=refreshed)
            if run.refresher.is_due(run.step) and run.refresher.last is not None:
                seconds = run.refresher.last.seconds
                for callback in callbacks:
                    callback.refreshed(run)
        info = run.advance(seconds)
        run.step += 1
        told = run.weigh_costs()
        if run.step % STEPS_IN_FLIGHT == 0:
            jax.block_until_ready(info.loss)
        for callback in callbacks:
            if told is not None:
                callback.told(run, told)
            callback.stepped(run, info)
    _warn_if_lost(info, callbacks)
    for callback in callbacks:
        callback.end(run)
    records: list[Record] = next((callback.records for callback in callbacks if hasattr(callback, "records")), [])
    return FitResult(run.state.params, run.state, run.step, records, run.stopped)


def _warn_if_lost(info: StepInfo | None, callbacks: Sequence[Callback]) -> None:
    """Where no callback keeps records, which end a run whose loss is none, say at its end that the last one was."""
    if info is None or any(isinstance(callback, History) for callback in callbacks):
        return
    loss = float(jax.device_get(info.loss))
    if not np.isfinite(loss):
        warnings.warn(
            f"the training loss became {loss}, and parameters with it: lower the learning rate; a callback with "
            "records, such as History, ends a run where it does",
            stacklevel=3,
        )


def _check_costs(run: Run) -> None:
    """Refuse a saved state that knows more or less of costs than this run."""
    if (run.costs is None) != (run.cost_gate is None):
        was = "with step_cost=None, or with an engine" if run.costs else "without an engine, and with a step_cost"
        raise ArgumentError(f"the state to go on from was made {was}: go on as it began")


def _parallel(batch_size: int, devices: Sequence[jax.Device] | None, shard_params: bool) -> DataParallel | None:
    if devices is None:
        if shard_params:
            raise ArgumentError("shard_params=True needs devices= to put the parts on, such as jax.devices()")
        return None
    return DataParallel(batch_size, devices, shard_params=shard_params)


def _first_state(
    problem: Problem,
    tx: optax.GradientTransformation,
    sampler: BatchSampler,
    parallel: DataParallel | None,
    init_key: Key,
    sampler_key: Key,
) -> TrainState:
    """Before the first step, each part where it belongs; the chain is looked at before anything is made."""
    if parallel is None or not parallel.shard_params:
        params = problem.init(init_key)
        check_chain(tx, params, sampler.batch_size)
        state = TrainState(params, tx.init(params), sampler.init(sampler_key))
        return state if parallel is None else parallel.replicate(state)
    check_chain(tx, jax.eval_shape(problem.init, init_key), sampler.batch_size)
    makes = problem.makes_params
    params = parallel.made(problem.init, init_key) if makes else parallel.place(problem.params)
    return TrainState(params, parallel.made(tx.init, params), parallel.replicate(sampler.init(sampler_key)))


def _check_scorer(problem: Problem, sampler: BatchSampler, state: TrainState) -> None:
    """See, from shapes alone, that presampling can score its candidates: its scorer is called as the loss is."""
    if sampler.candidates is None:
        return

    def sample(key: Key, state: TrainState, data: Batch, frozen: Any) -> Any:
        return sampler.sample(key, state.sampler, params=state.params, data=data, frozen=frozen)

    try:
        jax.eval_shape(sample, jax.random.key(0), state, problem.train, problem.frozen)
    except (TypeError, ValueError) as error:
        arguments = "params, batch" if problem.frozen is None else "params, frozen, batch"
        raise ArgumentError(
            f"presampling's scorer must take ({arguments}) and give one score an example, as those of "
            f"isgd_jax.scorers made of the problem's loss do: {error}"
        ) from error


def _check_fit(problem: Problem, sampler: BatchSampler, key: Key) -> None:
    kind, shape = getattr(key, "dtype", None), jnp.shape(key)
    is_typed = kind is not None and jnp.issubdtype(kind, jax.dtypes.prng_key)
    is_one = shape == () if is_typed else kind == jnp.uint32 and len(shape) == 1
    if not is_one:
        got = f"keys of shape {shape}" if kind is not None else f"a {type(key).__name__}"
        raise ArgumentTypeError(f"key must be one key, such as jax.random.key(0), got {got}")
    if sampler.num_examples != problem.num_examples:
        raise ArgumentError(
            f"the sampler draws from {sampler.num_examples} examples, the problem has {problem.num_examples}"
        )
    if sampler.candidates is not None and problem.hold != "device":
        raise ArgumentError('presampling scores candidates inside the step: hold="device", or a loop of your own')
