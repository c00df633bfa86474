"""Workers on a Ray cluster: actors wherever there is room, each with data that it was sent or loaded itself.

Ray does the rest: placement, transport through its object store, restarts of what dies, nodes that come and go. Without
an address a Ray of this host alone is started, and stopped again; it listens on the loopback interface, and asks for a
token.
"""

import functools
import hashlib
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from isgd_jax.errors import ArgumentTypeError, CannotImportError

__all__ = [
    "LOOK",
    "PAUSES",
    "Actor",
    "Failed",
    "Lost",
    "MakeJob",
    "Places",
    "RayCluster",
    "Refused",
    "ScoringActor",
    "actor_pool",
    "fingerprint_of",
    "places",
    "ray_cluster",
]

try:
    import ray
    from ray import exceptions
except ImportError as error:
    raise CannotImportError("isgd.engines.ray_cluster needs Ray: pip install 'isgd_jax[cluster]'") from error

from isgd_jax.engines.chunks import Chunks, is_key, num_rows, unpadded
from isgd_jax.engines.contract import ScoredChunk
from isgd_jax.engines.local_engine import Job, num_bytes, seconds_per_chunk
from isgd_jax.engines.ray_connection import connect
from isgd_jax.engines.work_queue import WorkItem, WorkQueue
from isgd_jax.engines.worker_pool import WorkerPool
from isgd_jax.gradients.captured import CapturingJit
from isgd_jax.types import Batch, Params, Scorer, SketchingScorer

MakeJob = Callable[[], tuple[Job, str]]

PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before a worker that failed is tried again, longer each time. Ray restarts it meanwhile."""

LOOK = 1.0
"""Seconds between two looks whether the engine was closed, while a worker takes its time."""


class ScoringActor:
    """The actor: one process, one device, one version of the parameters."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._version: int | None = None

    def prepare(self, make_job: MakeJob) -> str:
        """Load the data; called first, and again after each restart, since Ray's new process knows nothing.

        Returns:
            The fingerprint of the data set, which the trainer compares with its own.
        """
        self._job, fingerprint = make_job()
        self._device = jax.local_devices()[0]
        self._scorer = CapturingJit(self._job.scorer)
        self._params: Params = None
        self._version = None
        return fingerprint

    def load(self, params: Params, version: int) -> int:
        """Take parameters, NumPy arrays in the shared memory of this node; returns their bytes.

        Raises:
            RuntimeError: it has no data, as after a restart that nobody saw.
        """
        if self._job is None:
            raise RuntimeError("its process began anew, and has yet to load its data")
        self._params, self._version = jax.device_put(params, self._device), version
        return num_bytes(self._params)

    def score(self, item: WorkItem) -> Any:
        """The ``scores [c]`` of a chunk, or ``(scores, sketches [c, dims])``.

        Raises:
            RuntimeError: the item is of another version than the parameters here, as after a restart that nobody saw.
            ValueError: what the scorer returned cannot be scores.
        """
        if self._job is None or item.version != self._version:
            raise RuntimeError(f"asked to score at version {item.version}, but holds {self._version}")
        batch = jax.device_put(self._job.chunks.batch(self._job.data, item.chunk), self._device)
        chunks = self._job.chunks
        return unpadded(self._scorer(self._params, batch), len(chunks.ids(item.chunk)), chunks.size)


class Refused(ValueError):
    """A worker that can never help: it has another data set, or cannot load it."""


class Failed(RuntimeError):
    """What a worker was asked to do raised an error there."""


class Lost(RuntimeError):
    """A worker that Ray restarts, here or on another node; or the Ray of this process is gone."""


