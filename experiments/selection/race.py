"""The race: the shortest fully decayed runs that end at a training loss, rate and batch tuned alike for each method.

Tuning uses three seeds that are not reported; one, in the quick form. For each batch, every rate of the grid makes
runs of the same budget, and is judged by their mean loss, so that one at which any of them diverges is not taken; the
grid goes on where its edge is best. With its best rate each batch then runs to the level, by the first seed, and the
batch with the least seconds is taken, by the price model: passes times the least core seconds a pass of its runs. So
all methods get the same number of trials, but for the edges. Then fresh seeds run to the level, the methods in turn.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from isgd_jax.app.compare import Interval, aligned, median, paired_ratio
from selection.bench import Record, column
from selection.contest import Problem
from selection.problems import Scale

__all__ = [
    "LEVEL",
    "TUNING_SEEDS",
    "Arm",
    "Finish",
    "against_best",
    "fastest",
    "forecast",
    "least",
    "shortest",
    "table",
    "tune",
]

LEVEL = 0.05
RATES, FIRST_RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0), (3, 7)
"""The grid, and the part of it that every method tries."""
SMALLEST_BATCH, EPOCH_BATCHES, BATCH_RATIO = 8, 16, 4
"""Batches go on down to 8 and up to a sixteenth of the data: an epoch of a pruned half still has eight of them."""
TUNING_SEEDS, PRICE_SEED = (1000, 1001, 1002), 2000
RUNG, MOST_RUNGS = 1.15, 10
"""Budgets stand on a ladder with this ratio, so many rungs up and down at most."""
FALL, LEAP = 0.35, 4
"""What a rung takes off the logarithm of the loss at most, as a rule; so many are climbed at once, up to four."""
OWN = "ours"
"""How the names of our methods begin."""


class Runs(Protocol):
    """What a bench is for here."""

    problem: Problem

    def run(self, name: str, passes: float, rate: float, seed: int, *, batch_size: int | None = None) -> Record: ...


class Finish(NamedTuple):
    """What the shortest decayed run to the level took, interpolated on the ladder, and how well it then did."""

    seconds: float
    core_seconds: float
    passes: float
    steps: float
    test_error: float
    test_worst_class: float
    test_calibration: float
    top_share: float
    rung: int


NEVER = Finish(*(math.inf,) * 8, rung=MOST_RUNGS)
"""A run that did not arrive in the longest budget counts as infinite, never as missing."""
_TAKEN = ("seconds", "core_seconds", "passes", "steps")


class Arm(NamedTuple):
    """A method with its batch and rate, the rung at which it arrived when tuned, and what was tried, in words."""

    name: str
    batch_size: int
    rate: float
    rung: int
    tried: tuple[str, ...]


def budget(problem: Problem, scale: Scale, rung: int = 0) -> int:
    """Passes of a rung of the ladder."""
    return round(scale.epochs * problem.num_examples * RUNG**rung)


def least(grid: Sequence[Any], first: tuple[int, int], badness: Callable[[Any], float]) -> tuple[Any, dict[Any, float]]:
    """The value with the least badness, and all that were tried: those of a slice, and more where an edge is best.

    Of equals the smaller is taken.
    """
    low, high = first
    tried = {value: badness(value) for value in grid[low:high]}
    while True:
        best = min(tried, key=lambda value: (tried[value], value))
        if best == grid[low] and low > 0:
            low -= 1
            tried[grid[low]] = badness(grid[low])
        elif best == grid[high - 1] and high < len(grid):
            high += 1
            tried[grid[high - 1]] = badness(grid[high - 1])
        else:
            return best, dict(sorted(tried.items()))


def batch_ladder(batches: Sequence[int], num_examples: int) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The batches asked for with those beyond their edges, and where they stand among these.

    Raises:
        ValueError: a batch is larger than a sixteenth of the data.
    """
    batches, largest = sorted(set(batches)), num_examples // EPOCH_BATCHES
    if batches[-1] > largest:
        raise ValueError(f"expected batches of at most {largest} for {num_examples:,} examples, got {batches[-1]}")
    below, above = [], []
    while (size := (below[0] if below else batches[0]) // BATCH_RATIO) >= SMALLEST_BATCH:
        below.insert(0, size)
    while (size := (above[-1] if above else batches[-1]) * BATCH_RATIO) <= largest:
        above.append(size)
    return (*below, *batches, *above), (len(below), len(below) + len(batches))


def tune(bench: Runs, name: str, batches: Sequence[int], scale: Scale, seeds: Sequence[int] = TUNING_SEEDS) -> Arm:
    """The batch and the rate of a method.

    Args:
        bench: what runs it.
        name: of the method.
        batches: sizes that every method tries.
        scale: its ``epochs`` are the budget of a trial, near the expected finish.
        seeds: that no run of the race has.
    """
    rates: dict[int, float] = {}
    finishes: dict[int, Finish] = {}
    found: dict[int, float] = {}
    tried: list[str] = []

    def seconds_of(size: int) -> float:
        made: list[Record] = []

        def loss(rate: float) -> float:
            passes = budget(bench.problem, scale)
            runs = [bench.run(name, passes, rate, seed, batch_size=size) for seed in seeds]
            made.extend(runs)
            return float(np.mean(column(runs, "train_loss")))

        rates[size], losses = least(RATES, FIRST_RATES, loss)
        best = min(found.values(), default=math.inf)
        most = best / _price(made)  # no use in going on where another batch has arrived
        finishes[size] = finish = shortest(bench, name, size, rates[size], seeds[0], scale, most_passes=most, made=made)
        found[size] = seconds = finish.passes * _price(made)
        grid = ", ".join(f"{rate:g}: {value:.3g}" for rate, value in losses.items())
        told = f"in {seconds:.2f} core seconds" if math.isfinite(seconds) else "later than another batch, or never"
        tried.append(f"{name}, batch {size}: train loss by rate {grid}; to {LEVEL} {told}")
        return seconds

    ladder, asked = batch_ladder(batches, bench.problem.num_examples)
    size, _ = least(ladder, asked, seconds_of)
    return Arm(name, size, rates[size], finishes[size].rung, tuple(tried))


def shortest(
    bench: Runs,
    name: str,
    batch_size: int,
    rate: float,
    seed: int,
    scale: Scale,
    *,
    rung: int = 0,
    most_passes: float = math.inf,
    made: list[Record] | None = None,
) -> Finish:
    """Walk the ladder of budgets to the first that ends at the level, then interpolate between it and the one below.

    Args:
        bench: what runs it.
        name: of the method.
        batch_size: of its batches.
        rate: its rate.
        seed: of the run.
        scale: its ``epochs`` are the budget of rung 0.
        rung: where to begin.
        most_passes: a run that takes more is not looked for: budgets end with the first above it.
        made: a list that gets the runs.
    """
    most = max(rung for rung in range(-MOST_RUNGS, MOST_RUNGS + 1) if _fits(bench, scale, rung, most_passes))
    found: dict[int, Record] = {}

    def at(rung: int) -> Record:
        if rung not in found:
            passes = budget(bench.problem, scale, rung)
            found[rung] = bench.run(name, passes, rate, seed, batch_size=batch_size)
        return found[rung]

    def there(rung: int) -> bool:
        return bool(column([at(rung)], "train_loss")[0] <= LEVEL)

    def leap(rung: int) -> int:
        loss = column([at(rung)], "train_loss")[0]
        return min(LEAP, max(1, int(math.log(loss / LEVEL) / FALL))) if math.isfinite(loss) else LEAP

    rung = min(rung, most)
    while not there(rung) and rung < most:
        rung = min(most, rung + leap(rung))
    while there(rung) and there(rung - 1) and rung > -MOST_RUNGS:
        rung -= 1
    if made is not None:
        made.extend(found.values())
    if not there(rung):
        return NEVER
    short, long = at(rung - 1), at(rung)
    share = 1.0
    if short["train_loss"] and short["train_loss"] > long["train_loss"]:
        fall = math.log(short["train_loss"] / long["train_loss"])
        share = min(1.0, max(0.0, math.log(short["train_loss"] / LEVEL) / fall))
    between = {field: short[field] * (long[field] / short[field]) ** share for field in _TAKEN}
    rest = {field: float(column([long], field)[0]) for field in Finish._fields if field not in (*_TAKEN, "rung")}
    return Finish(**between, **rest, rung=rung)


def _fits(bench: Runs, scale: Scale, rung: int, most_passes: float) -> bool:
    return rung == -MOST_RUNGS or budget(bench.problem, scale, rung - 1) <= most_passes


def _price(made: Sequence[Record]) -> float:
    """Core seconds a pass: the least that runs met."""
    return min(run["core_seconds"] / run["passes"] for run in made)


def forecast(
    bench: Runs, names: Sequence[str], batches: Sequence[int], scale: Scale, seeds: int, tuning_seeds: int
) -> float:
    """Hours that the race takes if nothing of it is there yet, from half an epoch of each method and batch.

    A walk is counted as four runs; grids that go on, and compilation, come on top.
    """
    prices = {
        (name, size): run["seconds"] / run["passes"]
        for size in batches
        for name in names
        for run in [bench.run(name, bench.problem.num_examples / 2, RATES[4], PRICE_SEED, batch_size=size)]
    }
    trials, walk = FIRST_RATES[1] - FIRST_RATES[0], 4
    runs = sum(prices.values()) * (trials * tuning_seeds + walk)
    runs += seeds * walk * sum(np.mean([prices[name, size] for size in batches]) for name in names)
    return runs * budget(bench.problem, scale) / 3600


def table(arms: Sequence[Arm], finishes: dict[str, list[Finish]]) -> str:
    """One line an arm; ratios are to the first, paired by seed."""
    lines = [("method", "batch", "rate", "arrived", "seconds [95 %]", f"over {arms[0].name}'s", "core seconds over",
              "passes over", "test error", "worst class", "calibration", "top 1 %")]  # fmt: skip
    for arm in arms:
        found = finishes[arm.name]
        seconds = median(_all(found, "seconds"))
        ratios = [_ratio(finishes, arm.name, arms[0].name, field) for field in ("seconds", "core_seconds", "passes")]
        shares = [np.median(_all(found, field)) for field in Finish._fields[4:8]]
        arrived = sum(math.isfinite(finish.passes) for finish in found)
        lines.append((
            arm.name, f"{arm.batch_size}", f"{arm.rate:g}", f"{arrived}/{len(found)}",
            f"{seconds.value:.2f} [{seconds.low:.2f}, {seconds.high:.2f}]",
            *(_told(ratio) for ratio in ratios), *(f"{100 * share:.1f} %" for share in shares),
        ))  # fmt: skip
    return aligned(lines)


def fastest(finishes: dict[str, list[Finish]], field: str) -> str:
    """Who is the fastest, if the interval against the best of the others lies under 1; else that nobody is."""
    first, second = sorted(finishes, key=lambda name: np.median(_all(finishes[name], field)))[:2]
    ratio = _ratio(finishes, first, second, field)
    said = f"{_told(ratio)} of {second}'s"
    named = f"fastest: {first}, {said}" if ratio.high < 1 else f"no method is shown to be the fastest: {first} {said}"
    return f"{field.replace('_', ' ')}: {named}"


def against_best(finishes: dict[str, list[Finish]], field: str) -> list[str]:
    """Each of our methods against the best rival: ahead, a tie, or a loss."""
    others = [name for name in finishes if not name.startswith(OWN)]
    best = min(others, key=lambda name: np.median(_all(finishes[name], field)))
    lines = []
    for name in finishes:
        if name not in others:
            ratio = _ratio(finishes, name, best, field)
            word = "ahead" if ratio.high < 1 else "a loss" if ratio.low > 1 else "a tie"
            lines.append(f"{field.replace('_', ' ')}: {name} over {best}, the best rival: {_told(ratio)}, {word}")
    return lines


def _all(found: Sequence[Finish], field: str) -> np.ndarray:
    return np.array([getattr(finish, field) for finish in found])


def _ratio(finishes: dict[str, list[Finish]], name: str, base: str, field: str) -> Interval:
    return paired_ratio(_all(finishes[name], field), _all(finishes[base], field))


def _told(ratio: Interval) -> str:
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
