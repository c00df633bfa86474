"""What an estimator is: one state, a pytree of arrays, and the pure functions that take it.

The state is all that the next draw depends on besides the caller's key, so saving it with the parameters makes a run
resumable. It has one structure for all samplers: what a sampler does not use is None.

Guarantees:

* every leaf is an array of int32, uint32, float32 or bool, whatever ``jax_enable_x64`` says;
* nothing in it is NaN: what is not measured yet is told by counts and masks;
* a state of another format or of another data set is refused by name, wherever its values can be seen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, UInt

from isgd_jax.errors import ArgumentError, ArgumentTypeError, check_whole, seen
from isgd_jax.sampling.allocation import GroupState
from isgd_jax.sampling.calibration import Calibration
from isgd_jax.sampling.costs import Costs
from isgd_jax.sampling.fractions import Mixtures
from isgd_jax.sampling.law import Law
from isgd_jax.sampling.score_table import ScoreTable
from isgd_jax.types import Draw, Key, Params
from isgd_jax.variance.gate import Gate
from isgd_jax.variance.monitor import Monitor

__all__ = [
    "FORMAT",
    "BatchSampler",
    "Clock",
    "Examples",
    "Ordering",
    "Proposal",
    "SamplerState",
    "SpeedupGate",
    "advanced",
    "begun_anew",
    "blank_clock",
    "check_clock",
    "check_sizes",
    "check_state",
    "key_data",
    "on_mesh",
    "own_key",
    "step_ahead",
]

FORMAT = 4
"""Counts up when the meaning of a state changes: a checkpoint of another format is not read as if it were this one."""

KEY_IMPL = "threefry2x32"

COARSEST = 0.1
"""The largest step of a clock, as a share of the age that it is to tell."""


class Clock(NamedTuple):
    """Where a run stands.

    ``step`` counts the calls of ``observe``; ``version`` the parameter updates, ``step // steps_per_update``;
    ``seconds`` is the latest reading of the caller's clock, from the start of the run; 0 where none is given.
    """

    step: Int[Array, ""]
    version: Int[Array, ""]
    seconds: Float[Array, ""]


class Proposal(NamedTuple):
    """What is drawn from until the next refresh, and what the refresh found."""

    law: Law
    uniform_fraction: Float[Array, ""]
    version: Int[Array, ""]
    """The parameter version it was made at."""
    refreshes: Int[Array, ""]
    """How many refreshes there were."""
    trusted_share: Float[Array, ""]
    is_uniform: Bool[Array, ""]
    """Whether the scores had nothing to say, or too few could be trusted."""
    stream: Int[Array, ""]
    """Counts up whenever draws change by what earlier ones have taught: at each refresh, and where a gate moves. The
    places of draws begin anew there, so that they know nothing of what the proposal was made from."""


class Ordering(NamedTuple):
    """What the line of draws is ordered by: fixed keys [n], or sketches of gradients and which examples have one."""

    keys: Array | None = None
    sketches: Float[Array, "n dims"] | None = None
    is_sketched: Bool[Array, " n"] | None = None


class SpeedupGate(NamedTuple):
    """Whether candidates are worth their scores: the larger batch that they promised over the last dozen steps."""

    expected_speedup: Float[Array, ""]


class Examples(NamedTuple):
    """What each example counts for, costs, and belongs to: one number of it each, and what is derived from them."""

    target: Float[Array, " n"] | None = None
    """a_n of the target sum(a_n g_n); None for the mean of all gradients, or of groups that have shares."""
    costs: Costs | None = None
    groups: GroupState | None = None


class SamplerState(NamedTuple):
    """The state of a sampler: made by ``init``, moved on by ``observe``, ``record`` and ``refresh``."""

    format: Int[Array, ""]
    key_data: UInt[Array, " k"]
    """Raw data of the key that epochs and k-means fold theirs from."""
    clock: Clock
    table: ScoreTable
    quarantined: Int[Array, ""]
    """Scores that were not finite, or negative, and so were not recorded."""
    proposal: Proposal
    ordering: Ordering
    examples: Examples = Examples()
    calibration: Calibration | None = None
    fractions: Mixtures | None = None
    gate: Gate | SpeedupGate | None = None
    monitor: Monitor | None = None

    @property
    def version(self) -> Int[Array, ""]:
        """Parameter updates so far: the version of the parameters that the next draw will be learnt with."""
        return self.clock.version


class BatchSampler(NamedTuple):
    """Pure functions that choose batches; all samplers have the same, so plain SGD is the same loop.

    None of them is decorated: jit them where it suits the loop, and donate the state.
    """

    num_examples: int
    batch_size: int
    init: Callable[..., SamplerState]
    """``init(key=None) -> state``."""
    sample: Callable[..., Draw]
    """``sample(key, state, *, params=None, data=None, ahead=0) -> draw``: changes nothing. Presampling's also takes
    ``frozen=``, what its scorer needs besides."""
    observe: Callable[..., SamplerState]
    """``observe(state, draw, grads=None, *, norms=None, halves=None, scores=None, sketches=None, seconds=None,
    axis_name=None) -> state``."""
    record: Callable[..., SamplerState]
    """``record(state, ids, scores, *, version, sketches=None, seconds=None) -> state``."""
    refresh: Callable[..., SamplerState]
    """``refresh(state, key=None) -> state``: the next proposal, from all that is known."""
    report: Callable[[SamplerState], Any]
    """``report(state)``: what is known of the variance, as arrays; print it to read it."""
    candidates: Callable[..., Draw] | None = None
    """``candidates(key, state, *, ahead=0) -> draw``, presampling's first step where the data stay on the host."""
    resample: Callable[..., Draw] | None = None
    """``resample(key, state, candidates, scores, *, ahead=0) -> draw``, its second step."""
    steps_per_update: int = 1
    is_scored: bool = False
    """Whether scores make the proposal, so that scoring besides can help."""
    learns: bool = True
    """Whether ``observe`` makes anything of gradients; where not, none are made for it."""
    sketch: Callable[[Params], Array] | None = None
    """``sketch(grads) -> sketches [m, dims]``: what ``observe`` makes of gradients for its order, for steps that hand
    it norms; None where the order is made of none."""
    max_age_seconds: float | None = None
    """By which scores are distrusted, in seconds from the start of the run."""