class Actor:
    """The trainer's side of an actor; implements `isgd_jax.engines.worker_pool.Worker`."""

    def __init__(self, name: str, make_job: MakeJob, *, fingerprint: str, needs: Mapping[str, Any]) -> None:
        self.name, self.fingerprint = name, fingerprint
        self.handle: Any = ray.remote(ScoringActor).options(max_restarts=-1, **needs).remote()
        self._make_job = make_job
        self._closed, self._refused, self._known = threading.Event(), False, False

    def load(self, shipment: ray.ObjectRef, version: int) -> int:
        """Tell the actor the parameters to score with from now on."""
        _check_ray()
        if not self._known:
            self._meet()
        return self._get(self.handle.load.remote(shipment, version))

    def start(self, item: WorkItem) -> ray.ObjectRef:
        """Send a batch to the actor; returns what `finish` waits for."""
        _check_ray()
        return self.handle.score.remote(item)

    def finish(self, started: ray.ObjectRef) -> Any:
        """The scores of a batch that was started."""
        return self._get(started)

    def revive(self, failures: int) -> bool:
        """As long as Ray restarts it, after a pause."""
        pause = PAUSES[min(failures, len(PAUSES)) - 1]
        self._known = False  # the next one may be on another node, and must show its data
        return not self._refused and ray.is_initialized() and not self._closed.wait(pause)

    def close(self) -> None:
        """Let the actor go, once, and of the Ray that there is: to kill begins another where none runs."""
        if self._closed.is_set():
            return
        self._closed.set()
        if ray.is_initialized():
            ray.kill(self.handle)

    def _meet(self) -> None:
        """Wait until it has loaded its data, however long there is no room for it, and compare."""
        try:
            theirs = self._get(self.handle.prepare.remote(self._make_job))
        except Failed as error:
            self._refused = True
            raise Refused(f"it could not begin: {error}") from error
        if theirs != self.fingerprint:
            self._refused = True
            raise Refused(
                f"it has another data set: expected fingerprint {self.fingerprint!r}, got {theirs!r}; give every node "
                "the same files in the same order"
            )
        self._known = True

    def _get(self, ref: ray.ObjectRef) -> Any:
        """Ray's errors are pages long: say what happened in one sentence."""
        try:
            while not self._closed.is_set():
                _check_ray()
                ready, _ = ray.wait([ref], timeout=LOOK)
                if ready:
                    return ray.get(ref)
            raise Lost("the engine was closed")
        except exceptions.RayTaskError as error:
            raise Failed(f"{type(error.cause).__name__}: {error.cause}") from error
        except exceptions.RayError as error:
            raise Lost(f"its process or its node is gone ({type(error).__name__}); Ray restarts it") from error


class RayCluster(WorkerPool):
    """A pool of actors.

    Args:
        queue, seconds_per_chunk, options: those of `WorkerPool`.
        stops_ray: whether this engine started Ray.
    """

    def __init__(self, queue: WorkQueue, *, stops_ray: bool, **options: Any) -> None:
        super().__init__(queue, ship=_ship, **options)
        self._stops_ray, self._unpublished, self._advice = stops_ray, "", ""

    def publish(self, params: Params, version: int) -> None:
        """As in `WorkerPool`; when Ray's store is full, workers go on with older parameters: `collect` may raise.

        Once the engine is closed nothing is done. Where somebody else shut Ray down nobody scores any more, and no
        other Ray is begun, which would listen to everybody.
        """
        if self._closed:
            return
        try:
            super().publish(params, version)
            self._unpublished, self._advice = "", ""
        except (exceptions.ObjectStoreFullError, exceptions.OutOfDiskError):
            self._unpublished = f"Ray's object store has no room for the {num_bytes(params):,} bytes of the parameters"
            self._advice = "start Ray with a larger object store"
            self.tell(f"{self._unpublished}: workers go on with older ones; {self._advice}")
        except Lost as error:
            if str(error) != self._unpublished:
                self.tell(f"{error}: nobody scores any more; training goes on with the scores there are")
            self._unpublished, self._advice = str(error), "make another engine"

    def collect(self, *, wait: bool = False) -> list[ScoredChunk]:
        """As in `WorkerPool`.

        Raises:
            RuntimeError: nothing was published yet.
            WorkersGone: ``wait``, and nobody is left who could score.
            OSError: ``wait``, and Ray's store was full at the last publish, or Ray was shut down before.
        """
        if self._unpublished and wait:
            raise OSError(f"{self._unpublished}: {self._advice}, then go on")
        if self._unpublished and self._published is None:
            return []
        return super().collect(wait=wait)

    def seconds_per_collect(self, params: Params, *, wait: bool = False) -> float:
        """As in `WorkerPool`.

        Raises:
            OSError: Ray's store has no room for the parameters, or Ray was shut down.
        """
        try:
            return super().seconds_per_collect(params, wait=wait)
        except (exceptions.ObjectStoreFullError, exceptions.OutOfDiskError) as error:
            raise OSError(
                f"Ray's object store has no room for the {num_bytes(params):,} bytes of the parameters: start Ray with "
                "a larger one"
            ) from error
        except Lost as error:
            raise OSError(f"{error}: make another engine") from error

    def close(self) -> None:
        """End the workers and, where this process started it, the Ray of this host."""
        super().close()
        if self._stops_ray and ray.is_initialized():
            ray.shutdown()
        self._stops_ray = False  # one that is started later is another's


