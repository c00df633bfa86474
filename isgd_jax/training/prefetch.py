"""Data that stay on the host: draws made ahead while the proposal stays, their examples fetched by a thread.

The proposal does not change between two refreshes, so the draws of the steps to come are known, and while the device is
at one step a thread gathers the examples of the next ones. Each batch carries the probabilities of its own draws.

Guarantees:

* the draws of a step are those that it would make itself, but that the gate is asked at the start of a block of steps;
* no block reaches beyond the next refresh: no draw is ever served from an old proposal;
* at most ``AHEAD`` batches wait: memory does not grow with the data;
* a run resumed within a block goes on with the block's gate: bit for bit.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from isgd_jax.sampling.gates import is_open, with_gate
from isgd_jax.sampling.state import SamplerState
from isgd_jax.types import Batch, Draw, Key

__all__ = ["Prefetch"]

BLOCK, AHEAD = 32, 4
"""Steps whose draws are made at once, and batches that are fetched before they are needed."""


class Prefetch:
    """The batches of a run whose training set is not on the device.

    Args:
        data: the training set, a pytree of arrays in memory or memory-mapped, leading axis ``n``.
        draw_ahead: ``(sampler state, key, num_steps) -> draws``, stacked.
        key: of the run's draws.
    """

    def __init__(self, data: Batch, draw_ahead: Callable[..., Draw], key: Key) -> None:
        self._data, self._draw_ahead, self._key = data, draw_ahead, key
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="isgd-prefetch")
        self._draws: Any = None
        self._indices = np.zeros((0, 0), np.int32)
        self._first = self._fetched = self._next = self._end = 0
        self._waiting: deque[Future] = deque()
        self._is_open: bool | None = None

    def next(self, step: int, state: SamplerState, steps_left: int) -> tuple[Draw, Batch]:
        """The draws of ``step`` and their examples; waits for the thread that fetches them.

        A step asked for out of turn, or again, begins a block anew.

        Args:
            step: asked for one after the other.
            state: of the sampler, with the proposal and the gate of the block where one begins; not kept.
            steps_left: for how many steps the proposal stays, this one included: no block reaches further.

        Returns:
            The draw [m], on the device, and its batch, NumPy arrays on the host.

        Raises:
            OSError: the examples cannot be read.
        """
        if step != self._next or step >= self._end or not len(self._indices):
            self._begin(step, state, steps_left)
        self._fetch_ahead()
        at, self._next = step - self._first, step + 1
        return jax.tree.map(lambda x: x[at], self._draws), self._waiting.popleft().result()

    def state_dict(self) -> dict[str, Any]:
        """What a run resumed within a block must know: where the block ends, and how its gate stood."""
        return {"end": self._end, "is_open": self._is_open}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on within a saved block: the draws of its rest are made anew, by the gate of its start."""
        self._end, self._is_open = saved["end"], saved["is_open"]
        self._next = -1

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, step: int, state: SamplerState, steps_left: int) -> None:
        """The draws of a block; where it was begun before a break, of its rest."""
        is_resumed = step < self._end
        end = self._end if is_resumed else step + min(BLOCK, steps_left)
        if not is_resumed or self._is_open is None:
            self._is_open = bool(is_open(state))
        self._draws = self._draw_ahead(with_gate(state, self._is_open), self._key, BLOCK)
        self._indices = np.asarray(self._draws.indices)
        self._first, self._fetched, self._end = step, step, end
        self._waiting.clear()

    def _fetch_ahead(self) -> None:
        while self._fetched < self._end and len(self._waiting) < AHEAD:
            ids = self._indices[self._fetched - self._first]
            self._waiting.append(self._pool.submit(self._gather, ids))
            self._fetched += 1

    def _gather(self, ids: np.ndarray) -> Batch:
        return jax.tree.map(lambda x: x[ids], self._data)
