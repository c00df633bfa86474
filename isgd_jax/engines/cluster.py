"""Workers on a Ray cluster: actors wherever there is room, each with the data it has loaded itself.

Ray does the rest: placement, transport through its object store, restarts of what dies, nodes that come and go. Without
an address a Ray of this host alone is started, and stopped again.
"""

import logging
import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import ray
from ray import exceptions
from ray._private import worker

from isgd_jax.engines.desk import Desk, Order
from isgd_jax.engines.local import Job, num_bytes, seconds_per_chunk
from isgd_jax.engines.pool import Pool
from isgd_jax.typing import Params, ScoredChunk, WorkersGone

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Ray would print notices, and write a token into the home folder."""

MakeJob = Callable[[], tuple[Job, str]]

PAUSES = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before a worker that failed is tried again, longer each time. Ray restarts it meanwhile."""

LOOK = 1.0
"""Seconds between two looks whether the engine was closed, while a worker takes its time."""


class Scorer:
    """The actor: one process, one device, one version of the parameters."""

    def prepare(self, make_job: MakeJob) -> str:
        """Load the data; returns the fingerprint of the training set. Called first, again after each restart."""
        self._job, fingerprint = make_job()
        self._device = jax.local_devices()[0]
        self._scorer = jax.jit(self._job.scorer)
        self._params: Params = None
        self._version: int | None = None
        return fingerprint

    def load(self, params: Params, version: int) -> int:
        """Take parameters, NumPy arrays in the shared memory of this node; returns their bytes."""
        self._params, self._version = jax.device_put(params, self._device), version
        return num_bytes(self._params)

    def score(self, order: Order) -> np.ndarray:
        """The scores [c] of a chunk."""
        if order.version != self._version:
            raise RuntimeError(f"asked to score at version {order.version}, but holds {self._version}")
        batch = jax.device_put(self._job.chunks.batch(self._job.data, order.chunk), self._device)
        scores = self._scorer(self._params, batch)
        return np.asarray(scores)[: len(self._job.chunks.ids(order.chunk))]


class Refused(ValueError):
    """A worker that can never help: it has another data set, or cannot load it."""


class Failed(RuntimeError):
    """What a worker was asked to do raised an error there."""


class Lost(RuntimeError):
    """A worker that Ray restarts, here or on another node."""


class Actor:
    """The trainer's side of an actor; implements `isgd_jax.engines.pool.Worker`."""

    def __init__(self, name: str, make_job: MakeJob, *, fingerprint: str, needs: Mapping[str, Any]) -> None:
        self.name, self.fingerprint = name, fingerprint
        self.handle: Any = ray.remote(Scorer).options(max_restarts=-1, **needs).remote()
        self._make_job = make_job
        self._closed, self._refused, self._known = threading.Event(), False, False

    def load(self, shipment: ray.ObjectRef, version: int) -> int:
        if not self._known:
            self._meet()
        return self._get(self.handle.load.remote(shipment, version))

    def start(self, order: Order) -> ray.ObjectRef:
        return self.handle.score.remote(order)

    def finish(self, started: ray.ObjectRef) -> np.ndarray:
        return self._get(started)

    def revive(self, failures: int) -> bool:
        """As long as Ray restarts it, after a pause."""
        pause = PAUSES[min(failures, len(PAUSES)) - 1]
        self._known = False  # the next one may be on another node, and must show its data
        return not self._refused and not self._closed.wait(pause)

    def close(self) -> None:
        self._closed.set()
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
                ready, _ = ray.wait([ref], timeout=LOOK)
                if ready:
                    return ray.get(ref)
            raise Lost("the engine was closed")
        except exceptions.RayTaskError as error:
            raise Failed(f"{type(error.cause).__name__}: {error.cause}") from error
        except exceptions.RayError as error:
            raise Lost(f"its process or its node is gone ({type(error).__name__}); Ray restarts it") from error


class Cluster(Pool):
    """A pool of actors.

    Args:
        desk, ship, seconds_per_chunk, options: those of `Pool`.
        stops_ray: whether this engine started Ray.
    """

    def __init__(self, desk: Desk, *, stops_ray: bool, exact: bool, **options: Any) -> None:
        super().__init__(desk, ship=_ship, exact=exact, **options)
        self._stops_ray, self._must_publish = stops_ray, exact

    def publish(self, params: Params, version: int) -> None:
        """As in `Pool`; when Ray's store is full, workers go on with older parameters, unless the mode is exact.

        Raises:
            OSError: exact mode, and the store is full.
        """
        try:
            super().publish(params, version)
        except (exceptions.ObjectStoreFullError, exceptions.OutOfDiskError) as error:
            text = f"Ray's object store has no room for the {num_bytes(params):,} bytes of the parameters"
            if self._must_publish:
                raise OSError(f"{text}: start Ray with more --object-store-memory, then resume") from error
            with self._changed:
                self._notices.append(f"{text}: workers go on with older ones; start it with more --object-store-memory")

    def collect(self) -> list[ScoredChunk]:
        try:
            return super().collect()
        except WorkersGone as error:
            raise WorkersGone("; ".join([str(error), *self.notices()])) from None

    def close(self) -> None:
        super().close()
        if self._stops_ray and ray.is_initialized():
            ray.shutdown()


