"""From a configuration to the parts that a run is made of: problem, sampler, optimizer, scorer, engine and refresher.

Nothing below this module knows `Config`.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from isgd_jax.app import data, models, optimizers, task, userfiles
from isgd_jax.app.config import Config
from isgd_jax.app.engine_choice import make_engine
from isgd_jax.app.task import Task
from isgd_jax.engines import scorers
from isgd_jax.engines.arrivals import Schedule
from isgd_jax.engines.chunks import Chunks
from isgd_jax.engines.contract import Engine
from isgd_jax.engines.local_engine import Job
from isgd_jax.gradients import sketches
from isgd_jax.gradients.sketches import LayerSketch
from isgd_jax.sampling.estimator import importance_sampler
from isgd_jax.sampling.plain import fixed, shuffled_epochs, uniform_draws
from isgd_jax.sampling.presampler import presampling
from isgd_jax.sampling.state import BatchSampler
from isgd_jax.training.problem import Problem
from isgd_jax.training.train_step import PICTURES, FreshScores
from isgd_jax.types import Params, Scorer

__all__ = ["Parts", "build", "job_elsewhere", "make_sampler", "make_scorer"]

FIXED_FRACTION = 0.1
"""The uniform fraction of proposals whose scores are not learned from: of static scores and of candidates."""


class Parts(NamedTuple):
    """What a run is made of."""

    config: Config
    work: Task
    problem: Problem
    sampler: BatchSampler
    tx: Any
    engine: Engine | None
    fresh_scores: FreshScores | None
    published: Callable[[Params, int], Any]
    """What the scorer is told at a refresh."""
    replayed: Schedule | None
    """The schedule that the engine follows, in a replay."""
    remarks: list[str]
    """What a person should hear of before the first step."""


def build(
    config: Config,
    work: Task,
    *,
    replayed: Schedule | None = None,
    make_job: Callable[[], tuple[Job, str]] | None = None,
) -> Parts:
    """The parts of a run.

    Args:
        config: what to do.
        work: the data, the model and the loss.
        replayed: the schedule to follow.
        make_job: what a worker on another host does to be ready.

    Raises:
        ValueError: a file of the user's does not fit the data.
    """
    named, sketch = config.sampling.augment, _sketch(config, work)
    augment = None if named is None else models.from_reference(named)
    hold: Literal["device", "host"] = "device" if config.data.hold == "device" else "host"
    problem = Problem(work.loss_fn, work.init, work.train, augment=augment, hold=hold)
    sampler = make_sampler(config, work, sketch=sketch)
    engine, remarks = None, list[str]()
    if config.sampling.is_scored:
        scorer = engine_scorer(config, work, sketch)
        engine, remarks = make_engine(config, scorer, work, replayed=replayed, make_job=make_job)
    tx, fresh_scores = optimizers.make(config.training, work.num_examples), make_scorer(config.scoring.scorer, work)[1]
    told = published(named, config.training.seed)
    return Parts(config, work, problem, sampler, tx, engine, fresh_scores, told, replayed, remarks)


def make_sampler(config: Config, work: Task, *, sketch: LayerSketch | None = None) -> BatchSampler:
    """The sampler of a configuration: of plain SGD, of scores measured in training or given for ever, or of candidates.

    Args:
        config: its mode and all that belongs to it.
        work: the data, the model and the loss.
        sketch: of gradients, where draws are ordered by them.

    Raises:
        ValueError: a file of the user's does not fit the data.
    """
    size, sampling, refresh, scorer = work.num_examples, config.sampling, config.refresh, config.scoring.scorer
    weights, is_watched = example_weights(sampling.example_weights, size), config.recording.monitor == "on"
    alike: Any = {"batch_size": config.training.batch_size, "monitor": is_watched, "example_weights": weights}
    name, is_gated, fraction = sampling.sampler_in_use, sampling.gate == "on", sampling.mixture
    if sampling.mode == "uniform":
        return (shuffled_epochs if name == "shuffled" else uniform_draws)(size, **alike)
    if sampling.mode == "presample":
        return presampling(
            size, scorer=make_scorer(scorer, work)[0], candidates=sampling.candidates, gate=is_gated,
            score_cost=2.0 if scorer == "grad_norm" else 1.0, uniform_fraction=_number(fraction), **alike,
        )  # fmt: skip
    chosen = models.from_reference(name) if ":" in name else name
    alike |= {"sampler": chosen, "order": _order(config, work, sketch), "gate": is_gated, "additive": sampling.additive}
    if sampling.mode == "static":
        scores = userfiles.numbers(str(sampling.static_scores), size, name="static_scores")
        return fixed(scores, uniform_fraction=_number(fraction), **alike)
    return importance_sampler(
        size,
        uniform_fraction=fraction,
        calibrate=sampling.calibrate == "on",
        learning_steps=learning_steps(config, size),
        max_age=refresh.max_age,
        max_age_seconds=refresh.max_age_seconds,
        min_trusted=refresh.min_trusted,
        score_memory=sampling.score_memory if sampling.augment else 0.0,
        record_drawn=scorer in ("grad_norm", "loss"),
        **alike,
    )


def learning_steps(config: Config, num_examples: int) -> int:
    """Updates before calibrated scores are used: two sweeps of the data by whoever scores.

    Args:
        config: its refresh period, and how much is scored at each.
        num_examples: of the training set.
    """
    sweeps = -(-1 // config.share_scored(num_examples))
    return int(2 * sweeps * config.refresh.refresh_every)


def make_scorer(name: str, work: Task) -> tuple[Scorer, FreshScores | None]:
    """A scorer, and what a step takes for the fresh scores of what it has drawn: None is norms.

    Args:
        name: one of `isgd_jax.app.config.SCORERS`, or ``pkg.module:fn``, a function of the loss that returns a scorer;
            the module is imported here.
        work: whose loss is scored; ``logit_bound`` takes its logits.

    Raises:
        ImportError: there is no such module.
        AttributeError: it has no such name.
    """
    if name == "grad_norm":
        return scorers.grad_norm(work.loss_fn), None
    if name == "loss":
        return scorers.loss(work.loss_fn), lambda losses, grads: jnp.abs(losses)
    if name == "logit_bound":
        return scorers.logit_bound(work.logits_fn), None
    return models.from_reference(name)(work.loss_fn), None


def engine_scorer(config: Config, work: Task, sketch: LayerSketch | None = None) -> Any:
    """What the engine scores with, here or on another host.

    Args:
        config: its scorer, and how it augments.
        work: whose loss is scored.
        sketch: of gradients, if the order is made of them; the scorer then returns ``(scores [b], sketches [b, k])``.
    """
    name, augment = config.scoring.scorer, config.sampling.augment
    scorer: Any = make_scorer(name, work)[0]
    if sketch is not None and name == "grad_norm":
        scorer = scorers.grad_norm(work.loss_fn, sketch=sketch)
    elif sketch is not None:
        plain = scorer

        def scorer(params: Params, batch: Any) -> Any:
            return plain(params, batch), sketch.of_batch(params, batch)

    return scorer if augment is None else _augmented(scorer, models.from_reference(augment))


def published(augment: str | None, seed: int) -> Callable[[Params, int], Any]:
    """What the scorer is told at a refresh: the parameters and, to augment by, a key of this refresh's own.

    Args:
        augment: the name of the augmentation, or None.
        seed: of the run; a resumed run scores the same pictures.
    """
    if augment is None:
        return lambda params, at: params
    key = jax.random.fold_in(jax.random.key(seed), PICTURES)
    return lambda params, at: (params, jax.random.key_data(jax.random.fold_in(key, at)))


def example_weights(path: str | None, num_examples: int) -> Float[Array, " n"] | None:
    """a_n [n] of a weighted target, from the user's file.

    Args:
        path: a .npy file, as ``--example-weights`` names it, or None.
        num_examples: of the training set, and so of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not fit the data, or holds numbers that are not finite.
    """
    if path is None:
        return None
    return jnp.asarray(userfiles.numbers(path, num_examples, name="example_weights", allow_negative=True))


def worker_job(
    config: Config, dataset: data.Dataset | None, model: models.Model | None, loss: task.OutputLoss | None
) -> tuple[Job, str]:
    """What a worker on another host does to be ready: it loads the data itself.

    Args:
        config: of the run; ``data_dir`` and ``raw_dir`` are looked for on the worker's host.
        dataset: given from Python, and sent; None loads it by its name, which may download it there.
        model: given from Python, or None for that of the configuration.
        loss: likewise.

    Returns:
        The job, and the fingerprint of the data it has; the trainer refuses a worker with another one.

    Raises:
        FileNotFoundError: the data are not there.
        ValueError: the data are damaged, or the model does not suit them.
    """
    if dataset is None:
        dataset = data.load(config.data.dataset, data_dir=config.data.data_dir, raw_dir=config.data.raw_dir)
    work = task.make(config.model, dataset, model=model, loss=loss)
    chunks = Chunks(work.num_examples, config.scoring.chunk_size)
    return Job(engine_scorer(config, work, _sketch(config, work)), work.train, chunks), work.fingerprint


def job_elsewhere(
    config: Config, dataset: data.Dataset | None, model: models.Model | None, loss: task.OutputLoss | None
) -> Callable[[], tuple[Job, str]]:
    """`worker_job`, to be called in another process: folders are named from the root, as it works in another one.

    Args:
        config: of the run.
        dataset: given from Python, or None; it travels with the call.
        model: likewise.
        loss: likewise.
    """
    data_dir = config.data.data_dir or os.environ.get("TFDS_DATA_DIR")
    config = config.replace(data_dir=_absolute(data_dir), raw_dir=_absolute(config.data.raw_dir))
    return functools.partial(worker_job, config, dataset, model, loss)


def _absolute(folder: str | None) -> str | None:
    return os.path.abspath(os.path.expanduser(folder)) if folder else None


def _number(fraction: float | str) -> float:
    """The uniform fraction where it cannot be learned."""
    return FIXED_FRACTION if isinstance(fraction, str) else fraction


def _order(config: Config, work: Task, sketch: LayerSketch | None) -> Any:
    """The line of the draws, as the sampler wants it."""
    name = config.order_in_use
    if name == "cells":
        return sketch
    if name in ("index", "score"):
        return name
    if work.num_classes is None:  # nothing to order by but the scores
        return "score"
    labels = np.asarray(work.train["label"])
    if name == "label":  # by label alone: ranks leave no ties to be ordered by score
        return jnp.asarray(np.argsort(np.argsort(labels, kind="stable")).astype(np.int32))
    return jnp.asarray(labels)


def _sketch(config: Config, work: Task) -> LayerSketch | None:
    if not (config.sampling.is_scored and config.order_in_use == "cells"):
        return None
    params = jax.eval_shape(work.init, jax.random.key(0))
    return sketches.last_layer_sketch(work.loss_fn, params, jax.tree.map(lambda x: jnp.asarray(x[0]), work.train))


def _augmented(scorer: Any, augment: Any) -> Any:
    """The scorer of one random picture of each example; its parameters are the pair (parameters, bits of a key)."""

    def score(pair: tuple[Params, Array], batch: Any) -> Any:
        params, bits = pair
        count = jax.tree.leaves(batch)[0].shape[0]
        pictures = jax.vmap(augment)(jax.random.split(jax.random.wrap_key_data(bits), count), batch)
        return scorer(params, pictures)

    return score
