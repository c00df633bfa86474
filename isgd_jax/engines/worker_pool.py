"""An engine of workers that score while training goes on: a thread a worker, one queue between them and the trainer.

What a worker is, a device of this host or a process on another one, is its own business: see `Worker`.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from isgd_jax.engines import exits
from isgd_jax.engines.chunks import as_scored
from isgd_jax.engines.contract import ClosesOnExit, EngineStats, ScoredChunk, WorkersGone
from isgd_jax.engines.work_queue import WorkItem, WorkQueue
from isgd_jax.errors import ArgumentError
from isgd_jax.types import Params

__all__ = ["CLOSING", "IN_FLIGHT", "LOG", "NOTHING", "PATIENCE", "POLL", "Held", "Published", "Worker", "WorkerPool"]

LOG = logging.getLogger("isgd_jax")

IN_FLIGHT = 2
"""Items a worker has begun: while one is brought home the next is being scored. More would only make scores older."""

POLL = 0.2
"""Seconds between two looks of a thread that waits, in case nobody wakes it: items become late in silence."""

PATIENCE = 5.0
"""Seconds after which `close` says whom it waits for."""

CLOSING = 30.0
"""Seconds after which `close` leaves a call that cannot be interrupted to itself; the program's end waits for it."""


@runtime_checkable
class Worker(Protocol):
    """Who scores. Its methods are called from one thread of its own, except `close`."""

    name: str
    fingerprint: str
    """Of the training set it scores."""

    def load(self, shipment: Any, version: int) -> int:
        """Take the parameters that were shipped last; returns the bytes moved."""
        ...

    def start(self, item: WorkItem) -> Any:
        """Begin to score a chunk, without waiting for it."""
        ...

    def finish(self, started: Any) -> Any:
        """Wait for what was started: ``scores [c]`` or ``(scores, sketches [c, dims])``, NumPy without padding."""
        ...

    def revive(self, failures: int) -> bool:
        """After so many errors in a row: whether it may be tried again. It is given the newest parameters then."""
        ...

    def close(self) -> None:
        """Release what it holds, while it may be scoring."""
        ...


class Held(NamedTuple):
    """Which parameters a worker has: of which run of the queue, and their version."""

    run: int
    version: int


NOTHING = Held(-1, -1)
"""What a worker holds before its first parameters: older than all."""


class Published(NamedTuple):
    """The newest parameters, as they are shipped, and which they are."""

    shipment: Any
    held: Held


