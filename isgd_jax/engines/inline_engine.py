"""The simplest engine: the trainer's own devices score between two steps."""

import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from isgd_jax.engines.all_hosts import AllHosts
from isgd_jax.engines.chunks import Chunks, Scored, as_scored, joined, num_rows, unpadded
from isgd_jax.engines.contract import ClosesOnExit, EngineStats, ScoredChunk
from isgd_jax.engines.sharded import sharded
from isgd_jax.errors import ArgumentError
from isgd_jax.types import Batch, Params, Scorer, SketchingScorer

__all__ = ["InlineEngine", "inline"]


class InlineEngine(ClosesOnExit):
    """Scores chunks of the data set in turn, a chunk on each device at a time, whenever `collect` is called.

    Guarantees:
        * A chunk carries the version of the parameters it was scored with.
        * On every device, every call of the scorer has the same shape: a chunk, the last one padded.
        * `collect` scores `chunks_per_collect` chunks, going on where the last call stopped; ``wait=True`` scores all
          of them, and does not move the turn.
        * Parameters are copied when they are published: the trainer may donate its own.

    Args:
        scorer: ``(params, batch) -> scores [b]``, or ``(scores [b], sketches [b, dims])``, not jitted.
        data: the training set in host memory, a pytree with leading axis ``n``.
        chunk_size: examples scored in one call on one device.
        chunks_per_collect: chunks scored at each `collect`; `None` is all of them.
        devices: who scores; all local ones by default.
    """

    def __init__(
        self,
        scorer: Scorer | SketchingScorer,
        data: Batch,
        *,
        chunk_size: int,
        chunks_per_collect: int | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        self._data = data
        self._chunks = Chunks(num_rows(data), chunk_size)
        self._per_collect = len(self._chunks) if chunks_per_collect is None else chunks_per_collect
        self._devices = list(devices or jax.local_devices())[: self._per_collect]
        self._scorer = sharded(scorer, self._devices)
        self._published: tuple[Params, int] | None = None
        self._cursor = self._scored = self._bytes = 0

    @property
    def chunks(self) -> Chunks:
        """The chunks of the training set."""
        return self._chunks

    @property
    def num_examples(self) -> int:
        """Of the training set."""
        return self._chunks.num_examples

    @property
    def chunk_size(self) -> int:
        """Examples in a chunk."""
        return self._chunks.size

    def publish(self, params: Params, version: int) -> None:
        """Score with these parameters from now on.

        Args:
            params: copied; to each device at the next `collect`.
            version: which the scores carry.
        """
        copied = jax.tree.map(jnp.copy, params)  # numbers of Python become arrays
        self._published = (copied, version)
        self._bytes += (len(self._devices) - 1) * sum(leaf.nbytes for leaf in jax.tree.leaves(copied))

    def collect(self, *, wait: bool = False) -> list[ScoredChunk]:
        """Score the next chunks and return them; this is when the engine works, and training waits for it.

        Args:
            wait: score all chunks; the turn does not move.

        Raises:
            RuntimeError: nothing was published yet.
            ValueError: what the scorer returned cannot be scores.
        """
        if wait:
            return self.score(range(len(self._chunks)))
        turn = [(self._cursor + i) % len(self._chunks) for i in range(self._per_collect)]
        scored = self.score(turn)
        self._cursor = (self._cursor + self._per_collect) % len(self._chunks)
        return scored

    def score(self, turn: Sequence[int]) -> list[ScoredChunk]:
        """Score these chunks with the published parameters, whosever turn it is.

        Args:
            turn: numbers of chunks, in any order; they come back in it.

        Raises:
            RuntimeError: nothing was published yet.
            ValueError: what the scorer returned cannot be scores.
        """
        if self._published is None:
            raise RuntimeError("nothing to score with: call publish(params, version) before collect()")
        params, version = self._published
        width = len(self._devices)
        groups = [turn[i : i + width] for i in range(0, len(turn), width)]
        # All calls are dispatched before the first result is fetched: the devices never wait for the host.
        pending = [self._scorer(params, self._batch(group)) for group in groups]
        scored = [
            self._scored_chunk(found, place, chunk, version)
            for found, group in zip(map(self._checked, pending), groups, strict=True)
            for place, chunk in enumerate(group)
        ]
        self._scored += sum(len(chunk.ids) for chunk in scored)
        self._bytes += sum(Scored(chunk.scores, chunk.sketches).nbytes for chunk in scored)
        return scored

    def notices(self) -> list[str]:
        """An engine without workers has nothing to tell."""
        return []

    def stats(self) -> EngineStats:
        """All devices together are one worker."""
        return EngineStats({"inline": self._scored}, 1, self._bytes, 0, 0)

    def state(self) -> dict[str, int]:
        """The chunk whose turn is next."""
        return {"next": self._cursor}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self._cursor = state["next"]

    def seconds_per_collect(self, params: Params, *, wait: bool = False) -> float:
        """How long a `collect` will take: one call is compiled, a second one timed and multiplied.

        Args:
            params: to score with.
            wait: whether all chunks are scored, in place of those of one turn.
        """
        width = len(self._devices)
        batch = self._batch([chunk % len(self._chunks) for chunk in range(width)])
        jax.device_get(self._scorer(params, batch))
        began = time.monotonic()
        jax.device_get(self._scorer(params, batch))
        count = len(self._chunks) if wait else self._per_collect
        return (time.monotonic() - began) * -(-count // width)

    def close(self) -> None:
        """Forget the published parameters."""
        self._published = None

    def _batch(self, group: Sequence[int]) -> Batch:
        """A chunk for each device; the first of the group again is harmless padding."""
        padded = [*group, *[group[0]] * (len(self._devices) - len(group))]
        parts = [self._chunks.batch(self._data, chunk) for chunk in padded]
        return jax.tree.map(lambda *leaves: joined(leaves), *parts)

    def _checked(self, pending: Any) -> Any:
        """What a call found of as many chunks as there are devices, in host memory."""
        count = len(self._devices) * self._chunks.size
        return unpadded(pending, count, count)

    def _scored_chunk(self, found: Any, place: int, chunk: int, version: int) -> ScoredChunk:
        ids, start = self._chunks.ids(chunk), place * self._chunks.size
        mine = as_scored(jax.tree.map(lambda rows: rows[start : start + len(ids)], found))
        return ScoredChunk(ids, mine.scores, version, mine.sketches)


def inline(
    scorer: Scorer | SketchingScorer,
    data: Batch,
    *,
    chunk_size: int = 2048,
    share: float = 1.0,
    devices: Sequence[jax.Device] | None = None,
) -> InlineEngine | AllHosts:
    """An engine that scores between two steps, on the devices that train: ``collect`` is when it works.

    Where JAX runs in several processes, each scores its part of the chunks on its own devices, and all know all scores;
    parameters must then be replicated, and every process must make the same calls. Parameters that are split over all
    devices stay split, and all processes score each chunk together.

    >>> import jax.numpy as jnp
    >>> import isgd_jax as isgd
    >>> data = {"x": jnp.array([1.0, 2.0, 3.0])}
    >>> scorer = isgd.scorers.grad_norm(lambda w, example: 0.5 * w * example["x"] ** 2)
    >>> with isgd.engines.inline(scorer, data) as engine:
    ...     engine.publish(jnp.float32(2.0), 0)
    ...     print(engine.collect()[0].scores)
    [0.5 2.  4.5]

    Args:
        scorer: ``(params, batch) -> scores [b]``, or ``(scores [b], sketches [b, dims])``; it is jitted here.
        data: a pytree of arrays with one leading axis, best in host memory.
        chunk_size: examples in one call of the scorer, on one device.
        share: of the data set that one ``collect()`` scores, in turn; ``collect(wait=True)`` scores all.
        devices: who scores; all local ones by default.

    Raises:
        ValueError: ``share`` is not above 0 and at most 1, or the data have no common leading axis.
    """
    if not 0.0 < share <= 1.0:
        raise ArgumentError(f"share must be above 0 and at most 1, got {share!r}: the part that one collect() scores")
    size, processes = num_rows(data), jax.process_count()
    wanted = math.ceil(share * size)
    chunk_size = min(Chunks(size, chunk_size).size, wanted)
    per_collect = math.ceil(wanted / chunk_size)
    each = math.ceil(per_collect / processes)
    engine = InlineEngine(scorer, data, chunk_size=chunk_size, chunks_per_collect=each, devices=devices)
    return engine if processes == 1 else AllHosts(engine, per_collect=per_collect)
