"""Scoring while training: what it costs the trainer, how old the scores are, and how many scorers a task needs.

Claims under test, on two forced CPU devices of a machine with two cores, Fashion-MNIST, MLP 784-512x4-10, M = 128:

* ``speed``: with the local engine, the trainer's steps/s and the scores/s, each relative to running alone, sum to at
  least 0.85, and scores/s is at least 0.30 of alone; the virtual-time model predicts the age that is measured;
* ``loss``: the final train loss with the local engine is that of inline relaxed scoring at the same mean age: the 95 %
  interval of the paired difference contains 0, its half-width is at most 10 %;
* ``plan``: what the model says of larger tasks: how many scorers keep the mean age under a target.

Commands: python experiments/benchmarks/engines.py speed | loss [--seeds 5] | plan [--examples N --rate R ...]
Times: 2 minutes; 8 minutes; a minute. Before measuring, see that nothing else runs on the machine.

Result: `speed` and `loss` are still to be measured on a quiet machine. `plan` with its defaults (100,000 scores/s a
scorer, 75.6 MB of parameters at 1 GB/s, published every second) says, for the mean age in seconds:

    examples         1 scorer    10      100     1,000
    1,000,000             6.0     1.1     0.6      0.6
    100,000,000         541.5    54.7     6.0      1.2

Half a sweep plus half a period, as long as the workers do not rest: ten times the scorers are a tenth of the age until
the period is all that is left.
"""

import argparse
import dataclasses
import heapq
import math
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import jax
import jax.numpy as jnp
import numpy as np

from isgd_jax import data, laws, optimizers, samplers, step, task
from isgd_jax.clock import Clock
from isgd_jax.config import Config
from isgd_jax.engines.choose import make_engine
from isgd_jax.engines.chunks import Chunks
from isgd_jax.engines.desk import Desk, Segment
from isgd_jax.rundir import RunDir
from isgd_jax.train import fit, make_scorer
from isgd_jax.typing import TRAIN, Engine

STUDENT_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""97.5 % point of Student's t for so many seeds."""

SETTING: dict[str, Any] = {
    "dataset": "fashion_mnist", "mode": "relaxed", "engine": "local", "batch_size": 128, "learning_rate": 0.01,
    "momentum": 0.95, "refresh_every": 50, "mixture": 0.3, "probe_size": 64,
}  # fmt: skip


class World(NamedTuple):
    """What the virtual-time model knows of a task."""

    examples: int
    chunk: int
    scorers: int
    rate: float
    """Examples a second that one scorer scores."""
    param_bytes: float
    bandwidth: float
    """Bytes a second at which one scorer receives parameters."""
    period: float
    """Seconds between two publications."""


class Ages(NamedTuple):
    """Of the scores, in seconds since the parameters they were measured with were published."""

    mean: float
    p95: float


def simulate(world: World, *, sweeps: float = 3.0) -> Ages:
    """The ages that workers reach, in virtual time: the desk of the library, with a clock that jumps.

    A worker looks for newer parameters before each chunk, as the library's do. The first half is left out.
    """
    now, chunks = [0.0], Chunks(world.examples, world.chunk)
    desk = Desk({TRAIN: Segment(chunks)}, patience=math.inf, now=lambda: now[0])
    sweep = world.examples / (world.scorers * world.rate)
    end = sweeps * max(sweep, world.period) + 4 * world.period
    looks = np.linspace(end / 2, end, 20)
    held, versions = [-1] * world.scorers, np.full(len(chunks), -1)
    events: list[tuple[float, int, Any]] = [(0.0, worker, None) for worker in range(world.scorers)]
    found: list[np.ndarray] = []
    while len(found) < len(looks):
        now[0], worker, order = heapq.heappop(events)
        while len(found) < len(looks) and looks[len(found)] <= now[0]:
            found.append(looks[len(found)] - versions[versions >= 0] * world.period)
        newest = int(now[0] / world.period)
        desk.announce(newest)
        if order is not None:
            versions[order.chunk] = order.version
            desk.take(order, np.zeros(len(chunks.ids(order.chunk)), np.float32))
            desk.collect()
        moving = world.param_bytes / world.bandwidth if newest > held[worker] else 0.0
        held[worker], following = newest, desk.next_order(str(worker), newest)
        if following is None:
            heapq.heappush(events, ((newest + 1) * world.period, worker, None))
        else:
            heapq.heappush(events, (now[0] + moving + world.chunk / world.rate, worker, following))
    ages = np.concatenate(found)
    return Ages(float(ages.mean()), float(np.quantile(ages, 0.95)))