def ray_cluster(
    scorer: Scorer | SketchingScorer,
    data: Batch | Callable[[], Batch],
    *,
    num_workers: int,
    address: str | None = None,
    chunk_size: int = 2048,
    num_examples: int | None = None,
    refetch_every: int = 1,
    timeout: float = 60.0,
    fingerprint: str = "",
    make_job: MakeJob | None = None,
) -> RayCluster:
    """An engine of ``num_workers`` Ray actors, each a process with one device, here or on other hosts.

    Args:
        scorer: ``(params, batch) -> scores [b]``, or ``(scores [b], sketches [b, dims])``; cloudpickle takes it to the
            workers, which jit it.
        data: a pytree of arrays with one leading axis, which goes through Ray's object store; or a function without
            arguments that loads one, and is called on each worker.
        num_workers: actors to start; those for which there is no room now begin when there is.
        address: of a running Ray cluster, ``"auto"`` for the one this host belongs to; None starts one of this host
            alone, which is stopped with the engine.
        chunk_size: examples in one call of the scorer.
        num_examples: rows of the data, where a function loads them. Without it the function is called here too, and
            each worker must have loaded the same bytes.
        refetch_every: chunks that a worker scores between two looks for newer parameters.
        timeout: seconds after which a chunk is handed to another worker.
        fingerprint: of the data, as ``make_job`` tells it.
        make_job: what a worker does to be ready, where neither sending the data nor a function of theirs will do:
            ``() -> (Job, fingerprint)``. ``data`` are then arrays of this process.

    Raises:
        ConnectionError: there is no Ray at the address.
        OSError: Ray's object store has no room for the data.
        TypeError: the data hold typed random keys, and are no function.
        ValueError: the data have no common leading axis.
    """
    held: list[Batch] = []

    def load() -> Batch:
        """The data as this process has them; a function is called once."""
        if not held:
            held.append(data() if callable(data) else data)
        return held[0]

    size = num_rows(load()) if num_examples is None or not callable(data) else num_examples
    chunks, started = Chunks(size, chunk_size), connect(address, num_workers)
    try:
        if make_job is None and callable(data):
            is_counted = num_examples is not None
            make_job = functools.partial(_loaded_job, scorer, data, chunks.size, is_counted)
            fingerprint = f"{size} rows" if is_counted else fingerprint_of(load())
        elif make_job is None:
            make_job, fingerprint = functools.partial(_sent_job, scorer, _sent(data), chunks.size), ""
        return actor_pool(
            chunks,
            make_job,
            num_workers=num_workers,
            stops_ray=started,
            seconds_per_chunk=lambda params: seconds_per_chunk(
                Job(scorer, load(), chunks), jax.local_devices()[0], params
            ),
            fingerprint=fingerprint,
            refetch_every=refetch_every,
            timeout=timeout,
        )
    except BaseException:
        if started:
            ray.shutdown()
        raise


