"""What a probe measures: the spread of the norms, what scoring costs beside a step, and how fast scores lose worth."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from isgd_jax.app import build, optimizers
from isgd_jax.app.clock import middle_seconds
from isgd_jax.app.config import Config
from isgd_jax.app.task import Task
from isgd_jax.engines.sharded import sharded
from isgd_jax.errors import DivergedError
from isgd_jax.gradients import lazy
from isgd_jax.gradients.per_example import per_example_grads, per_example_value_and_grad
from isgd_jax.sampling import proposal, samplers
from isgd_jax.types import Batch, Key, LossFn, Params
from isgd_jax.variance import second_moments

CHUNK = 256
"""Examples differentiated together where a mean gradient is formed."""

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
REPEATS = 15
STEPS_IN_FLIGHT = 8


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
    """A step that draws by scores, reweights, and has the fresh norms of what it drew."""
    score_example: float
    """Scoring one example of a chunk."""
    score_all: float
    """Scoring the whole training set once."""


def spread(loss_fn: LossFn, params: Params, sample: Batch, *, is_whole: bool = False) -> Spread:
    """Norms and mean gradient of a random ``sample`` [n] of the training set, or of the whole of it."""
    norms, mean = norms_and_mean(loss_fn, params, sample)
    size = len(norms)
    square = float(optax.tree.vdot(mean, mean))
    if not is_whole:  # the mean over pairs: the squared norm of a sample's mean is too large
        square = max((size * square - float(np.mean(np.square(norms)))) / (size - 1), 0.0)
    moments = second_moments.moments(jnp.asarray(norms), jnp.asarray(norms))
    second, ideal = float(moments.uniform), float(moments.ideal)
    quantiles = {at: float(np.quantile(norms, at)) for at in QUANTILES}
    ratio = second / ideal if ideal else 1.0
    return Spread(norms, quantiles, ratio, square, second - square, max(ideal - square, 0.0))


def norms_and_mean(loss_fn: LossFn, params: Params, sample: Batch) -> tuple[np.ndarray, Params]:
    """The exact norm of each example's gradient [n], and the mean gradient; the sample passes through in chunks."""

    @jax.jit
    def one(params: Params, chunk: Batch, weights: Float[Array, " b"]) -> tuple[Params, Array]:
        grads = per_example_grads(loss_fn)(params, chunk)
        return lazy.weighted_mean(grads, weights), lazy.norms(grads)

    size = len(jax.tree.leaves(sample)[0])
    width = min(CHUNK, size)
    total, norms = jax.tree.map(jnp.zeros_like, params), []
    for start in range(0, size, width):
        rows = np.minimum(np.arange(start, start + width), size - 1)
        real = np.arange(start, start + width) < size
        mean, some = one(params, jax.tree.map(lambda x, rows=rows: x[rows], sample), jnp.asarray(real, jnp.float32))
        total = jax.tree.map(lambda t, m: t + m * (width / size), total, mean)
        norms.append(np.asarray(some)[real])
    return np.concatenate(norms), total


def costs(config: Config, task: Task, params: Params) -> Costs:
    """Time a plain step, a reweighted step, and the scoring of one chunk."""
    steps = Steps(config, task)
    data = jax.device_put(dict(task.train))
    law = samplers.prepare(jnp.full(task.num_examples, 1.0 / task.num_examples))
    opt_state, key = steps.tx.init(params), jax.random.key(0)
    size = min(config.chunk_size, task.num_examples)
    chunk = jax.tree.map(lambda x: x[:size], task.train)
    scorer = sharded(build.make_scorer(config, task)[0])
    plain, reweighted, scoring = middle_seconds(
        lambda: steps.plain(params, opt_state, data, key),
        lambda: steps.reweighted(params, opt_state, law, data, key),
        lambda: scorer(params, chunk),
        repeats=REPEATS,
    )
    return Costs(plain, reweighted, scoring / size, scoring / size * task.num_examples)


