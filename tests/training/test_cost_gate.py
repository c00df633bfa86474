"""Whether steps learn from norms: decided from numbers in the state, measured by a clock that is handed in."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import linear_loss, linear_problem
from sampling_problem import jitted

import isgd_jax as isgd
from isgd_jax.sampling.gates import with_gate
from isgd_jax.training import cost_gate
from isgd_jax.training.cost_gate import CostGate, CostWatch, create, decide
from isgd_jax.training.promise import Promise, noise_left, promise, saves
from isgd_jax.variance import monitor

N, M = 40, 8
MEASURED = cost_gate.MEASURE_AT + 2 * cost_gate.ROUNDS * cost_gate.GROUP
RESTED = [4, 5, 6, 7, *(8 + at for at in range(64) if at // 4 % 2)]
"""Steps that rest while the cost is not known."""


def gate(**changes: float) -> CostGate:
    made = create()._replace(step_cost=np.asarray(1.2, np.float32))
    return made._replace(**{name: np.asarray(value) for name, value in changes.items()})


HIGH, LOW = 2.0, 1.1
"""Promises of which 1.4 and 1.04 times fewer steps are likely: above and below a cost of 1.2."""


@pytest.mark.parametrize(
    ("before", "found", "step", "expected"),
    [
        pytest.param({}, Promise(LOW, HIGH), 256, {"is_open": True}, id="on trial"),
        pytest.param({}, Promise(LOW, LOW), 256, {"is_open": False, "moved_at": 256, "wait": 0}, id="hopeless"),
        pytest.param({}, Promise(LOW, HIGH), 384, {"is_open": False, "wait": 300, "patience": 300}, id="trial failed"),
        pytest.param({"patience": 300}, Promise(LOW, HIGH), 384, {"wait": 600, "patience": 600}, id="failed again"),
        pytest.param({}, Promise(HIGH, HIGH), 384, {"is_open": True, "moved_at": 0}, id="it pays"),
        pytest.param({"is_open": False, "wait": 300}, Promise(LOW, HIGH), 256, {"is_open": False}, id="waits"),
        pytest.param({"is_open": False, "wait": 300}, Promise(LOW, HIGH), 384, {"is_open": True}, id="tries again"),
        pytest.param({"is_open": False}, Promise(HIGH, 1.6), 384, {"is_open": False}, id="too little to flutter for"),
    ],
)
def test_decisions_by_hand(before: dict[str, Any], found: Promise, step: int, expected: dict[str, Any]) -> None:
    after = decide(gate(**before), found, step=step, trial=300)
    assert {name: getattr(after, name).item() for name in expected} == expected


def test_while_scores_do_harm_nothing_is_learnt_whatever_is_promised() -> None:
    found = Promise(HIGH, HIGH)
    assert not decide(gate(), found, step=256, trial=300, scores_help=False).is_open
    assert not decide(gate(is_open=False), found, step=256, trial=300, scores_help=False).is_open


def test_what_is_likely_is_less_than_what_is_promised() -> None:
    assert saves(1.0) == 1.0
    assert 1.0 < saves(HIGH) < HIGH


def test_a_promise_by_hand() -> None:
    """Steps that each see all examples once: moments without noise. DRAWN counts where it is surely below STALE.

    Ten steps of 4 are 40/13 of an epoch, which leave 13/120 of the noise; of a plain batch's there is 9/12."""
    norms, square, drawn = jnp.asarray([1.0, 1.0, 2.0, 8.0]), 3.0, 2.0
    uniform, ideal = 17.5 - square, 9.0 - square
    sizes: dict[str, Any] = {"num_examples": 13, "batch_size": 4, "is_open": True}
    left = 13 / 120
    assert promise(monitor.create(8), **sizes) == Promise(1.0, 1.0)  # nothing was seen
    for own, expected in ((square + drawn / 4, drawn), (square + 100.0, uniform)):
        watched = monitor.create(8)
        for _ in range(3):
            watched = monitor.observe(
                watched, jnp.ones(4), norms, jnp.float32(square), batch_grad_norm_sq=jnp.float32(own)
            )
        found = promise(watched, **sizes)
        plain = square + left * 0.75 * uniform / 4
        assert found.ideal == pytest.approx(plain / (square + left * ideal / 4), rel=1e-5)
        assert found.drawn == pytest.approx(plain / (square + left * expected / 4), rel=1e-5)


