"""The inline engine over all processes of a distributed run: each scores its share, and all know the same scores."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isgd_jax.engines.chunks import Chunks, Scored
from isgd_jax.engines.contract import ClosesOnExit, EngineStats, FullEngine, ScoredChunk
from isgd_jax.types import Params

__all__ = ["AllHosts", "ScoresChunks"]


@runtime_checkable
class ScoresChunks(FullEngine, Protocol):
    """An engine that scores the chunks it is told to."""

    @property
    def chunks(self) -> Chunks:
        """The chunks of the training set."""
        ...

    def score(self, turn: Sequence[int]) -> list[ScoredChunk]:
        """Score these chunks with the published parameters."""
        ...


class AllHosts(ClosesOnExit):
    """Chunks in turn, dealt out over the processes; every process makes the same calls.

    Guarantees:
        * `collect` returns the same chunks with the same bits, in the same order, on every process.
        * Each process scores with its own devices (`jax.pmap`); only scores and sketches cross the network.
        * Parameters that are split over the devices of all stay split: then all score each chunk together.

    Args:
        inline: the engine of this process, over its devices. All processes have as many devices.
        per_collect: chunks scored at each `collect`, by all processes together.
    """

    def __init__(self, inline: ScoresChunks, *, per_collect: int) -> None:
        self._inline, self._chunks, self._per_collect = inline, inline.chunks, per_collect
        self._rank, self._size = jax.process_index(), jax.process_count()
        self._cursor = self._bytes = 0
        self._is_split = False

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
            params: replicated over all devices of all processes; each process takes its own copies, and nothing is
                moved. Those that are split over the devices stay split.
            version: the same on all processes.
        """
        self._is_split = _is_split(params)
        self._inline.publish(params if self._is_split else _on_this_host(params), version)

    def collect(self, *, wait: bool = False) -> list[ScoredChunk]:
        """The next chunks, or all, scored by all; a barrier, since every process waits for the others' scores.

        Args:
            wait: score all chunks at the published version; the turn does not move.

        Raises:
            RuntimeError: nothing was published yet.
            ValueError: what the scorer returned cannot be scores.
        """
        if wait:
            return self._score(list(range(len(self._chunks))))
        turn = [(self._cursor + i) % len(self._chunks) for i in range(self._per_collect)]
        self._cursor = (self._cursor + self._per_collect) % len(self._chunks)
        return self._score(turn)

    def notices(self) -> list[str]:
        """A process that is lost ends all others: there is nobody to tell of."""
        return []

    def stats(self) -> EngineStats:
        """Of this process."""
        mine = self._inline.stats()
        scored = {f"process {self._rank}": sum(mine.scored.values())}
        return mine._replace(scored=scored, workers=self._size, bytes_moved=mine.bytes_moved + self._bytes)

    def state(self) -> dict[str, int]:
        """The chunk whose turn is next."""
        return {"next": self._cursor}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self._cursor = state["next"]

    def seconds_per_collect(self, params: Params, *, wait: bool = False) -> float:
        """What this process needs for its share."""
        if _is_split(params):  # all are timed together, at one chunk after the other
            return self._inline.seconds_per_collect(params, wait=wait) * (1 if wait else self._size)
        seconds = self._inline.seconds_per_collect(_on_this_host(params), wait=wait)
        return seconds / self._size if wait else seconds

    def close(self) -> None:
        """Forget the published parameters."""
        self._inline.close()

    def _score(self, turn: list[int]) -> list[ScoredChunk]:
        if self._is_split:
            return self._inline.score(turn)
        each = -(-len(turn) // self._size)
        dealt = [[turn[min(i * self._size + rank, len(turn) - 1)] for i in range(each)] for rank in range(self._size)]
        mine = self._inline.score(dealt[self._rank])
        rows = jax.tree.map(lambda *chunks: np.stack(chunks), *map(self._padded, mine))
        everyones = multihost_utils.process_allgather(rows)  # leaves [processes, each, width, ...]
        self._bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(everyones))
        found = []
        for i, chunk in enumerate(turn):
            ids, place = self._chunks.ids(chunk), (i % self._size, i // self._size)
            part = jax.tree.map(lambda leaf, place=place, ids=ids: leaf[place][: len(ids)], everyones)
            found.append(ScoredChunk(ids, part.scores, mine[0].version, part.sketches))
        return found

    def _padded(self, chunk: ScoredChunk) -> Scored:
        """One shape for all chunks."""

        def padded(rows: Any) -> np.ndarray:
            return np.pad(rows, [(0, self._chunks.size - len(rows)), *[(0, 0)] * (rows.ndim - 1)])

        return jax.tree.map(padded, Scored(chunk.scores, chunk.sketches))


def _is_split(params: Params) -> bool:
    return any(not x.is_fully_replicated for x in jax.tree.leaves(params) if isinstance(x, jax.Array))


def _on_this_host(params: Params) -> Params:
    """Parameters replicated over all devices, as arrays replicated over those of this process: nothing is copied."""
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), ("devices",)), PartitionSpec())

    def local(x: jax.Array) -> jax.Array:
        shards = {shard.device: shard.data for shard in x.addressable_shards}
        return jax.make_array_from_single_device_arrays(x.shape, sharding, [shards[d] for d in jax.local_devices()])

    return jax.tree.map(local, params)