def ageing(
    config: Config,
    task: Task,
    params: Params,
    opt_state: Any | None,
    *,
    sample: Batch,
    ages: Sequence[int],
    mixture: float,
    key: Key,
) -> dict[int, float]:
    """What scores are worth after so many real steps of plain SGD: STALE/UNIFORM of one draw, by age; age 0 is fresh.

    The scores and the norms are those of the ``sample``; the steps draw from the whole training set, with the batch
    size and the optimiser of the configuration. ``mixture`` is the share of the uniform law in the proposal.
    """
    scorer = sharded(build.make_scorer(config, task)[0])
    probs, _ = proposal.smooth(jnp.asarray(scorer(params, sample)), mixture=mixture)
    found = {0: _ratio(task.loss_fn, params, sample, probs)}
    steps = Steps(config, task)
    first = (params, steps.tx.init(params) if opt_state is None else opt_state)
    for age, state in _after(steps, first, jax.device_put(dict(task.train)), sorted(ages), key):
        found[age] = _ratio(task.loss_fn, state[0], sample, probs)
    return found


class Steps:
    """Real steps with the optimiser and the batch size of a configuration: plain, and reweighted."""

    def __init__(self, config: Config, task: Task) -> None:
        num_examples, num_draws = task.num_examples, config.batch_size
        num_steps = config.num_steps(num_examples)
        self.tx = optimizers.make(config, num_examples=num_examples, num_steps=num_steps)
        behind = optimizers.behind(config, num_steps=num_steps)

        def mean_loss(params: Params, batch: Batch) -> Float[Array, ""]:
            return jnp.mean(jax.vmap(task.loss_fn, (None, 0))(params, batch))

        def plain(params: Params, opt_state: Any, data: Batch, key: Key) -> tuple[Params, Any]:
            indices = jax.random.randint(key, (num_draws,), 0, num_examples)
            grads = jax.grad(mean_loss)(params, jax.tree.map(lambda x: x[indices], data))
            reweighting, inner = opt_state
            updates, inner = behind.update(grads, inner, params)
            return optax.apply_updates(params, updates), (reweighting, inner)

        def reweighted(
            params: Params, opt_state: Any, law: samplers.Law, data: Batch, key: Key
        ) -> tuple[Params, Any, Array]:
            draw = samplers.stratified(key, law, num_draws=num_draws)
            batch = jax.tree.map(lambda x: x[draw.indices], data)
            _, grads = per_example_value_and_grad(task.loss_fn)(params, batch)
            updates, opt_state = self.tx.update(grads, opt_state, params, probs=draw.probs)
            return optax.apply_updates(params, updates), opt_state, lazy.norms(grads)

        self.plain, self.reweighted = jax.jit(plain), jax.jit(reweighted)


def run_plain(config: Config, task: Task, params: Params, *, num_steps: int, key: Key) -> tuple[Params, Any]:
    """Parameters and optimiser state after so many steps of plain SGD."""
    steps = Steps(config, task)
    first = (params, steps.tx.init(params))
    [(_, state)] = _after(steps, first, jax.device_put(dict(task.train)), [num_steps], key)
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
            if done % STEPS_IN_FLIGHT == 0:  # before JAX 0.12 a loop without a fence can hang
                jax.block_until_ready(state)
        yield count, state


def _ratio(loss_fn: LossFn, params: Params, sample: Batch, probs: Float[Array, " n"]) -> float:
    """STALE/UNIFORM of one draw: Tr Cov with these probabilities over that of uniform draws."""
    norms, mean = norms_and_mean(loss_fn, params, sample)
    if not np.isfinite(norms).all():
        raise DivergedError("the gradients are no longer finite after some steps: lower --learning-rate")
    traces = second_moments.trace_covariance(
        second_moments.moments(jnp.asarray(norms), probs), optax.tree.vdot(mean, mean)
    )
    return float(traces.stale / traces.uniform)
