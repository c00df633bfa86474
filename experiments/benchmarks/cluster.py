"""One trainer and three actors on a Ray of this host: what each loses by the other.

Claim under test, on a machine with two cores, Fashion-MNIST, MLP 784-512x4-10, M = 128, refresh every 50 updates: the
trainer's steps/s and the actors' scores/s, each relative to running alone, sum to at least 0.85, and scores/s is at
least 0.30 of alone.

Command: python experiments/benchmarks/cluster.py [--scorers 3] [--seconds 20] [--rounds 3]
Time: 3 minutes. Alone and together are measured in turn, round after round, so that a busy machine favours neither.

RESULTS
"""

import argparse
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from isgd_jax import data, laws, optimizers, samplers, step, task
from isgd_jax.clock import Clock
from isgd_jax.config import Config
from isgd_jax.engines.choose import make_engine
from isgd_jax.train import make_scorer, worker_jobs
from isgd_jax.typing import Engine, EngineStats, Params, ScoredChunk

SETTING: dict[str, Any] = {
    "dataset": "fashion_mnist", "mode": "relaxed", "engine": "cluster", "batch_size": 128, "learning_rate": 0.01,
    "refresh_every": 50, "mixture": 0.3,
}  # fmt: skip


class Mute:
    """An engine that is never asked: its workers have all scored, and rest."""

    chunk_size = 2048

    def publish(self, params: Params, version: int) -> None: ...

    def collect(self) -> list[ScoredChunk]:
        return []

    def notices(self) -> list[str]:
        return []

    def stats(self) -> EngineStats:
        return EngineStats({}, 0, 0, 0, 0)

    def state(self) -> dict[str, int]:
        return {}

    def restore(self, state: dict[str, int]) -> None: ...

    def seconds_per_collect(self, params: Params) -> float:
        return 0.0

    def close(self) -> None: ...


class Bench:
    """A trainer that neither measures nor saves, and an engine of actors."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.work = task.make(config, data.load(config.dataset, data_dir=config.data_dir))
        tx = optimizers.make(config, num_examples=self.work.num_examples, num_steps=config.steps)
        self.state = step.init_state(self.work.init(jax.random.key(0)), tx, self.work.num_examples)
        scorer, fresh = make_scorer(config, self.work)
        self.update = step.make_update(
            self.work.loss_fn, tx, samplers.stratified, num_draws=config.batch_size, fresh_scores=fresh
        )
        self.data, self.key, self.clock, self.step = (
            jax.device_put(dict(self.work.train)),
            jax.random.key(1),
            Clock(),
            0,
        )
        jobs = functools.partial(worker_jobs, config, None, None, None)
        self.engine, remarks = make_engine(
            config, scorer, self.work.train, fingerprint=self.work.fingerprint, make_jobs=jobs
        )
        print(*remarks, sep="\n")
        self.sources = {True: self.source(self.engine), False: self.source(Mute())}

    def source(self, engine: Engine) -> laws.ScoredLaws:
        """Refreshes from an engine."""
        return laws.ScoredLaws(engine, self.config, self.data["label"])

    def train(self, seconds: float, *, scoring: bool) -> float:
        """Steps a second, refreshes included."""
        source, first, began = self.sources[scoring], self.step, self.clock()
        while self.clock() - began < seconds or self.step % self.config.refresh_every:
            self.state, _ = source.before(self.step, self.state, self.clock)
            self.state, info = self.update(self.state, source.law, self.data, self.key, jnp.float32(0.0))
            self.step += 1
            if self.step % 8 == 0:
                jax.block_until_ready(info.loss)
        return (self.step - first) / (self.clock() - began)

    def score(self, seconds: float) -> float:
        """Scores a second while nobody trains: published anew so often that the actors never rest."""
        before, began = self.scored(), time.monotonic()
        while time.monotonic() - began < seconds:
            self.step += self.config.refresh_every
            self.engine.publish(self.state.params, self.step)
            self.engine.collect()
            time.sleep(0.25)
        return (self.scored() - before) / (time.monotonic() - began)

    def rest(self) -> None:
        """Wait until the actors have scored all that there is."""
        before = -1
        while before != (before := self.scored()):
            time.sleep(2.0)

    def scored(self) -> int:
        """Examples scored so far."""
        return sum(self.engine.stats().scored.values())


def measure(bench: Bench, seconds: float) -> tuple[float, float, float, float]:
    """Steps/s alone, scores/s alone, and both together."""
    bench.rest()
    steps_alone = bench.train(seconds, scoring=False)
    scores_alone = bench.score(seconds)
    before, began = bench.scored(), time.monotonic()
    steps = bench.train(seconds, scoring=True)
    return steps_alone, scores_alone, steps, (bench.scored() - before) / (time.monotonic() - began)


def main() -> None:
    """Measure round after round, and print each with the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scorers", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--data-dir")
    options = parser.parse_args()
    bench = Bench(Config(**SETTING, scorers=options.scorers, data_dir=options.data_dir))
    try:
        bench.train(1.0, scoring=True)
        while bench.scored() < options.scorers * bench.engine.chunk_size:
            time.sleep(0.1)
        bench.score(5.0)
        shares = []
        print("steps/s alone   scores/s alone   together: steps/s    scores/s    shares: steps   scores   sum")
        for _ in range(options.rounds):
            steps_alone, scores_alone, steps, scores = measure(bench, options.seconds)
            shares.append((steps / steps_alone, scores / scores_alone))
            print(f"{steps_alone:13.1f} {scores_alone:16,.0f} {steps:19.1f} {scores:11,.0f} "
                  f"{shares[-1][0]:16.2f} {shares[-1][1]:8.2f} {sum(shares[-1]):5.2f}", flush=True)  # fmt: skip
        medians = [statistics.median(column) for column in zip(*shares, strict=True)]
        print(
            f"medians: steps {medians[0]:.2f}, scores {medians[1]:.2f}, sum {statistics.median(map(sum, shares)):.2f}"
        )
    finally:
        bench.engine.close()


if __name__ == "__main__":
    main()
