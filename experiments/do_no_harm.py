"""Does `fit` ever cost more than it brings, and does the probe know beforehand?

Question: twelve problems, six on which gradients of few examples should count and six on which they should not
(`harm/problems.py`, fixed before the first run). On each, `isgd.fit` with `importance_sampler` as it comes, which
leaves its estimator off where norms cost more than they promise, against `isgd.fit` with
`shuffled_epochs(monitor=False)`, which is plain SGD at its usual price. No engine.

Protocol   Nesterov momentum 0.9, or Adam; the rate decays to zero by a cosine over a number of steps that is the same
           for both sides. Rates are tuned for each side on three seeds that are not reported: of three rates, and one
           more where the best is an end, the one that is soonest, in the median, at the loss that both sides come to.
           Then seeds outer, sides inner. Seconds count from the second step on: compiling and measuring the loss stand
           outside, all else of `fit` (timing, deciding, refreshing) inside. They are those of the process, which on one
           core is what a clock on the wall of a quiet machine shows; the wall's stand beside.
           Told, all over plain, paired by seed with 95 % intervals: seconds to a common mean training loss, the worse
           end of the pair, and the steps alone; and the last loss. A side wins where seconds differ by more than 5 %;
           it is harm where the interval lies above 1.05.
           The probe is asked after two fifths of the steps of plain SGD.

Claims     `fit` never costs more than 5 % beyond its interval; each side wins at least 4 of 12; the probe names the
           winner in at least 10 of 12, ties not counted.

Commands   python experiments/do_no_harm.py                    all, half an hour on one core (it says at most)
           python experiments/do_no_harm.py --quick            three problems, two seeds, minutes
           python experiments/do_no_harm.py --problems burgers digits --seeds 5
It goes on where it was stopped. Pin it to a core: taskset -c 1.

Result     Five seeds, one problem after the other on one core of two; the other core was in use.

           problem       seconds            steps              last loss          cost learnt  probe       won by
           tiny model    0.68 [0.20, 2.27]  0.70 [0.16, 3.07]  0.97 [0.89, 1.06]  2.2    3 %  importance  importance
           long tail     0.74 [0.67, 0.82]  0.56 [0.50, 0.62]  0.55 [0.44, 0.68]  1.5   81 %  importance  importance
           burgers       0.74 [0.55, 1.00]  0.66 [0.45, 0.95]  0.60 [0.43, 0.82]  1.9    4 %  importance  importance
           fashion       0.83 [0.71, 0.98]  0.65 [0.57, 0.74]  0.71 [0.56, 0.88]  1.4   68 %  importance  importance
           language      1.03 [0.84, 1.28]  1.00 [0.78, 1.28]  1.00 [0.99, 1.01]  0.9   29 %  importance  tie
           image         1.05 [0.97, 1.14]  1.00 [0.89, 1.12]  1.00 [0.98, 1.01]  1.7    4 %  plain       plain
           convex        1.08 [0.93, 1.26]  0.94 [0.85, 1.04]  1.00 [1.00, 1.00]  2.3    3 %  plain       plain
           digits        1.10 [0.36, 3.36]  0.78 [0.30, 2.02]  0.94 [0.58, 1.52]  1.9   49 %  plain       plain
           wrong labels  1.14 [0.91, 1.42]  1.06 [0.86, 1.31]  1.02 [0.97, 1.06]  1.5    5 %  plain       plain
           regression    1.15 [1.02, 1.30]  1.04 [1.01, 1.08]  1.00 [1.00, 1.00]  2.5    3 %  plain       plain
           huge batch    1.49 [0.75, 2.96]  1.36 [0.70, 2.62]  1.09 [0.84, 1.41]  1.8   16 %  plain       plain
           separable     2.53 [0.64, 10.0]  1.28 [0.25, 6.53]  1.06 [0.72, 1.56]  2.3   96 %  plain       plain

           "cost" is that of a step that learns over a plain one, as `fit` measured it, "learnt" the share of such
           steps, medians. **Harm is certain nowhere**; two wins are certain, long tail and fashion. Won by importance
           sampling 4, by plain SGD 7 (claimed: 4 each): met, in medians. But of two of the four, burgers and tiny
           model, nearly all steps are plain ones: noise between seeds. In the run before this one, with draws that went
           on across refreshes, these two stood at 1.01 and 1.22. **The probe is right in all 11 that are no ties** (9
           of 10 in that run), the constant guess "plain" in 7; it trains on both ways from two fifths of the steps, at
           the rate of plain SGD, for as many steps as are left.

           What remains on convex and regression, runs of 0.15 seconds whose steps take 0.06 ms, is finding out what
           steps cost, and some µs of each step. All of their rates end alike, and were chosen by luck until the rate of
           a side was the one that is soonest at the loss that both sides come to: of rates that end within one percent,
           the one soonest there gave regression 4.1 [3.0, 5.6] (0.01 for plain SGD, 0.003 for importance sampling) and
           convex 1.23 [1.02, 1.48]. The other ten keep their rates but tiny model (0.81). In a run in which noise that
           even batches cancel within ten steps counted in full, huge batch had 1.95 [1.16, 3.29], 93 % of its steps by
           norms.

           Until rates were tuned on three seeds Burgers' equation stood here with 0.39 [0.34, 0.44]: one seed had given
           plain SGD 0.003 and importance sampling 0.01, by a difference of half a percent, though 82 % of the steps of
           both were of one kind. The probe that went by the promise of variance was right in 1 of 8.

           Runs before this one are why `fit` is as it is. An estimator that drew by score while it was left off ended
           digits 15 times as high. Shares of uniform draws below 0.2 made the rate that suits plain SGD on digits
           diverge: 9.9 [6.6, 15] times the seconds (`benchmarks/largest_weight.py`). With the state handed from step to
           step array by array, resting steps of 0.1 ms took 1.2 plain ones (`training/packing.py`). The probe timed
           steps in another way than `fit` makes them, and found them 2 to 11 times as dear.
"""

