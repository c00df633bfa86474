"""The simplest engine: the trainer's own devices score between two steps."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from isgd_jax.typing import Batch, Params, ScoredChunk, Scorer


class Inline:
    """Scores chunks of the data set in turn, on the devices of the scorer, whenever `collect` is called.

    Guarantees:
        * A chunk carries the version of the parameters it was scored with.
        * Every call of the scorer has the same shape: the last chunk is padded, and its padding dropped.
        * `collect` scores `chunks_per_collect` chunks, going on where the last call stopped; `None` is all of them,
          which is the exact mode: every score carries the published version.
        * Parameters are copied when they are published: the trainer may donate its own.

    Args:
        scorer: ``(params, batch) -> scores [b]``; `isgd_jax.sharded` spreads it over devices.
        data: the training set in host memory, a pytree with leading axis ``n``.
        chunk_size: examples scored in one call of the scorer.
        chunks_per_collect: chunks scored at each `collect`.
        cursor: the first chunk to score, for resuming.
    """

    def __init__(
        self,
        scorer: Scorer,
        data: Batch,
        *,
        chunk_size: int,
        chunks_per_collect: int | None = None,
        cursor: int = 0,
    ) -> None:
        self._scorer = scorer
        self._data = data
        self._num_examples = len(jax.tree.leaves(data)[0])
        self._chunk_size = min(chunk_size, self._num_examples)
        self._num_chunks = -(-self._num_examples // self._chunk_size)
        self._per_collect = self._num_chunks if chunks_per_collect is None else chunks_per_collect
        self._published: tuple[Params, int] | None = None
        self.cursor = cursor

    def publish(self, params: Params, version: int) -> None:
        """Score with these parameters from now on."""
        self._published = (jax.tree.map(jnp.copy, params), version)

    def collect(self) -> list[ScoredChunk]:
        """Score the next chunks and return them.

        Raises:
            RuntimeError: nothing was published yet.
        """
        if self._published is None:
            raise RuntimeError("nothing to score with: call publish(params, version) before collect()")
        params, version = self._published
        turn = [self._ids((self.cursor + i) % self._num_chunks) for i in range(self._per_collect)]
        self.cursor = (self.cursor + self._per_collect) % self._num_chunks
        # All calls are dispatched before the first result is fetched: the devices never wait for the host.
        pending = [self._scorer(params, self._batch(ids)) for ids in turn]
        return [ScoredChunk(ids, np.asarray(s)[: len(ids)], version) for ids, s in zip(turn, pending, strict=True)]

    def seconds_per_collect(self, params: Params) -> float:
        """How long a `collect` will take: one chunk is scored and timed, compilation left out."""
        batch = self._batch(self._ids(0))
        np.asarray(self._scorer(params, batch))
        began = time.monotonic()
        np.asarray(self._scorer(params, batch))
        return (time.monotonic() - began) * self._per_collect

    def close(self) -> None:
        """Forget the published parameters."""
        self._published = None

    def _ids(self, chunk: int) -> np.ndarray:
        start = chunk * self._chunk_size
        return np.arange(start, min(start + self._chunk_size, self._num_examples))

    def _batch(self, ids: np.ndarray) -> Batch:
        padded = np.pad(ids, (0, self._chunk_size - len(ids)), mode="edge")
        return jax.tree.map(lambda x: x[padded], self._data)
