"""The books of the work handed out: which chunk is with whom, at which version, and what came back. No device in sight.

An engine asks the desk for orders in the name of its workers and brings back what they found. The desk never looks at a
worker: one that is late or gone is one whose orders are handed out again.

Guarantees:

* chunks go out round robin: between two turns of a chunk, every other that needs scoring has its turn;
* a chunk is handed out only if it is neither scored nor out with anybody at this version or a later one; so workers
  rest, in place of scoring twice, when all is scored at the published parameters;
* an order not back in time, or of a worker that left, is handed out again, before anything else;
* results are idempotent: what comes twice, or later than a result of newer parameters, changes nothing;
* a result carries the version it was measured with, which may be older than the one published since;
* what is not taken is at most one result a chunk: a trainer that does not look costs no memory.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from isgd_jax.engines.chunks import Chunks
from isgd_jax.typing import TRAIN, ScoredChunk

NEVER = -1


class Order(NamedTuple):
    """Score this chunk of this segment, with parameters of this version."""

    segment: str
    chunk: int
    version: int


class Segment(NamedTuple):
    """A data set to walk through: its chunks, how often it is chosen beside the others, and the shape of one score."""

    chunks: Chunks
    priority: int = 1
    shape: tuple[int, ...] = ()


class Counts(NamedTuple):
    """What has passed over the desk."""

    handed_out: int
    """Orders handed out, those handed out again included."""
    again: int
    """Orders handed out again, because they were late or their worker had left."""
    taken: int
    """Results that told something new."""
    repeated: int
    """Results that came twice or too late, and changed nothing."""
    refused: int
    """Results that could not be right."""


class Desk:
    """Hands out chunks and takes in scores. Not thread-safe: its engine holds a lock.

    Args:
        segments: what to walk through, by name; ``train`` is the training set. Priorities 20:1:1 hand out 20 chunks of
            the first for one of each other, while all have work.
        fingerprint: of the training set; results of workers with another one are refused.
        patience: seconds after which an order is handed out again.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        segments: Mapping[str, Segment],
        *,
        fingerprint: str = "",
        patience: float = 60.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sweeps = {name: _Sweep(segment, patience=patience, now=now) for name, segment in segments.items()}
        self._credit = dict.fromkeys(segments, 0)
        self._fingerprint = fingerprint
        self._newest = NEVER
        self._taken = self._repeated = self._refused = 0

    @property
    def cursors(self) -> dict[str, int]:
        """The chunk whose turn is next, a segment each: saved with the run."""
        return {name: sweep.cursor for name, sweep in self._sweeps.items()}

    @cursors.setter
    def cursors(self, values: Mapping[str, int]) -> None:
        for name, cursor in values.items():
            if name in self._sweeps:
                self._sweeps[name].cursor = cursor % len(self._sweeps[name])

    @property
    def counts(self) -> Counts:
        sweeps = self._sweeps.values()
        handed_out, again = sum(sweep.handed_out for sweep in sweeps), sum(sweep.again for sweep in sweeps)
        return Counts(handed_out, again, self._taken, self._repeated, self._refused)

    def check(self, fingerprint: str) -> None:
        """Refuse a worker that has another data set.

        Raises:
            ValueError: it has.
        """
        if fingerprint != self._fingerprint:
            raise ValueError(
                f"the worker has another data set: expected fingerprint {self._fingerprint!r}, got {fingerprint!r}; "
                "give it the same files in the same order"
            )

    def announce(self, version: int) -> None:
        """Parameters of this version have been published."""
        self._newest = max(self._newest, version)

    def next_order(self, worker: str, version: int) -> Order | None:
        """The next chunk for a worker that holds parameters of this version; None if there is nothing to score."""
        waiting = [name for name, sweep in self._sweeps.items() if sweep.has_work(version)]
        if not waiting:
            return None
        for name in waiting:
            self._credit[name] += self._sweeps[name].segment.priority
        chosen = max(waiting, key=lambda name: self._credit[name])
        self._credit[chosen] -= sum(self._sweeps[name].segment.priority for name in waiting)
        return Order(chosen, self._sweeps[chosen].hand_out(worker, version), version)

    def give_back(self, worker: str) -> None:
        """A worker is gone: hand its orders out again."""
        for sweep in self._sweeps.values():
            sweep.release_of(worker)

    def take(self, order: Order, scores: np.ndarray, *, fingerprint: str = "") -> str | None:
        """Bring back the scores of an order; if they are refused, what is wrong with them.

        Scores that are not finite are not refused: the table sets single ones aside and counts them.
        """
        wrong = self._what_is_wrong(order, scores, fingerprint)
        if wrong is not None:
            self._refused += 1
            return wrong
        if self._sweeps[order.segment].take(order, scores):
            self._taken += 1
        else:
            self._repeated += 1
        return None

    def is_complete(self, version: int) -> bool:
        """Whether every training example has been scored with parameters of this version or later."""
        return bool((self._sweeps[TRAIN].scored >= version).all())

    def __len__(self) -> int:
        """Chunks of the training set."""
        return len(self._sweeps[TRAIN])

    @property
    def chunk_size(self) -> int:
        """Examples in a chunk of the training set."""
        return self._sweeps[TRAIN].segment.chunks.size

    def missing(self, version: int) -> int:
        """How many chunks of the training set have not been scored with parameters of this version or later."""
        return int((self._sweeps[TRAIN].scored < version).sum())

    def collect(self) -> list[ScoredChunk]:
        """What has come in since the last call, in the order in which it came."""
        return [chunk for sweep in self._sweeps.values() for chunk in sweep.collect()]

    def _what_is_wrong(self, order: Order, scores: np.ndarray, fingerprint: str) -> str | None:
        if fingerprint != self._fingerprint:
            return f"another data set: expected fingerprint {self._fingerprint!r}, got {fingerprint!r}"
        sweep = self._sweeps.get(order.segment)
        if sweep is None or not 0 <= order.chunk < len(sweep):
            return f"there is no chunk {order.chunk} of {order.segment}"
        if not 0 <= order.version <= self._newest:
            return f"no parameters of version {order.version} were published; the newest are {self._newest}"
        shape = (len(sweep.segment.chunks.ids(order.chunk)), *sweep.segment.shape)
        if scores.shape != shape or not np.issubdtype(scores.dtype, np.floating):
            return f"expected {list(shape)} floating-point scores, got {scores.dtype}{list(scores.shape)}"
        return None


