"""What a probe measures: the spread of the norms, what scoring costs beside a step, and how fast scores lose worth."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from isgd_jax.app.clock import middle_seconds
from isgd_jax.engines.sharded import sharded
from isgd_jax.errors import DivergedError
from isgd_jax.gradients.all_examples import norms_and_mean_gradient
from isgd_jax.gradients.captured import CapturingJit
from isgd_jax.gradients.one_pass import mean_gradient
from isgd_jax.reweight import importance_weighting
from isgd_jax.sampling import proposal
from isgd_jax.sampling.estimator import importance_sampler
from isgd_jax.sampling.plain import shuffled_epochs
from isgd_jax.sampling.state import BatchSampler
from isgd_jax.training.packing import Held, Packing
from isgd_jax.training.problem import Problem
from isgd_jax.training.train_step import JittedStep, TrainState, make_steps
from isgd_jax.types import Batch, Key, LossFn, Params, Scorer
from isgd_jax.variance import second_moments

__all__ = [
    "STEPS_IN_FLIGHT",
    "Costs",
    "Probed",
    "Spread",
    "Steps",
    "ageing",
    "costs",
    "mean_loss",
    "run_plain",
    "spread",
]

CHUNK = 256
"""Examples differentiated together where a mean gradient is formed."""

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
REPEATS = 15
STEPS_IN_FLIGHT = 8
"""Steps between two waits for the device: before JAX 0.12 a loop without any can hang."""


class Spread(NamedTuple):
    """How the norms [n] of a random sample of examples are spread, and what that is worth."""

    norms: np.ndarray
    quantiles: dict[float, float]
    second_moment_ratio: float
    """1 + CV² = mean(norms²) / mean(norms)²: what ideal draws divide the second moment by."""
    mean_grad_norm_sq: float
    """‖mean gradient‖², without bias."""
    uniform: float
    """Tr Cov of the gradient of one uniform draw."""
    ideal: float
    """The same for ideal draws: the least that independent draws can reach."""


class Costs(NamedTuple):
    """Seconds on this machine, compilation left out; the middle of fifteen measurements."""

    update: float
    """A step of plain SGD."""
    reweighted_update: float
    """A step of training by importance sampling: it draws by scores, reweights, and learns from the fresh norms."""
    score_example: float
    """Scoring one example of a chunk."""
    score_all: float
    """Scoring the whole training set once."""


def spread(loss_fn: LossFn, params: Params, sample: Batch, *, is_whole: bool = False) -> Spread:
    """Norms and mean gradient of a random sample of the training set.

    Args:
        loss_fn: ``(params, example) -> scalar``.
        params: at which gradients are taken.
        sample: examples, a pytree of arrays [n, ...].
        is_whole: whether it is the training set itself; else ‖mean gradient‖² is estimated over pairs, without bias.
    """
    found, mean = norms_and_mean_gradient(loss_fn, params, sample, batch_size=CHUNK)
    norms = np.asarray(found)
    size = len(norms)
    square = float(optax.tree.vdot(mean, mean))
    if not is_whole:  # the mean over pairs: the squared norm of a sample's mean is too large
        square = max((size * square - float(np.mean(np.square(norms)))) / (size - 1), 0.0)
    moments = second_moments.moments(jnp.asarray(norms), jnp.asarray(norms))
    second, ideal = float(moments.uniform), float(moments.ideal)
    quantiles = {at: float(np.quantile(norms, at)) for at in QUANTILES}
    ratio = second / ideal if ideal else 1.0
    return Spread(norms, quantiles, ratio, square, second - square, max(ideal - square, 0.0))


class Probed(NamedTuple):
    """What is probed: a loss on data, and how it would be trained."""

    problem: Problem
    optimizer: optax.GradientTransformation
    """For mean gradients; the reweighting stands before it."""
    batch_size: int
    scorer: Scorer
    chunk_size: int
    """Examples scored in one call."""
    mixture: float
    """Share of uniform draws in the proposals."""
    seed: int
    """Of the first parameters, of the examples that are measured, and of the steps."""
    fingerprint: str = ""
    """Of the data set; a checkpoint of another one is refused."""


def costs(probed: Probed, params: Params) -> Costs:
    """Time a plain step and one by importance sampling, as `isgd_jax.fit` makes them, and the scoring of one chunk.

    Args:
        probed: what is trained, and how.
        params: at which it is timed; they are not changed.

    Returns:
        Seconds, each the median of `REPEATS` calls that take turns.
    """
    steps = Steps(probed)
    data, num_examples = jax.device_put(probed.problem.train), probed.problem.num_examples
    opt_state, key = steps.tx.init(params), jax.random.key(0)
    samplers = (
        shuffled_epochs(num_examples, batch_size=probed.batch_size, monitor=False),
        importance_sampler(num_examples, batch_size=probed.batch_size),
    )

    def made_by(sampler: BatchSampler) -> Callable[[], Any]:
        state = jax.tree.map(jnp.copy, TrainState(params, opt_state, sampler.init()))  # a step takes over its state
        packing = Packing(state)
        held, step = Held(state, packing), packing.step(steps.of_training(sampler).__wrapped__)

        def advance() -> Any:
            held.advance(step, None, data, key, jnp.float32(0.0))
            return held.ready()

        return advance

    size = min(probed.chunk_size, num_examples)
    chunk = jax.tree.map(lambda x: x[:size], probed.problem.train)
    scorer = sharded(probed.scorer)
    plain, ours, scoring = middle_seconds(*map(made_by, samplers), lambda: scorer(params, chunk), repeats=REPEATS)
    return Costs(plain, ours, scoring / size, scoring / size * num_examples)


def mean_loss(probed: Probed, params: Params, sample: Batch) -> float:
    """The mean loss of examples [n, ...]."""
    return float(probed.problem.evaluator(batch_size=CHUNK)(params, sample)["loss"])


def ageing(
    probed: Probed,
    params: Params,
    opt_state: Any | None,
    *,
    sample: Batch,
    ages: Sequence[int],
    key: Key,
) -> dict[int, float]:
    """What scores are worth after so many real steps of plain SGD: STALE/UNIFORM of one draw, by age; age 0 is fresh.

    The scores and the norms are those of the ``sample``; the steps draw from the whole training set, with the batch
    size and the optimizer that are probed.

    Args:
        probed: what is trained, and how; its uniform share is that of the proposals.
        params: that are scored at first; they are not changed.
        opt_state: of the chain at these parameters; None begins anew.
        sample: examples whose norms are measured again at each age [n, ...].
        ages: steps, in any order.
        key: of the steps' draws.

    Returns:
        Trace of the covariance with old scores over that of uniform draws, for each age; above 1 they do harm.

    Raises:
        FloatingPointError: gradients are no longer finite after some steps.
    """
    loss_fn, scorer = probed.problem.loss_fn, sharded(probed.scorer)
    probs, _ = proposal.smooth(jnp.asarray(scorer(params, sample)), mixture=probed.mixture)
    found = {0: _ratio(loss_fn, params, sample, probs)}
    steps = Steps(probed)
    first = (params, steps.tx.init(params) if opt_state is None else opt_state)
    for age, state in _after(steps, first, jax.device_put(probed.problem.train), sorted(ages), key):
        found[age] = _ratio(loss_fn, state[0], sample, probs)
    return found


class Steps:
    """Real steps with the optimizer and the batch size of what is probed: plain ones, and those of training itself."""

    def __init__(self, probed: Probed) -> None:
        problem, num_examples, optimizer = probed.problem, probed.problem.num_examples, probed.optimizer
        self.tx = optax.chain(importance_weighting(num_examples), optimizer)
        self._problem = problem

        def plain(params: Params, opt_state: Any, data: Batch, key: Key) -> tuple[Params, Any]:
            indices = jax.random.randint(key, (probed.batch_size,), 0, num_examples)
            grads = mean_gradient(problem.loss_fn, (params,), jax.tree.map(lambda x: x[indices], data))
            reweighting, inner = opt_state
            updates, inner = optimizer.update(grads, inner, params)
            return optax.apply_updates(params, updates), (reweighting, inner)

        self.plain = CapturingJit(plain)

    def of_training(self, sampler: BatchSampler) -> JittedStep:
        """The step of training by this sampler, ``(state, frozen, data, key, seconds)``; the state is donated."""
        return make_steps(self._problem, sampler, self.tx).step


def run_plain(probed: Probed, params: Params, *, num_steps: int, key: Key) -> tuple[Params, Any]:
    """Parameters and optimizer state after so many steps of plain SGD, with uniform draws.

    Args:
        probed: what is trained, and how.
        params: the first; they are not changed.
        num_steps: of them.
        key: of the draws, folded with the number of each step.
    """
    steps = Steps(probed)
    first = (params, steps.tx.init(params))
    [(_, state)] = _after(steps, first, jax.device_put(probed.problem.train), [num_steps], key)
    return state


def _after(
    steps: Steps, state: tuple[Params, Any], data: Batch, counts: Sequence[int], key: Key
) -> Iterator[tuple[int, tuple[Params, Any]]]:
    """The state after each of these counts of plain steps."""
    done = 0
    for count in counts:
        while done < count:
            state = steps.plain(*state, data, jax.random.fold_in(key, done))
            done += 1
            if done % STEPS_IN_FLIGHT == 0:
                jax.block_until_ready(state)
        yield count, state


def _ratio(loss_fn: LossFn, params: Params, sample: Batch, probs: Float[Array, " n"]) -> float:
    """STALE/UNIFORM of one draw: Tr Cov with these probabilities over that of uniform draws."""
    norms, mean = norms_and_mean_gradient(loss_fn, params, sample, batch_size=CHUNK)
    if not np.isfinite(norms).all():
        raise DivergedError("the gradients are no longer finite after some steps: lower learning_rate")
    traces = second_moments.trace_covariance(second_moments.moments(norms, probs), optax.tree.vdot(mean, mean))
    return float(traces.stale / traces.uniform)