import argparse
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
from clocks import core_seconds
from harm.problems import CASES, Case, case

import isgd_jax as isgd
from isgd_jax.app.compare import Interval, paired_ratio
from isgd_jax.app.probe import Probed, probe
from isgd_jax.training.promise import promise

SIDES = ("plain", "importance")
QUICK = ("digits", "regression", "convex")
TUNING_SEEDS, LOOKS = (1_000, 1_001, 1_002), 40
"""One seed chose rates by luck: on Burgers' equation plain SGD had 0.003 and importance sampling 0.01."""
ALIKE = 1.001
"""Losses within this factor are alike."""
PROBED_AT = 0.4
TIE, HARM = 1.05, 1.05
HOURS_A_CELL = 5 / 3600
"""About what a cell takes on one core, compiling included."""

Record = dict[str, Any]


class Decaying(NamedTuple):
    """A rate that falls to zero by a cosine; its numbers are no constants, so that rates share a program."""

    step: jax.Array
    rate: jax.Array
    steps: jax.Array


def decaying(rate: float, steps: int) -> optax.GradientTransformation:
    """Updates times the negative rate."""

    def init(params: Any) -> Decaying:
        del params
        return Decaying(jnp.float32(0), jnp.float32(rate), jnp.float32(steps))

    def update(updates: Any, state: Decaying, params: Any = None) -> tuple[Any, Decaying]:
        del params
        now = 0.5 * state.rate * (1.0 + jnp.cos(jnp.pi * state.step / state.steps))
        return jax.tree.map(lambda u: -now * u, updates), state._replace(step=state.step + 1.0)

    return optax.GradientTransformation(init, update)


def optimizer(name: str, rate: float, steps: int) -> optax.GradientTransformation:
    """For mean gradients."""
    inner = optax.scale_by_adam() if name == "adam" else optax.trace(0.9, nesterov=True)
    return optax.chain(inner, decaying(rate, steps))


