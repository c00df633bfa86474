"""The protocol: how well each arm does in the same seconds, each at its own best rate, batch and length.

* A *run* trains from first parameters to the end of its budget of seconds; the rate decays to zero by a cosine over
  the share of the budget that is spent. By the *clock* a run stops when its seconds are over, whatever the machine did
  meanwhile; by *price* it makes as many steps as fit when each costs the arm's price, which is measured first: the
  least seconds of a core a step took in a few runs of the whole budget, made arm by arm in turn. Seconds of a core
  leave out what others on the machine took; pinned to one core of a machine at rest they are those of the clock, so
  pin it. Compiling and measuring stand outside.
* *Tuning*: all arms try the same grid of rates, batches and lengths (shares of the budget: who overfits may stop
  early), by price, on seeds that are not reported. Where the best of any arm lies on an edge of rates or batches, all
  arms try one more there, twice at most; an arm whose best is on an edge still is told.
* *Reported*: each seed by the clock and by price. Seeds are outer, arms inner, so what disturbs the machine meets all.
* An arm is called best only where the interval of its paired difference to the best rival leaves zero out.

Cells are files in a folder, written whole: a race goes on where it was stopped, and refuses a folder of other settings.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from cells import cell

from isgd_jax.app.compare import Interval, aligned, mean

__all__ = ["Bench", "Cells", "Grid", "Measure", "Meter", "Plan", "Race", "Trial", "arguments", "plan", "run"]

Record = dict[str, Any]
TUNING_SEED, PRICE_SEED = 1_000, 2_000
PRICE_RUNS = 3
EXTENSIONS = 2
FIRST_LOOK = 10
"""Steps before a run by the clock knows what a step costs it."""


class Trial(NamedTuple):
    """What is tuned: the rate, the batch, and the length of a run as a share of the budget."""

    rate: float
    batch: int
    share: float

    def __str__(self) -> str:
        return f"rate {self.rate:.2g}, batch {self.batch}, {self.share:g} of the seconds"


class Grid(NamedTuple):
    """All that each arm tries, each in rising order."""

    rates: tuple[float, ...]
    batches: tuple[int, ...]
    shares: tuple[float, ...]

    def trials(self) -> list[Trial]:
        """One by one."""
        return [Trial(r, b, s) for s in self.shares for b in self.batches for r in self.rates]

    def wider(self, chosen: Iterable[Trial]) -> "Grid":
        """One more beyond each edge that a chosen trial is on: a third or three times the rate, half or twice the rest.

        An axis with one value alone is not searched, and a whole budget is the longest run.
        """
        chosen = list(chosen)
        rates = _wider(self.rates, [t.rate for t in chosen], lambda x: x / 3, lambda x: 3 * x)
        batches = _wider(self.batches, [t.batch for t in chosen], lambda x: x // 2, lambda x: 2 * x)
        shares = _wider(self.shares, [t.share for t in chosen], lambda x: x / 2, lambda x: None)
        return Grid(rates, batches, shares)


def _wider(values: tuple[Any, ...], chosen: list[Any], down: Callable[..., Any], up: Callable[..., Any]) -> Any:
    if len(values) == 1:
        return values
    below = [down(values[0])] if values[0] in chosen else []
    above = [up(values[-1])] if values[-1] in chosen else []
    return tuple(x for x in (*below, *values, *above) if x)


class Measure(NamedTuple):
    """A number of a finished run, by the name it has in its record."""

    name: str
    text: str
    is_better_high: bool
    digits: int = 3


class Meter:
    """The seconds of a run: what is spent of its budget, and how many steps to make before it is looked at again.

    Args:
        seconds: the budget.
        price: of a step in seconds of a core; None goes by time.
        by_core: whether that is the time of a core, or that of the clock.
    """

    def __init__(self, seconds: float, price: float | None = None, *, by_core: bool = False) -> None:
        self.seconds, self.price, self.by_core = seconds, price, by_core
        self.elapsed, self.core, self.steps = 0.0, 0.0, 0
        self.slope = 0.0 if price is None else price / seconds
        """The share of the budget that a step spends."""

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, 1 at the end."""
        time_spent = self.core if self.by_core else self.elapsed
        return (time_spent if self.price is None else self.steps * self.price) / self.seconds

    def timed(self, function: Callable[..., Any], *args: Any, steps: int = 0) -> Any:
        """What a function gives, its seconds and steps counted.

        Args:
            function: called at once, and waited for.
            args: its arguments.
            steps: how many steps of training it makes.
        """
        began, core = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(function(*args))
        took, took_core = time.perf_counter() - began, time.process_time() - core
        self.elapsed, self.core, self.steps = self.elapsed + took, self.core + took_core, self.steps + steps
        if steps and self.price is None:
            self.slope = (took_core if self.by_core else took) / steps / self.seconds
        return result

    def block(self, longest: int) -> int:
        """Steps to the next look, at most ``longest``; 0 when the budget is spent, never before the first step."""
        if not self.steps:
            return min(longest, FIRST_LOOK if self.price is None else max(1, round(self.seconds / self.price)))
        return max(0, min(longest, round((1.0 - self.progress) / self.slope)))


