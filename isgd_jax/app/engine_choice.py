"""The engine of a configuration."""

import importlib.util
from collections.abc import Callable

import jax

from isgd_jax.app.config import Config
from isgd_jax.engines.arrivals import Schedule
from isgd_jax.engines.chunks import Chunks, num_rows
from isgd_jax.engines.contract import FullEngine
from isgd_jax.engines.inline_engine import inline
from isgd_jax.engines.local_engine import Job, device_pool
from isgd_jax.engines.replay_engine import replay
from isgd_jax.errors import CannotImportError
from isgd_jax.types import Batch, Scorer

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
) -> tuple[FullEngine, list[str]]:
    """Who scores, and what a person should know of the choice before the first step.

    Args:
        config: its mode and engine.
        scorer: ``(params, batch) -> [b]``, not jitted.
        data: the training set in host memory.
        fingerprint: of the training set.
        devices: those of this host, the trainer's first; all local ones by default.
        replayed: the arrivals of an earlier run, to be followed in place of an engine of this run's own.
        make_job: what a worker on another host does to have the same job.

    Raises:
        ImportError: the engine needs a package that is not installed.
        ConnectionError: there is no Ray cluster at the address.
    """
    devices = devices or jax.local_devices()
    if replayed is not None:
        return replay(scorer, data, replayed, devices=devices), []
    if config.engine == "inline" or config.mode == "uniform":
        return _inline(config, scorer, data, devices), []
    if config.engine == "cluster":
        engine = _cluster(config, scorer, data, make_job, fingerprint)
        return engine, engine.notices()
    if len(devices) == 1:
        text = f"--engine local needs a device that trains and one that scores, and here is only {devices[0]}: "
        return _inline(config, scorer, data, devices), [f"{text}it scores inline, between the steps"]
    engine = device_pool(
        Job(scorer, data, Chunks(num_rows(data), config.chunk_size)),
        devices[config.train_devices :],
        fingerprint=fingerprint,
        refetch_every=config.refetch_every,
        timeout=config.chunk_patience,
    )
    return engine, []


def _cluster(config: Config, scorer: Scorer, data: Batch, make_job: MakeJob | None, fingerprint: str) -> FullEngine:
    if importlib.util.find_spec("ray") is None:
        raise CannotImportError("--engine cluster needs Ray: pip install 'isgd_jax[cluster]'")
    from isgd_jax.engines.ray_engine import ray_cluster

    try:
        return ray_cluster(
            scorer,
            data,
            num_workers=config.scorers,
            address=config.address,
            chunk_size=config.chunk_size,
            fingerprint=fingerprint,
            make_job=make_job,
            refetch_every=config.refetch_every,
            timeout=config.chunk_patience,
        )
    except ConnectionError as error:
        text = str(error).replace(f"address={config.address!r}", f"--address {config.address}")
        raise ConnectionError(text.replace("leave out address=", "leave out --address")) from error


def _inline(config: Config, scorer: Scorer, data: Batch, devices: list[jax.Device]) -> FullEngine:
    """Exact mode scores everything at each refresh, relaxed mode its share; of several processes each scores a part."""
    share = config.share_scored(num_rows(data)) or 1.0
    return inline(scorer, data, chunk_size=config.chunk_size, share=share, devices=devices)
