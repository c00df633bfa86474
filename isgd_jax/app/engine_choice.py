"""The engine of a configuration."""

import importlib.util
from collections.abc import Callable

import jax

from isgd_jax.app.config import Config
from isgd_jax.app.task import Task
from isgd_jax.engines.arrivals import Schedule
from isgd_jax.engines.chunks import Chunks
from isgd_jax.engines.contract import FullEngine
from isgd_jax.engines.inline_engine import inline
from isgd_jax.engines.local_engine import Job, device_pool
from isgd_jax.engines.replay_engine import replay
from isgd_jax.errors import CannotImportError
from isgd_jax.types import Scorer

__all__ = ["MakeJob", "make_engine"]

MakeJob = Callable[[], tuple[Job, str]]
"""What a worker elsewhere does to be ready: load the data; returns its job, and the training set's fingerprint."""


def make_engine(
    config: Config,
    scorer: Scorer,
    work: Task,
    *,
    replayed: Schedule | None = None,
    make_job: MakeJob | None = None,
) -> tuple[FullEngine, list[str]]:
    """Who scores, and what a person should know of the choice before the first step.

    Args:
        config: its mode, its workers, and how much they score.
        scorer: ``(params, batch) -> [b]``, not jitted.
        work: what is trained; its training set is in host memory.
        replayed: the arrivals of an earlier run, to be followed in place of an engine of this run's own.
        make_job: what a worker on another host does to have the same job.

    Raises:
        ImportError: the engine needs a package that is not installed.
        ConnectionError: there is no Ray cluster at the address.
    """
    devices, workers = jax.local_devices(), config.workers
    if replayed is not None:
        return replay(scorer, work.train, replayed, devices=devices), []
    if workers.engine == "cluster":
        engine = _cluster(config, scorer, work, make_job)
        return engine, engine.notices()
    remarks = []
    if workers.engine == "local":
        if len(devices) > 1:
            job = Job(scorer, work.train, Chunks(work.num_examples, config.scoring.chunk_size))
            pool = device_pool(
                job,
                devices[workers.train_devices :],
                fingerprint=work.fingerprint,
                refetch_every=config.refresh.refetch_every,
                timeout=workers.chunk_patience,
            )
            return pool, []
        remarks = [
            f"engine=local needs a device that trains and one that scores, and here is only {devices[0]}: it scores "
            "inline, between the steps"
        ]
    # Exact mode scores everything at each refresh, relaxed mode its share; of several processes each scores a part.
    share = config.share_scored(work.num_examples) or 1.0
    return inline(scorer, work.train, chunk_size=config.scoring.chunk_size, share=share, devices=devices), remarks


def _cluster(config: Config, scorer: Scorer, work: Task, make_job: MakeJob | None) -> FullEngine:
    if importlib.util.find_spec("ray") is None:
        raise CannotImportError("engine=cluster needs Ray: pip install 'isgd_jax[cluster]'")
    from isgd_jax.engines.ray_engine import ray_cluster

    return ray_cluster(
        scorer,
        work.train,
        num_workers=config.workers.scorers,
        address=config.workers.address,
        chunk_size=config.scoring.chunk_size,
        fingerprint=work.fingerprint,
        make_job=make_job,
        refetch_every=config.refresh.refetch_every,
        timeout=config.workers.chunk_patience,
    )
