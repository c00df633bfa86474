"""Learn from the gradients of single examples only while that brings more than it costs.

A step that learns from single gradients (fresh norms, and all that the estimator makes of them) is dearer than one that
rests: that is plain SGD, the ordinary gradient of a batch of shuffled epochs, by a program of its own. By how much is
measured once, on steps of the run itself, of which every other four rest. The ratio is kept in the state, and all that
follows is decided from it and from the draws, never from a clock again: a run that goes on from a saved state decides
the same.

While this gate is shut, steps rest, and every so many steps one looks: it draws by score and learns, so that the gate
can open again; so seldom that it costs `LOOK_SHARE` of the time. It also shuts while scores do harm and draws are
uniform (`isgd_jax.variance.gate`).

Guarantees:

* what is estimated stays unbiased, whatever is decided: both kinds of draws carry their own weights, for one target;
* a run of cheap norms learns from its first step on; where they are dear they are to show first that they can pay;
* decisions are a function of the state, of the arguments of the run, and of the recorded ratio;
* a gate that has failed a trial waits twice as long before the next.

Source: ours. Katharopoulos & Fleuret (2018) compare what scores promise with a fixed count of operations.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from isgd_jax.errors import ArgumentError
from isgd_jax.sampling import gates
from isgd_jax.sampling.drawing import MONITOR_EVERY
from isgd_jax.sampling.plain import shuffled_epochs
from isgd_jax.sampling.state import BatchSampler, SamplerState
from isgd_jax.training.data_parallel import agree, local_copy
from isgd_jax.training.promise import RECENT, Promise, promise, saves

__all__ = [
    "DECIDE_EVERY",
    "GROUP",
    "LOOK_OFTEN",
    "LOOK_OFTEN_UNTIL",
    "LOOK_SELDOM",
    "LOOK_SHARE",
    "MEASURE_AT",
    "ROUNDS",
    "TRY_AT_ONCE",
    "CostGate",
    "CostWatch",
    "check_step_cost",
    "create",
    "decide",
    "epochs_of",
    "trial_steps",
]

LOOK_SELDOM = 128
"""Steps from one look to the next while steps rest, at most. Looks fall on multiples of `MONITOR_EVERY`, since draws in
halves tell more."""

LOOK_SHARE = 0.02
"""What looks may cost, of the time of a plain step, after `LOOK_OFTEN_UNTIL`; before, every eighth step looks."""

LOOK_OFTEN, LOOK_OFTEN_UNTIL = 8, 128

MEASURE_AT, GROUP, ROUNDS = 8, 4, 8
"""The step at which measuring begins, and how often so many steps that learn, and then as many that rest, are timed."""

DECIDE_EVERY = 128
"""Steps between two decisions, at least; each waits for the device. While steps rest, the looks that it is made of are
to be new ones (`RECENT`)."""

TRY_AT_ONCE = 1.25
"""The cost up to which a run begins by learning in every step; dearer norms are first to show, in looks, that ideal
draws would pay."""

OPEN_ABOVE = 1.05
"""What a shut gate must be promised, times the cost, to open: it does not flutter."""

TRIAL_REFRESHES = (2, 10)
"""A trial lasts a sweep of the data, and at least and at most so many refreshes of the proposal."""

REFRESH_SELDOM = 16
"""While the gate is shut, one of so many refreshes is made."""

_SPAN = 2 * ROUNDS * GROUP


class CostGate(NamedTuple):
    """Whether steps learn from single gradients, and why: a part of the state of training that stays on the host."""

    seconds: np.ndarray
    """The least [2] that `GROUP` steps took, which learn and which rest, float32; 0 while none were timed."""
    step_cost: np.ndarray
    """Time of a step that learns, refreshes included, over that of one that rests; 0 while it is not known."""
    is_open: np.ndarray
    """Whether all steps learn."""
    look_every: np.ndarray
    """Steps between two looks while steps rest."""
    moved_at: np.ndarray
    """The step at which the gate last moved."""
    wait: np.ndarray
    """Steps that it stays shut at least."""
    patience: np.ndarray
    """Steps to wait after the next trial that fails; 0 before the first."""


def create() -> CostGate:
    """An open gate that knows nothing of costs."""
    looks, *zeros = (np.asarray(x, np.int32) for x in (MONITOR_EVERY, 0, 0, 0))
    return CostGate(np.zeros(2, np.float32), np.zeros((), np.float32), np.asarray(True), looks, *zeros)


def check_step_cost(step_cost: float | str | None) -> None:
    """Refuse what is no cost.

    Raises:
        ValueError: it is another word, or a number that is not above 0.
    """
    if step_cost is None or step_cost == "measured":
        return
    if isinstance(step_cost, str | bool) or not 0.0 < step_cost < math.inf:
        raise ArgumentError(
            'step_cost must be "measured", None, or the time of a step that learns from norms over that of a plain '
            f"step, a number above 0; got {step_cost!r}"
        )


def epochs_of(sampler: BatchSampler, state: SamplerState) -> BatchSampler:
    """Shuffled epochs for the target of a sampler: what a run goes over to while norms do not pay.

    Args:
        sampler: of the run.
        state: of it; its weights of examples are taken.
    """
    return shuffled_epochs(
        sampler.num_examples,
        batch_size=sampler.batch_size,
        monitor=False,
        example_weights=state.examples.target,
        steps_per_update=sampler.steps_per_update,
    )


def trial_steps(sampler: BatchSampler, refresh_every: int) -> int:
    """Steps that an estimator is given to show what it can: a sweep of the data, within `TRIAL_REFRESHES`.

    Args:
        sampler: whose draws score.
        refresh_every: steps between two refreshes of its proposal.
    """
    least, most = (count * refresh_every for count in TRIAL_REFRESHES)
    return max(least, min(-(-sampler.num_examples // sampler.batch_size), most))


def decide(gate: CostGate, found: Promise, *, step: int, trial: int, scores_help: bool = True) -> CostGate:
    """The gate after a look at what draws promise; a function of its arguments alone.

    An open gate shuts while scores do harm, and where even ideal draws promise less than steps cost. Once a trial is
    over, it also shuts where draws as they are made do, and then waits; the wait doubles each time.

    Args:
        gate: whose ``step_cost`` is known.
        found: what draws promise now.
        step: the present one.
        trial: steps that an open gate is given to show what it can.
        scores_help: whether draws go by score (`isgd_jax.sampling.gates.is_open`).
    """
    cost, is_open = float(gate.step_cost), bool(gate.is_open)
    now, best = (saves(x) for x in found)
    since = step - int(gate.moved_at)
    if is_open and (not scores_help or best < cost):
        return _moved(gate, False, step)
    if is_open and since >= trial and now < cost:
        patience = 2 * int(gate.patience) or trial
        waits = np.asarray(patience, np.int32)
        return _moved(gate, False, step)._replace(wait=waits, patience=waits)
    if not is_open and scores_help and since >= int(gate.wait) and best >= OPEN_ABOVE * cost:
        return _moved(gate, True, step)
    return gate


def _moved(gate: CostGate, is_open: bool, step: int) -> CostGate:
    return gate._replace(is_open=np.asarray(is_open), moved_at=np.asarray(step, np.int32), wait=np.zeros((), np.int32))


class CostWatch:
    """What `fit` does about costs between steps: times a few, records the ratio, and decides.

    Args:
        sampler: of the run.
        refresh_every: steps between two refreshes of its proposal.
        rehearse: what a refresh does, to be timed; it forgets the result.
        step_cost: "measured", or a ratio to go by in its place: the same steps rest then as if they were timed, so with
            the ratio that another run has measured this one repeats it bit for bit.
        clock: seconds.
    """

    def __init__(
        self,
        sampler: BatchSampler,
        refresh_every: int,
        rehearse: Callable[[SamplerState], Any],
        step_cost: float | str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._num_examples, self._batch_size = sampler.num_examples, sampler.batch_size
        self._every, self._rehearse, self._clock = refresh_every, rehearse, clock
        self._given = None if isinstance(step_cost, str) else float(step_cost)
        self._trial = trial_steps(sampler, refresh_every)
        self._gate: CostGate | None = None
        self._known = 0.0, True, MONITOR_EVERY
        self._timed = 0, 0.0  # steps of the group, and their seconds
        self.last: Promise | None = None
        """What draws promised at the last decision of this process."""

    @staticmethod
    def suits(sampler: BatchSampler, engine: Any, state: SamplerState) -> bool:
        """Whether a run scores only what it draws, sees what that is worth, and could do without."""
        has_epochs = state.examples.groups is None and sampler.batch_size <= sampler.num_examples
        return sampler.is_scored and engine is None and state.monitor is not None and has_epochs

    def _numbers(self, gate: CostGate) -> tuple[float, bool, int]:
        """Of a gate: cost, whether it is open, and steps between looks. Asked before every step, so they are kept."""
        if gate is not self._gate:
            self._gate = gate
            self._known = float(gate.step_cost), bool(gate.is_open), int(gate.look_every)
        return self._known

    def skips_refresh(self, gate: CostGate, step: int) -> bool:
        """Whether a refresh that is due before a step need not be made: steps rest, and little is learnt."""
        return not gate.is_open and step // self._every % REFRESH_SELDOM != 0

    def is_known(self, gate: CostGate) -> bool:
        """Whether the ratio is there, so that no step is timed."""
        return self._numbers(gate)[0] > 0.0

    def weighs(self, gate: CostGate, step: int) -> bool:
        """Whether something is found or decided after so many steps: where a group has been timed, and then seldom."""
        cost, is_open, looks = self._numbers(gate)
        if cost > 0.0:
            every = DECIDE_EVERY if is_open else max(DECIDE_EVERY, RECENT[False] * looks)
            return step % every == 0 or step == LOOK_OFTEN_UNTIL
        at = step - MEASURE_AT
        return at > 0 and at % GROUP == 0

    def rests(self, gate: CostGate, step: int) -> bool:
        """Whether a step takes the ordinary gradient and learns nothing."""
        cost, is_open, looks = self._numbers(gate)
        if cost > 0.0:
            looks = min(looks, LOOK_OFTEN) if step < LOOK_OFTEN_UNTIL else looks
            return not is_open and step % looks != 0
        if step < MEASURE_AT:
            return step >= MEASURE_AT // 2  # to compile both
        return (step - MEASURE_AT) // GROUP % 2 == 1

    def advance(self, gate: CostGate, step: int, ready: Callable[[], Any], make: Callable[[], Any]) -> Any:
        """Make a step; in a group of steps that is timed, wait before it and after it, and not between.

        Args:
            gate: as it is.
            step: the number of the step.
            ready: what the step before left, to wait for.
            make: makes it.
        """
        at = step - MEASURE_AT
        if at < 0 or self._given is not None or self.is_known(gate):
            return make()
        if at % GROUP == 0:
            self._timed = 0, 0.0
        if at % GROUP == 0 or step % self._every == 0:  # a refresh has its own account
            jax.block_until_ready(ready())
        began = self._clock()
        made = make()
        if at % GROUP == GROUP - 1:
            jax.block_until_ready(ready())
        count, seconds = self._timed
        self._timed = count + 1, seconds + self._clock() - began
        return made

    def after(self, gate: CostGate, sampler: Callable[[], SamplerState], step: int) -> tuple[CostGate, str | None]:
        """The gate after a step, and what a person should hear of it.

        Args:
            gate: before.
            sampler: gives the state of the sampler, where something is found from it; it is not changed.
            step: steps made so far.
        """
        if not self.weighs(gate, step):
            return gate, None
        if not self.is_known(gate):
            at = step - MEASURE_AT
            gate = self._with_seconds(gate, at // GROUP - 1)
            return (gate, None) if at < _SPAN else self._with_cost(gate, sampler(), step)
        was_open, state = bool(gate.is_open), sampler()
        seen = state._replace(monitor=local_copy(state.monitor), gate=local_copy(state.gate))
        assert seen.monitor is not None
        self.last = promise(
            seen.monitor, num_examples=self._num_examples, batch_size=self._batch_size, is_open=was_open
        )
        helps = bool(gates.is_open(seen))
        after = decide(gate, self.last, step=step, trial=self._trial, scores_help=helps)
        return after, None if bool(after.is_open) == was_open else _told(after, self.last, helps)

    def _with_seconds(self, gate: CostGate, turn: int) -> CostGate:
        """The gate with the group that has just been timed; a resumed run may have begun within it."""
        count, taken = self._timed
        if count < GROUP:
            return gate
        seconds, kind, taken = np.array(gate.seconds), turn % 2, agree(taken)
        seconds[kind], self._timed = min(taken, seconds[kind]) if seconds[kind] else taken, (0, 0.0)
        return gate._replace(seconds=seconds)

    def _with_cost(self, gate: CostGate, sampler: SamplerState, step: int) -> tuple[CostGate, str]:
        """The gate with the ratio that was measured or given."""
        learning, resting = (float(x) / GROUP for x in gate.seconds)
        cost, how = (1.0, "not measured") if self._given is None else (self._given, "given")
        if self._given is None and learning and resting:
            refresh = agree(self._seconds_of_refresh(sampler)) / self._every
            cost, how = max(round((learning + refresh) / resting, 2), 0.01), "measured"
        looks = math.ceil((cost - 1.0) / LOOK_SHARE / MONITOR_EVERY) * MONITOR_EVERY
        looks = min(max(looks, MONITOR_EVERY), LOOK_SELDOM)
        gate = gate._replace(step_cost=np.asarray(cost, np.float32), look_every=np.asarray(looks, np.int32))
        text = f"a step that learns from norms takes {cost:.3g} times a plain one ({how}, refreshes included)"
        if cost <= TRY_AT_ONCE:
            return gate, text
        return _moved(gate, False, step), f"{text}: few norms until they promise more"

    def _seconds_of_refresh(self, sampler: SamplerState) -> float:
        found = []
        for _ in range(3):
            began = self._clock()
            jax.block_until_ready(self._rehearse(sampler))
            found.append(self._clock() - began)
        return min(found)


def _told(gate: CostGate, found: Promise, scores_help: bool) -> str:
    """What has just been decided, and why."""
    cost, now, best = float(gate.step_cost), *(saves(x) for x in found)
    numbers = f"draws promise {now:.3g} times fewer steps, ideal ones {best:.3g}, and cost {cost:.3g} times the time"
    if bool(gate.is_open):
        return f"{numbers}: steps learn from norms again"
    why = numbers if scores_help else "scores do harm"
    return f"{why}: norms are looked at in every {int(gate.look_every)}th step alone"