class Bench(Protocol):
    """What an experiment hands in."""

    def train(self, arm: str, trial: Trial, seed: int, meter: Meter) -> Record:
        """A run to the end of the meter's budget; measures, and ``merit``, lower is better, from validation alone."""
        ...


class Cells:
    """Finished runs, a file each.

    Raises:
        ValueError: the folder was filled under other settings.
    """

    def __init__(self, folder: Path, settings: Record) -> None:
        self.folder = folder
        settings = json.loads(json.dumps(settings))
        before = self.get("settings", lambda: settings)
        if before != settings:
            raise ValueError(f"{folder} holds runs of {before}, expected {settings}: give another --folder")

    def has(self, name: str) -> bool:
        """Whether it is there."""
        return self._file(name).exists()

    def get(self, name: str, make: Callable[[], Record]) -> Record:
        """What is there under a name, or what is made now and kept."""
        return cell(self.folder, name, make)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"


class Plan(NamedTuple):
    """How long a race is."""

    grid: Grid
    seconds: float
    """The budget of a run."""
    seeds: int
    tuning_seeds: int = 1
    extensions: int = EXTENSIONS
    """How often the grid is extended where the best of an arm lies on its edge."""


class Race:
    """Arms, a plan, and the folder of its cells.

    Args:
        bench: trains.
        arms: by name, ``uniform`` first.
        ours: those of them that are compared with the best of the others.
        measures: the first is what arms are compared by.
        plan: how long it is.
        cells: where runs are kept.
    """

    def __init__(
        self,
        bench: Bench,
        arms: Sequence[str],
        ours: Sequence[str],
        measures: Sequence[Measure],
        plan: Plan,
        cells: Cells,
    ) -> None:
        self.bench, self.arms, self.measures, self.plan, self.cells = bench, tuple(arms), tuple(measures), plan, cells
        self.ours = tuple(name for name in ours if name in arms)

    def planned(self) -> tuple[float, float]:
        """Seconds of the cells that are not done: without and with the extensions of the grid, compiling aside."""
        plan = self.plan
        length = {share: share * plan.seconds for share in plan.grid.shares}
        first = sum(
            length[trial.share]
            for trial in plan.grid.trials()
            for arm in self.arms
            for seed in range(plan.tuning_seeds)
            if not self.cells.has(self._name(arm, trial, TUNING_SEED + seed, "price"))
        )
        prices = sum(
            plan.seconds
            for arm in self.arms
            for batch in plan.grid.batches
            for run in range(PRICE_RUNS)
            if not self.cells.has(self._price_name(arm, batch, run))
        )
        made = [file.name.split("-seed")[-1] for file in self.cells.folder.glob("run-*.json")]
        wanted = {f"{seed}-{way}.json" for seed in range(plan.seeds) for way in ("clock", "price")}
        runs = max(0, len(wanted) * len(self.arms) - sum(name in wanted for name in made)) * plan.seconds
        widest = plan.grid
        for _ in range(plan.extensions):
            widest = widest.wider([Trial(*(axis[0] for axis in widest)), Trial(*(axis[-1] for axis in widest))])
        more = sum(trial.share for trial in widest.trials()) - sum(trial.share for trial in plan.grid.trials())
        return first + prices + runs, first + prices + runs + more * plan.seconds * len(self.arms) * plan.tuning_seeds

    def price(self, arm: str, batch: int) -> float:
        """Seconds of a core a step takes, refreshes and all: the least of whole runs at the middle rate.

        The first call for a batch measures all arms in turn.
        """
        rate = self.plan.grid.rates[len(self.plan.grid.rates) // 2]
        found = {}
        for run in range(PRICE_RUNS):
            for name in self.arms:
                cell = self._price_name(name, batch, run)
                found[name, run] = self.cells.get(cell, lambda name=name, run=run: self._priced(name, rate, batch, run))
        return min(found[arm, run]["price"] for run in range(PRICE_RUNS))

    def _priced(self, arm: str, rate: float, batch: int, run: int) -> Record:
        meter = Meter(self.plan.seconds, by_core=True)
        self.bench.train(arm, Trial(rate, batch, 1.0), PRICE_SEED + run, meter)
        return {"price": meter.core / meter.steps}

    def run(self, arm: str, trial: Trial, seed: int, way: str) -> Record:
        """A run by the ``clock`` or by ``price``, or what is kept of it."""

        def make() -> Record:
            meter = Meter(trial.share * self.plan.seconds, self.price(arm, trial.batch) if way == "price" else None)
            found = self.bench.train(arm, trial, seed, meter)
            return {"steps": meter.steps, "seconds": meter.elapsed, "core_seconds": meter.core, **found}

        return self.cells.get(self._name(arm, trial, seed, way), make)

    def tuned(self) -> tuple[dict[str, Trial], Grid]:
        """The best trial of each arm, and the grid that all of them tried."""
        grid, seeds = self.plan.grid, [TUNING_SEED + seed for seed in range(self.plan.tuning_seeds)]
        for extension in range(self.plan.extensions + 1):
            merits: dict[str, dict[Trial, float]] = {arm: {} for arm in self.arms}
            for trial in grid.trials():
                for arm in self.arms:
                    found = [self.run(arm, trial, seed, "price")["merit"] for seed in seeds]
                    merits[arm][trial] = math.inf if None in found else float(np.mean(found))
            chosen = {arm: min(tried, key=lambda trial: tried[trial]) for arm, tried in merits.items()}
            wider = grid.wider(chosen.values())
            if wider == grid or extension == self.plan.extensions:
                break
            grid = wider
        return chosen, grid

    def race(self) -> None:
        """Say how long it takes, tune, run all seeds, print what came out."""
        least, most = (seconds / 60 for seconds in self.planned())
        print(f"{least:.0f} minutes, {most:.0f} where the grid is extended, compiling and measuring aside", flush=True)
        chosen, grid = self.tuned()
        axes = f"rates {_listed(grid.rates)}, batches {_listed(grid.batches)}, shares {_listed(grid.shares)}"
        print(f"each arm tried {axes} of {self.plan.seconds:g} s, {self.plan.tuning_seeds} seeds each")
        for arm, trial in chosen.items():
            edges = [
                name
                for name, value, axis in zip(("rate", "batch"), trial, grid, strict=False)
                if len(axis) > 1 and value in (axis[0], axis[-1])
            ]
            still = f"; its {' and '.join(edges)} still on an edge" if edges else ""
            print(f"{arm:18} {trial}; {1e3 * self.price(arm, trial.batch):.3g} ms a step{still}", flush=True)
        found: dict[str, dict[str, list[Record]]] = {way: {arm: [] for arm in self.arms} for way in ("clock", "price")}
        for seed in range(self.plan.seeds):
            for way, records in found.items():
                for arm in self.arms:
                    records[arm].append(self.run(arm, chosen[arm], seed, way))
        for way, records in found.items():
            print("\n" + "\n".join(table(way, records, self.measures, self.ours)), flush=True)

    @staticmethod
    def _name(arm: str, trial: Trial, seed: int, way: str) -> str:
        return f"run-{arm}-{trial.rate:.6g}-{trial.batch}-{trial.share:g}-seed{seed}-{way}"

    @staticmethod
    def _price_name(arm: str, batch: int, run: int) -> str:
        return f"price-{arm}-{batch}-{run}"


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.2g}" if isinstance(value, float) else str(value) for value in values)


