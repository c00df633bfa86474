"""From a configuration to the parts that a run is made of: problem, sampler, optimizer, scorer, engine and refresher.

Nothing below this module knows `Config`.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

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

FIXED_FRACTION = 0.1
"""The uniform fraction of proposals whose scores are not learnt from: of static scores and of candidates."""


class Parts(NamedTuple):
    """What a run is made of."""

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
    num_steps: int,
    replayed: Schedule | None = None,
    make_job: Callable[[], tuple[Job, str]] | None = None,
) -> Parts:
    """The parts of a run.

    Args:
        config: what to do.
        work: the data, the model and the loss.
        num_steps: of the run, for a decaying rate.
        replayed: the schedule to follow.
        make_job: what a worker on another host does to be ready.

    Raises:
        ValueError: a file of the user's does not fit the data.
    """
    size, weights = work.num_examples, example_weights(config, work.num_examples)
    augment = None if config.augment is None else models.from_reference(config.augment)
    problem = Problem(
        work.loss_fn, work.init, work.train, augment=augment, hold="device" if config.hold == "device" else "host"
    )
    sketch = _sketch(config, work)
    sampler = make_sampler(config, work, sketch=sketch, weights=weights)
    engine, remarks = None, list[str]()
    if config.is_scored:
        engine, remarks = make_engine(
            config, engine_scorer(config, work, sketch), work.train, fingerprint=work.fingerprint, replayed=replayed,
            make_job=make_job,
        )  # fmt: skip
    tx = optimizers.make(config, num_examples=size, num_steps=num_steps)
    return Parts(problem, sampler, tx, engine, make_scorer(config, work)[1], published(config), replayed, remarks)


def make_sampler(
    config: Config, work: Task, *, sketch: LayerSketch | None = None, weights: Float[Array, " n"] | None = None
) -> BatchSampler:
    """The sampler of a configuration."""
    size, name = work.num_examples, config.sampler_in_use
    alike: dict[str, Any] = {
        "batch_size": config.batch_size, "monitor": config.monitor == "on", "example_weights": weights,
    }  # fmt: skip
    is_gated, fraction = config.gate == "on", config.mixture
    if config.mode == "uniform":
        return (shuffled_epochs if name == "shuffled" else uniform_draws)(size, **alike)
    if config.mode == "presample":
        return presampling(
            size, scorer=make_scorer(config, work)[0], candidates=config.candidates, gate=is_gated,
            score_cost=2.0 if config.scorer == "grad_norm" else 1.0, uniform_fraction=_number(fraction), **alike,
        )  # fmt: skip
    chosen = models.from_reference(name) if ":" in name else name
    alike |= {"sampler": chosen, "order": _order(config, work, sketch), "gate": is_gated, "additive": config.additive}
    if config.mode == "static":
        scores = userfiles.numbers(str(config.static_scores), size, flag="--static-scores")
        return fixed(scores, uniform_fraction=_number(fraction), **alike)
    return importance_sampler(
        size,
        uniform_fraction=fraction,
        calibrate=config.calibrate == "on",
        learning_steps=learning_steps(config, size),
        max_age=config.max_age,
        max_age_seconds=config.max_age_seconds,
        min_trusted=config.min_trusted,
        score_memory=config.score_memory if config.augment else 0.0,
        record_drawn=config.scorer in ("grad_norm", "loss"),
        **alike,
    )


def learning_steps(config: Config, num_examples: int) -> int:
    """Steps before calibrated scores are used: two sweeps of the data by whoever scores."""
    sweeps = -(-1 // config.share_scored(num_examples))
    return int(2 * sweeps * config.refresh_every)


def make_scorer(config: Config, work: Task) -> tuple[Scorer, FreshScores | None]:
    """The scorer of a configuration, and what a step takes for the fresh scores of what it has drawn: None is norms."""
    if config.scorer == "grad_norm":
        return scorers.grad_norm(work.loss_fn), None
    if config.scorer == "loss":
        return scorers.loss(work.loss_fn), lambda losses, grads: jnp.abs(losses)
    if config.scorer == "logit_bound":
        return scorers.logit_bound(work.logits_fn), None
    return models.from_reference(config.scorer)(work.loss_fn), None


def engine_scorer(config: Config, work: Task, sketch: LayerSketch | None = None) -> Any:
    """What the engine scores with, here or on another host: with sketches where the order is made of them."""
    if sketch is None:
        scorer: Any = make_scorer(config, work)[0]
    elif config.scorer == "grad_norm":
        scorer = scorers.grad_norm(work.loss_fn, sketch=sketch)
    else:
        plain = make_scorer(config, work)[0]

        def scorer(params: Params, batch: Any) -> Any:
            return plain(params, batch), sketch.of_batch(params, batch)

    return scorer if config.augment is None else _augmented(scorer, models.from_reference(config.augment))


def published(config: Config) -> Callable[[Params, int], Any]:
    """What the scorer is told at a refresh: the parameters and, to augment by, a key of this refresh's own."""
    if config.augment is None:
        return lambda params, at: params
    key = jax.random.fold_in(jax.random.key(config.seed), PICTURES)
    return lambda params, at: (params, jax.random.key_data(jax.random.fold_in(key, at)))


def example_weights(config: Config, num_examples: int) -> Float[Array, " n"] | None:
    """a_n [n] of a weighted target, from the user's file.

    Raises:
        ValueError: the file does not fit the data.
    """
    if config.example_weights is None:
        return None
    return jnp.asarray(
        userfiles.numbers(config.example_weights, num_examples, flag="--example-weights", allow_negative=True)
    )


def worker_job(
    config: Config, dataset: data.Dataset | None, model: models.Model | None, loss: task.OutputLoss | None
) -> tuple[Job, str]:
    """What a worker on another host does to be ready: it loads the data itself; also the fingerprint of what it has."""
    if dataset is None:
        dataset = data.load(config.dataset, data_dir=config.data_dir, raw_dir=config.raw_dir)
    work = task.make(config, dataset, model=model, loss=loss)
    chunks = Chunks(work.num_examples, config.chunk_size)
    return Job(engine_scorer(config, work, _sketch(config, work)), work.train, chunks), work.fingerprint


def job_elsewhere(
    config: Config, dataset: data.Dataset | None, model: models.Model | None, loss: task.OutputLoss | None
) -> Callable[[], tuple[Job, str]]:
    """`worker_job`, to be called in another process: folders are named from the root, as it works in another one."""
    data_dir = config.data_dir or os.environ.get("TFDS_DATA_DIR")
    config = dataclasses.replace(config, data_dir=_absolute(data_dir), raw_dir=_absolute(config.raw_dir))
    return functools.partial(worker_job, config, dataset, model, loss)


def _absolute(folder: str | None) -> str | None:
    return os.path.abspath(os.path.expanduser(folder)) if folder else None


def _number(fraction: float | str) -> float:
    """The uniform fraction where it cannot be learnt."""
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
    if not (config.is_scored and config.order_in_use == "cells"):
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
