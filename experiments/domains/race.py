"""The protocol: seconds to an error, for each way to choose points, each at its own best rate, batch and length.

* A *cell* is one run: Adam, its rate decayed to zero by a cosine over a budget of seconds. Steps are the budget over
  the *price* of the arm's step, which is measured first, of all arms in turn, several times over: the least of all, so
  that a busy machine does not favor anybody. Compiling and measuring errors stand outside the clock.
* *Tuning*: every arm tries the same grid of rates, batch sizes and budgets on a seed that is not reported, the best
  four of them on two more, and keeps what comes to the level soonest, or else nearest, in the median. Where a best rate
  or batch is an end of the grid, the next one is tried too (told). One seed chose by luck.
* *Seeds* are outer, arms inner: what disturbs the machine meets all. A run that never arrives is censored.
* Told: how many arrived, median seconds, the ratio to `uniform` and to the nearest rival paired by seed with its 95 %
  interval (Student's, of logarithms); the same by the price alone (steps times price); and errors at the end of the
  shortest budget in use, which count where uniform arrives in fewer than half of its runs. "Fastest" is said only where
  the interval against each rival lies under 1.

Cells are files in a folder, written whole: a race goes on where it was stopped.
"""

import argparse
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cells import cell

from domains import arms, problems
from isgd_jax.app.compare import Interval, paired_ratio

__all__ = ["Grid", "Race", "Trial", "captured", "main"]

Record = dict[str, Any]
TUNING_SEEDS = (1_000, 1_001, 1_002)
FINALISTS = 4
"""Trials, the best by the first of these seeds, that are made with all."""
LOOKS = 40
"""Errors are measured so many times a run."""
FEW = ("uniform", "rad", "ours")
"""The arms of the quick form."""
LBFGS_POOL = 4
"""L-BFGS works on so many plain batches."""


class Trial(NamedTuple):
    """What is tuned."""

    rate: float
    larger: float
    seconds: float

    def __str__(self) -> str:
        return f"rate {self.rate:g}, batch x{self.larger}, {self.seconds:g} s"


class Grid(NamedTuple):
    """All that each arm tries."""

    rates: tuple[float, ...]
    larger: tuple[float, ...]
    seconds: tuple[float, ...]

    def trials(self) -> list[Trial]:
        """One by one."""
        return [Trial(r, b, s) for s in self.seconds for b in self.larger for r in self.rates]


class Programs(NamedTuple):
    """The compiled parts of an arm; one for all seeds, rates and lengths."""

    begin: Callable[..., Any]
    advance: Callable[..., Any]
    """``(carry, key, rate, total, start, count)``: so many steps."""
    finish: Callable[..., Any] | None
    """``(params, lbfgs state, key, count)``."""
    error: Callable[..., jax.Array]


@functools.cache
def programs(problem: str, name: str, larger: float) -> Programs:
    """Compiled on first use."""
    domain = problems.domain(problem)
    arm = arms.arm(name, domain, larger)
    adam = optax.scale_by_adam()

    def begin(key: jax.Array) -> Any:
        params = domain.init(jax.random.fold_in(key, 0))
        return params, adam.init(params), arm.init(jax.random.fold_in(key, 1))

    def advance(carry: Any, key: jax.Array, rate: Any, total: Any, start: Any, count: Any) -> Any:
        def step(place: jax.Array, carry: Any) -> Any:
            params, opt_state, memory = carry
            at = start + place
            own = jax.random.fold_in(key, at)
            if arm.refresh_every:
                memory = jax.lax.cond(
                    (at % arm.refresh_every == 0) & (at > 0),
                    lambda: arm.refresh(params, memory, jax.random.fold_in(own, 7)),
                    lambda: memory,
                )
            gradient, memory = arm.gradient(params, memory, own, at)
            updates, opt_state = adam.update(gradient, opt_state)
            scale = rate * 0.5 * (1 + jnp.cos(jnp.pi * at.astype(jnp.float32) / total))
            return jax.tree.map(lambda p, u: p - scale * u, params, updates), opt_state, memory

        return jax.lax.fori_loop(0, count, step, carry)

    return Programs(
        begin,
        jax.jit(advance, donate_argnums=0),
        jax.jit(_lbfgs_steps(domain)) if name == "lbfgs" else None,
        jax.jit(domain.error),
    )


