"""What workers on other hosts are given to do."""

import dataclasses
import functools
import os
from collections.abc import Callable

from isgd_jax import assembly, data, models, task
from isgd_jax.config import Config
from isgd_jax.engines.chunks import Chunks
from isgd_jax.engines.local import Job


def worker_job(
    config: Config, dataset: data.Dataset | None, model: models.Model | None, loss: task.OutputLoss | None
) -> tuple[Job, str]:
    """What a worker on another host does to be ready: it loads the data itself; also the fingerprint of what it has."""
    if dataset is None:
        dataset = data.load(config.dataset, data_dir=config.data_dir, raw_dir=config.raw_dir)
    work = task.make(config, dataset, model=model, loss=loss)
    chunks = Chunks(work.num_examples, config.chunk_size)
    return Job(assembly.engine_scorer(config, work), work.train, chunks), work.fingerprint


def job_elsewhere(
    config: Config, dataset: data.Dataset | None, model: models.Model | None, loss: task.OutputLoss | None
) -> Callable[[], tuple[Job, str]]:
    """`worker_job`, to be called in another process: folders are named from the root, as it works in another one."""
    data_dir = config.data_dir or os.environ.get("TFDS_DATA_DIR")
    config = dataclasses.replace(config, data_dir=_absolute(data_dir), raw_dir=_absolute(config.raw_dir))
    return functools.partial(worker_job, config, dataset, model, loss)


def _absolute(folder: str | None) -> str | None:
    return os.path.abspath(os.path.expanduser(folder)) if folder else None