def scorers_needed(world: World, target: float) -> int | None:
    """The fewest scorers, among powers of two, that keep the mean age under the target; None beyond 1,024."""
    fewest = world.examples / (2 * world.rate * target)  # a mean age of half a sweep: no fewer can do
    counts = (2**power for power in range(max(0, math.floor(math.log2(fewest))), 11))
    return next((count for count in counts if simulate(world._replace(scorers=count)).mean <= target), None)


class Bench:
    """A trainer without measuring and saving: its steps, its refreshes, and nothing else."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.work = task.make(config, data.load(config.dataset))
        tx = optimizers.make(config, num_examples=self.work.num_examples, num_steps=config.steps)
        self.state = step.init_state(self.work.init(jax.random.key(0)), tx, self.work.num_examples)
        self.scorer, fresh = make_scorer(config, self.work)
        self.update = step.make_update(
            self.work.loss_fn, tx, samplers.stratified, num_draws=config.batch_size, fresh_scores=fresh
        )
        self.data, self.key, self.clock = jax.device_put(dict(self.work.train)), jax.random.key(1), Clock()
        self.step = 0

    def engine(self) -> Engine:
        """A local engine of its own: device 0 trains, device 1 scores."""
        return make_engine(self.config, self.scorer, self.work.train)[0]

    def train(self, engine: Engine, seconds: float, watch: Callable[[laws.Refresh], None] = lambda r: None) -> float:
        """Train for so long; steps a second. The first 50 steps, where programs are compiled, are not counted."""
        source = laws.ScoredLaws(engine, self.config, self.data["label"])
        start = self.step + 50
        began = math.inf
        while self.clock() - began < seconds:
            self.state, refresh = source.before(self.step, self.state, self.clock)
            if refresh is not None and self.step > start:
                watch(refresh)
            self.state, info = self.update(self.state, source.law, self.data, self.key, jnp.float32(0.0))
            self.step += 1
            if self.step % 8 == 0:
                jax.block_until_ready(info.loss)
            if self.step == start:
                began = self.clock()
        return (self.step - start) / (self.clock() - began)


class Resting:
    """An engine whose workers do nothing: the trainer alone, its refreshes included."""

    chunk_size = 1

    def publish(self, params: Any, version: int) -> None: ...

    def collect(self) -> list[Any]:
        return []


def scored(engine: Engine) -> int:
    """Examples that an engine has scored so far."""
    return sum(engine.stats().scored.values())


def score_alone(bench: Bench, seconds: float) -> float:
    """Scores a second while nobody trains; published anew so often that the workers never rest."""
    engine, version = bench.engine(), 0
    try:
        engine.publish(bench.state.params, version)
        while not engine.collect():
            time.sleep(0.01)
        first, began = scored(engine), time.monotonic()
        while time.monotonic() - began < seconds:
            version += 1
            engine.publish(bench.state.params, version)
            engine.collect()
            time.sleep(0.25)
        return (scored(engine) - first) / (time.monotonic() - began)
    finally:
        engine.close()


def speed(options: argparse.Namespace) -> None:
    """Alone, together, and what the model makes of it."""
    bench = Bench(Config(**SETTING))
    steps_alone = bench.train(Resting(), options.seconds)  # type: ignore[arg-type]
    scores_alone = score_alone(bench, options.seconds)
    for every in options.refresh:
        together(bench, every, steps_alone, scores_alone, options.seconds)


def together(bench: Bench, every: int, steps_alone: float, scores_alone: float, seconds: float) -> None:
    """One line: training and scoring at once, with a refresh every so many steps."""
    bench.config = dataclasses.replace(bench.config, refresh_every=every)
    engine, seen = bench.engine(), [(0.0, 0)]
    chunks = Chunks(bench.work.num_examples, engine.chunk_size)
    versions, ages = np.full(len(chunks), -1), []

    def watch(refresh: laws.Refresh) -> None:
        for version, first, last in refresh.arrived:
            versions[first : last + 1] = version
        seen.append((bench.clock(), scored(engine)))
        if (versions >= 0).all():
            ages.append(bench.step - versions.mean())

    try:
        steps = bench.train(engine, seconds, watch)
    finally:
        engine.close()
    (began, before), (ended, after) = seen[1], seen[-1]
    scores = (after - before) / (ended - began)
    relative = (steps / steps_alone, scores / scores_alone)
    param_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(bench.state.params))
    predicted = simulate(World(chunks.num_examples, chunks.size, 1, scores, param_bytes, 1e9, every / steps))
    age = float(np.mean(ages[len(ages) // 2 :])) if ages else math.nan
    print(
        f"refresh every {every:4}: {steps:6.1f} steps/s ({relative[0]:.2f} of {steps_alone:.1f} alone), "
        f"{scores:8,.0f} scores/s ({relative[1]:.2f} of {scores_alone:,.0f} alone), sum {sum(relative):.2f}; "
        f"mean age {age:5.0f} steps, model {predicted.mean * steps:5.0f}",
        flush=True,
    )


def loss(options: argparse.Namespace) -> None:
    """Final train loss, local and inline, at the same mean age."""
    dataset, differences = data.load(SETTING["dataset"]), []
    for seed in range(options.seeds):
        ours, age = final_loss(dataset, seed, options.steps)
        share = min(1.0, SETTING["refresh_every"] / (2 * age))
        theirs, other_age = final_loss(dataset, seed, options.steps, engine="inline", refresh_share=share)
        differences.append((ours - theirs) / theirs)
        print(
            f"seed {seed}: local {ours:.4f} at mean age {age:.0f}, inline {theirs:.4f} at {other_age:.0f}", flush=True
        )
    mean, deviation = float(np.mean(differences)), float(np.std(differences, ddof=1))
    half = STUDENT_95[options.seeds] * deviation / math.sqrt(options.seeds)
    print(f"local over inline: {100 * mean:+.1f} % [{100 * (mean - half):+.1f}, {100 * (mean + half):+.1f}]")


def final_loss(dataset: data.Dataset, seed: int, steps: int, **changes: Any) -> tuple[float, float]:
    """The full-set train loss after the last step, and the mean age over the second half of the run."""
    with tempfile.TemporaryDirectory() as folder:
        log_every = steps // 8
        fixed: dict[str, Any] = {"steps": steps, "seed": seed, "log_every": log_every, "checkpoint_every": steps}
        config = Config(**(SETTING | fixed | {"full_train_loss": True, "run_dir": f"{folder}/run"} | changes))
        run = RunDir(fit(config, dataset=dataset).run_dir)
        lines = list(run.records("progress"))
        return lines[-1]["train_loss"], float(np.mean([line["age_mean"] for line in lines[len(lines) // 2 :]]))


def plan(options: argparse.Namespace) -> None:
    """How many scorers a task needs."""
    print("examples      scorers  mean age  95 %   (seconds)")
    for examples in (10**6, 10**7, 10**8, 10**9):
        chunk = max(options.chunk, examples // 10**4)
        world = World(examples, chunk, 1, options.rate, options.param_bytes, options.bandwidth, options.period)
        for count in (1, 10, 100, 1000):
            ages = simulate(world._replace(scorers=count))
            print(f"{examples:13,} {count:7,} {ages.mean:9,.1f} {ages.p95:9,.1f}", flush=True)
        needed = scorers_needed(world, options.target)
        print(f"{examples:13,}: mean age under {options.target:g} s needs {needed or 'more than 1,024'} scorers")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    speeds = commands.add_parser("speed")
    speeds.add_argument("--seconds", type=float, default=15.0)
    speeds.add_argument("--refresh", type=int, nargs="+", default=[25, 50, 100, 400])
    speeds.set_defaults(run=speed)
    losses = commands.add_parser("loss")
    losses.add_argument("--seeds", type=int, default=5)
    losses.add_argument("--steps", type=int, default=2000)
    losses.set_defaults(run=loss)
    plans = commands.add_parser("plan")
    plans.add_argument("--rate", type=float, default=100_000.0, help="examples a second that one scorer scores")
    plans.add_argument("--param-bytes", type=float, default=75.6e6)
    plans.add_argument("--bandwidth", type=float, default=1e9, help="bytes a second to one scorer")
    plans.add_argument("--period", type=float, default=1.0, help="seconds between two publications")
    plans.add_argument("--chunk", type=int, default=2048)
    plans.add_argument("--target", type=float, default=60.0, help="mean age, seconds")
    plans.set_defaults(run=plan)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