def clocks() -> np.ndarray:
    """Seconds of this process on any core (on an accelerator those of the wall), and of the wall."""
    return np.array([core_seconds(), time.perf_counter()])


class Curve(isgd.Callback):
    """The mean loss over the whole training set, by seconds of training alone: (step, cpu, loss, wall)."""

    def __init__(self, mean_loss: Callable[[Any], float], steps: int) -> None:
        self._mean_loss, self._marks = mean_loss, set(np.linspace(0, steps, LOOKS + 1).round().astype(int))
        self.curve: list[tuple[int, float, float, float]] = []
        self._spent, self._began = np.zeros(2), np.zeros(2)
        self._learning = 0
        self.messages: list[str] = []

    def begin(self, run: Any) -> None:
        """Compile what `fit` would compile between steps."""
        run.rehearse(1, rests=run.costs is not None, look=True)
        if run.costs is not None:
            run.refresher.rehearse(run.state.sampler, chunks=0)
            for is_open in (True, False):
                sizes = {"num_examples": run.sampler.num_examples, "batch_size": run.sampler.batch_size}
                promise(run.state.sampler.monitor, **sizes, is_open=is_open)

    def told(self, run: Any, text: str) -> None:
        self.messages.append(f"{run.step}: {text}")

    def stepped(self, run: Any, info: Any) -> None:
        gate = run.cost_gate
        self._learning += gate is None or not run.costs.rests(gate, run.step)
        if run.step == 1:
            jax.block_until_ready(info.loss)
            self._began = clocks()
        elif run.step in self._marks:
            jax.block_until_ready(run.state.params)
            self._spent += clocks() - self._began
            loss = self._mean_loss(run.state.params)
            cpu, wall = (float(x) for x in self._spent)
            self.curve.append((run.step, cpu, loss if math.isfinite(loss) else math.inf, wall))
            if not math.isfinite(loss):
                run.stop("diverged")
            self._began = clocks()

    def end(self, run: Any) -> None:
        gate = run.cost_gate
        self.cost = None if gate is None else float(gate.step_cost)
        self.learnt = self._learning / max(run.step, 1)