def cluster(
    job: Job,
    make_job: MakeJob,
    *,
    scorers: int,
    address: str | None = None,
    fingerprint: str = "",
    exact: bool = False,
    refetch_every: int = 1,
    patience: float = 60.0,
) -> tuple[Cluster, list[str]]:
    """An engine of ``scorers`` actors, and what a person should know before the first step.

    Args:
        job: what to score, as the trainer has it.
        make_job: makes the same in a worker; sent there by cloudpickle, so it should name data rather than hold it.
        scorers: actors to start; those for which there is no room now begin when there is.
        address: of a running Ray cluster, ``auto`` for the one this host belongs to; None starts one of this host.
        fingerprint: of the training set.
        exact: whether `collect` waits until all scores carry the published version.
        refetch_every: chunks an actor scores between two looks for newer parameters.
        patience: seconds after which a chunk is handed to another actor.

    Raises:
        ConnectionError: there is no Ray at the address.
    """
    started = connect(address, scorers)
    engine = Cluster(
        Desk(job.chunks, fingerprint=fingerprint, patience=patience),
        stops_ray=started,
        exact=exact,
        seconds_per_chunk=lambda params: seconds_per_chunk(job, jax.local_devices()[0], params),
        refetch_every=refetch_every,
    )
    found = places(scorers, ray.available_resources())
    for number, needs in enumerate(found.needs):
        engine.join(Actor(f"scorer-{number}", make_job, fingerprint=fingerprint, needs=needs))
    if found.room >= scorers:
        return engine, []
    return engine, [f"the cluster has room for {found.room} of {scorers} scorers; the others begin when there is more"]


def connect(address: str | None, scorers: int) -> bool:
    """Join the Ray at the address, or start one of this host; says whether it was started.

    Raises:
        ConnectionError: there is no Ray at the address.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    vars(worker)["print_to_stdstream"] = _log  # there is no switch for what it says of workers that died
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # from jax: what is forked is replaced at once
            return _connect(address, scorers)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)  # Ray's own handler prints a stack trace


def _connect(address: str | None, scorers: int) -> bool:
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if ray.is_initialized():
        return False
    try:
        if address is not None:
            ray.init(address=address, **quiet)
            return False
    except (ConnectionError, ValueError) as error:
        raise ConnectionError(
            f"there is no Ray at --address {address} ({_last_line(error)}): start one with `ray start --head` and join "
            "the other hosts with `ray start --address=HOST:6379`, or leave out --address to start one of this host"
        ) from error
    # Scorers share the cores that training leaves: each has its place, however few there are.
    ray.init(address="local", num_cpus=max(scorers, os.cpu_count() or 1), include_dashboard=False, **quiet)
    return True


class Places(NamedTuple):
    """What each actor asks of Ray, and for how many there is room now."""

    needs: list[dict[str, Any]]
    room: int


def places(scorers: int, free: Mapping[str, float]) -> Places:
    """An accelerator for each actor while there are any, then a CPU; those without room ask for what there is most of.

    >>> places(3, {"CPU": 8.0, "GPU": 2.0}).needs
    [{'num_gpus': 1}, {'num_gpus': 1}, {'num_cpus': 1}]
    """
    asks: dict[str, dict[str, Any]] = {"TPU": {"resources": {"TPU": 1}}, "GPU": {"num_gpus": 1}, "CPU": {"num_cpus": 1}}
    room = [ask for kind, ask in asks.items() for _ in range(math.floor(free.get(kind, 0.0)))]
    most = max(asks, key=lambda kind: free.get(kind, 0.0))
    return Places([*room[:scorers], *[asks[most]] * (scorers - len(room))], len(room))


def _ship(params: Params) -> ray.ObjectRef:
    """Into the object store, once for all workers of a node."""
    return ray.put(jax.tree.map(np.asarray, params))


def _log(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """What Ray would print between our lines; our notices say the same in a sentence."""
    logging.getLogger(__name__).debug("\n".join(data["lines"]))


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