def _lbfgs_steps(domain: problems.Domain) -> Callable[..., Any]:
    tx = arms.lbfgs()

    def finish(params: Any, state: Any, key: jax.Array, count: jax.Array) -> Any:
        points = {
            name: term.draw(jax.random.fold_in(key, i), LBFGS_POOL * term.batch)
            for i, (name, term) in enumerate(domain.terms.items())
        }

        def loss(params: Any) -> jax.Array:
            means = [
                jnp.mean(jax.vmap(problems.loss_of(domain.terms[name]), (None, 0))(params, at))
                for name, at in points.items()
            ]
            return jnp.sum(jnp.stack(means))

        def step(_: jax.Array, carry: Any) -> Any:
            params, state = carry
            value, gradient = optax.value_and_grad_from_state(loss)(params, state=state)
            updates, state = tx.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, count, step, (params, state))

    return finish


ROUNDS = 4
"""Times that the price of each arm is measured, the others' in between."""


class Priced:
    """An arm in training at a rate of 0, for the seconds of its step."""

    def __init__(self, problem: str, name: str, larger: float) -> None:
        self.made, self.key = programs(problem, name, larger), jax.random.key(TUNING_SEEDS[0])
        self.every = max(arms.arm(name, problems.domain(problem), larger).refresh_every, 1)
        self.carry, self.at, self.least = self.made.begin(self.key), 1, math.inf
        self._seconds(self.every)  # compiles
        # Blocks of half a second, which hold the refreshes that are due.
        self.count = max(self.every, round(0.5 / self._seconds(self.every) / self.every) * self.every)

    def measure(self) -> None:
        """Two blocks more."""
        for _ in range(2):
            self.least = min(self.least, self._seconds(self.count))

    def _seconds(self, count: int) -> float:
        """Of a step, in a block of so many."""
        began = time.perf_counter()
        self.carry = jax.block_until_ready(self.made.advance(self.carry, self.key, 0.0, 1e6, self.at, count))
        self.at += count
        return (time.perf_counter() - began) / count


def prices(problem: str, which: Sequence[tuple[str, float]]) -> dict[tuple[str, float], float]:
    """Seconds of a step of arms and batches, refreshes included, measured in turn."""
    priced = {each: Priced(problem, *each) for each in which}
    for _ in range(ROUNDS):
        for each in priced.values():
            each.measure()
    return {each: found.least for each, found in priced.items()}


