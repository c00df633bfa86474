"""The suite of twelve: its problems are what they say they are, and its table says what came out."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import do_no_harm
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harm.problems import CASES, case

DOWNLOADED = {"fashion", "long tail", "wrong labels"}


@jax.numpy_rank_promotion("allow")
@pytest.mark.parametrize("name", sorted(set(CASES) - DOWNLOADED))
def test_every_problem_has_a_scalar_loss_of_an_example(name: str) -> None:
    """From shapes alone. A sweep of the data is shorter than a run."""
    made = case(name)
    params = jax.eval_shape(made.problem.init, jax.random.key(0))
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), made.problem.train)
    loss = jax.eval_shape(made.problem.loss_fn, params, example)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    assert made.problem.num_examples < made.steps * made.batch_size
    assert made.expected in do_no_harm.SIDES


def test_what_is_separable_is_and_text_is_of_its_alphabet() -> None:
    train = case("separable").problem.train
    x, y = np.asarray(train["x"], np.float64), np.asarray(train["y"])
    truth = np.random.default_rng(0).normal(size=20)
    assert np.array_equal(x @ truth > 0, y == 1)
    assert np.abs(x @ truth).min() / np.linalg.norm(truth) > 0.05
    rows = np.asarray(case("language").problem.train)
    assert rows.min() >= 0
    assert rows.max() < 96
    assert 0.2 < np.mean(rows == ord(" ") - 31) < 0.5


def record(*losses: float, seconds: float = 1.0, steps: int = 10) -> dict[str, Any]:
    """A curve with a look every ``steps`` steps and so many ``seconds``."""
    curve = [(steps * (at + 1), seconds * (at + 1), loss, 2 * seconds * (at + 1)) for at, loss in enumerate(losses)]
    return {"curve": curve, "cost": 1.5, "learnt": 0.5}


def test_arrivals_between_looks() -> None:
    curve = record(4.0, 2.0, 1.0)["curve"]
    assert do_no_harm.arrival(curve, 3.0, 1) == 1.5
    assert do_no_harm.arrival(curve, 1.5, 0) == 25.0
    assert do_no_harm.arrival(curve, 5.0, 1) == 1.0  # at the first look already
    assert do_no_harm.arrival(curve, 0.5, 1) == math.inf


def test_a_row_and_the_summary_by_hand() -> None:
    """Ours takes half of the steps, each for 1.5 times the time, and ends at half of the loss."""
    plain, ours = record(4.0, 3.0, 2.0, 1.0), record(3.0, 1.0, 0.7, 0.5, seconds=1.5)
    won = do_no_harm.row([plain, plain], [ours, ours])
    assert tuple(ratio.value for ratio in won) == pytest.approx((0.75, 0.5, 0.75, 0.5))
    assert won.winner == "importance"
    lost, tied = do_no_harm.row([ours] * 2, [plain] * 2), do_no_harm.row([plain] * 2, [plain] * 2)
    assert (lost.winner, tied.winner) == ("plain", "tie")
    told = do_no_harm.summary({"a": (won, True), "b": (lost, True), "c": (tied, False), "d": (lost, None)})
    assert told == [
        "won by importance sampling 1, by plain SGD 2, ties 1",
        "harm, the interval of seconds above 1.05: b, d",
        "the probe named the winner in 1 of 3 decided; the constant guesses are right in 2 (plain) and 1 (importance)",
    ]
    assert Counter(case(name).expected for name in ("digits", "convex")) == {"importance": 1, "plain": 1}


def test_a_rate_is_the_soonest_at_the_loss_that_both_sides_come_to(tmp_path: Path, monkeypatch: Any) -> None:
    ends = {("plain", 0.1): (50, 1.0005), ("plain", 0.01): (100, 1.0), ("plain", 0.001): (200, 1.2)}
    ends |= {("importance", 0.1): (50, 2.0), ("importance", 0.01): (100, 0.9), ("importance", 0.001): (80, 1.0)}

    def run(race: Any, side: str, rate: float, seed: int) -> Any:
        at, end = ends[side, rate]
        return {"curve": [(10, 0.1, 5.0, 0.1), (at, 0.5, end, 0.5), (500, 5.0, end, 5.0)]}

    monkeypatch.setattr(do_no_harm.Race, "run", run)
    race = do_no_harm.Race("regression", tmp_path, None, shorter=40)
    rates = {side: [0.001, 0.01, 0.1] for side in do_no_harm.SIDES}
    assert race._best(rates) == {"plain": 0.1, "importance": 0.001}  # both at 1.001


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # optax's own arithmetic mixes types
def test_a_race_of_a_few_steps_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    first, again = (do_no_harm.Race("regression", tmp_path, None, shorter=40) for _ in range(2))
    runs = [first.run(side, 0.01, 0) for side in do_no_harm.SIDES]
    assert [again.run(side, 0.01, 0) for side in do_no_harm.SIDES] == [
        {**one, "curve": [list(point) for point in one["curve"]]} for one in runs
    ]
    assert all(one["curve"][-1][0] == 60 for one in runs)
    assert all(one["curve"][-1][2] < one["curve"][0][2] for one in runs)
    assert again._made is None  # nothing was made anew
