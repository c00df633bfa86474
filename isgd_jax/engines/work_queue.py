"""Keeps the work handed out: which chunk is with whom, at which version, and what came back. No device in sight.

An engine asks the queue for items in the name of its workers and brings back what they found. The queue never looks at
a worker: one that is late or gone is one whose items are handed out again.

Guarantees:

* chunks go out round robin: between two turns of a chunk, every other that needs scoring has its turn;
* a chunk is handed out only if it is neither scored nor out with anybody at this version or a later one; so workers
  rest, in place of scoring twice, when all is scored at the published parameters;
* an item not back in time, or of a worker that left, is handed out again, before anything else;
* results are idempotent: what comes twice, or later than a result of newer parameters, changes nothing;
* a result carries the version it was measured with, which may be older than the one published since;
* a version that is lower than the last begins another run: all is to be scored anew, and what was scored before, or
  comes back later, is of no use to it;
* what is not taken is at most one result a chunk: a trainer that does not look costs no memory.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from isgd_jax.engines.chunks import Chunks, as_scored, what_is_wrong
from isgd_jax.engines.contract import ScoredChunk
from isgd_jax.errors import ArgumentError

__all__ = ["NEVER", "Counts", "WorkItem", "WorkQueue"]

NEVER = -1


class WorkItem(NamedTuple):
    """Score this chunk, with parameters of this version."""

    chunk: int
    version: int
    run: int = 0
    """Of the queue (`WorkQueue.begin_anew`)."""


class Counts(NamedTuple):
    """What has passed through the queue."""

    handed_out: int
    """Items handed out, those handed out again included."""
    again: int
    """Items handed out again, because they were late or their worker had left."""
    taken: int
    """Results that told something new."""
    repeated: int
    """Results that came twice, too late or from an earlier run, and changed nothing."""
    refused: int
    """Results that could not be right."""


class WorkQueue:
    """Hands out chunks and takes in scores. Not thread-safe: its engine holds a lock.

    Args:
        chunks: of the training set: what to walk through.
        fingerprint: of the training set; results of workers with another one are refused.
        timeout: seconds after which an item is handed out again.
        now: the clock, in seconds.
    """

    def __init__(
        self,
        chunks: Chunks,
        *,
        fingerprint: str = "",
        timeout: float = 60.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._chunks, self._fingerprint, self._timeout, self._now = chunks, fingerprint, timeout, now
        self._cursor = self._run = 0
        self._forget()
        self._handed_out = self._again = self._taken = self._repeated = self._refused = 0

    def begin_anew(self) -> None:
        """Another run begins, with other parameters at the same versions: nothing is scored; the turn stays."""
        self._run += 1
        self._forget()

    def _forget(self) -> None:
        self._newest = NEVER
        self._scored = np.full(len(self), NEVER, np.int64)  # the version each chunk was last scored with
        self._busy = self._scored.copy()  # the version each chunk is scored or out with
        self._items: OrderedDict[int, tuple[str, int, float]] = OrderedDict()  # chunk: worker, version, due
        self._lost: deque[int] = deque()
        self._results: dict[int, ScoredChunk] = {}

    @property
    def run(self) -> int:
        """How often it has begun anew."""
        return self._run

    @property
    def cursor(self) -> int:
        """The chunk whose turn is next: saved with the run."""
        return self._cursor

    @cursor.setter
    def cursor(self, value: int) -> None:
        """The chunk whose turn is next."""
        self._cursor = value % len(self)

    @property
    def counts(self) -> Counts:
        """What has passed through so far."""
        return Counts(self._handed_out, self._again, self._taken, self._repeated, self._refused)

    def check(self, fingerprint: str) -> None:
        """Refuse a worker that has another data set.

        Raises:
            ValueError: it has.
        """
        if fingerprint != self._fingerprint:
            raise ArgumentError(
                f"the worker has another data set: expected fingerprint {self._fingerprint!r}, got {fingerprint!r}; "
                "give it the same files in the same order"
            )

    def set_version(self, version: int) -> None:
        """Parameters of this version have been published; those of a lower one than the last are another run's."""
        if version < self._newest:
            self.begin_anew()
        self._newest = version

    def next_item(self, worker: str, version: int) -> WorkItem | None:
        """The next chunk for a worker that holds parameters of this version; None if there is nothing to score.

        Chunks whose worker is late or gone come first, then those in turn. O(1) as a rule, O(chunks) where most are
        out.

        Args:
            worker: its name, for `requeue`.
            version: of the parameters that it holds, which may be older than the published ones.
        """
        self._release_late()
        if not (self._busy[self._cursor] < version or (self._busy < version).any()):
            return None
        chunk = self._next_lost(version)
        if chunk is None:
            chunk = self._next_in_turn(version)
        else:
            self._again += 1
        self._handed_out += 1
        self._busy[chunk] = version
        self._items[chunk] = (worker, version, self._now() + self._timeout)
        self._items.move_to_end(chunk)
        return WorkItem(chunk, version, self._run)

    def requeue(self, worker: str) -> None:
        """A worker is gone: hand its items out again."""
        for chunk in [chunk for chunk, (holder, _, _) in self._items.items() if holder == worker]:
            self._release(chunk)

    def complete(self, item: WorkItem, found: Any, *, fingerprint: str = "") -> str | None:
        """Bring back what a worker found of an item; what comes twice, or late, changes nothing.

        Scores that are not finite are not refused: the table sets single ones aside and counts them.

        Args:
            item: as it was handed out.
            found: ``scores [c]``, or ``(scores, sketches [c, dims])``, NumPy arrays without padding.
            fingerprint: of the worker's data set.

        Returns:
            None, or what is wrong with the result, which is then not used.
        """
        if item.run != self._run:
            self._repeated += 1
            return None
        wrong = self._what_is_wrong(item, found, fingerprint)
        if wrong is not None:
            self._refused += 1
            return wrong
        chunk, version, _ = item
        if chunk in self._items and self._items[chunk][1] <= version:
            del self._items[chunk]
        if version <= self._scored[chunk]:
            self._repeated += 1
            return None
        scored = as_scored(found)
        self._taken += 1
        self._scored[chunk] = version
        self._busy[chunk] = max(version, self._busy[chunk])
        self._results.pop(chunk, None)  # so that the newer one is the last to have come in
        self._results[chunk] = ScoredChunk(self._chunks.ids(chunk), scored.scores, version, scored.sketches)
        return None

    def is_complete(self, version: int) -> bool:
        """Whether every chunk has been scored with parameters of this version or later."""
        return bool((self._scored >= version).all())

    def __len__(self) -> int:
        """Chunks of the training set."""
        return len(self._chunks)

    @property
    def num_examples(self) -> int:
        """Of the training set."""
        return self._chunks.num_examples

    @property
    def chunk_size(self) -> int:
        """Examples in a chunk."""
        return self._chunks.size

    def missing(self, version: int) -> int:
        """How many chunks have not been scored with parameters of this version or later."""
        return int((self._scored < version).sum())

    def collect(self) -> list[ScoredChunk]:
        """What has come in since the last call, in the order in which it came."""
        results, self._results = list(self._results.values()), {}
        return results

    def _what_is_wrong(self, item: WorkItem, found: Any, fingerprint: str) -> str | None:
        if fingerprint != self._fingerprint:
            return f"another data set: expected fingerprint {self._fingerprint!r}, got {fingerprint!r}"
        if not 0 <= item.chunk < len(self):
            return f"there is no chunk {item.chunk}"
        if not 0 <= item.version <= self._newest:
            return f"no parameters of version {item.version} were published; the newest are {self._newest}"
        return what_is_wrong(found, len(self._chunks.ids(item.chunk)))

    def _next_in_turn(self, version: int) -> int:
        chunk = self._cursor
        if self._busy[chunk] >= version:  # rarely: a sweep over all chunks costs as much as there are
            ahead = np.roll(self._busy, -chunk) < version
            chunk = (chunk + int(np.argmax(ahead))) % len(self)
        self._cursor = (chunk + 1) % len(self)
        return chunk

    def _next_lost(self, version: int) -> int | None:
        while self._lost:
            chunk = self._lost.popleft()
            if self._busy[chunk] < version:
                return chunk
        return None

    def _release_late(self) -> None:
        while self._items:
            chunk, (_, _, due) = next(iter(self._items.items()))  # the oldest item is the first to be late
            if due > self._now():
                return
            self._release(chunk)

    def _release(self, chunk: int) -> None:
        del self._items[chunk]
        self._busy[chunk] = self._scored[chunk]
        self._lost.append(chunk)
