"""Where the law of the next step comes from: an epoch's permutation, the uniform law, or the scores of an engine."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from isgd_jax import designs, samplers, schedule, table, watch
from isgd_jax.clock import Clock, middle_seconds
from isgd_jax.config import Config
from isgd_jax.draws import WATCH_EVERY, Choice, Choose
from isgd_jax.proposal import Frozen, Proposal
from isgd_jax.step import TrainState
from isgd_jax.typing import Draw, Engine, Key, Params, ScoredChunk


class Refresh(NamedTuple):
    """What happened at a refresh of the proposal: the record from which a decision by the clock can be understood."""

    clock: float
    """Seconds of the run when ages were judged; the updates until the next refresh carry it too."""
    chunk_size: int
    arrived: list[schedule.Run]
    """The chunks that came in and the versions they were scored with: what `--replay` follows."""
    scored: int
    rejected: int
    trusted_share: float
    is_uniform: bool


class Sketcher(NamedTuple):
    """How the order by cells sees examples: ``of_rows(params, ids [c]) -> [c, dims]``."""

    of_rows: Callable[[Params, np.ndarray], Float[Array, "c dims"]]
    dims: int


@runtime_checkable
class Laws(Protocol):
    """The law to draw from, step by step."""

    law: Any
    """What the sampler takes. It decides the next step, so it is saved with the run."""

    @property
    def proposal(self) -> samplers.Law:
        """The probabilities in use, for measuring what they are worth."""
        ...

    def before(self, step: int, state: TrainState, clock: Clock) -> tuple[TrainState, Refresh | None]:
        """Bring the law up to date before a step; say so if scores were refreshed."""
        ...

    def steps_left(self, step: int) -> int:
        """For how many steps the law stays as it is, this one included."""
        ...

    def seconds_per_refresh(self, state: TrainState) -> float:
        """What each refresh costs, measured; nothing where nobody scores."""
        ...


def shuffled(permutation: Int[Array, " n"], step: Int[Array, ""] | int, *, num_draws: int) -> Draw:
    """A step's part of its epoch, by its number alone; over the random permutations each index is equally likely."""
    size = len(permutation)
    indices = jax.lax.dynamic_slice_in_dim(permutation, step % (size // num_draws) * num_draws, num_draws)
    return Draw(indices, jnp.full(num_draws, 1.0 / size), jnp.ones(num_draws, bool))


def choose_shuffled(num_draws: int) -> Choose:
    """How a step takes its part of the epoch; the law is the epoch's permutation."""

    def choose(key: Key, law: Int[Array, " n"], state: TrainState, data: Any) -> Choice:
        draw = shuffled(law, state.step, num_draws=num_draws)
        return Choice(draw, draw.probs, state.step % WATCH_EVERY == 0)

    return choose


class ShuffledLaws:
    """A new permutation each epoch, from the seed and the epoch alone; what does not fill a batch is left out of it."""

    def __init__(self, key: Key, num_examples: int, batch_size: int) -> None:
        self._key = key
        self._num_examples, self._num_batches = num_examples, num_examples // batch_size
        self.proposal = uniform_law(num_examples)
        self.law = self._begin(0)

    def before(self, step: int, state: TrainState, clock: Clock) -> tuple[TrainState, Refresh | None]:
        epoch, batch = divmod(step, self._num_batches)
        if batch == 0:
            self.law = self._begin(epoch)
        return state, None

    def steps_left(self, step: int) -> int:
        return self._num_batches - step % self._num_batches

    def seconds_per_refresh(self, state: TrainState) -> float:
        return 0.0

    def _begin(self, epoch: int) -> Int[Array, " n"]:
        return jax.random.permutation(jax.random.fold_in(self._key, epoch), self._num_examples)


class FixedLaws:
    """One law for ever: the uniform one of SGD with replacement, or one of scores that the user brought."""

    def __init__(self, law: Any, proposal: samplers.Law) -> None:
        self.law, self.proposal = law, proposal

    def before(self, step: int, state: TrainState, clock: Clock) -> tuple[TrainState, Refresh | None]:
        return state, None

    def steps_left(self, step: int) -> int:
        return sys.maxsize

    def seconds_per_refresh(self, state: TrainState) -> float:
        return 0.0


class ScoredLaws:
    """Every K steps: publish the parameters, collect scores, and freeze the proposal they make.

    Args:
        engine: who scores.
        config: K, and the options of the design.
        labels: the label of each example, for the orders by label.
        sketch: how the order by cells sees examples; None where no order needs it.
        published: ``(params, step) -> what the scorer takes``, where that is more than the parameters.
        example_weights: a_n [n] of a weighted target.
        replayed: the schedule that is followed, if the engine is a `Replay`.
    """

    def __init__(
        self,
        engine: Engine,
        config: Config,
        labels: Int[Array, " n"],
        *,
        replayed: schedule.Schedule | None = None,
        sketch: Sketcher | None = None,
        published: Callable[[Params, int], Any] = lambda params, step: params,
        example_weights: Float[Array, " n"] | None = None,
    ) -> None:
        self._engine, self._config, self._labels, self._sketch = engine, config, labels, sketch
        self._published, self._example_weights = published, example_weights
        self._replayed, self._is_first = replayed, True
        self._make = designs.make_maker(config)
        self._record = jax.jit(partial(table.record, memory=config.score_memory if config.augment else 0.0))
        self._write = jax.jit(lambda rows, ids, new: rows.at[ids].set(new, mode="drop"), donate_argnums=0)
        self._is_kept = sketch is not None and config.mode == "relaxed"  # exact mode sketches all anew each time
        self.law = self._frozen(table.create(len(labels)), watch.create(config.batch_size), 0, 0.0, None)[0]

    @property
    def proposal(self) -> samplers.Law:
        return self.law.law

    def before(self, step: int, state: TrainState, clock: Clock) -> tuple[TrainState, Refresh | None]:
        refreshes = step % self._config.refresh_every == 0
        if refreshes:
            jax.block_until_ready(state)  # else the time of steps still in flight would count as scoring
        with clock.spending("scoring"):
            if self._publishes(step):
                self._engine.publish(self._published(state.params, step), step)
            return self._refresh(step, state, clock) if refreshes else (state, None)

    def _publishes(self, step: int) -> bool:
        """Every so many steps; also at once where a run begins or goes on, so that no worker waits or scores the old.

        In exact mode a refresh follows each publish, so there is nothing to be gained between.
        """
        first, self._is_first = self._is_first, False
        if self._replayed is not None:
            return step in self._replayed.versions
        return step % self._config.publishes_every == 0 or (first and self._config.mode == "relaxed")

    def _refresh(self, step: int, state: TrainState, clock: Clock) -> tuple[TrainState, Refresh]:
        chunks = self._engine.collect()
        now = clock() if self._replayed is None else self._replayed.arrivals[step].clock
        scores, rejected = self._recorded(state.table, chunks, now)
        sketches = self._sketched(state.params, chunks)
        self.law, made = self._frozen(scores, state.watch, step, now, sketches)
        share, is_uniform = float(made.trusted_share), bool(made.is_uniform)
        size = self._engine.chunk_size
        runs, count = schedule.as_runs(chunks, size), sum(len(chunk.ids) for chunk in chunks)
        return state._replace(table=scores), Refresh(now, size, runs, count, rejected, share, is_uniform)

    def steps_left(self, step: int) -> int:
        return self._config.refresh_every - step % self._config.refresh_every

    def seconds_per_refresh(self, state: TrainState) -> float:
        """Of scoring, of recording and sketching what is scored, and of making the law."""
        size, rows = len(self._labels), self._engine.chunk_size
        one = ScoredChunk(np.arange(min(rows, size), dtype=np.int32), np.ones(min(rows, size), np.float32), 0)
        # What is done once a refresh and what is done for each chunk: the difference is a chunk's.
        once, with_a_chunk = middle_seconds(
            lambda: self._made_of(state, []), lambda: self._made_of(state, [one]), repeats=3
        )
        collecting = self._engine.seconds_per_collect(self._published(state.params, 0))
        return collecting + once + max(0.0, with_a_chunk - once) * self._config.share_scored(size) * size / rows

    def _made_of(self, state: TrainState, chunks: list[ScoredChunk]) -> Frozen:
        """The law that these chunks would make, for a rehearsal."""
        scores = self._recorded(state.table, chunks, 0.0)[0]
        return self._frozen(scores, state.watch, 0, 0.0, self._sketched(state.params, chunks))[0]

    def _frozen(
        self, scores: table.ScoreTable, seen: watch.Watch, step: int, now: float, sketches: Array | None
    ) -> tuple[Frozen, Proposal]:
        if sketches is None and self._sketch is not None:
            sketches = jnp.zeros((len(self._labels), self._sketch.dims), jnp.float32)
        law, made = self._make(scores, seen, step, now, self._labels, sketches, self._example_weights)
        return law._replace(sketches=sketches if self._is_kept else None), made

    def _sketched(self, params: Params, chunks: list[ScoredChunk]) -> Array | None:
        """The sketches with those of the examples just scored brought up to date."""
        if self._sketch is None:
            return None
        size, rows = len(self._labels), self.law.sketches
        empty = np.zeros((size, self._sketch.dims), np.float32)
        rows = jnp.asarray(empty) if rows is None else jnp.copy(rows)
        for chunk in chunks:
            ids = self._padded(chunk.ids)
            rows = self._write(rows, ids, self._sketch.of_rows(params, np.minimum(ids, size - 1)))
        return rows

    def _padded(self, ids: np.ndarray) -> np.ndarray:
        """One shape for all chunks, so that what takes them compiles once: rows of index n are dropped."""
        padding = (0, self._engine.chunk_size - len(ids))
        return np.pad(ids, padding, constant_values=len(self._labels)).astype(np.int32)

    def _recorded(
        self, scores: table.ScoreTable, chunks: list[ScoredChunk], seconds: float
    ) -> tuple[table.ScoreTable, int]:
        rejected = 0
        for chunk in chunks:
            ids = self._padded(chunk.ids)
            values = np.pad(chunk.scores, (0, len(ids) - len(chunk.scores))).astype(np.float32)
            scores, bad = self._record(scores, ids, values, version=chunk.version, seconds=seconds)
            rejected += int(bad)
        return scores, rejected


def uniform_law(num_examples: int) -> samplers.Law:
    """Every example alike."""
    return samplers.prepare(jnp.full(num_examples, 1.0 / num_examples))
