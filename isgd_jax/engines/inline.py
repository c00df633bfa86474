"""The simplest engine: the trainer's own devices score between two steps."""

import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from isgd_jax.engines.chunks import Chunks
from isgd_jax.sharded import sharded
from isgd_jax.typing import Batch, EngineStats, Params, ScoredChunk, Scorer


class Inline:
    """Scores chunks of the data set in turn, a chunk on each device at a time, whenever `collect` is called.

    Guarantees:
        * A chunk carries the version of the parameters it was scored with.
        * On every device, every call of the scorer has the same shape: a chunk, the last one padded.
        * `collect` scores `chunks_per_collect` chunks, going on where the last call stopped; `None` is all of them,
          which is the exact mode: every score carries the published version.
        * Parameters are copied when they are published: the trainer may donate its own.

    Args:
        scorer: ``(params, batch) -> scores [b]``, not jitted.
        data: the training set in host memory, a pytree with leading axis ``n``.
        chunk_size: examples scored in one call on one device.
        chunks_per_collect: chunks scored at each `collect`.
        devices: who scores; all local ones by default.
    """

    def __init__(
        self,
        scorer: Scorer,
        data: Batch,
        *,
        chunk_size: int,
        chunks_per_collect: int | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        self._data = data
        self._chunks = Chunks(len(jax.tree.leaves(data)[0]), chunk_size)
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
    def chunk_size(self) -> int:
        """Examples in a chunk."""
        return self._chunks.size

    def publish(self, params: Params, version: int) -> None:
        """Score with these parameters from now on."""
        self._published = (jax.tree.map(jnp.copy, params), version)
        self._bytes += (len(self._devices) - 1) * sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def collect(self) -> list[ScoredChunk]:
        """Score the next chunks and return them.

        Raises:
            RuntimeError: nothing was published yet.
        """
        turn = [(self._cursor + i) % len(self._chunks) for i in range(self._per_collect)]
        self._cursor = (self._cursor + self._per_collect) % len(self._chunks)
        return self.score(turn)

    def score(self, turn: Sequence[int]) -> list[ScoredChunk]:
        """Score these chunks with the published parameters, whosever turn it is.

        Raises:
            RuntimeError: nothing was published yet.
        """
        if self._published is None:
            raise RuntimeError("nothing to score with: call publish(params, version) before collect()")
        params, version = self._published
        width = len(self._devices)
        groups = [turn[i : i + width] for i in range(0, len(turn), width)]
        # All calls are dispatched before the first result is fetched: the devices never wait for the host.
        pending = [self._scorer(params, self._batch(group)) for group in groups]
        found = [row for scores in pending for row in np.asarray(scores).reshape(width, -1)]
        scored = [
            ScoredChunk(ids, row[: len(ids)], version)
            for row, ids in zip(found, map(self._chunks.ids, turn), strict=False)
        ]
        self._scored += sum(len(chunk.ids) for chunk in scored)
        self._bytes += sum(chunk.scores.nbytes for chunk in scored)
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

    def seconds_per_collect(self, params: Params) -> float:
        """How long a `collect` will take: one call is scored and timed, compilation left out."""
        width = len(self._devices)
        batch = self._batch(list(range(width)))
        np.asarray(self._scorer(params, batch))
        began = time.monotonic()
        np.asarray(self._scorer(params, batch))
        return (time.monotonic() - began) * -(-self._per_collect // width)

    def close(self) -> None:
        """Forget the published parameters."""
        self._published = None

    def _batch(self, group: Sequence[int]) -> Batch:
        """A chunk for each device; the first of the group again is harmless padding."""
        padded = [*group, *[group[0]] * (len(self._devices) - len(group))]
        parts = [self._chunks.batch(self._data, chunk) for chunk in padded]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
