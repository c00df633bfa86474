"""The engine of a configuration."""

import importlib.util
import math
from collections.abc import Callable

import jax

from isgd_jax.config import Config
from isgd_jax.engines.chunks import Chunks
from isgd_jax.engines.hosts import Hosts
from isgd_jax.engines.inline import Inline
from isgd_jax.engines.local import Job, local
from isgd_jax.engines.replay import Replay
from isgd_jax.schedule import Schedule
from isgd_jax.typing import Batch, Engine, Scorer

MakeJob = Callable[[], tuple[Job, str]]
"""What a worker elsewhere does to be ready: load the data; returns its job, and the training set's fingerprint."""


def make_engine(
    config: Config,
    scorer: Scorer,
    data: Batch,
    *,
    fingerprint: str = "",
    devices: list[jax.Device] | None = None,
    replayed: Schedule | None = None,
    make_job: MakeJob | None = None,
) -> tuple[Engine, list[str]]:
    """Who scores, and what a person should know of the choice before the first step.

    Args:
        config: its mode and engine.
        scorer: ``(params, batch) -> [b]``, not jitted.
        data: the training set in host memory.
        fingerprint: of the training set.
        devices: those of this host, the trainer's first; all local ones by default.
        replayed: the schedule of an earlier run, to be followed in place of an engine of this run's own.
        make_job: what a worker on another host does to have the same job.

    Raises:
        ImportError: the engine needs a package that is not installed.
        ConnectionError: there is no Ray cluster at the address.
    """
    devices = devices or jax.local_devices()
    if replayed is not None:
        return Replay(Inline(scorer, data, chunk_size=replayed.chunk_size, devices=devices), replayed), []
    if config.engine == "inline" or config.mode == "uniform":
        return _inline(config, scorer, data, devices), []
    chunks = Chunks(len(jax.tree.leaves(data)[0]), config.chunk_size)
    job = Job(scorer, data, chunks)
    if config.engine == "cluster":
        return _cluster(config, job, make_job, fingerprint)
    if len(devices) == 1:
        text = f"--engine local needs a device that trains and one that scores, and here is only {devices[0]}: "
        return _inline(config, scorer, data, devices), [f"{text}it scores inline, between the steps"]
    engine = local(
        job,
        devices[config.train_devices :],
        fingerprint=fingerprint,
        exact=config.mode == "exact",
        refetch_every=config.refetch_every,
        patience=config.chunk_patience,
    )
    return engine, []


def _cluster(config: Config, job: Job, make_job: MakeJob | None, fingerprint: str) -> tuple[Engine, list[str]]:
    if importlib.util.find_spec("ray") is None:
        raise ImportError("--engine cluster needs Ray: pip install 'isgd_jax[cluster]'")
    from isgd_jax.engines.cluster import cluster

    return cluster(
        job,
        make_job or (lambda: (job, fingerprint)),
        scorers=config.scorers,
        address=config.address,
        fingerprint=fingerprint,
        exact=config.mode == "exact",
        refetch_every=config.refetch_every,
        patience=config.chunk_patience,
    )


def _inline(config: Config, scorer: Scorer, data: Batch, devices: list[jax.Device]) -> Engine:
    """Exact mode scores everything at each refresh, relaxed mode its share; of several processes each scores a part."""
    size = len(jax.tree.leaves(data)[0])
    wanted = math.ceil(config.share_scored(size) * size) or size
    chunk_size = min(config.chunk_size, wanted)
    per_collect, processes = math.ceil(wanted / chunk_size), jax.process_count()
    mine = math.ceil(per_collect / processes)
    inline = Inline(scorer, data, chunk_size=chunk_size, chunks_per_collect=mine, devices=devices)
    return inline if processes == 1 else Hosts(inline, per_collect=per_collect)