class Race:
    """A problem, its arms and seeds, and the folder of its cells."""

    def __init__(self, problem: str, names: Sequence[str], grid: Grid, seeds: int, folder: Path) -> None:
        self.problem, self.names, self.grid, self.seeds = problem, tuple(names), grid, seeds
        self.folder = folder / problem.replace("/", "-")
        self.level = problems.domain(problem).levels[1]
        self.prices: dict[tuple[str, float], float] = {}

    def planned(self) -> float:
        """Seconds of all cells, as far as they are not done."""
        longest, finals = max(self.grid.seconds), FINALISTS * (len(TUNING_SEEDS) - 1)
        tuning = (sum(t.seconds for t in self.grid.trials()) + finals * longest) * len(self.names)
        known = sum(json.loads(file.read_text()).get("seconds", 0.0) for file in self.folder.glob("run-*.json"))
        return max(0.0, tuning + longest * len(self.names) * self.seeds - known)

    def price(self, name: str, larger: float) -> float:
        """Of an arm's step, measured once a folder, those of all arms with this batch in turn."""
        if (name, larger) not in self.prices:
            self._measure_prices((larger,))
        return self.prices[name, larger]

    def _measure_prices(self, batches: Sequence[float]) -> None:
        which = [(name, larger) for larger in batches for name in self.names]
        key = "price-" + "-".join((*self.names, *map(str, batches)))
        found = cell(self.folder, key, lambda: {"prices": [*prices(self.problem, which).values()]})
        self.prices |= zip(which, found["prices"], strict=True)

    def run(self, name: str, trial: Trial, seed: int) -> Record:
        """A run, or what is kept of it."""
        key = f"run-{name}-{trial.rate:g}-{trial.larger}-{trial.seconds:g}-{seed}"
        return cell(self.folder, key, lambda: run(self.problem, name, trial, seed, self.price(name, trial.larger)))

    def tuned(self, name: str) -> tuple[Trial, str]:
        """The best trial of an arm, and what is to be told of the search."""
        first = {trial: self._merit(name, trial, TUNING_SEEDS[:1]) for trial in self.grid.trials()}
        tried = {trial: self._merit(name, trial) for trial in sorted(first, key=first.__getitem__)[:FINALISTS]}
        best, told = min(tried, key=tried.__getitem__), []
        for field, values in (("rate", self.grid.rates), ("larger", self.grid.larger)):
            at = getattr(best, field)
            if len(values) > 1 and at in (values[0], values[-1]):
                down, up = values[0] ** 2 / values[1], values[-1] ** 2 / values[-2]
                further = best._replace(**{field: down if at == values[0] else up})
                tried[further] = self._merit(name, further)
                told.append(f"; also tried {further}")
                best = min(tried, key=tried.__getitem__)
        return best, "".join(told)

    def _merit(self, name: str, trial: Trial, seeds: Sequence[int] = TUNING_SEEDS) -> tuple[float, float]:
        """Medians of the seconds to the level, and of the last errors; of two trials the less is the better one."""
        made = [self.run(name, trial, seed) for seed in seeds]
        ends = [record["curve"][-1][2] if record["curve"] else math.inf for record in made]
        return float(np.median([arrival(record, self.level) for record in made])), float(np.median(ends))

    def race(self) -> None:
        """Tune, run all seeds, print the table."""
        self._measure_prices(self.grid.larger)
        chosen = {}
        for name in self.names:
            chosen[name], told = self.tuned(name)
            step = 1e3 * self.price(name, chosen[name].larger)
            print(f"{self.problem:14} {name:12} {chosen[name]}; {step:.2f} ms a step{told}", flush=True)
        found: dict[str, list[Record]] = {name: [] for name in self.names}
        for seed in range(self.seeds):
            for name in self.names:
                found[name].append(self.run(name, chosen[name], seed))
        prices = {name: self.price(name, chosen[name].larger) for name in self.names}
        print("\n" + "\n".join(table(self.problem, found, prices)) + "\n", flush=True)


def run(problem: str, name: str, trial: Trial, seed: int, seconds_a_step: float) -> Record:
    """Train; (step, seconds, error) as it goes on."""
    made, key = programs(problem, name, trial.larger), jax.random.key(seed)
    adam_seconds = trial.seconds / 2 if made.finish else trial.seconds
    total = max(LOOKS, round(adam_seconds / seconds_a_step))
    carry = made.begin(key)
    jax.block_until_ready(made.advance(jax.tree.map(jnp.copy, carry), key, 0.0, 1.0, 0, 1))  # compiled
    seconds, curve = 0.0, []

    def looked(step: int, params: Any) -> bool:
        error = float(made.error(params))
        curve.append((step, seconds, error if math.isfinite(error) else math.inf))
        return math.isfinite(error)

    marks = np.unique(np.linspace(0, total, LOOKS + 1).round().astype(int))
    for start, stop in itertools.pairwise(marks):
        began = time.perf_counter()
        carry = jax.block_until_ready(made.advance(carry, key, trial.rate, float(total), int(start), int(stop - start)))
        seconds += time.perf_counter() - began
        if not looked(int(stop), carry[0]):
            break
    if made.finish and math.isfinite(curve[-1][2]):
        params, state = carry[0], arms.lbfgs().init(carry[0])
        jax.block_until_ready(made.finish(params, state, key, 1))  # compiled
        step, until = total, 2 * adam_seconds
        while seconds < until and math.isfinite(curve[-1][2]):
            began = time.perf_counter()
            params, state = jax.block_until_ready(made.finish(params, state, key, 2))
            seconds += time.perf_counter() - began
            step += 2
            looked(step, params)
    return {"problem": problem, "arm": name, **trial._asdict(), "seed": seed, "seconds": seconds, "curve": curve}


