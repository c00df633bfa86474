"""The inline engine over all processes of a distributed run: each scores its share, and all know the same scores."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isgd_jax.engines.inline import Inline
from isgd_jax.typing import EngineStats, Params, ScoredChunk


class Hosts:
    """Chunks in turn, dealt out over the processes; implements `isgd_jax.typing.Engine`.

    Guarantees:
        * `collect` returns the same chunks with the same bits, in the same order, on every process.
        * Each process scores with its own devices (`jax.pmap`); only scores cross the network.

    Args:
        inline: the engine of this process, over its devices. All processes have as many devices.
        per_collect: chunks scored at each `collect`, by all processes together.
    """

    def __init__(self, inline: Inline, *, per_collect: int) -> None:
        self._inline, self._chunks, self._per_collect = inline, inline.chunks, per_collect
        self._rank, self._size = jax.process_index(), jax.process_count()
        self._cursor = self._bytes = 0

    @property
    def chunk_size(self) -> int:
        """Examples in a chunk."""
        return self._chunks.size

    def publish(self, params: Params, version: int) -> None:
        """Score with these parameters, replicated over all devices, from now on."""
        self._inline.publish(_on_this_host(params), version)

    def collect(self) -> list[ScoredChunk]:
        """The next chunks, scored by all."""
        turn = [(self._cursor + i) % len(self._chunks) for i in range(self._per_collect)]
        self._cursor = (self._cursor + self._per_collect) % len(self._chunks)
        each = -(-len(turn) // self._size)
        dealt = [[turn[min(i * self._size + rank, len(turn) - 1)] for i in range(each)] for rank in range(self._size)]
        mine = self._inline.score(dealt[self._rank])
        rows = np.stack([np.pad(chunk.scores, (0, self._chunks.size - len(chunk.scores))) for chunk in mine])
        everyones = multihost_utils.process_allgather(rows)  # [processes, each, width]
        self._bytes += everyones.nbytes
        found = [everyones[i % self._size, i // self._size] for i in range(len(turn))]
        ids = [self._chunks.ids(chunk) for chunk in turn]
        return [ScoredChunk(i, row[: len(i)], mine[0].version) for i, row in zip(ids, found, strict=True)]

    def notices(self) -> list[str]:
        return []

    def stats(self) -> EngineStats:
        """Of this process."""
        mine = self._inline.stats()
        scored = {f"process {self._rank}": sum(mine.scored.values())}
        return mine._replace(scored=scored, workers=self._size, bytes_moved=mine.bytes_moved + self._bytes)

    def state(self) -> dict[str, int]:
        return {"next": self._cursor}

    def restore(self, state: dict[str, int]) -> None:
        self._cursor = state["next"]

    def seconds_per_collect(self, params: Params) -> float:
        return self._inline.seconds_per_collect(_on_this_host(params))

    def close(self) -> None:
        self._inline.close()


def _on_this_host(params: Params) -> Params:
    """Parameters replicated over all devices, as arrays replicated over those of this process: nothing is copied."""
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), ("devices",)), PartitionSpec())

    def local(x: jax.Array) -> jax.Array:
        shards = {shard.device: shard.data for shard in x.addressable_shards}
        return jax.make_array_from_single_device_arrays(x.shape, sharding, [shards[d] for d in jax.local_devices()])

    return jax.tree.map(local, params)
