"""Scoring besides training: what an engine has scored goes into the state, and the next proposal is made of it.

    with isgd.engines.local(isgd.scorers.grad_norm(loss_fn), data) as engine:
        refresher = isgd.refresher(engine, sampler, every=100)
        for step in range(num_steps):
            state = refresher(step, params, state)
            ...

Guarantees:

* between two refreshes the proposal stays as it is, so draws may be made ahead;
* with ``wait`` every score carries the version of the refresh (the paper's exact mode); else nothing waits;
* a score carries the version of the parameters it was measured with;
* a refresher is one run's: at its first publication the engine forgets what it has scored for another;
* one program records chunks of any length, and one refreshes;
* a caller whose steps are not those of the state is told, at the refresh after the first that differs at the latest.
"""

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from isgd_jax.engines.contract import Resumable, ScoredChunk
from isgd_jax.errors import ArgumentError, check_whole
from isgd_jax.sampling.state import BatchSampler, SamplerState, check_clock
from isgd_jax.training.data_parallel import agree
from isgd_jax.types import Params

__all__ = ["QUIET_REFRESHES", "Refresh", "Refresher", "refresher"]

QUIET_REFRESHES = 3
"""Refreshes without any score after which a person should know."""


class Refresh(NamedTuple):
    """What happened at a refresh."""

    step: int
    seconds: float
    """The clock when ages were judged; ``observe`` takes it until the next refresh."""
    chunks: list[ScoredChunk]
    """What had been scored since the last one."""
    quarantined: Array
    """Scores set aside in all, on the device."""


