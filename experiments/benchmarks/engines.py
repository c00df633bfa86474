"""Scoring while training: what it costs the trainer, how old the scores are, and how many scorers a task needs.

Claims under test, on a machine with two cores, Fashion-MNIST, MLP 784-512x4-10, M = 128, refresh every 50 updates:

* ``speed``: with the local engine (two forced CPU devices), and with three actors of a Ray on this host, the trainer's
  steps/s and the scores/s, each relative to running alone, sum to at least 0.85, and scores/s is at least 0.30 of
  alone; the virtual-time model predicts the age that is measured;
* ``loss``: the final train loss with either engine is that of inline relaxed scoring at the same mean age: the 95 %
  interval of the paired difference contains 0, its half-width is at most 10 %;
* ``plan``: what the model says of larger tasks: how many scorers keep the mean age under a target.

Commands: python experiments/benchmarks/engines.py speed [--engine cluster --scorers 1 2 3 --refresh 50]
          python experiments/benchmarks/engines.py loss [--engine cluster --scorers 3 --steps 3000 --head-start 20]
          python experiments/benchmarks/engines.py plan [--rate R ...]
Times: a minute a line; 8 to 12 minutes; a minute. Before measuring, see that nothing else runs on the machine.

Result of `speed`, alone and together in turn, medians of three rounds (sum: least to most; ages in steps):

    engine     refresh   steps/s of alone   scores/s of alone   sum                   mean age   model   STALE/UNIFORM
    local      50        0.54               0.54                1.07 (1.03 to 1.27)   113        109     0.62
    local      400       0.79               0.29                1.09 (1.02 to 1.27)   400        441     0.95
    1 actor    50        0.86               0.27                1.12 (1.05 to 1.17)   328        319     0.63
    2 actors   50        0.96               0.29                1.21 (1.21 to 1.38)   376        346     0.96
    3 actors   50        0.81               0.30                1.12 (1.05 to 1.21)   334        297     0.78

Beyond 1: neither keeps two cores busy alone. At 400 the device that scores has scored all and rests. More actors
do not score more on two cores (20,000 scores/s each time): they share what the trainer leaves. STALE/UNIFORM is of raw
scores at one moment, at the end of each round: it follows the age, and says little to the second digit.

Result of `loss` with the local engine (cosine decay: at a constant rate the last loss differs by 15 % from seed to
seed, and nothing can be told; in the same order on both sides, which inline scoring would otherwise have by cells):

    seed 0: local 0.1326 at mean age 130, inline 0.1286 at 130
    seed 1: local 0.1290 at mean age 133, inline 0.1288 at 130
    seed 2: local 0.1278 at mean age 133, inline 0.1300 at 130
    seed 3: local 0.1241 at mean age 132, inline 0.1260 at 130
    seed 4: local 0.1241 at mean age 130, inline 0.1260 at 130
    local over inline: -0.3 % [-2.9, +2.3]

With three actors (`--engine cluster --scorers 3 --steps 3000 --head-start 20`; a run this short is half over before
actors that start with it have scored anything: three such runs of 2,000 steps ended 17 to 20 % higher):

    seed 0: cluster 0.0794 at mean age 268, inline 0.0763 at 267
    seed 1: cluster 0.0671 at mean age 211, inline 0.0704 at 217
    seed 2: cluster 0.0659 at mean age 216, inline 0.0666 at 217
    seed 3: cluster 0.0629 at mean age 210, inline 0.0639 at 209
    seed 4: cluster 0.0718 at mean age 266, inline 0.0682 at 254
    cluster over inline: +0.3 % [-4.8, +5.6]

`plan` with its defaults (100,000 scores/s a scorer, 75.6 MB of parameters at 1 GB/s, published every second) says, for
the mean age in seconds:

    examples         1 scorer    10      100     1,000
    1,000,000             6.0     1.1     0.6      0.6
    100,000,000         541.5    54.7     6.0      1.2

Half a sweep plus half a period, as long as the workers do not rest: ten times the scorers are a tenth of the age until
the period is all that is left.
"""