def arrival(record: Record, level: float) -> float:
    """Seconds to an error; infinite if it never came there."""
    return next((seconds for _, seconds, error in record["curve"] if error <= level), math.inf)


def arrival_by_price(record: Record, level: float, seconds_a_step: float) -> float:
    """The same by steps alone, each at the arm's price."""
    return next((step * seconds_a_step for step, _, error in record["curve"] if error <= level), math.inf)


def error_at(record: Record, seconds: float) -> float:
    """The last error measured in this time."""
    return next((error for _, at, error in reversed(record["curve"]) if at <= seconds * 1.02), math.inf)


def error_at_price(record: Record, budget: float, seconds_a_step: float) -> float:
    """The last error measured in so many seconds, each step at the arm's price."""
    reached = (error for step, _, error in reversed(record["curve"]) if step * seconds_a_step <= budget * 1.02)
    return next(reached, math.inf)


def table(problem: str, found: dict[str, list[Record]], prices: dict[str, float]) -> list[str]:
    """What came out, in lines of text."""
    lines = []
    budget = min(records[0]["seconds"] for records in found.values())
    for level in problems.domain(problem).levels:
        times = {name: np.array([arrival(r, level) for r in records]) for name, records in found.items()}
        if not any(np.isfinite(t).any() for t in times.values()):
            lines.append(f"{problem}: error {level:.3g}: no arm arrived")
            continue
        lines.append(f"{problem}: error {level:.3g}")
        lines.append(f"  {'arm':12} arrived  seconds  over uniform's [95 %]   by price  error at {budget:.0f} s")
        for name, records in found.items():
            count = int(np.isfinite(times[name]).sum())
            ratio = paired_ratio(times[name], times["uniform"]) if "uniform" in times else None
            priced = [arrival_by_price(r, level, prices[name]) for r in records]
            ends = np.median([error_at(r, budget) for r in records])
            lines.append(
                f"  {name:12} {count:3} of {len(records):<3} {np.median(times[name]):7.1f}  {_told(ratio):22} "
                f"{np.median(priced):9.1f}  {ends:.4f}"
            )
        lines.append("  " + verdict(times))
    return lines + errors_by_price(problem, found, prices)


def errors_by_price(problem: str, found: dict[str, list[Record]], prices: dict[str, float]) -> list[str]:
    """Errors at the end of the shortest budget, by steps alone: what a busy machine does to seconds is left out."""
    budget = min(records[0]["curve"][-1][0] * prices[name] for name, records in found.items())
    last = {
        name: np.array([error_at_price(record, budget, prices[name]) for record in records])
        for name, records in found.items()
    }
    lines = [f"{problem}: error after {budget:.0f} s by price: median (least to largest), over uniform's [95 %]"]
    for name, errors in last.items():
        ratio = paired_ratio(errors, last["uniform"]) if "uniform" in last else None
        spread = f"{np.median(errors):.4f} ({errors.min():.4f} to {errors.max():.4f})"
        lines.append(f"  {name:12} {spread}  {_told(ratio)}".rstrip())
    return lines


