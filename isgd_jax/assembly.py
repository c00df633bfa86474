"""From a configuration and a task to the parts that a run is made of: scorer, engine, laws, and the jitted updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from isgd_jax import (
    candidates,
    designs,
    laws,
    models,
    optimizers,
    proposal,
    samplers,
    scorers,
    sketches,
    step,
    userfiles,
)
from isgd_jax.config import Config
from isgd_jax.draws import Choose
from isgd_jax.engines.choose import MakeJob, make_engine
from isgd_jax.parallel import OneDevice
from isgd_jax.schedule import Schedule
from isgd_jax.task import Task
from isgd_jax.typing import Batch, Engine, Params, Scorer


class Parts(NamedTuple):
    """What a run is made of."""

    state: step.TrainState
    engine: Engine
    laws: laws.Laws
    updates: step.Updates
    remarks: list[str]
    """What a person should hear of before the first step."""


def assemble(
    config: Config,
    work: Task,
    train_data: Batch,
    *,
    num_steps: int,
    place: OneDevice | None = None,
    replayed: Schedule | None = None,
    make_job: MakeJob | None = None,
) -> Parts:
    """The parts of a run. ``train_data`` is the training set where the run keeps it, ``place`` where it makes steps.

    ``replayed`` is the schedule to follow, ``make_job`` what a worker on another host does to be ready.

    Raises:
        ValueError: a file of the user's does not fit the data.
    """
    size = work.num_examples
    weights = None
    if config.example_weights is not None:
        weights = jnp.asarray(
            userfiles.numbers(config.example_weights, size, flag="--example-weights", allow_negative=True)
        )
    init_key, _, epoch_key = keys(config)
    tx = optimizers.make(config, num_examples=size, num_steps=num_steps, place=place, example_weights=weights)
    state = step.init_state(work.init(init_key), tx, size, num_draws=config.batch_size)
    state = (place or OneDevice()).spread(state)
    augment = None if config.augment is None else models.from_reference(config.augment)
    scorer, fresh_scores = make_scorer(config, work)
    engine, remarks = make_engine(
        config,
        engine_scorer(config, work),
        work.train,
        fingerprint=work.fingerprint,
        replayed=replayed,
        make_job=make_job,
    )
    if config.is_scored:
        sketch = None
        if config.order_in_use == "cells":
            sketch = _sketcher(work, state.params, train_data)
        found: laws.Laws = laws.ScoredLaws(
            engine,
            config,
            jnp.asarray(train_data["label"]),
            replayed=replayed,
            sketch=sketch,
            published=_published(config, augment),
            example_weights=weights,
        )
    else:
        found = _fixed_laws(config, jnp.asarray(train_data["label"]), weights, epoch_key)
    options = step.Options(
        fresh_scores=fresh_scores if config.is_scored else None,
        is_watched=config.monitor == "on" or config.is_scored or config.mode == "static",
        augment=augment,
        memory=0.0 if augment is None else config.score_memory,
        example_weights=weights,
    )
    updates = step.make_updates(work.loss_fn, tx, _chooser(config, scorer), options, place)
    return Parts(state, engine, found, updates, remarks)


def keys(config: Config) -> Array:
    """The keys of a run: of the first parameters, the draws, and the epochs."""
    return jax.random.split(jax.random.key(config.seed), 3)


def engine_scorer(config: Config, work: Task) -> Scorer:
    """What the engine scores with, here or on another host: of augmented examples where they are augmented."""
    scorer, _ = make_scorer(config, work)
    return scorer if config.augment is None else _augmented(scorer, models.from_reference(config.augment))


def make_scorer(config: Config, work: Task) -> tuple[Scorer, step.FreshScores | None]:
    """The scorer of a configuration, for the engine to jit, and how a step scores what it has drawn."""
    if config.scorer == "grad_norm":
        return scorers.grad_norm(work.loss_fn), step.norms_as_scores
    if config.scorer == "loss":
        return scorers.loss(work.loss_fn), step.losses_as_scores
    return scorers.logit_bound(work.logits_fn), None


def _chooser(config: Config, scorer: Scorer) -> Choose:
    if config.mode == "presample":
        return candidates.make_choose(
            samplers.uniform,
            scorer,
            num_draws=config.batch_size,
            candidates=config.candidates,
            mixture=_mixture(config, otherwise=0.1),
            is_gated=config.gate == "on",
            score_cost=2.0 if config.scorer == "grad_norm" else 1.0,
        )
    if config.sampler_in_use == "shuffled":
        return laws.choose_shuffled(config.batch_size)
    return designs.choose_by(config)


def _fixed_laws(config: Config, labels: Array, weights: Float[Array, " n"] | None, epoch_key: Array) -> laws.Laws:
    size = len(labels)
    if config.sampler_in_use == "shuffled":
        return laws.ShuffledLaws(epoch_key, size, config.batch_size)
    if config.mode != "static":
        return laws.FixedLaws(laws.uniform_law(size), laws.uniform_law(size))
    scores = jnp.asarray(userfiles.numbers(str(config.static_scores), size, flag="--static-scores"))
    mixture = _mixture(config, otherwise=0.1)
    probs, _ = proposal.smooth(scores, mixture=mixture, additive=config.additive, example_weights=weights)
    law = designs.prepared(config, probs, labels, None)
    frozen = proposal.Frozen(law, jnp.float32(mixture), scores, jnp.zeros(size, jnp.int32))
    return laws.FixedLaws(frozen, law)


def _mixture(config: Config, *, otherwise: float) -> float:
    """The share of uniform draws where it cannot be learnt."""
    return otherwise if isinstance(config.mixture, str) else config.mixture


def _sketcher(work: Task, params: Params, train_data: Batch) -> laws.Sketcher:
    example = jax.tree.map(lambda x: jnp.asarray(x[0]), train_data)
    sketch = jax.jit(sketches.last_layer(jax.random.key(0), work.loss_fn, params, example))
    batch = jax.tree.map(lambda x: x[None], example)
    dims = jax.eval_shape(sketch, params, batch).shape[1]

    def of_rows(params: Params, ids: np.ndarray) -> Array:
        return sketch(params, jax.tree.map(lambda x: x[ids], train_data))

    return laws.Sketcher(of_rows, dims)


def _augmented(scorer: Scorer, augment: step.Augment) -> Scorer:
    """The scorer of one random picture of each example; its parameters are the pair (parameters, bits of a key)."""

    def score(pair: tuple[Params, Array], batch: Batch) -> Array:
        params, bits = pair
        count = jax.tree.leaves(batch)[0].shape[0]
        pictures = jax.vmap(augment)(jax.random.split(jax.random.wrap_key_data(bits), count), batch)
        return scorer(params, pictures)

    return score


def _published(config: Config, augment: step.Augment | None) -> Any:
    """What the scorer is told at a refresh: the parameters and, to augment by, a key of this refresh's own."""
    if augment is None:
        return lambda params, at: params
    key = jax.random.fold_in(jax.random.key(config.seed), step.PICTURES)
    return lambda params, at: (params, jax.random.key_data(jax.random.fold_in(key, at)))
