"""The protocol of equal seconds: budgets are kept, arms are tuned alike, and only what is shown is said."""

import math

import pytest
from equal_seconds import race

HIGH = race.Measure("score", "score", True)


class Toy:
    """Arms that do best at a rate of their own; every run is counted, and takes no time but what its meter is told."""

    def __init__(self, best: dict[str, float]) -> None:
        self.best, self.runs = best, 0

    def train(self, arm, trial, seed, meter):
        self.runs += 1
        while now := meter.block(longest=100):
            meter.steps += now
            meter.elapsed += now * 1e-2
            meter.core += now * 1e-2
            meter.slope = 1e-2 / meter.seconds
        off = abs(math.log(trial.rate / self.best[arm]))
        return {"merit": None if trial.rate > 5 else off, "score": 1.0 - off + 0.01 * seed}


def made(tmp_path, best, grid, **more):
    cells = race.Cells(tmp_path, {"seconds": 2.0})
    bench = Toy(best)
    return bench, race.Race(bench, tuple(best), ("ours",), (HIGH,), race.Plan(grid, 2.0, 3, **more), cells)


def test_a_race_tunes_all_arms_alike_resumes_and_tells(tmp_path, capsys):
    best, grid = {"uniform": 1.0, "prune": 0.1, "ours": 0.3}, race.Grid((0.1, 0.3, 1.0), (8,), (0.5, 1.0))
    bench, started = made(tmp_path, best, grid)
    planned, most = started.planned()
    # Three rates for 1 and 2 s, of three arms; nine prices of 2 s; three seeds, twice. Extended twice: four
    # more rates, and runs of a half and a quarter of a second.
    assert planned == pytest.approx(3 * 3 * (1.0 + 2.0) + 9 * 2.0 + 3 * 3 * 2 * 2.0)
    assert most == pytest.approx(planned + 3 * (7 * (0.25 + 0.5 + 1.0 + 2.0) - 3 * (1.0 + 2.0)))
    started.race()
    told = capsys.readouterr().out
    chosen, widened = started.tuned()
    assert {arm: trial.rate for arm, trial in chosen.items()} == pytest.approx(best)
    # Uniform's best was the upper edge and pruning's the lower one: all arms tried one more on both sides.
    assert widened.rates == pytest.approx((0.1 / 3, 0.1, 0.3, 1.0, 3.0))
    for arm in best:
        tried = list(tmp_path.glob(f"run-{arm}-*-seed{race.TUNING_SEED}-price.json"))
        assert len(tried) == len(widened.trials())
    assert "still on an edge" not in told
    assert "ours less uniform, the best rival, in score: +0.000 [+0.000, +0.000]: a tie" in told
    runs, (left, _) = bench.runs, started.planned()
    assert left == 0
    again, restarted = made(tmp_path, best, grid)
    restarted.race()
    assert (again.runs, bench.runs) == (0, runs)
    assert capsys.readouterr().out.splitlines()[1:] == told.splitlines()[1:]
    with pytest.raises(ValueError, match=r"another --folder"):
        race.Cells(tmp_path, {"seconds": 3.0})


def test_budgets_are_kept_by_price_and_by_the_clock():
    by_price = race.Meter(1.0, price=0.3)
    while now := by_price.block(longest=2):
        by_price.steps += now
        by_price.elapsed += 1e6  # the machine was busy: nobody cares
    assert by_price.steps == 3
    assert race.Meter(1.0, price=7.0).block(longest=5) == 1  # a step that is dearer than the budget is still made
    toy, by_clock = Toy({"uniform": 1.0}), race.Meter(5.0)
    toy.train("uniform", race.Trial(1.0, 8, 1.0), 0, by_clock)
    assert by_clock.steps == 500
    assert by_clock.progress == pytest.approx(1.0)
    toy.train("uniform", race.Trial(1.0, 8, 1.0), 0, by_core := race.Meter(2.0, by_core=True))
    assert by_core.steps == 200
    assert race.Meter(1.0).timed(sum, [1, 2], steps=1) == 3


def test_best_is_said_only_where_the_interval_leaves_zero_out():
    def runs(*values):
        return [{"score": value, "steps": 1, "seconds": 1.0, "core_seconds": 0.5} for value in values]

    found = {"uniform": runs(0.5, 0.6, 0.7), "prune": runs(0.1, 0.2, 0.9)}
    low = HIGH._replace(is_better_high=False)
    for ours, word, by_low in (
        (runs(0.6, 0.71, 0.79), "best", "behind"),
        (runs(0.4, 0.51, 0.59), "behind", "best"),
        (runs(0.4, 0.7, 0.75), "a tie", "a tie"),
        (runs(None, 0.9, 0.9), "a tie", "a tie"),
    ):
        everyone = found | {"ours": ours}
        [line] = race.verdicts(everyone, HIGH, ("ours",))
        assert line.startswith("ours less uniform, the best rival")
        assert line.endswith(": " + word)
        [line] = race.verdicts({"uniform": found["uniform"], "ours": ours}, low, ("ours",))
        assert line.endswith(": " + by_low)
    [line] = race.verdicts(found | {"ours": runs(0.0, 0.0, 0.0)}, low, ("ours",))
    assert line.startswith("ours less prune")
    lines = race.table("price", found, (HIGH,))
    assert lines[2].split() == ["uniform", "1", "1.0", "0.5", "0.600", "(0.500", "to", "0.700)"]
    assert "-0.200 [" in lines[3]