import argparse
import heapq
import itertools
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
from estimation import problem_of, true_traces

import isgd_jax as isgd
from isgd_jax.app import build, compare, data, task
from isgd_jax.app.clock import Clock
from isgd_jax.app.config import Config, configure
from isgd_jax.app.run import fit
from isgd_jax.app.run_dir import RunDir
from isgd_jax.engines.chunks import Chunks
from isgd_jax.engines.contract import EngineStats, ScoredChunk
from isgd_jax.engines.work_queue import WorkQueue
from isgd_jax.sampling import samplers
from isgd_jax.training.background import Refresh, Refresher
from isgd_jax.training.train_step import TrainState, make_steps
from isgd_jax.types import Params

SETTING: dict[str, Any] = {
    "dataset": "fashion_mnist", "mode": "relaxed", "batch_size": 128, "learning_rate": 0.01,
    "momentum": 0.95, "refresh_every": 50, "mixture": 0.3, "order": "label-score",
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
    """The ages that workers reach, in virtual time: the work queue of the library, with a clock that jumps.

    A worker looks for newer parameters before each chunk, as the library's do. The first half is left out.
    """
    now, chunks = [0.0], Chunks(world.examples, world.chunk)
    queue = WorkQueue(chunks, timeout=math.inf, now=lambda: now[0])
    sweep = world.examples / (world.scorers * world.rate)
    end = sweeps * max(sweep, world.period) + 4 * world.period
    looks = np.linspace(end / 2, end, 20)
    held, versions = [-1] * world.scorers, np.full(len(chunks), -1)
    events: list[tuple[float, int, Any]] = [(0.0, worker, None) for worker in range(world.scorers)]
    found: list[np.ndarray] = []
    while len(found) < len(looks):
        now[0], worker, item = heapq.heappop(events)
        while len(found) < len(looks) and looks[len(found)] <= now[0]:
            found.append(looks[len(found)] - versions[versions >= 0] * world.period)
        newest = int(now[0] / world.period)
        queue.set_version(newest)
        if item is not None:
            versions[item.chunk] = item.version
            queue.complete(item, np.zeros(len(chunks.ids(item.chunk)), np.float32))
            queue.collect()
        moving = world.param_bytes / world.bandwidth if newest > held[worker] else 0.0
        held[worker], following = newest, queue.next_item(str(worker), newest)
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


class Mute:
    """An engine that is never asked: the trainer alone, its refreshes included."""

    chunk_size = 2048

    def publish(self, params: Params, version: int) -> None: ...

    def collect(self, *, wait: bool = False) -> list[ScoredChunk]:
        return []

    def notices(self) -> list[str]:
        return []

    def stats(self) -> EngineStats:
        return EngineStats({}, 0, 0, 0, 0)

    def state(self) -> dict[str, int]:
        return {}

    def restore(self, state: dict[str, int]) -> None: ...

    def seconds_per_collect(self, params: Params, *, wait: bool = False) -> float:
        return 0.0

    def close(self) -> None: ...


class Together(NamedTuple):
    """Training and scoring at once."""

    steps: float
    """A second."""
    scores: float
    """A second."""
    age: float
    """Mean age of the scores, in steps."""
    ratio: float
    """Tr Cov STALE/UNIFORM of the law in use at the end, from all the data."""


class Bench:
    """A trainer that neither measures nor saves, and an engine whose workers are kept."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.work = task.make(config.model, data.load(config.data.dataset, data_dir=config.data.data_dir))
        make_job = build.job_elsewhere(config, None, None, None)
        parts = build.build(config, self.work, make_job=make_job)
        self.problem, self.sampler, self.engine = parts.problem, parts.sampler, parts.engine
        self.steps = make_steps(parts.problem, parts.sampler, parts.tx, fresh_scores=parts.fresh_scores)
        params = parts.problem.init(jax.random.key(0))
        self.state = TrainState(params, parts.tx.init(params), parts.sampler.init())
        self.data, self.key, self.clock = jax.device_put(dict(self.work.train)), jax.random.key(1), Clock()
        self.step = 0
        print(*parts.remarks, sep="\n", end="")
        self._mute, self._scoring = (
            isgd.refresher(engine, self.sampler, every=config.refresh.refresh_every, warn=lambda text: None)
            for engine in (Mute(), self.engine)
        )
        self.train(0.0, self._mute)
        self.engine.publish(self.state.params, self.step)
        while self.scored() < config.workers.scorers * self.engine.chunk_size:
            time.sleep(0.1)

    def train(
        self, seconds: float, source: Refresher, watch: Callable[[Refresh], None] = lambda refresh: None
    ) -> float:
        """Train for so long, and to the end of a period; steps a second, refreshes included."""
        first, began = self.step, self.clock()
        while self.clock() - began < seconds or self.step % self.config.refresh.refresh_every or self.step == first:
            refreshed = source(self.step, self.state.params, self.state.sampler)
            if source.is_due(self.step):
                watch(source.last)
            state = self.state._replace(sampler=refreshed)
            self.state, info = self.steps.step(state, None, self.data, self.key, jnp.float32(0.0))
            self.step += 1
            if self.step % 8 == 0:
                jax.block_until_ready(info.loss)
        return (self.step - first) / (self.clock() - began)

    def train_alone(self, seconds: float) -> float:
        """Steps a second while the workers, who have scored all that there is, rest."""
        before = -1
        while before != (before := self.scored()):
            time.sleep(1.0)
        return self.train(seconds, self._mute)

    def score_alone(self, seconds: float) -> float:
        """Scores a second while nobody trains: published anew so often that the workers never rest."""
        before, began = self.scored(), time.monotonic()
        while time.monotonic() - began < seconds:
            self.step += self.config.refresh.refresh_every
            clock = self.state.sampler.clock
            clock = clock._replace(step=jnp.int32(self.step), version=jnp.int32(self.step))
            self.state = self.state._replace(sampler=self.state.sampler._replace(clock=clock))
            self.engine.publish(self.state.params, self.step)
            self.engine.collect()
            time.sleep(0.25)
        return (self.scored() - before) / (time.monotonic() - began)

    def together(self, seconds: float) -> Together:
        """Both at once; ages are those of the second half."""
        chunks = Chunks(self.work.num_examples, self.engine.chunk_size)
        versions, ages = np.full(len(chunks), -1), []

        def watch(refresh: Refresh) -> None:
            for chunk in refresh.chunks:
                versions[chunk.ids[0] // chunks.size] = chunk.version
            ages.append(self.step - versions[versions >= 0].mean())

        before, began = self.scored(), time.monotonic()
        steps = self.train(seconds, self._scoring, watch)
        scores = (self.scored() - before) / (time.monotonic() - began)
        return Together(steps, scores, float(np.mean(ages[len(ages) // 2 :])), self.ratio())

    def ratio(self) -> float:
        """Tr Cov STALE/UNIFORM of the law in use, at the parameters of now."""
        probs = samplers.probabilities(self.state.sampler.proposal.law)
        traces = true_traces(problem_of(self.work, self.data), self.state.params, probs)
        return float(traces.stale / traces.uniform)

    def scored(self) -> int:
        """Examples scored so far."""
        return sum(self.engine.stats().scored.values())


def speed(options: argparse.Namespace) -> None:
    """Alone and together in turn, round after round, so that a busy machine favours neither; what the model says."""
    for scorers, every in itertools.product(options.scorers, options.refresh):
        more = {"engine": options.engine, "scorers": scorers, "refresh_every": every}
        bench = Bench(configure(**SETTING | more))
        try:
            print_speed(bench, options)
        finally:
            bench.engine.close()


def print_speed(bench: Bench, options: argparse.Namespace) -> None:
    """One line: the medians of the rounds."""
    alone, both = [], []
    for _ in range(options.rounds):
        alone.append((bench.train_alone(options.seconds), bench.score_alone(options.seconds)))
        both.append(bench.together(options.seconds))
    shares = np.array(both)[:, :2] / np.array(alone)
    (steps, scores), sums = np.median(shares, axis=0), shares.sum(axis=1)
    middle, every = Together(*np.median(both, axis=0)), bench.config.refresh.refresh_every
    world = World(
        bench.work.num_examples,
        bench.engine.chunk_size,
        bench.config.workers.scorers,
        middle.scores / bench.config.workers.scorers,
        sum(leaf.nbytes for leaf in jax.tree.leaves(bench.state.params)),
        options.bandwidth,
        every / middle.steps,
    )
    print(
        f"{bench.config.workers.engine} {bench.config.workers.scorers}, refresh every {every:4}: "
        f"{middle.steps:6.1f} steps/s ({steps:.2f} of alone), {middle.scores:8,.0f} scores/s "
        f"({scores:.2f} of alone), sum {np.median(sums):.2f} ({sums.min():.2f} to {sums.max():.2f}); "
        f"mean age {middle.age:5.0f} steps, model {simulate(world).mean * middle.steps:5.0f}; "
        f"STALE/UNIFORM {middle.ratio:.2f}",
        flush=True,
    )


def loss(options: argparse.Namespace) -> None:
    """Final train loss, with workers and inline, at the same mean age."""
    dataset, ratios, age_times_share = data.load(SETTING["dataset"]), [], SETTING["refresh_every"] / 2
    for seed in range(options.seeds):
        more = {"engine": options.engine, "scorers": options.scorers, "head_start": options.head_start}
        ours, age = final_loss(dataset, seed, options.steps, **more)
        for _ in range(3):  # until the ages agree: what share gives which age is learnt from these runs
            share = min(1.0, age_times_share / age)
            theirs, other_age = final_loss(dataset, seed, options.steps, refresh_share=share, chunk_size=256)
            age_times_share = other_age * share
            if abs(other_age / age - 1) < 0.05:
                break
        ratios.append(ours / theirs)
        print(
            f"seed {seed}: {options.engine} {ours:.4f} at mean age {age:.0f}, inline {theirs:.4f} at {other_age:.0f}",
            flush=True,
        )
    mean, low, high = (100 * (ratio - 1) for ratio in compare.geometric_mean(ratios))
    print(f"{options.engine} over inline: {mean:+.1f} % [{low:+.1f}, {high:+.1f}]")


def final_loss(
    dataset: data.Dataset, seed: int, steps: int, *, head_start: float = 0.0, **changes: Any
) -> tuple[float, float]:
    """The full-set train loss after the last step, and the mean age over the second half of the run.

    The first parameters are published before the first step; workers are then given a head start of so many seconds.
    """

    def observe(record: dict[str, Any]) -> None:
        if record["event"] == "refresh" and record["step"] == 0:
            time.sleep(head_start)

    with tempfile.TemporaryDirectory() as folder:
        fixed: dict[str, Any] = {"steps": steps, "seed": seed, "log_every": steps // 16, "checkpoint_every": steps}
        fixed |= {"full_train_loss": True, "run_dir": f"{folder}/run", "schedule": "cosine"}
        config = configure(**(SETTING | fixed | changes))
        run = RunDir(fit(config, dataset=dataset, observe=observe).run_dir)
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
    speeds.add_argument("--seconds", type=float, default=6.0)
    speeds.add_argument("--rounds", type=int, default=3)
    speeds.add_argument("--refresh", type=int, nargs="+", default=[25, 50, 100, 400])
    speeds.add_argument("--engine", choices=("local", "cluster"), default="local")
    speeds.add_argument("--scorers", type=int, nargs="+", default=[1], help="actors of the cluster")
    speeds.add_argument("--bandwidth", type=float, default=1e9, help="bytes a second to one scorer, for the model")
    speeds.set_defaults(run=speed)
    losses = commands.add_parser("loss")
    losses.add_argument("--seeds", type=int, default=5)
    losses.add_argument("--steps", type=int, default=2000)
    losses.add_argument("--engine", choices=("local", "cluster"), default="local")
    losses.add_argument("--scorers", type=int, default=1, help="actors of the cluster")
    losses.add_argument("--head-start", type=float, default=0.0, help="seconds for workers before the first step")
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
