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
from typing import Any, NamedTuple

import jax
import numpy as np

from isgd_jax.sampling.gates import is_open, with_gate
from isgd_jax.sampling.state import SamplerState
from isgd_jax.training.data_parallel import local_copy
from isgd_jax.types import Batch, Draw, Key

__all__ = ["BLOCK", "NO_BLOCK", "Block", "Prefetch"]

BLOCK, AHEAD = 32, 4
"""Steps whose draws are made at once, and batches that are fetched before they are needed."""


class Block(NamedTuple):
    """What a run that is resumed within a block of draws must know: a part of its state that stays on the host."""

    end: np.ndarray
    """The step at which it ends."""
    is_open: np.ndarray
    """How the gate stood when it began."""
    stream: np.ndarray
    """The sampler's stream of places then."""


NO_BLOCK = Block(np.zeros((), np.int32), np.asarray(True), np.zeros((), np.int32))


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
        self._first = self._fetched = self._next = 0
        self._waiting: deque[Future] = deque()
        self._block = NO_BLOCK

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
        if step != self._next or step >= self._block.end or not len(self._indices):
            self._begin(step, state, steps_left)
        self._fetch_ahead()
        at, self._next = step - self._first, step + 1
        return jax.tree.map(lambda x: x[at], self._draws), self._waiting.popleft().result()

    @property
    def block(self) -> Block:
        """The present one; to save, and to set in a run that goes on: its rest is then drawn as it was begun."""
        return self._block

    @block.setter
    def block(self, block: Block) -> None:
        if block is not self._block:
            self._block, self._next = Block(*map(np.asarray, block)), -1

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, step: int, state: SamplerState, steps_left: int) -> None:
        """The draws of a block; where it was begun before a break, of its rest."""
        if step >= self._block.end:
            end = np.asarray(step + min(BLOCK, steps_left), np.int32)
            self._block = Block(end, *(np.asarray(local_copy(x)) for x in (is_open(state), state.proposal.stream)))
        self._draws = self._draw_ahead(with_gate(state, self._block.is_open, self._block.stream), self._key, BLOCK)
        self._indices = np.asarray(self._draws.indices)
        self._first, self._fetched = step, step
        self._waiting.clear()

    def _fetch_ahead(self) -> None:
        while self._fetched < self._block.end and len(self._waiting) < AHEAD:
            ids = self._indices[self._fetched - self._first]
            self._waiting.append(self._pool.submit(self._gather, ids))
            self._fetched += 1

    def _gather(self, ids: np.ndarray) -> Batch:
        return jax.tree.map(lambda x: x[ids], self._data)
