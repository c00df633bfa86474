"""Where the law of the next step comes from: an epoch's permutation, the uniform law, or the scores of an engine."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from isgd_jax import designs, samplers, schedule, table
from isgd_jax.clock import Clock
from isgd_jax.config import Config
from isgd_jax.step import TrainState
from isgd_jax.typing import TRAIN, Draw, Engine, Key, ScoredChunk


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


class Epoch(NamedTuple):
    """A permutation of the data set, and where its unused part begins."""

    permutation: Int[Array, " n"]
    start: Int[Array, ""]


def shuffled(key: Key, law: Epoch, *, num_draws: int) -> Draw:
    """The next ``num_draws`` indices of the epoch; over the random permutations each index is equally likely."""
    num_examples = len(law.permutation)
    indices = jax.lax.dynamic_slice_in_dim(law.permutation, law.start, num_draws)
    return Draw(indices, jnp.full(num_draws, 1.0 / num_examples), jnp.ones(num_draws, bool))


class ShuffledLaws:
    """A new permutation each epoch, from the seed and the epoch alone; what does not fill a batch is left out of it."""

    def __init__(self, key: Key, num_examples: int, batch_size: int) -> None:
        self._key = key
        self._num_examples, self._batch_size = num_examples, batch_size
        self.proposal = uniform_law(num_examples)
        self.law = self._begin(0)

    def before(self, step: int, state: TrainState, clock: Clock) -> tuple[TrainState, Refresh | None]:
        epoch, batch = divmod(step, self._num_examples // self._batch_size)
        if batch == 0:
            self.law = self._begin(epoch)
        self.law = self.law._replace(start=jnp.int32(batch * self._batch_size))
        return state, None

    def _begin(self, epoch: int) -> Epoch:
        permutation = jax.random.permutation(jax.random.fold_in(self._key, epoch), self._num_examples)
        return Epoch(permutation, jnp.int32(0))


class UniformLaws:
    """The uniform law, for ever: SGD with replacement."""

    def __init__(self, num_examples: int) -> None:
        self.law = self.proposal = uniform_law(num_examples)

    def before(self, step: int, state: TrainState, clock: Clock) -> tuple[TrainState, Refresh | None]:
        return state, None


class ScoredLaws:
    """Every K steps: publish the parameters, collect scores, and freeze the proposal they make.

    Args:
        engine: who scores.
        config: K, and the options of the proposal.
        labels: the label of each example, for the order of stratified draws.
        replayed: the schedule that is followed, if the engine is a `Replay`.
    """

    def __init__(
        self,
        engine: Engine,
        config: Config,
        labels: Int[Array, " n"],
        *,
        replayed: schedule.Schedule | None = None,
    ) -> None:
        self._engine = engine
        self._replayed = replayed
        self._is_first = True
        self.measured: list[ScoredChunk] = []
        """What workers brought of other segments: for whoever keeps the books of held-out data to take away."""
        self._config = config
        self._labels = labels
        self._make = designs.make_maker(config)
        self._record = jax.jit(table.record)
        self.law, _ = self._make(table.create(len(labels)), 0, 0.0, labels)

    @property
    def proposal(self) -> samplers.Law:
        return self.law

    def before(self, step: int, state: TrainState, clock: Clock) -> tuple[TrainState, Refresh | None]:
        refreshes = step % self._config.refresh_every == 0
        if refreshes:
            jax.block_until_ready(state)  # else the time of steps still in flight would count as scoring
        with clock.spending("scoring"):
            if self._publishes(step):
                self._engine.publish(state.params, step)
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
        collected = self._engine.collect()
        chunks = [chunk for chunk in collected if chunk.segment == TRAIN]
        self.measured += [chunk for chunk in collected if chunk.segment != TRAIN]
        now = clock() if self._replayed is None else self._replayed.arrivals[step].clock
        scores, rejected = self._recorded(state.table, chunks, now)
        self.law, made = self._make(scores, step, now, self._labels)
        share, is_uniform = float(made.trusted_share), bool(made.is_uniform)
        size = self._engine.chunk_size
        runs, count = schedule.as_runs(chunks, size), sum(len(chunk.ids) for chunk in chunks)
        return state._replace(table=scores), Refresh(now, size, runs, count, rejected, share, is_uniform)

    def _recorded(
        self, scores: table.ScoreTable, chunks: list[ScoredChunk], seconds: float
    ) -> tuple[table.ScoreTable, int]:
        size, rejected = len(scores.scores), 0
        for chunk in chunks:
            # One shape for all chunks, so that recording compiles once: the table drops rows of index n.
            padding = (0, self._engine.chunk_size - len(chunk.ids))
            ids = np.pad(chunk.ids, padding, constant_values=size).astype(np.int32)
            values = np.pad(chunk.scores, padding).astype(np.float32)
            scores, bad = self._record(scores, ids, values, version=chunk.version, seconds=seconds)
            rejected += int(bad)
        return scores, rejected


def uniform_law(num_examples: int) -> samplers.Law:
    """Every example alike."""
    return samplers.prepare(jnp.full(num_examples, 1.0 / num_examples))