class WorkerPool(ClosesOnExit):
    """An engine of workers in threads, which score what the queue hands them.

    Guarantees:
        * `publish` keeps the newest parameters only, and does not wait for any worker.
        * `collect` never waits. ``collect(wait=True)`` returns when every score carries the published version, and
          what came in since the last call in the order of the examples.
        * It serves one run after the other: what is published at a lower version than the last, or after `restore`, is
          scored anew, and no score of before comes with it.
        * A worker with another data set is refused when it joins, and its results are refused afterwards.
        * An error in a worker costs the run nothing but time: its chunks go to others, it is tried again while
          `Worker.revive` allows it, and `notices` says so.
        * So does any other end of a worker's thread, ``SystemExit`` included, but it is not tried again.
        * Scores that are not finite, or negative, are passed on for the table to set aside; `notices` says so once.
        * `close` closes every worker, whatever one of them raises, and waits for the calls that run: a compilation
          cannot be interrupted, and the interpreter must not end under it. What takes long is waited for at exit.
        * A worker that hangs is left behind: its chunks go to others after the time-out of the queue.

    Args:
        queue: which chunk is with whom; workers `join`, now or later.
        ship: makes of parameters, which the trainer will donate, what workers load: called once a publish.
        seconds_per_chunk: measures, given parameters, how long one worker takes for a chunk, compilation left out.
        refetch_every: chunks a worker scores between two looks for newer parameters.
        timeout: ``collect(wait=True)`` gives up when no result has come for this many seconds.
    """

    def __init__(
        self,
        queue: WorkQueue,
        *,
        ship: Callable[[Params], Any],
        seconds_per_chunk: Callable[[Params], float],
        refetch_every: int = 1,
        timeout: float = 600.0,
    ) -> None:
        self._queue, self._ship, self._seconds_per_chunk = queue, ship, seconds_per_chunk
        self._refetch_every, self._timeout = refetch_every, timeout
        self._changed = threading.Condition()  # guards all that follows, and the queue
        self._published: Published | None = None
        self._workers: dict[str, Worker] = {}  # all that work or may come back
        self._failing: dict[str, list[str]] = {}  # those of them that are in trouble: errors in a row
        self._threads: list[threading.Thread] = []
        self._scored: dict[str, int] = {}
        self._bytes = 0
        self._notices: list[str] = []
        self._last_result = time.monotonic()
        self._odd: set[str] = set()  # workers of whose scores that are no scores was told
        self._closed = False
        exits.close_at_exit(self)

    def join(self, worker: Worker) -> None:
        """A worker begins, now or as soon as parameters are published.

        Raises:
            ValueError: it has another data set, or a name that is taken.

        Args:
            worker: served by a thread of its own from now on. Its name tells it from the others.
        """
        with self._changed:
            if worker.name in self._workers:
                raise ArgumentError(f"there is a worker {worker.name} already")
            self._queue.check(worker.fingerprint)
            self._workers[worker.name] = worker
            self._scored.setdefault(worker.name, 0)
        thread = threading.Thread(target=self._serve, args=(worker,), name=f"isgd-{worker.name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    @property
    def num_examples(self) -> int:
        """Of the training set."""
        return self._queue.num_examples

    @property
    def chunk_size(self) -> int:
        """Examples in a chunk of the training set."""
        return self._queue.chunk_size

    def publish(self, params: Params, version: int) -> None:
        """Score with these parameters from now on; returns before anybody does.

        Args:
            params: copied by ``ship``; a worker takes the newest ones when it next looks, and older ones are dropped.
            version: one that is lower than the last begins another run, which nothing of the one before gets into.
        """
        shipment = self._ship(params)
        with self._changed:
            self._queue.set_version(version)
            self._published = Published(shipment, Held(self._queue.run, version))
            self._changed.notify_all()

    def collect(self, *, wait: bool = False) -> list[ScoredChunk]:
        """What has been scored since the last call; with ``wait``, all chunks at the published version.

        Args:
            wait: until all are there. Otherwise nothing is waited for, and there may be nothing.

        Returns:
            Chunks in the order in which they came in; with ``wait`` in that of the examples.

        Raises:
            RuntimeError: nothing was published yet, or ``wait`` and the engine is closed, or is while it is waited.
            WorkersGone: ``wait``, and no worker is left, or none has sent anything for the pool's time-out.
        """
        with self._changed:
            if self._published is None:
                raise RuntimeError("nothing to score with: call publish(params, version) before collect()")
            if wait and self._closed:
                raise RuntimeError("the engine is closed: nobody scores what is waited for")
            if wait:
                self._wait_for(self._published.held.version)
            chunks = self._queue.collect()
        return sorted(chunks, key=lambda chunk: chunk.ids[0]) if wait else chunks

    def notices(self) -> list[str]:
        """What a person should know since the last call, in sentences."""
        with self._changed:
            told, self._notices = self._notices, []
        return told

    def tell(self, notice: str) -> None:
        """Something that a person should hear of."""
        with self._changed:
            self._notices.append(notice)

    def stats(self) -> EngineStats:
        """What each worker has done so far."""
        with self._changed:
            counts, alive = self._queue.counts, len(self._workers) - len(self._failing)
            return EngineStats(dict(self._scored), alive, self._bytes, counts.again, counts.refused)

    def state(self) -> dict[str, int]:
        """What a run that is resumed must know: the chunk whose turn is next."""
        with self._changed:
            return {"next": self._queue.cursor}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from there, when parameters are published anew; what was scored before is forgotten."""
        with self._changed:
            self._published = None
            self._queue.begin_anew()
            self._queue.cursor = state["next"]

    def seconds_per_collect(self, params: Params, *, wait: bool = False) -> float:
        """What shipping the parameters takes the trainer; where it waits, a sweep of all workers as well.

        Args:
            params: to ship; twice, of which the second is timed.
            wait: whether training waits for a sweep.
        """
        jax.block_until_ready(self._ship(params))
        began = time.monotonic()
        jax.block_until_ready(self._ship(params))
        shipping = time.monotonic() - began
        sweep = len(self._queue) * self._seconds_per_chunk(params) if wait else 0.0
        return shipping + sweep / max(1, len(self._workers))

    def close(self) -> None:
        """Let the workers end what they are at, and end them; those that do not are named. Once closed it stays so."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            workers = list(self._workers.values())
            self._changed.notify_all()
        for worker in workers:
            try:
                worker.close()
            except Exception as error:
                self.tell(f"worker {worker.name} could not be closed ({type(error).__name__}: {error})")
        if exits.joined(self._threads, PATIENCE):
            return
        busy = ", ".join(thread.name for thread in self._threads if thread.is_alive())
        LOG.warning("closing waits for workers that still compile or score: %s", busy)
        if not exits.joined(self._threads, CLOSING - PATIENCE):
            LOG.warning("they are left to finish by themselves; when this program ends, it waits for them")

    @property
    def threads(self) -> list[threading.Thread]:
        """Of the workers, those that have ended included."""
        return list(self._threads)

    def _wait_for(self, version: int) -> None:
        """Until every chunk carries the version, or nobody is left to score the rest."""
        self._last_result = time.monotonic()
        while not self._queue.is_complete(version):
            missing = f"{self._queue.missing(version)} chunks lack scores at version {version}"
            if self._closed:
                raise RuntimeError(f"the engine was closed, and {missing}: nobody scores what is waited for")
            if not self._workers:
                gone = f"all workers are gone and {missing}: go on with other workers, or inline"
                raise WorkersGone("; ".join([gone, *self._notices]))  # after an error nobody may ask for them
            if time.monotonic() - self._last_result > self._timeout:
                why = "".join(f"; worker {name} failed ({errors[-1]})" for name, errors in self._failing.items())
                raise WorkersGone(f"no worker has sent anything for {self._timeout:g} s and {missing}{why}")
            self._changed.wait(timeout=POLL)

    def _serve(self, worker: Worker) -> None:
        """The life of a worker's thread."""
        while not self._closed:
            try:
                self._work(worker)
            except BaseException as error:  # whatever it is, it must not end the run, nor the thread in silence
                if self._closed or not self._try_again(worker, error):
                    return

    def _work(self, worker: Worker) -> None:
        """Score until the engine is closed, or an error."""
        held, fetched = NOTHING, 0
        begun: deque[tuple[WorkItem, Any]] = deque()
        while not self._closed:
            if fetched % self._refetch_every == 0 or not begun:
                held = self._refetch(worker, held)
            item = self._next_item(worker, held)
            if item is not None:
                begun.append((item, worker.start(item)))
                fetched += 1
            if len(begun) == IN_FLIGHT or (begun and item is None):
                done, started = begun.popleft()
                self._complete(worker, done, worker.finish(started))
            elif not begun:
                self._rest()
        for _, started in begun:  # what runs must not outlive the interpreter
            with contextlib.suppress(Exception):
                worker.finish(started)

    def _refetch(self, worker: Worker, held: Held) -> Held:
        """The newest parameters, if they are newer than the worker's."""
        with self._changed:
            newest = self._published
        if newest is None or newest.held <= held:
            return held
        moved = worker.load(newest.shipment, newest.held.version)
        with self._changed:
            self._bytes += moved
        return newest.held

    def _next_item(self, worker: Worker, held: Held) -> WorkItem | None:
        with self._changed:
            is_of_now = held.run == self._queue.run and not self._closed
            return self._queue.next_item(worker.name, held.version) if is_of_now else None

    def _complete(self, worker: Worker, item: WorkItem, found: Any) -> None:
        with self._changed:
            wrong = self._queue.complete(item, found, fingerprint=worker.fingerprint)
            if wrong is not None:
                raise ArgumentError(wrong)
            scored = as_scored(found)
            self._bytes += scored.nbytes
            self._scored[worker.name] += len(scored.scores)
            self._tell_if_odd(worker.name, scored.scores)
            self._last_result = time.monotonic()
            if worker.name in self._failing:
                del self._failing[worker.name]
                self._notices.append(f"worker {worker.name} scores again")
            self._changed.notify_all()

    def _rest(self) -> None:
        """Nothing to score: until something is published, or an item of somebody else is late."""
        with self._changed:
            if not self._closed:
                self._changed.wait(timeout=POLL)

    def _tell_if_odd(self, name: str, scores: np.ndarray) -> None:
        bad = int(np.sum(~(np.isfinite(scores) & (scores >= 0))))
        if bad and name not in self._odd:
            self._odd.add(name)
            self._notices.append(
                f"worker {name} found what cannot be scores: {bad} of {len(scores)} in a chunk are NaN, infinite or "
                "negative; they are passed on, and set aside where scores are recorded"
            )

    def _try_again(self, worker: Worker, error: BaseException) -> bool:
        with self._changed:
            self._queue.requeue(worker.name)
            errors, text = self._failing.setdefault(worker.name, []), f"{type(error).__name__}: {error}"
            if text not in errors:  # what is told once need not be told at each attempt
                self._notices.append(f"worker {worker.name} failed ({text}); others take its work")
                self._tell_if_alone("for now")
            errors.append(text)
            self._changed.notify_all()
        if isinstance(error, Exception) and self._revives(worker, len(errors)):
            return True
        with self._changed:
            del self._workers[worker.name]
            del self._failing[worker.name]
            self._notices.append(f"worker {worker.name} is gone for good")
            if not self._workers:
                self._tell_if_alone("for good")
            self._changed.notify_all()
        return False

    def _revives(self, worker: Worker, failures: int) -> bool:
        try:
            return worker.revive(failures)
        except BaseException as error:
            self.tell(f"worker {worker.name} could not be revived ({type(error).__name__}: {error})")
            return False

    def _tell_if_alone(self, how_long: str) -> None:
        if len(self._failing) == len(self._workers):
            self._notices.append(
                f"no worker is left ({how_long}): training goes on with the scores there are, and they grow old; "
                "max_age= says how old they may be trusted"
            )
