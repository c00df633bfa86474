"""What workers are given to do: scoring, and measuring the held-out data if they are asked to."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping

import jax

from isgd_jax import assembly, data, evaluate, models, task
from isgd_jax.config import Config
from isgd_jax.engines.chunks import Chunks
from isgd_jax.engines.local import Job
from isgd_jax.typing import TRAIN


def worker_jobs(
    config: Config, dataset: data.Dataset | None, model: models.Model | None, loss: task.OutputLoss | None
) -> tuple[dict[str, Job], str]:
    """What a worker on another host does to be ready: it loads the data itself; also the fingerprint of what it has."""
    if dataset is None:
        dataset = data.load(config.dataset, data_dir=config.data_dir, raw_dir=config.raw_dir)
    work = task.make(config, dataset, model=model, loss=loss)
    chunks = Chunks(work.num_examples, config.chunk_size)
    train = Job(assembly.engine_scorer(config, work), work.train, chunks, config.priorities[0])
    return {TRAIN: train, **held_out_jobs(config, work)}, work.fingerprint


def jobs_elsewhere(
    config: Config, dataset: data.Dataset | None, model: models.Model | None, loss: task.OutputLoss | None
) -> Callable[[], tuple[Mapping[str, Job], str]]:
    """`worker_jobs`, to be called in another process: folders are named from the root, as it works in another one."""
    data_dir = config.data_dir or os.environ.get("TFDS_DATA_DIR")
    config = dataclasses.replace(config, data_dir=_absolute(data_dir), raw_dir=_absolute(config.raw_dir))
    return functools.partial(worker_jobs, config, dataset, model, loss)


def _absolute(folder: str | None) -> str | None:
    return os.path.abspath(os.path.expanduser(folder)) if folder else None


def held_out_jobs(config: Config, work: task.Task) -> dict[str, Job]:
    """What workers measure beside their scoring; nothing where the trainer measures."""
    if config.held_out_by == "trainer":
        return {}
    splits = {"valid": (work.valid, config.priorities[1]), "test": (work.test, config.priorities[2])}
    measure = evaluate.make_measure(work)
    return {
        name: Job(measure, split, Chunks(len(jax.tree.leaves(split)[0]), config.chunk_size), priority, (2,))
        for name, (split, priority) in splits.items()
        if split is not None
    }