def key_data(key: Key | None) -> UInt[Array, " k"]:
    """Raw data for a key of `KEY_IMPL`, by default of seed 0; a copy, since states are donated.

    Of a key of another kind they are drawn, so the state has one shape whatever ``jax_default_prng_impl`` says.
    """
    key = jax.random.key(0, impl=KEY_IMPL) if key is None else key
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if data.shape != (2,):
        return jax.random.bits(key, (2,), jnp.uint32)
    return on_mesh(data)


def on_mesh(x: Array | np.ndarray) -> Array:
    """An array that was given, placed as those that are made: on an explicit mesh, where there is one.

    So do the states to come lie, and ``refresh`` compiles once.
    """
    return jnp.asarray(x) + jnp.zeros(x.shape, x.dtype)


def own_key(state: SamplerState, count: Int[Array, ""]) -> Key:
    """A key from the seed of the state and a number.

    Args:
        state: whose seed was given to ``init``.
        count: such as the version or the epoch. The same number gives the same key, in a resumed run too.
    """
    return jax.random.fold_in(jax.random.wrap_key_data(state.key_data, impl=KEY_IMPL), count)


def step_ahead(state: SamplerState, ahead: int | Array) -> Int[Array, ""]:
    """The number of the step that is ``ahead`` from now.

    Raises:
        TypeError: ``ahead`` is no whole number.
        ValueError: it is negative, and no array of JAX.
    """
    if isinstance(ahead, Array):
        return state.clock.step + ahead
    if (whole := check_whole("ahead", ahead, least=-(2**31))) < 0:
        raise ArgumentError(f"ahead counts the steps since the last observe, 0 or more; got {whole}")
    return state.clock.step + whole


def begun_anew(state: SamplerState, moved: bool | Bool[Array, ""] = True) -> SamplerState:
    """The state with places of draws that know nothing of the draws before.

    Args:
        state: any.
        moved: whether what is drawn, or whether it is, has been decided anew; if not, places stay.
    """
    more = int(moved) if isinstance(moved, bool) else moved.astype(jnp.int32)
    stream = state.proposal.stream + more
    return state._replace(proposal=state.proposal._replace(stream=stream))


def blank_clock() -> Clock:
    """Before the first step."""
    return Clock(jnp.int32(0), jnp.int32(0), jnp.float32(0.0))


def advanced(clock: Clock, *, steps_per_update: int, seconds: float | Array | None) -> Clock:
    """The clock after one more step.

    Args:
        clock: before it.
        steps_per_update: steps that make one version.
        seconds: the caller's clock; None leaves the last reading.
    """
    step = clock.step + 1
    now = clock.seconds if seconds is None else jnp.asarray(seconds, jnp.float32)
    return Clock(step, step // steps_per_update, now)


def check_clock(seconds: float | Array | None, max_age_seconds: float | None) -> None:
    """Refuse a clock that float32 cannot tell ages by, such as that of the day, where it can be seen.

    Ages are then wrong by no more than a tenth of what they are compared with.

    Raises:
        ValueError: it is no number, or float32 has steps there of more than a tenth of ``max_age_seconds``.
    """
    found = None if seconds is None or max_age_seconds is None else seen(seconds)
    if found is None or max_age_seconds is None:
        return
    if not np.isfinite(found):
        raise ArgumentError(f"seconds must be finite, counted from the start of the run, got {found:g}")
    with np.errstate(over="ignore"):
        step = float(np.spacing(np.minimum(np.abs(found).astype(np.float32), np.finfo(np.float32).max)))
    if step > COARSEST * max_age_seconds:
        raise ArgumentError(
            f"seconds must be such that float32 can tell ages of max_age_seconds={max_age_seconds:g}, got {found:g}, "
            f"where it has steps of {step:g} s: count from the start of the run, time.monotonic() - began"
        )


def check_sizes(num_examples: int, batch_size: int) -> tuple[int, int]:
    """Both as ints, refused where they are no sizes: NumPy's small integers would wrap in products.

    Raises:
        TypeError: they are no whole numbers.
        ValueError: they are out of range.
    """
    return check_whole("num_examples", num_examples, least=1), check_whole("batch_size", batch_size, least=1)


def check_state(state: SamplerState, num_examples: int) -> None:
    """Refuse a state that was made for something else; values are seen where the call is not traced.

    Raises:
        TypeError: it is no state.
        ValueError: it is of another format or another number of examples.
    """
    if not isinstance(state, SamplerState):
        raise ArgumentTypeError(f"expected a SamplerState as init() makes it, got {type(state).__name__}")
    known = state.table.scores.shape[0]
    if known != num_examples:
        raise ArgumentError(
            f"the state is of {known} examples, this sampler of {num_examples}: they are not of one run"
        )
    found = seen(state.format)
    if found is not None and found != FORMAT:
        raise ArgumentError(
            f"the sampler's state has format {found}, this version of isgd_jax reads format {FORMAT}: "
            "begin with init(), or go on with the version that wrote it"
        )