def column(records: Sequence[Record], measure: Measure) -> np.ndarray:
    """A measurement of every run; the worst there is where a run diverged (None)."""
    worst = -math.inf if measure.is_better_high else math.inf
    return np.array([worst if r[measure.name] is None else r[measure.name] for r in records], np.float64)


def measured_less(ours: Sequence[Record], base: Sequence[Record], measure: Measure) -> Interval:
    """The mean paired difference of a measurement, with Student's 95 % interval.

    Boundless where a run diverged, for then nothing is shown.
    """
    ours, base = column(ours, measure), column(base, measure)
    if not (np.isfinite(ours).all() and np.isfinite(base).all()):
        return Interval(math.nan, -math.inf, math.inf)
    return mean(ours - base)


def told(interval: Interval, digits: int) -> str:
    """An interval as it is printed."""
    return f"{interval.value:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def table(way: str, found: dict[str, list[Record]], measures: Sequence[Measure], ours: Sequence[str] = ()) -> list[str]:
    """What came out, a line an arm: medians, and the first measure less uniform's; then who is best."""
    first, base = measures[0], next(iter(found))
    seeds = len(found[base])
    heads = ["arm", "steps", "seconds", "of a core", f"{first.text} (least to largest)", f"less {base}'s [95 %]"]
    lines = [heads + [measure.text for measure in measures[1:]]]
    for arm, records in found.items():
        values = column(records, first)
        spread = (
            f"{np.median(values):.{first.digits}f} ({values.min():.{first.digits}f} to {values.max():.{first.digits}f})"
        )
        gap = "" if arm == base else told(measured_less(records, found[base], first), first.digits)
        rest = [f"{np.median(column(records, m)):.{m.digits}f}" for m in measures[1:]]
        steps, seconds, core = (np.median([r[name] for r in records]) for name in ("steps", "seconds", "core_seconds"))
        lines.append([arm, f"{steps:,.0f}", f"{seconds:.1f}", f"{core:.1f}", spread, gap, *rest])
    head = f"equal seconds by the clock, {seeds} seeds" if way == "clock" else f"equal seconds by price, {seeds} seeds"
    return [head, *aligned(lines).splitlines(), *verdicts(found, first, ours)]


