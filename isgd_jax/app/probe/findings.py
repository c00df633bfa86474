"""The probe as a whole: at initialization, after some steps, or at the newest checkpoint of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from isgd_jax.app import build, checkpoints, optimizers
from isgd_jax.app.config import Config, ScoringConfig, TrainingConfig
from isgd_jax.app.data import check_batch_size
from isgd_jax.app.probe import measure
from isgd_jax.app.probe.trial import steps_in_time, try_both
from isgd_jax.app.probe.verdict import Period, Trial, is_unlearnt, periods, verdict
from isgd_jax.app.run_dir import RunDir
from isgd_jax.app.task import Task
from isgd_jax.errors import ArgumentError, DivergedError
from isgd_jax.training.problem import Problem
from isgd_jax.types import Params

__all__ = ["Probe", "check_probeable", "probe", "probed_of"]


class Probe(NamedTuple):
    """What was found, and what it means."""

    num_updates: int
    """Updates that had been made."""
    num_examples: int
    mixture: float
    spread: measure.Spread
    costs: measure.Costs
    by_age: dict[int, float]
    """STALE/UNIFORM by the age of the scores."""
    periods: list[Period]
    words: list[str]
    losses: tuple[float, float]
    """Mean loss of the examples that were measured: with the first parameters, and with those that were probed."""
    tried: Trial | None
    """What came of training on both ways; None where nothing is learnt yet, or nobody asked."""
    remarks: tuple[str, ...] = ()
    """What a person should hear of: newer checkpoints that are damaged."""

    @property
    def is_unlearnt(self) -> bool:
        """Whether it is too early to say anything: hardly anything has been learnt yet."""
        return is_unlearnt(self.num_updates, self.losses)


def probe(
    probed: measure.Probed,
    *,
    run: Path | None = None,
    after: int = 0,
    ages: Sequence[int] = (10, 30, 100, 300),
    num_examples: int = 4096,
    trial_steps: int | None = None,
) -> Probe:
    """Measure whether importance sampling can pay.

    Args:
        probed: what would be trained, and how; see `probed_of`.
        run: the folder of a run of the same: its newest checkpoint is probed.
        after: steps of plain SGD to make first, from initialization.
        ages: after so many further steps the scores are tried again.
        num_examples: norms and losses are measured on so many examples, drawn at random.
        trial_steps: by importance sampling, tried against plain SGD for as long; 0 for none; None: as many as were made
            before, or as fit in about a minute. Best are as many as are to come.

    Raises:
        ValueError: an argument is out of range, the batch is larger than the training set, the run has example weights
            or augmented examples, or the checkpoint is of another model or data set.
        FileNotFoundError: the run has no checkpoint.
        FloatingPointError: the gradients are not finite.
    """
    _check(run, after, ages, num_examples, trial_steps)
    check_batch_size(probed.batch_size, probed.problem.num_examples)
    problem, seed = probed.problem, jax.random.key(probed.seed)
    init_key, step_key, sample_key = jax.random.split(seed, 3)
    first, opt_state = problem.init(jax.random.split(seed, 4)[0]), None
    params, remarks = first, tuple[str, ...]()
    if run is not None:
        params, opt_state, after, remarks = _restored(run, probed, first)
    elif after:
        params, opt_state = measure.run_plain(probed, first, num_steps=after, key=init_key)
    size = min(num_examples, problem.num_examples)
    rows = np.sort(np.asarray(jax.random.permutation(sample_key, problem.num_examples))[:size])
    sample = jax.tree.map(lambda x: x[rows], problem.train)
    spread = measure.spread(problem.loss_fn, params, sample, is_whole=size == problem.num_examples)
    if not np.isfinite(spread.norms).all():
        raise DivergedError(f"the gradients are not finite after {after} updates: lower learning_rate")
    losses = measure.mean_loss(probed, first, sample), measure.mean_loss(probed, params, sample)
    cost = measure.costs(probed, params)
    by_age = measure.ageing(probed, params, opt_state, sample=sample, ages=ages, key=step_key)
    table = periods(by_age, update=cost.update, reweighted_update=cost.reweighted_update, score_all=cost.score_all)
    tried, steps = None, steps_in_time(trial_steps, after, cost)
    if steps and not is_unlearnt(after, losses):
        tried = try_both(probed, params, opt_state, sample=sample, steps=steps, costs=cost, key=step_key)
    headroom = spread.uniform / spread.ideal if spread.ideal else float("inf")
    words = verdict(spread.second_moment_ratio, headroom, table, tried, num_updates=after, losses=losses)
    return Probe(after, size, probed.mixture, spread, cost, by_age, table, words, losses, tried, remarks)


def probed_of(training: TrainingConfig, scoring: ScoringConfig, task: Task, *, mixture: float = 0.3) -> measure.Probed:
    """How a task would be trained: the optimizer and its batch, what scores how many at a time, and the proposals.

    Args:
        training: optimizer, batch size and seed.
        scoring: the scorer and its chunks.
        task: what would be trained.
        mixture: share of uniform draws in the proposals.

    Raises:
        ValueError: ``mixture`` is out of range.
    """
    if not 0 < mixture <= 1:
        raise ArgumentError(f"mixture must be above 0 and at most 1; got {mixture}")
    return measure.Probed(
        problem=Problem(task.loss_fn, task.init, dict(task.train)),
        fingerprint=task.fingerprint,
        optimizer=optimizers.behind(training, task.num_examples),
        batch_size=training.batch_size,
        scorer=build.make_scorer(scoring.scorer, task)[0],
        chunk_size=scoring.chunk_size,
        mixture=mixture,
        seed=training.seed,
    )


def check_probeable(config: Config, run: Path) -> None:
    """Refuse a run whose gradient is not that of the mean loss of the examples as they are: nothing else is measured.

    Args:
        config: of the run.
        run: its folder, for the message.

    Raises:
        ValueError: it has example weights, or augments its examples.
    """
    for name in ("example_weights", "augment"):
        value = getattr(config.sampling, name)
        if value is not None:
            raise ArgumentError(
                f"expected a run without {name}=, for the probe measures the mean loss of the examples as they are; "
                f"{run} has {value!r}: compare both ways by training them, with isgd compare"
            )


def _restored(run: Path, probed: measure.Probed, params: Params) -> tuple[Params, Any, int, tuple[str, ...]]:
    """Parameters, optimizer state and step of the newest whole checkpoint, and what is to be said of damaged ones."""
    saved = checkpoints.read(RunDir(run).own_checkpoints(), only=("state/params", "state/opt_state"))
    if saved is None:
        raise FileNotFoundError(f"{run} has no checkpoint yet: probe it later, or from initialization, without run=")
    check_probeable(RunDir(run).read_config(), run)
    theirs = saved.identity.get("data set")
    if theirs != probed.fingerprint:
        raise ArgumentError(f"the checkpoint is of another data set: it has {theirs}, this one {probed.fingerprint}")
    template = {"params": params, "opt_state": measure.Steps(probed).tx.init(params)}
    state = checkpoints.into(template, saved.tree["state"])
    return state["params"], state["opt_state"], saved.step, tuple(saved.remarks)


def _check(run: Path | None, after: int, ages: Sequence[int], num_examples: int, trial_steps: int | None) -> None:
    if run is not None and after:
        raise ArgumentError("after= counts from initialization: leave it out with run=")
    if after < 0:
        raise ArgumentError(f"after must be 0 or more; got {after}")
    if not ages or min(ages) < 1:
        raise ArgumentError(f"ages must be numbers of steps of at least 1; got {tuple(ages)}")
    if num_examples < 2:
        raise ArgumentError(f"examples must be at least 2; got {num_examples}")
    if trial_steps is not None and trial_steps < 0:
        raise ArgumentError(f"trial must be 0 or more; got {trial_steps}")