def actor_pool(
    chunks: Chunks,
    make_job: MakeJob,
    *,
    num_workers: int,
    stops_ray: bool,
    seconds_per_chunk: Callable[[Params], float],
    fingerprint: str = "",
    refetch_every: int = 1,
    timeout: float = 60.0,
) -> RayCluster:
    """An engine of actors on the Ray that this process is connected to.

    Args:
        chunks: of the training set.
        make_job: makes the job in a worker; sent there by cloudpickle, so it should name data rather than hold it.
        num_workers: actors to start.
        stops_ray: whether closing the engine stops Ray.
        seconds_per_chunk: what one worker takes for a chunk, given parameters.
        fingerprint: of the training set.
        refetch_every: chunks an actor scores between two looks for newer parameters.
        timeout: seconds after which a chunk is handed to another actor.
    """
    engine = RayCluster(
        WorkQueue(chunks, fingerprint=fingerprint, timeout=timeout),
        stops_ray=stops_ray,
        seconds_per_chunk=seconds_per_chunk,
        refetch_every=refetch_every,
    )
    found = places(num_workers, ray.available_resources())
    if found.room < num_workers:
        engine.tell(f"Ray has room for {found.room} of {num_workers} workers; the others begin when there is more")
    for number, needs in enumerate(found.needs):
        engine.join(Actor(f"scorer-{number}", make_job, fingerprint=fingerprint, needs=needs))
    return engine


def fingerprint_of(data: Batch) -> str:
    """Of shapes, types and bytes: what tells whether two processes have the same data in the same order.

    BLAKE2b over everything, about a second per gigabyte.

    Args:
        data: a pytree of arrays in host memory; the names of its leaves count too.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree.leaves_with_path(data):
        array = np.ascontiguousarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype}{array.shape}".encode())
        digest.update(array.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def _sent(data: Batch) -> ray.ObjectRef:
    """The data in Ray's object store, once for all workers of a node."""
    for path, leaf in jax.tree.leaves_with_path(data):
        if is_key(leaf):
            raise ArgumentTypeError(
                f"data{jax.tree_util.keystr(path)} must be an array that NumPy has, to be sent to workers, got "
                f"{leaf.dtype}: give jax.random.key_data(keys) and wrap it in the scorer, or a function that makes the "
                "data on the worker"
            )
    try:
        return ray.put(jax.tree.map(np.asarray, data))
    except (exceptions.ObjectStoreFullError, exceptions.OutOfDiskError) as error:
        raise OSError(
            f"Ray's object store has no room for the {num_bytes(data):,} bytes of the data: "
            "start Ray with a larger one, or give data= as a function that loads them on the worker"
        ) from error


def _sent_job(scorer: Scorer | SketchingScorer, sent: Any, chunk_size: int) -> tuple[Job, str]:
    data = ray.get(sent)
    return Job(scorer, data, Chunks(num_rows(data), chunk_size)), ""


def _loaded_job(
    scorer: Scorer | SketchingScorer, load: Callable[[], Batch], chunk_size: int, is_counted: bool
) -> tuple[Job, str]:
    data = load()
    size = num_rows(data)
    return Job(scorer, data, Chunks(size, chunk_size)), f"{size} rows" if is_counted else fingerprint_of(data)


class Places(NamedTuple):
    """What each actor asks of Ray, and for how many there is room now."""

    needs: list[dict[str, Any]]
    room: int


def places(num_workers: int, free: Mapping[str, float]) -> Places:
    """An accelerator for each actor while there are any, then a CPU; those without room ask for what there is most of.

    >>> places(3, {"CPU": 8.0, "GPU": 2.0}).needs
    [{'num_gpus': 1}, {'num_gpus': 1}, {'num_cpus': 1}]

    Args:
        num_workers: actors to place.
        free: what Ray has left, by kind: "TPU", "GPU", "CPU".
    """
    asks: dict[str, dict[str, Any]] = {"TPU": {"resources": {"TPU": 1}}, "GPU": {"num_gpus": 1}, "CPU": {"num_cpus": 1}}
    room = [ask for kind, ask in asks.items() for _ in range(math.floor(free.get(kind, 0.0)))]
    most = max(asks, key=lambda kind: free.get(kind, 0.0))
    return Places([*room[:num_workers], *[asks[most]] * (num_workers - len(room))], len(room))


def _ship(params: Params) -> ray.ObjectRef:
    """Into the object store, once for all workers of a node."""
    _check_ray()
    return ray.put(jax.tree.map(np.asarray, params))


def _check_ray() -> None:
    """See that this process has a Ray: where it has none each of Ray's calls begins one, which listens to everybody."""
    if not ray.is_initialized():
        raise Lost("Ray was shut down in this process")