SAMPLER = jitted(isgd.importance_sampler(N, batch_size=M))
"""The same one for all: its functions are traced once, whatever program they are a part of."""


def watch(step_cost: float | str = "measured", rehearse: Any = lambda state: state, **options: Any) -> CostWatch:
    return CostWatch(SAMPLER, 100, rehearse, step_cost, **options)


def test_the_ratio_is_that_of_the_clock_refreshes_included() -> None:
    """Steps that learn take 3 seconds, those that rest 2, but for one disturbed one; a refresh takes 50."""
    now, state = [0.0], SAMPLER.init()

    def rehearse(state: Any) -> Any:
        now[0] += 50.0
        return state

    measuring = watch(rehearse=rehearse, clock=lambda: now[0])
    known, rested, told = create(), list[int](), None
    for step in range(MEASURED):
        rests = measuring.rests(known, step)
        rested += [step] if rests else []

        def make(rests: bool = rests, step: int = step) -> None:
            now[0] += (2.0 if rests else 3.0) + 100.0 * (step in (10, 33, 62))

        measuring.advance(known, step, lambda: state, make)
        now[0] += 7.0  # what callbacks do counts for nothing
        known, told = measuring.after(known, lambda: state, step + 1)
    assert rested == RESTED
    assert known.seconds.tolist() == [12.0, 8.0]
    assert float(known.step_cost) == pytest.approx((3.0 + 0.5) / 2.0)
    expected = "a step that learns from norms takes 1.75 times a plain one (measured, refreshes included): few norms"
    assert told == f"{expected} until they promise more"
    assert (bool(known.is_open), int(known.moved_at)) == (False, MEASURED)
    every = int(known.look_every)
    assert every % 4 == 0
    assert 0.75 / every <= cost_gate.LOOK_SHARE < 0.75 / (every - 4)
    assert [step for step in range(MEASURED, 300) if not measuring.rests(known, step)] == [
        *range(MEASURED, 128, 8), *range(-(-128 // every) * every, 300, every),
    ]  # fmt: skip


def test_a_run_that_was_broken_off_while_measuring_has_enough_of_the_rest() -> None:
    """Cheap norms are learnt from at once."""
    now = [0.0]
    measuring, known, state = watch(clock=lambda: now[0]), create(), SAMPLER.init()

    def make() -> None:
        now[0] += 1.0

    for step in range(cost_gate.MEASURE_AT + 6, MEASURED):
        measuring.advance(known, step, lambda: state, make)
        known, _ = measuring.after(known, lambda: state, step + 1)
    assert known.seconds.tolist() == [4.0, 4.0]
    assert float(known.step_cost) == 1.0
    assert bool(known.is_open)


@pytest.mark.parametrize("epochs", [0.25, 0.75, 1.5, 4.0])
def test_the_noise_that_shuffled_epochs_leave_is_that_of_drawn_ones(epochs: float) -> None:
    """Two thousand runs of epochs of 40 batches; the stretch begins anywhere in the first."""
    rng, length = np.random.default_rng(0), 40
    batches, window = rng.standard_normal(length), round(epochs * length)
    batches -= batches.mean()
    means = []
    for begin in rng.integers(0, length, 2_000):
        run = np.concatenate([rng.permutation(batches) for _ in range(window // length + 2)])
        means.append(np.mean(run[begin : begin + window]))
    assert np.var(means) * window / np.var(batches) == pytest.approx(noise_left(epochs), rel=0.12)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), "auto"])
def test_what_is_no_cost_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match='step_cost must be "measured", None, or the time of a step'):
        cost_gate.check_step_cost(wrong)


class Notes(isgd.Callback):
    """What is told, which steps learnt, and a state to go on from."""

    def __init__(self, begin: Any = None, keep_at: int = -1) -> None:
        self.texts, self.learnt, self.kept = list[str](), list[int](), begin
        self._begins, self._keep_at = begin is not None, keep_at

    def begin(self, run: Any) -> None:
        if self._begins:
            run.state, run.step = jax.tree.map(jnp.array, self.kept), int(self.kept.sampler.clock.step)
        self._versions = np.array(run.state.sampler.table.versions)

    def told(self, run: Any, text: str) -> None:
        self.texts.append(f"{run.step}: {text}")

    def stepped(self, run: Any, info: Any) -> None:
        versions = np.array(run.state.sampler.table.versions)
        self.learnt += [run.step - 1] if np.any(versions != self._versions) else []
        self._versions = versions
        if run.step == self._keep_at:
            self.kept = jax.tree.map(np.array, run.state)


def fitted(notes: Notes, num_steps: int = 300, **options: Any) -> isgd.FitResult:
    params, data = linear_problem(N)
    tx = optax.chain(isgd.importance_weighting(N), optax.sgd(0.01))
    options = {"step_cost": 30.0, "sampler": SAMPLER} | options
    make: Any = lambda *args, **given: isgd.refresher(*args, clock=lambda: 0.0, **given)  # noqa: E731
    return isgd.fit(
        isgd.Problem(linear_loss, params, data, hold=options.pop("hold", "device")), tx=tx, num_steps=num_steps,
        key=jax.random.key(0), callbacks=[notes], refresh_every=20, make_refresher=make, **options,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("hold", ["device", "host"])
def test_norms_that_cost_too_much_are_left_and_a_run_goes_on_bit_for_bit(hold: str) -> None:
    """At thirty times a plain step nothing can pay: a look at every eighth step at first, then at every 128th."""
    whole = Notes(keep_at=170)
    result = fitted(whole, hold=hold)
    (told,) = whole.texts
    assert told.startswith("72: a step that learns from norms takes 30 times a plain one (given, refreshes included)")
    assert whole.learnt == [*(step for step in range(72) if step not in RESTED), *range(72, 128, 8), 128, 256]
    again = Notes(begin=whole.kept)
    resumed = fitted(again, hold=hold)
    chex.assert_trees_all_equal(resumed.state, result.state)
    assert again.learnt == [256]
    assert np.isfinite(float(result.params["b"]))


@pytest.mark.slow
def test_a_measured_ratio_repeats_the_run_and_a_cheap_one_changes_no_more_than_the_timed_steps() -> None:
    measured = Notes()
    first = fitted(measured, step_cost="measured")
    cost = float(first.state.cost_gate.step_cost)
    second = fitted(Notes(), step_cost=round(cost, 2))
    chex.assert_trees_all_equal(second.state._replace(cost_gate=None), first.state._replace(cost_gate=None))
    assert measured.texts[0].startswith(
        f"72: a step that learns from norms takes {cost:.3g} times a plain one (measured"
    )
    cheap = Notes()
    result = fitted(cheap, step_cost=0.01)
    assert cheap.learnt == [step for step in range(300) if step not in RESTED]
    assert bool(result.state.cost_gate.is_open)
    with pytest.raises(ValueError, match="the state to go on from was made without an engine, and with a step_cost"):
        fitted(Notes(begin=result.state), step_cost=None)


@pytest.mark.slow
def test_who_has_given_an_engine_or_no_monitor_is_not_asked() -> None:
    params, data = linear_problem(N)
    problem = isgd.Problem(linear_loss, params, data)
    with isgd.engines.inline(problem.scorer(), problem.train) as engine:
        assert fitted(Notes(), 5, engine=engine).state.cost_gate is None
    unwatched = isgd.importance_sampler(N, batch_size=M, monitor=False)
    assert fitted(Notes(), 5, sampler=unwatched).state.cost_gate is None
    assert fitted(Notes(), 5, step_cost=None).state.cost_gate is None


@pytest.mark.parametrize(
    ("looks", "is_open", "expected"),
    [(64, True, [128, 256, 384, 512]), (8, False, [128, 256, 384, 512]), (64, False, [128, 512])],
)
def test_a_decision_while_steps_rest_is_made_of_new_looks(looks: int, is_open: bool, expected: list[int]) -> None:
    """One is made where looks begin to be seldom, and then not before eight have come."""
    known = gate(is_open=is_open)._replace(look_every=np.asarray(looks, np.int32))
    assert [step for step in range(MEASURED + 1, 600) if watch().weighs(known, step)] == expected


def test_a_shut_gate_of_draws_is_heard_of() -> None:
    after, told = watch(2.0).after(gate(), lambda: with_gate(SAMPLER.init(), False), 128)
    assert not after.is_open
    assert told == "scores do harm: norms are looked at in every 4th step alone"
