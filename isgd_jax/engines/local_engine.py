"""The devices of this host, split: some train, the others score, each in a thread, while training goes on."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from isgd_jax.engines.chunks import Chunks, num_rows, unpadded
from isgd_jax.engines.work_queue import WorkItem, WorkQueue
from isgd_jax.engines.worker_pool import WorkerPool
from isgd_jax.errors import ArgumentError
from isgd_jax.gradients.captured import CapturingJit
from isgd_jax.types import Batch, Params, Scorer, SketchingScorer

__all__ = ["TRIES", "DeviceWorker", "Job", "device_pool", "local", "num_bytes", "seconds_per_chunk"]

TRIES = 3
"""Errors in a row after which a device is given up."""


class Job(NamedTuple):
    """What is scored: with what, and on which examples."""

    scorer: Scorer | SketchingScorer
    """``(params, batch) -> scores [b]``, or ``(scores [b], sketches [b, dims])``, not jitted."""
    data: Batch
    """In host memory, leading axis ``n``."""
    chunks: Chunks


class DeviceWorker:
    """A worker that is a device of this process."""

    def __init__(self, device: jax.Device, job: Job, *, fingerprint: str = "") -> None:
        self.name: str = f"{device.platform}:{device.id}"
        self.fingerprint = fingerprint
        self._device, self._job, self._scorer = device, job, CapturingJit(job.scorer)
        self._params: Params = None

    def load(self, shipment: Params, version: int) -> int:
        """Put the parameters on this worker's device, and score with them from now on.

        Args:
            shipment: the pool's copy, on the trainer's device.
            version: not looked at: what was loaded last is what scores.

        Returns:
            Their bytes.
        """
        self._params = jax.device_put(shipment, self._device)
        return num_bytes(self._params)

    def start(self, item: WorkItem) -> tuple[WorkItem, Any]:
        """Dispatch the scoring of a batch; returns what `finish` waits for."""
        batch = jax.device_put(self._job.chunks.batch(self._job.data, item.chunk), self._device)
        return item, self._scorer(self._params, batch)

    def finish(self, started: tuple[WorkItem, Any]) -> Any:
        """The scores of a chunk that was started, in the memory of the host; waits for the device.

        Raises:
            ValueError: what the scorer returned cannot be scores.
        """
        item, found = started
        chunks = self._job.chunks
        return unpadded(found, len(chunks.ids(item.chunk)), chunks.size)

    def revive(self, failures: int) -> bool:
        """Whether to try again after so many failures in a row: there is nothing to be made anew."""
        return failures < TRIES

    def close(self) -> None:
        """Nothing to stop: what runs on a device cannot be interrupted, and is soon over."""


def local(
    scorer: Scorer | SketchingScorer,
    data: Batch,
    *,
    chunk_size: int = 2048,
    devices: Sequence[jax.Device] | None = None,
    refetch_every: int = 1,
    timeout: float = 60.0,
) -> WorkerPool:
    """An engine that scores on other devices of this host, a thread for each, while training goes on.

    Args:
        scorer: ``(params, batch) -> scores [b]``, or ``(scores [b], sketches [b, dims])``; it is jitted here.
        data: a pytree of arrays with one leading axis, in host memory.
        chunk_size: examples in one call of the scorer.
        devices: who scores, and does not train; all local ones but the first by default.
        refetch_every: chunks that a device scores between two looks for newer parameters.
        timeout: seconds after which a chunk is handed to another device.

    Raises:
        ValueError: no device is left to score, or the data have no common leading axis.

    Returns:
        The engine; close it, or use it as a context manager. What its workers have scored by a step depends on their
        speed, so such a run is repeated bit for bit only by `isgd_jax.engines.replay`.
    """
    devices = jax.local_devices()[1:] if devices is None else devices
    job = Job(scorer, data, Chunks(num_rows(data), chunk_size))
    return device_pool(job, devices, refetch_every=refetch_every, timeout=timeout)


def device_pool(
    job: Job,
    devices: Sequence[jax.Device],
    *,
    fingerprint: str = "",
    refetch_every: int = 1,
    timeout: float = 60.0,
    make_worker: Callable[..., Any] = DeviceWorker,
) -> WorkerPool:
    """An engine of a worker for each device.

    Args:
        job: what to score.
        devices: the scorers.
        fingerprint: of the training set.
        refetch_every: chunks that a device scores between two looks for newer parameters.
        timeout: seconds after which a chunk is handed to another device.
        make_worker: ``(device, job, fingerprint=...) -> Worker``; tests take a worker with faults.

    Raises:
        ValueError: there are no devices.
    """
    if not devices:
        raise ArgumentError(
            "a local engine needs a device that scores besides the one that trains: "
            "with a single device use isgd.engines.inline, which scores between the steps; on a CPU, "
            "XLA_FLAGS=--xla_force_host_platform_device_count=2 in the environment makes two devices of one"
        )
    pool = WorkerPool(
        WorkQueue(job.chunks, fingerprint=fingerprint, timeout=timeout),
        ship=lambda params: jax.tree.map(jnp.copy, params),
        seconds_per_chunk=lambda params: seconds_per_chunk(job, devices[0], params),
        refetch_every=refetch_every,
    )
    for device in devices:
        pool.join(make_worker(device, job, fingerprint=fingerprint))
    return pool


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays and numbers of a tree."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.nbytes if hasattr(leaf, "nbytes") else np.asarray(leaf).nbytes for leaf in leaves)


def seconds_per_chunk(job: Job, device: jax.Device, params: Params) -> float:
    """How long a device takes for a chunk, measured once after compiling; the transfer of the batch is left out.

    Args:
        job: what is scored; its first chunk is.
        device: who scores.
        params: to score with, anywhere.
    """
    scorer, held = CapturingJit(job.scorer), jax.device_put(params, device)
    batch = jax.device_put(job.chunks.batch(job.data, 0), device)
    jax.block_until_ready(scorer(held, batch))
    began = time.monotonic()
    jax.block_until_ready(scorer(held, batch))
    return time.monotonic() - began