def verdict(times: dict[str, np.ndarray]) -> str:
    """Whether ours is fastest, tied or behind, against each rival that arrives in half of its runs."""
    rivals = {name: t for name, t in times.items() if not name.startswith("ours") and np.isfinite(np.median(t))}
    if "ours" not in times or len(times) == 1:
        return "nothing to compare"
    if not rivals:
        return "no rival arrives in half of its runs"
    ratios = {name: paired_ratio(times["ours"], t) for name, t in rivals.items()}
    nearest = max(ratios, key=lambda name: ratios[name].value)
    is_slower = any(ratio.low > 1 for ratio in ratios.values())
    word = "slower" if is_slower else "fastest" if all(ratio.high < 1 for ratio in ratios.values()) else "a tie"
    return f"ours over {nearest}, the nearest rival: {_told(ratios[nearest])}: {word}"


def _told(ratio: Interval | None) -> str:
    return "" if ratio is None else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def captured(
    problem: str, seed: int, trial: Trial, times: Sequence[float], count: int = 2_000
) -> list[tuple[Any, Any]]:
    """Parameters and points drawn by ``ours`` at shares of a run, for pictures."""
    made, key, domain = programs(problem, "ours", trial.larger), jax.random.key(seed), problems.domain(problem)
    arm = arms.arm("ours", domain, trial.larger)
    assert isinstance(arm, arms.Ours)
    total = max(LOOKS, round(trial.seconds / prices(problem, [("ours", trial.larger)])["ours", trial.larger]))
    carry, at, rows = made.begin(key), 0, []
    name = next(iter(domain.terms))
    sampler = arm.sampler(name)
    for share in times:
        stop = max(at + 1, round(share * total))
        carry = made.advance(carry, key, trial.rate, float(total), at, stop - at)
        at = stop
        steps = np.arange(-(-count // sampler.batch_size))
        draws = jax.vmap(lambda step, state=carry[2].states[name]: sampler.sample(key, state, step))(steps)
        points = np.asarray(draws.points).reshape(-1, draws.points.shape[-1])
        rows.append((jax.tree.map(np.asarray, carry[0]), points[:count]))
    return rows


def _arguments(doc: str | None, names: Sequence[str], rivals: Sequence[str], seeds: int) -> argparse.Namespace:
    """The options that both experiments have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=names, help="all by default, and the first with --quick")
    parser.add_argument("--arms", nargs="+", choices=rivals, default=list(rivals))
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--seconds", nargs="+", type=float, help="budgets that every arm tries")
    parser.add_argument("--quick", action="store_true", help="minutes: a few arms, three seeds, one short budget")
    parser.add_argument("--x64", action="store_true", help="in float64")
    parser.add_argument("--folder", type=Path, help="of the cells")
    parser.add_argument("--picture", type=Path, help="draw the picture of the first problem there, and stop")
    options = parser.parse_args()
    options.problems = options.problems or list(names[:1] if options.quick else names)
    return options


def main(
    doc: str | None,
    folder: str,
    names: Sequence[str],
    rivals: Sequence[str],
    *,
    seeds: int,
    full: Grid,
    quick: Grid,
    picture: Callable[[Path, str], None],
) -> None:
    """The command of an experiment: a race on each problem in turn, or the picture of the first."""
    options = _arguments(doc, names, rivals, seeds)
    if options.picture:
        picture(options.picture, options.problems[0])
        return
    where = options.folder or Path(folder + ("-x64" if options.x64 else ""))
    grid = full
    if options.x64:
        jax.config.update("jax_enable_x64", True)
    if options.quick:
        grid, options.arms, options.seeds = quick, [name for name in options.arms if name in FEW], 3
    if options.seconds:
        grid = grid._replace(seconds=tuple(options.seconds))
    races = [Race(name, options.arms, grid, options.seeds, where) for name in options.problems]
    print(f"at most {sum(race.planned() for race in races) / 60:.0f} minutes, compiling aside", flush=True)
    print(f"each arm tries rates {grid.rates}, batches x{grid.larger}, budgets of {grid.seconds} s", flush=True)
    for race in races:
        race.race()