class Refresher:
    """Publishes, collects, records and refreshes, when it is due: `refresher` makes one."""

    def __init__(
        self,
        engine: Any,
        sampler: BatchSampler,
        *,
        every: int,
        publish_every: int | None,
        wait: bool,
        published: Callable[[Params, int], Any],
        clock: Callable[[], float] | None,
        publish_at: Callable[[int], bool] | None,
        warn: Callable[[str], None],
    ) -> None:
        self.engine: Any = engine
        self.sampler: BatchSampler = sampler
        self.every: int = every
        self.last: Refresh | None = None
        self._publish_every, self._wait, self._publish_at = publish_every or every, wait, publish_at
        self._published, self._clock, self._warn = published, clock, warn
        self._record = jax.jit(partial(_recorded, sampler), donate_argnums=0)
        self._refresh = jax.jit(sampler.refresh, donate_argnums=0)
        self._is_first, self._scored, self._quiet = True, 0, 0
        self._expected: tuple[int, Array] | None = None

    def __call__(self, step: int, params: Params, state: SamplerState) -> SamplerState:
        """The state to draw step ``step`` from; the one that was passed is donated where a refresh is due.

        Raises:
            ValueError: the steps of the caller are not those of the state, or its clock cannot tell ages of
                ``max_age_seconds``.

        Args:
            step: of the caller's loop, from 0. Called before the draw of each step, also where nothing is due.
            params: the newest; copied where they are published.
            state: of the sampler.
        """
        is_due = step % self.every == 0
        if self.engine is not None and self.publishes(step):
            if self._is_first and isinstance(self.engine, Resumable):
                self.engine.restore(self.engine.state())  # it may have scored for another run: only its turn is kept
            self.engine.publish(self._published(params, step), step // self.sampler.steps_per_update)
        self._is_first = False
        return self._refreshed(step, state) if is_due else state

    def is_due(self, step: int) -> bool:
        """Whether the proposal changes before this step."""
        return step % self.every == 0

    def steps_left(self, step: int) -> int:
        """For how many steps the proposal stays as it is, this one included."""
        return self.every - step % self.every

    def rehearse(self, state: SamplerState, *, chunks: int) -> SamplerState:
        """What a refresh does beside collecting, with chunks of ones, and forgets: to be compiled and timed before the
        run.

        Args:
            state: copied, so it stays the caller's.
            chunks: how many are recorded, as many as a refresh is expected to bring.
        """
        copied, known = jax.tree.map(jnp.copy, state), state.ordering.sketches
        size = min(getattr(self.engine, "chunk_size", 1), self.sampler.num_examples)
        sketches = None if known is None else np.zeros((size, known.shape[1]), np.float32)
        one = ScoredChunk(np.arange(size), np.ones(size, np.float32), 0, sketches)
        return self._refresh(self._take(copied, [one] * chunks, 0.0))

    def publishes(self, step: int) -> bool:
        """Every so many steps; also at once where a loop begins or goes on, so that no worker waits or scores the old.

        Where refreshes wait, each follows a publication, so there is nothing to be gained between.
        """
        if self._publish_at is not None:
            return self._publish_at(step)
        return step % self._publish_every == 0 or (self._is_first and not self._wait)

    def _refreshed(self, step: int, state: SamplerState) -> SamplerState:
        self._check_version(step, state)
        chunks = [] if self.engine is None else self.engine.collect(wait=self._wait)
        now = self._now(state)
        state = self._take(state, chunks, now)
        state = self._refresh(state)
        self.last = Refresh(step, now, chunks, jnp.copy(state.quarantined))
        self._warn_if_quiet(step, chunks)
        return state

    def _now(self, state: SamplerState) -> float:
        """The caller's clock, or seconds of running: small numbers, since float32 holds few digits."""
        if self._clock is None:
            began = time.monotonic() - float(state.clock.seconds)
            self._clock = lambda: agree(time.monotonic() - began)
        now = self._clock()
        if self.last is None:  # a run that lasts for weeks is not to end by it
            check_clock(now, self.sampler.max_age_seconds)
        return now

    def _take(self, state: SamplerState, chunks: list[ScoredChunk], now: float) -> SamplerState:
        """The state with what the chunks say. One shape for all, so that this compiles once."""
        width = max([getattr(self.engine, "chunk_size", 0), *(len(chunk.ids) for chunk in chunks)], default=0)
        for chunk in chunks:
            short, sketches = width - len(chunk.ids), chunk.sketches
            ids = np.pad(chunk.ids, (0, short), constant_values=self.sampler.num_examples).astype(np.int32)
            scores = np.pad(chunk.scores, (0, short)).astype(np.float32)
            rows = None if sketches is None else np.pad(np.asarray(sketches, np.float32), ((0, short), (0, 0)))
            state = self._record(state, ids, scores, rows, np.int32(chunk.version), np.float32(now))
        return state

    def _check_version(self, step: int, state: SamplerState) -> None:
        """Compare the caller's steps with the state's: at once at first, then one refresh late, so as not to wait."""
        per = self.sampler.steps_per_update
        told = self._expected or (step // per, state.version)
        expected, found = told[0], int(told[1])
        if expected != found:
            raise ArgumentError(
                f"at step {step} the sampler's state had seen {found} parameter updates, expected were {expected}: "
                "call observe once a step, pass the step of the loop, and say steps_per_update= where several steps "
                "make one update"
            )
        self._expected = (step // per, jnp.copy(state.version))

    def _warn_if_quiet(self, step: int, chunks: list[ScoredChunk]) -> None:
        self._scored += len(chunks)
        if self.engine is None or self._scored:
            return
        self._quiet += 1
        if self._quiet == QUIET_REFRESHES:
            self._warn(
                f"no worker has scored anything in {step} steps: they may still be compiling, or be too slow; "
                "only drawn examples have scores"
            )


def refresher(
    engine: Any,
    sampler: BatchSampler,
    *,
    every: int = 100,
    publish_every: int | None = None,
    wait: bool = False,
    published: Callable[[Params, int], Any] = lambda params, step: params,
    clock: Callable[[], float] | None = None,
    publish_at: Callable[[int], bool] | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Refresher:
    """What keeps a sampler's state fresh: ``state = refresher(step, params, state)``, called before each step.

    Args:
        engine: who scores (`isgd_jax.engines`); None where only drawn examples are scored.
        sampler: whose state it is.
        every: steps between two refreshes.
        publish_every: steps between two publications of the parameters to the engine; by default ``every``.
        wait: at a refresh, until all scores are of its version.
        published: ``(params, step) -> what the scorer takes``, where that is more than the parameters.
        clock: seconds from the start of the run, for scores that are distrusted by age in seconds; by default those of
            running, which go on from what the state says.
        publish_at: ``step -> bool``, in place of ``publish_every``, for a replay.
        warn: is told, once, when no worker has scored anything in several refreshes.

    Raises:
        TypeError: a number of steps is no whole number.
        ValueError: it is not positive, or more than int32 holds; or the engine scores another number of examples.
    """
    every = check_whole("every", every, least=1)
    if publish_every is not None:
        publish_every = check_whole("publish_every", publish_every, least=1)
    _check_size(engine, sampler)
    return Refresher(
        engine,
        sampler,
        every=every,
        publish_every=publish_every,
        wait=wait,
        published=published,
        clock=clock,
        publish_at=publish_at,
        warn=warn,
    )


def _check_size(engine: Any, sampler: BatchSampler) -> None:
    """See that an engine that knows its number of examples has those of the sampler: ids are all that scores bear."""
    scored = getattr(engine, "num_examples", sampler.num_examples)
    if scored != sampler.num_examples:
        raise ArgumentError(
            f"the engine scores {scored} examples, the sampler draws from {sampler.num_examples}: give both the same "
            "training set"
        )


def _recorded(
    sampler: BatchSampler,
    state: SamplerState,
    ids: Array,
    scores: Array,
    sketches: Array | None,
    version: Array,
    seconds: Array,
) -> SamplerState:
    return sampler.record(state, ids, scores, version=version, sketches=sketches, seconds=seconds)
