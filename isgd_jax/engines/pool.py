"""An engine of workers that score while training goes on: a thread a worker, one desk between them and the trainer.

What a worker is, a device of this host or a process on another one, is its own business: see `Worker`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from isgd_jax.engines.desk import Desk, Order
from isgd_jax.typing import EngineStats, Params, ScoredChunk, WorkersGone

IN_FLIGHT = 2
"""Orders a worker has begun: while one is brought home the next is being scored. More would only make scores older."""

POLL = 0.2
"""Seconds between two looks of a thread that waits, in case nobody wakes it: orders become late in silence."""

NOT_YET = 0
"""Versions begin here; what a worker holds before its first parameters is below."""


@runtime_checkable
class Worker(Protocol):
    """One who scores. Its methods are called from one thread of its own, except `close`."""

    name: str
    fingerprint: str
    """Of the training set it scores."""

    def load(self, shipment: Any, version: int) -> int:
        """Take the parameters that were shipped last; returns the bytes moved."""
        ...

    def start(self, order: Order) -> Any:
        """Begin to score a chunk, without waiting for it."""
        ...

    def finish(self, started: Any) -> np.ndarray:
        """Wait for what was started: the scores [c] of the chunk, without padding."""
        ...

    def revive(self, failures: int) -> bool:
        """After so many errors in a row: whether it may be tried again. It is given the newest parameters then."""
        ...

    def close(self) -> None:
        """Release what it holds, while it may be scoring."""
        ...


class Published(NamedTuple):
    """The newest parameters, as they are shipped, and their version."""

    shipment: Any
    version: int


class Pool:
    """Workers in threads, which score what the desk hands them; implements `isgd_jax.typing.Engine`.

    Guarantees:
        * `publish` keeps the newest parameters only, and does not wait for any worker.
        * Relaxed mode: `collect` never waits. Exact mode: it returns every chunk at the published version, in order.
        * A worker with another data set is refused when it joins, and its results are refused afterwards.
        * An error in a worker costs the run nothing but time: its orders go to others, it is tried again while
          `Worker.revive` allows it, and `notices` says so.
        * A worker that hangs is left behind: its orders go to others after the patience of the desk.

    Args:
        desk: the books.
        workers: who scores; others may `join` later.
        ship: makes of parameters, which the trainer will donate, what workers load: called once a publish.
        exact: whether `collect` waits.
        seconds_per_chunk: measures, given parameters, how long one worker takes for a chunk, compilation left out.
        refetch_every: chunks a worker scores between two looks for newer parameters.
        patience: exact mode gives up when no result has come for this many seconds.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        ship: Callable[[Params], Any],
        seconds_per_chunk: Callable[[Params], float],
        exact: bool = False,
        refetch_every: int = 1,
        patience: float = 600.0,
    ) -> None:
        self._desk, self._ship, self._seconds_per_chunk = desk, ship, seconds_per_chunk
        self._exact, self._refetch_every, self._patience = exact, refetch_every, patience
        self._changed = threading.Condition()  # guards all that follows, and the desk
        self._published: Published | None = None
        self._workers: dict[str, Worker] = {}  # all that work or may come back
        self._failing: dict[str, list[str]] = {}  # those of them that are in trouble: errors in a row
        self._threads: list[threading.Thread] = []
        self._scored: dict[str, int] = {}
        self._bytes = 0
        self._notices: list[str] = []
        self._last_result = time.monotonic()
        self._closed = False

    def join(self, worker: Worker) -> None:
        """A worker begins, now or as soon as parameters are published.

        Raises:
            ValueError: it has another data set, or a name that is taken.
        """
        with self._changed:
            if worker.name in self._workers:
                raise ValueError(f"there is a worker {worker.name} already")
            self._desk.check(worker.fingerprint)
            self._workers[worker.name] = worker
            self._scored.setdefault(worker.name, 0)
        thread = threading.Thread(target=self._serve, args=(worker,), name=f"isgd-{worker.name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    @property
    def chunk_size(self) -> int:
        """Examples in a chunk of the training set."""
        return self._desk.chunk_size

    def publish(self, params: Params, version: int) -> None:
        published = Published(self._ship(params), version)
        with self._changed:
            self._published = published
            self._desk.announce(version)
            self._changed.notify_all()

    def collect(self) -> list[ScoredChunk]:
        with self._changed:
            if self._published is None:
                raise RuntimeError("nothing to score with: call publish(params, version) before collect()")
            if self._exact:
                self._wait_for(self._published.version)
            chunks = self._desk.collect()
        return sorted(chunks, key=lambda chunk: chunk.ids[0]) if self._exact else chunks

    def notices(self) -> list[str]:
        with self._changed:
            told, self._notices = self._notices, []
        return told

    def stats(self) -> EngineStats:
        with self._changed:
            counts, alive = self._desk.counts, len(self._workers) - len(self._failing)
            return EngineStats(dict(self._scored), alive, self._bytes, counts.again, counts.refused)

    def state(self) -> dict[str, int]:
        with self._changed:
            return {"next": self._desk.cursor}

    def restore(self, state: dict[str, int]) -> None:
        with self._changed:
            self._desk.cursor = state["next"]

    def seconds_per_collect(self, params: Params) -> float:
        """Relaxed: what shipping the parameters takes the trainer. Exact: a sweep of all workers as well."""
        jax.block_until_ready(self._ship(params))
        began = time.monotonic()
        jax.block_until_ready(self._ship(params))
        shipping = time.monotonic() - began
        sweep = len(self._desk) * self._seconds_per_chunk(params) if self._exact else 0.0
        return shipping + sweep / max(1, len(self._workers))

    def close(self) -> None:
        with self._changed:
            self._closed = True
            workers = list(self._workers.values())
            self._changed.notify_all()
        for worker in workers:
            worker.close()
        for thread in self._threads:
            thread.join(timeout=5.0)  # one that hangs is a daemon, and ends with the process

    def _wait_for(self, version: int) -> None:
        """Until every chunk carries the version, or nobody is left to score the rest."""
        self._last_result = time.monotonic()
        while not self._desk.is_complete(version):
            missing = f"{self._desk.missing(version)} chunks lack scores at version {version}"
            if not self._workers:
                raise WorkersGone(f"all workers are gone and {missing}: resume with other workers, or --engine inline")
            if time.monotonic() - self._last_result > self._patience:
                why = "".join(f"; worker {name} failed ({errors[-1]})" for name, errors in self._failing.items())
                raise WorkersGone(f"no worker has sent anything for {self._patience:g} s and {missing}{why}")
            self._changed.wait(timeout=POLL)

    def _serve(self, worker: Worker) -> None:
        """The life of a worker's thread."""
        while not self._closed:
            try:
                self._work(worker)
            except Exception as error:  # whatever it is, it must not end the run
                if self._closed or not self._try_again(worker, error):
                    return

    def _work(self, worker: Worker) -> None:
        """Score until the engine is closed, or an error."""
        version, fetched = NOT_YET - 1, 0
        begun: deque[tuple[Order, Any]] = deque()
        while not self._closed:
            if fetched % self._refetch_every == 0 or not begun:
                version = self._refetch(worker, version)
            order = self._next_order(worker, version)
            if order is not None:
                begun.append((order, worker.start(order)))
                fetched += 1
            if len(begun) == IN_FLIGHT or (begun and order is None):
                done, started = begun.popleft()
                self._take(worker, done, worker.finish(started))
            elif not begun:
                self._rest()

    def _refetch(self, worker: Worker, version: int) -> int:
        """The newest parameters, if they are newer than the worker's."""
        with self._changed:
            newest = self._published
        if newest is None or newest.version <= version:
            return version
        moved = worker.load(newest.shipment, newest.version)
        with self._changed:
            self._bytes += moved
        return newest.version

    def _next_order(self, worker: Worker, version: int) -> Order | None:
        with self._changed:
            return None if version < NOT_YET or self._closed else self._desk.next_order(worker.name, version)

    def _take(self, worker: Worker, order: Order, scores: np.ndarray) -> None:
        with self._changed:
            wrong = self._desk.take(order, scores, fingerprint=worker.fingerprint)
            if wrong is not None:
                raise ValueError(wrong)
            self._bytes += scores.nbytes
            self._scored[worker.name] += len(scores)
            self._last_result = time.monotonic()
            if worker.name in self._failing:
                del self._failing[worker.name]
                self._notices.append(f"worker {worker.name} scores again")
            self._changed.notify_all()

    def _rest(self) -> None:
        """Nothing to score: until something is published, or an order of somebody else is late."""
        with self._changed:
            if not self._closed:
                self._changed.wait(timeout=POLL)

    def _try_again(self, worker: Worker, error: Exception) -> bool:
        with self._changed:
            self._desk.give_back(worker.name)
            errors, text = self._failing.setdefault(worker.name, []), f"{type(error).__name__}: {error}"
            if text not in errors:  # what is told once need not be told at each attempt
                self._notices.append(f"worker {worker.name} failed ({text}); others take its work")
                self._tell_if_alone("for now")
            errors.append(text)
            self._changed.notify_all()
        if worker.revive(len(errors)):
            return True
        with self._changed:
            del self._workers[worker.name]
            del self._failing[worker.name]
            self._notices.append(f"worker {worker.name} is gone for good")
            if not self._workers:
                self._tell_if_alone("for good")
            self._changed.notify_all()
        return False

    def _tell_if_alone(self, how_long: str) -> None:
        if len(self._failing) == len(self._workers) and not self._exact:
            self._notices.append(
                f"no worker is left ({how_long}): training goes on with the scores there are, and they grow old; "
                "--max-age says how old they may be trusted"
            )