def verdicts(found: dict[str, list[Record]], measure: Measure, ours: Sequence[str]) -> list[str]:
    """Whether each of ours is best, tied or behind, against the rival with the best median."""
    rivals = {arm: column(records, measure) for arm, records in found.items() if arm not in ours}
    if not rivals:
        return []
    sign = 1.0 if measure.is_better_high else -1.0
    best = max(rivals, key=lambda arm: sign * float(np.median(rivals[arm])))
    lines = []
    for arm in ours:
        gap = measured_less(found[arm], found[best], measure)
        low, high = sorted((sign * gap.low, sign * gap.high))
        word = "best" if low > 0 else "behind" if high < 0 else "a tie"
        lines.append(f"{arm} less {best}, the best rival, in {measure.text}: {told(gap, measure.digits)}: {word}")
    return lines


def arguments(doc: str | None, arms: Sequence[str], folder: str, seeds: int) -> argparse.ArgumentParser:
    """The options that both experiments have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=arms, default=list(arms), help="uniform is among them always")
    parser.add_argument("--seeds", type=int, default=seeds, help="reported")
    parser.add_argument("--quick", action="store_true", help="minutes: three seeds, one batch, short budgets")
    parser.add_argument(
        "--extensions", type=int, choices=range(EXTENSIONS + 1), default=EXTENSIONS, help="of a grid whose edge is best"
    )
    parser.add_argument("--folder", type=Path, default=Path(folder), help="of the cells")
    return parser


def plan(options: argparse.Namespace, full: Plan, quick: Plan) -> Plan:
    """The plan that was asked for."""
    chosen = quick if options.quick else full._replace(seeds=options.seeds)
    return chosen._replace(extensions=options.extensions)


def run(
    bench: Bench,
    options: argparse.Namespace,
    ours: Sequence[str],
    measures: Sequence[Measure],
    plan: Plan,
    settings: Record,
) -> None:
    """The race that was asked for.

    Args:
        bench: trains.
        options: of `arguments`.
        ours: arms that are compared with the best of the others.
        measures: the first is what arms are compared by.
        plan: how long it is.
        settings: what else decides a result; with the budget, a folder's cells are of one choice of it.

    Raises:
        SystemExit: the folder was filled under other settings.
    """
    folder = options.folder / ("quick" if options.quick else "full")
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(options.folder / "compiled"))
    arms = ["uniform", *(arm for arm in options.arms if arm != "uniform")]
    try:
        cells = Cells(folder, {"seconds": plan.seconds, **settings})
    except ValueError as error:
        raise SystemExit(str(error)) from None
    Race(bench, arms, ours, measures, plan, cells).race()