class _Sweep:
    """One segment: a cursor that goes round, the orders that are out, and the results not yet collected."""

    def __init__(self, segment: Segment, *, patience: float, now: Callable[[], float]) -> None:
        self.segment = segment
        self.cursor = 0
        self.handed_out = self.again = 0
        self.scored = np.full(len(segment.chunks), NEVER, np.int64)  # the version each chunk was last scored with
        self._busy = self.scored.copy()  # the version each chunk is scored or out with
        self._orders: OrderedDict[int, tuple[str, int, float]] = OrderedDict()  # chunk: worker, version, due
        self._lost: deque[int] = deque()
        self._results: dict[int, ScoredChunk] = {}
        self._patience, self._now = patience, now

    def __len__(self) -> int:
        return len(self.scored)

    def has_work(self, version: int) -> bool:
        self._release_late()
        return bool(self._busy[self.cursor] < version or (self._busy < version).any())

    def hand_out(self, worker: str, version: int) -> int:
        chunk = self._next_lost(version)
        if chunk is None:
            chunk = self.cursor
            if self._busy[chunk] >= version:  # rarely: a sweep over all chunks costs as much as there are
                ahead = np.concatenate([self._busy[chunk:], self._busy[:chunk]]) < version
                chunk = (chunk + int(ahead.argmax())) % len(self)
            self.cursor = (chunk + 1) % len(self)
        else:
            self.again += 1
        self.handed_out += 1
        self._busy[chunk] = version
        self._orders[chunk] = (worker, version, self._now() + self._patience)
        self._orders.move_to_end(chunk)
        return chunk

    def take(self, order: Order, scores: np.ndarray) -> bool:
        chunk, version = order.chunk, order.version
        if chunk in self._orders and self._orders[chunk][1] <= version:
            del self._orders[chunk]
        if version <= self.scored[chunk]:
            return False
        self.scored[chunk] = version
        self._busy[chunk] = max(version, self._busy[chunk])
        self._results.pop(chunk, None)
        self._results[chunk] = ScoredChunk(self.segment.chunks.ids(chunk), scores, version, order.segment)
        return True

    def collect(self) -> list[ScoredChunk]:
        results, self._results = list(self._results.values()), {}
        return results

    def release_of(self, worker: str) -> None:
        for chunk in [chunk for chunk, (holder, _, _) in self._orders.items() if holder == worker]:
            self._release(chunk)

    def _release_late(self) -> None:
        while self._orders:
            chunk, (_, _, due) = next(iter(self._orders.items()))  # the oldest order is the first to be late
            if due > self._now():
                return
            self._release(chunk)

    def _release(self, chunk: int) -> None:
        del self._orders[chunk]
        self._busy[chunk] = self.scored[chunk]
        self._lost.append(chunk)

    def _next_lost(self, version: int) -> int | None:
        while self._lost:
            chunk = self._lost.popleft()
            if self._busy[chunk] < version:
                return chunk
        return None
