"""The devices of this host, split: some train, the others score, each in a thread, while training goes on."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from isgd_jax.engines.chunks import Chunks
from isgd_jax.engines.desk import Desk, Order
from isgd_jax.engines.pool import Pool
from isgd_jax.typing import Batch, Params, Scorer

TRIES = 3
"""Errors in a row after which a device is given up."""


class Job(NamedTuple):
    """What is scored: with what, and on which examples."""

    scorer: Scorer
    """``(params, batch) -> [b]``, not jitted."""
    data: Batch
    """In host memory, leading axis ``n``."""
    chunks: Chunks


class Device:
    """A worker that is a device of this process."""

    def __init__(self, device: jax.Device, job: Job, *, fingerprint: str = "") -> None:
        self.name = f"{device.platform}:{device.id}"
        self.fingerprint = fingerprint
        self._device, self._job, self._scorer = device, job, jax.jit(job.scorer)
        self._params: Params = None

    def load(self, shipment: Params, version: int) -> int:
        self._params = jax.device_put(shipment, self._device)
        return num_bytes(self._params)

    def start(self, order: Order) -> tuple[Order, jax.Array]:
        batch = jax.device_put(self._job.chunks.batch(self._job.data, order.chunk), self._device)
        return order, self._scorer(self._params, batch)

    def finish(self, started: tuple[Order, jax.Array]) -> np.ndarray:
        order, scores = started
        return np.asarray(scores)[: len(self._job.chunks.ids(order.chunk))]

    def revive(self, failures: int) -> bool:
        return failures < TRIES

    def close(self) -> None:
        """Nothing to stop: what runs on a device cannot be interrupted, and is soon over."""


def local(
    job: Job,
    devices: Sequence[jax.Device],
    *,
    fingerprint: str = "",
    exact: bool = False,
    refetch_every: int = 1,
    patience: float = 60.0,
    make_worker: Callable[..., Any] = Device,
) -> Pool:
    """An engine that scores on ``devices``, which should not be those that train.

    Args:
        job: what to score.
        devices: the scorers.
        fingerprint: of the training set.
        exact: whether `collect` waits until all scores carry the published version.
        refetch_every: chunks that a device scores between two looks for newer parameters.
        patience: seconds after which a chunk is handed to another device.
        make_worker: ``(device, job, fingerprint=...) -> Worker``; tests take a worker with faults.
    """
    if not devices:
        raise ValueError("a local engine needs at least one device that scores; with a single device use inline")
    pool = Pool(
        Desk(job.chunks, fingerprint=fingerprint, patience=patience),
        ship=lambda params: jax.tree.map(jnp.copy, params),
        seconds_per_chunk=lambda params: seconds_per_chunk(job, devices[0], params),
        exact=exact,
        refetch_every=refetch_every,
    )
    for device in devices:
        pool.join(make_worker(device, job, fingerprint=fingerprint))
    return pool


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def seconds_per_chunk(job: Job, device: jax.Device, params: Params) -> float:
    """How long a device takes for a chunk, measured, compilation left out."""
    scorer, held = jax.jit(job.scorer), jax.device_put(params, device)
    batch = jax.device_put(job.chunks.batch(job.data, 0), device)
    jax.block_until_ready(scorer(held, batch))
    began = time.monotonic()
    jax.block_until_ready(scorer(held, batch))
    return time.monotonic() - began