class Race:
    """A problem and the folder of its cells."""

    def __init__(self, name: str, folder: Path, data_dir: str | None, shorter: int) -> None:
        self.name, self.folder, self._data_dir = name, folder / name.replace(" ", "-"), data_dir
        self._shorter = shorter
        self._made: tuple[Case, Callable[[Any], float]] | None = None

    @property
    def made(self) -> tuple[Case, Callable[[Any], float]]:
        """The problem, and its mean loss; made when a cell needs it."""
        if self._made is None:
            found = case(self.name, self._data_dir)
            found = found._replace(steps=found.steps // self._shorter)
            evaluate = found.problem.evaluator()
            self._made = found, lambda params: float(evaluate(params, found.problem.train)["loss"])
        return self._made

    def run(self, side: str, rate: float, seed: int) -> Record:
        """A run, or what is kept of it."""
        return cell(self.folder, f"run-{side}-{rate:g}-{seed}", lambda: self._run(side, rate, seed))

    def _run(self, side: str, rate: float, seed: int) -> Record:
        found, mean_loss = self.made
        size = found.problem.num_examples
        if side == "plain":
            sampler = isgd.shuffled_epochs(size, batch_size=found.batch_size, monitor=False)
        else:
            sampler = isgd.importance_sampler(size, batch_size=found.batch_size)
        tx = optax.chain(isgd.importance_weighting(size), optimizer(found.optimizer, rate, found.steps))
        curve = Curve(mean_loss, found.steps)
        key = jax.random.key(seed)
        isgd.fit(found.problem, sampler, tx, num_steps=found.steps, key=key, callbacks=[curve])
        return {"curve": curve.curve, "cost": curve.cost, "learnt": curve.learnt, "messages": curve.messages}

    def tuned(self) -> dict[str, tuple[float, list[float]]]:
        """For each side the best rate, and all that were tried."""
        rates = {side: sorted(self._rates()) for side in SIDES}
        best = self._best(rates)
        for side, tried in rates.items():
            if best[side] in (tried[0], tried[-1]):
                rates[side] = sorted([*tried, best[side] / 3 if best[side] == tried[0] else best[side] * 3])
        best = self._best(rates)
        return {side: (best[side], rates[side]) for side in SIDES}

    def _best(self, rates: dict[str, list[float]]) -> dict[str, float]:
        """For each side the rate that is soonest, in steps, at a loss that both sides come to, in medians of the seeds.

        That loss is the larger one of those that the two sides end with at their best.
        """
        curves = {
            (side, rate): [self.run(side, rate, seed)["curve"] for seed in TUNING_SEEDS]
            for side in SIDES
            for rate in rates[side]
        }
        ends = {which: float(np.median([curve[-1][2] for curve in made])) for which, made in curves.items()}
        level = ALIKE * max(min(ends[side, rate] for rate in rates[side]) for side in SIDES)
        times = {which: np.median([arrival(curve, level, 0) for curve in made]) for which, made in curves.items()}
        return {side: min(rates[side], key=lambda rate, side=side: times[side, rate]) for side in SIDES}

    def _rates(self) -> Sequence[float]:
        return cell(self.folder, "rates", lambda: {"rates": self.made[0].rates})["rates"]

    def probed(self, rate: float, after: int) -> Record:
        """What the probe says after so many plain steps at a rate."""
        return cell(self.folder, f"probe-{rate:g}-{after}", lambda: self._probed(rate, after))

    def _probed(self, rate: float, after: int) -> Record:
        found, _ = self.made
        plain = Probed(
            problem=found.problem,
            optimizer=optimizer(found.optimizer, rate, found.steps),
            batch_size=found.batch_size,
            scorer=isgd.scorers.grad_norm(found.problem.loss_fn),
            chunk_size=1_024,
            mixture=0.3,
            seed=TUNING_SEEDS[0],
        )
        told = probe(plain, after=after, ages=[10, 100], num_examples=4_096, trial_steps=found.steps - after)
        return {
            "pays": None if told.tried is None else told.tried.pays,
            "words": told.words,
            "tried": told.tried and told.tried._asdict(),
        }


def arrival(curve: Sequence[Sequence[float]], level: float, axis: int) -> float:
    """Steps (axis 0) or seconds (1 of the process, 3 of the wall) to a loss, a straight line between two looks.

    >>> arrival([(10, 1.0, 4.0, 1.1), (20, 2.0, 2.0, 2.2)], 3.0, 1)
    1.5
    """
    before: Sequence[float] = (0.0, 0.0, math.inf, 0.0)
    for point in curve:
        if point[2] <= level:
            share = (before[2] - level) / (before[2] - point[2]) if math.isfinite(before[2]) else 1.0
            return before[axis] + share * (point[axis] - before[axis])
        before = point
    return math.inf


class Row(NamedTuple):
    """What came out of a problem, importance sampling over plain."""

    seconds: Interval
    """Of the process."""
    steps: Interval
    wall: Interval
    loss: Interval

    @property
    def winner(self) -> str:
        """By seconds of the process, beyond a tie."""
        if self.seconds.value > TIE:
            return "plain"
        return "importance" if self.seconds.value < 1 / TIE else "tie"


def row(plain: Sequence[Record], ours: Sequence[Record]) -> Row:
    """Ratios over pairs of the same seed."""
    levels = [max(r["curve"][-1][2] for r in pair) for pair in zip(plain, ours, strict=True)]
    times = [
        [[arrival(r["curve"], level, axis) for r, level in zip(side, levels, strict=True)] for side in (ours, plain)]
        for axis in (1, 0, 3)
    ]
    losses = [[r["curve"][-1][2] for r in side] for side in (ours, plain)]
    return Row(*(paired_ratio(*pair) for pair in (*times, losses)))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="three problems, two seeds, a quarter of the steps")
    parser.add_argument("--probe-only", action="store_true", help="say what the probe says; no race")
    parser.add_argument("--folder", type=Path, default=Path("runs/do_no_harm"), help="of the cells")
    parser.add_argument("--data-dir", default=None, help="where prepared data sets are kept")
    args = parser.parse_args(argv)
    names, seeds, shorter = args.problems or list(CASES), args.seeds, 1
    if args.quick:
        names, seeds, shorter = args.problems or list(QUICK), 2, 4
    races = {
        name: Race(name, args.folder / ("quick" if args.quick else "whole"), args.data_dir, shorter) for name in names
    }
    most = len(names) * (2 * (4 * len(TUNING_SEEDS) + seeds) + 2)
    cells = most - sum(len(list(race.folder.glob("*.json"))) for race in races.values())
    print(
        f"at most {max(cells, 0)} cells to go, about {max(cells, 0) * HOURS_A_CELL:.1f} hours on one core", flush=True
    )
    jax.config.update("jax_compilation_cache_dir", str(args.folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if args.probe_only:
        for race in races.values():
            asked(race)
        return
    found = {}
    for name, race in races.items():
        found[name] = told(race, seeds)
    print("\n" + "\n".join(summary(found)))


def asked(race: Race) -> bool | None:
    """Ask the probe, after a part of the steps of plain SGD at its best rate, and print what it says."""
    rate, _ = race.tuned()["plain"]
    steps = race.run("plain", rate, TUNING_SEEDS[0])["curve"][-1][0]
    found = race.probed(rate, round(PROBED_AT * steps))
    print(f"{race.name:13} the probe said {_word(found['pays'])}: {' '.join(found['words'])}", flush=True)
    return found["pays"]


def told(race: Race, seeds: int) -> tuple[Row, bool | None]:
    """Run a problem and print its lines; what came out, and what the probe had said."""
    tuned = race.tuned()
    for side, (rate, tried) in tuned.items():
        print(f"{race.name:13} {side:10} rate {rate:g} of {', '.join(f'{x:g}' for x in tried)}", flush=True)
    pays = asked(race)
    runs: dict[str, list[Record]] = {side: [] for side in SIDES}
    for seed in range(seeds):
        for side in SIDES:
            runs[side].append(race.run(side, tuned[side][0], seed))
    made = row(runs["plain"], runs["importance"])
    ours = runs["importance"]
    print(
        f"{race.name:13} seconds {_told(made.seconds)}  steps {_told(made.steps)}  wall {_told(made.wall)}  "
        f"last loss {_told(made.loss)}  "
        f"norms cost {np.median([r['cost'] for r in ours]):.2f}, learnt in {np.median([r['learnt'] for r in ours]):.0%}"
        f" of the steps; the probe said {_word(pays)}: {made.winner}",
        flush=True,
    )
    return made, pays


def summary(found: dict[str, tuple[Row, bool | None]]) -> list[str]:
    """The claims, against what came out."""
    winners = {name: made.winner for name, (made, _) in found.items()}
    decided = [name for name, winner in winners.items() if winner != "tie"]
    said = {name: None if pays is None else ("importance" if pays else "plain") for name, (_, pays) in found.items()}
    harmed = [name for name, (made, _) in found.items() if made.seconds.low > HARM]
    guesses = {side: sum(winners[name] == side for name in decided) for side in SIDES}
    right = sum(said[name] == winners[name] for name in decided)
    ties = len(found) - len(decided)
    return [
        f"won by importance sampling {guesses['importance']}, by plain SGD {guesses['plain']}, ties {ties}",
        f"harm, the interval of seconds above {HARM}: {', '.join(harmed) or 'nowhere'}",
        f"the probe named the winner in {right} of {len(decided)} decided; the constant guesses are right in "
        f"{guesses['plain']} (plain) and {guesses['importance']} (importance)",
    ]


def _told(found: Interval) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _word(pays: bool | None) -> str:
    return "later" if pays is None else ("importance" if pays else "plain")


if __name__ == "__main__":
    main()
