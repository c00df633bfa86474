"""What the estimator experiments share: the problem, its checkpoints, and errors of designs from all the data."""

import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import isgd_jax as isgd
from isgd_jax.app import data, models, task
from isgd_jax.engines.scorers import softmax_cross_entropy
from isgd_jax.sampling import samplers
from isgd_jax.types import Batch, Draw, LossFn, Params
from isgd_jax.variance import second_moments

M, SLICE, SEED = 128, 2000, 0
CHECKPOINTS = (500, 4000, 12000)


class Problem(NamedTuple):
    """The data on the device, and the network as functions of one example."""

    train: Batch
    init: Callable[[jax.Array], Params]
    logits_fn: Callable[[Params, Batch], jax.Array]
    loss_fn: LossFn
    size: int


class Truth(NamedTuple):
    """What all the data say at some parameters."""

    params: Params
    norms: np.ndarray
    mean_grad: Params
    square: float
    """‖mean gradient‖²"""


def problem_of(work: task.Task, train: Batch) -> Problem:
    """The problem of a run, its data where they are."""
    return Problem(train, work.init, work.logits_fn, work.loss_fn, work.num_examples)


def load(data_dir: str | None, raw_dir: str | None) -> Problem:
    dataset = data.load("fashion_mnist", data_dir=data_dir, raw_dir=raw_dir)
    model = models.mlp(dataset.num_classes)

    def logits_fn(params: Params, example: Batch) -> jax.Array:
        return model.apply({"params": params}, dataset.standardize(example["image"]))

    def init(key: jax.Array) -> Params:
        return models.init(model, key, jnp.asarray(dataset.standardize(dataset.train["image"][0])))

    def loss_fn(params: Params, example: Batch) -> jax.Array:
        return softmax_cross_entropy(logits_fn(params, example), example)

    return Problem(jax.tree.map(jnp.asarray, dataset.train), init, logits_fn, loss_fn, len(dataset))


def uniform_checkpoints(problem: Problem, folder: Path) -> list[tuple[int, Params]]:
    """Parameters of plain SGD at the steps asked for."""
    tx = optax.sgd(0.03)

    @jax.jit
    def block(params: Params, start: jax.Array, train: Batch) -> Params:
        def step(i: jax.Array, params: Params) -> Params:
            key = jax.random.fold_in(jax.random.key(SEED + 1), start + i)
            at = jax.random.randint(key, (M,), 0, problem.size)
            grads = weighted_grad(problem.loss_fn, params, take(train, at), jnp.full(M, 1.0 / M))
            return optax.apply_updates(params, tx.update(grads, tx.init(params))[0])

        return jax.lax.fori_loop(0, 100, step, params)

    params, found = problem.init(jax.random.key(SEED)), []
    kept = folder / "uniform.pkl"
    if kept.exists():
        return pickle.loads(kept.read_bytes())
    for start in range(0, max(CHECKPOINTS), 100):
        params = block(params, jnp.int32(start), problem.train)
        if start + 100 in CHECKPOINTS:
            found.append((start + 100, jax.tree.map(np.asarray, params)))
    kept.write_bytes(pickle.dumps(found))
    return found


def take(train: Batch, at: jax.Array) -> Batch:
    return jax.tree.map(lambda x: x[at], train)


def weighted_grad(loss_fn: LossFn, params: Params, batch: Batch, weights: jax.Array) -> Params:
    """sum of weights * gradients: one ordinary backward pass."""
    return jax.grad(lambda p: jnp.vdot(weights, jax.vmap(loss_fn, (None, 0))(p, batch), precision="highest"))(params)


def sliced(function: Callable[[Params, Batch], jax.Array], params: Params, problem: Problem) -> np.ndarray:
    slices = range(0, problem.size, SLICE)
    parts = [function(params, jax.tree.map(lambda x, s=start: x[s : s + SLICE], problem.train)) for start in slices]
    return np.concatenate([np.asarray(part) for part in parts])


@cache
def norms_of(loss_fn: LossFn) -> Callable[[Params, Batch], jax.Array]:
    return jax.jit(isgd.scorers.grad_norm(loss_fn))


def all_norms(problem: Problem, params: Params) -> np.ndarray:
    return sliced(norms_of(problem.loss_fn), params, problem)


@cache
def runner_up_of(logits_fn: Callable[[Params, Batch], jax.Array]) -> Callable[[Params, Batch], jax.Array]:
    def one(params: Params, example: Batch) -> jax.Array:
        return jnp.argmax(logits_fn(params, example).at[example["label"]].set(-jnp.inf))

    return jax.jit(jax.vmap(one, (None, 0)))


def runner_up(problem: Problem, params: Params) -> jax.Array:
    """The most likely class that is not the label."""
    return jnp.asarray(sliced(runner_up_of(problem.logits_fn), params, problem))


def full_truth(problem: Problem, params: Params) -> Truth:
    params = jax.tree.map(jnp.asarray, params)
    norms, mean = isgd.norms_and_mean_gradient(problem.loss_fn, params, problem.train, batch_size=SLICE)
    return Truth(params, np.asarray(norms), mean, float(squared(mean)))


def true_traces(problem: Problem, params: Params, probs: jax.Array) -> second_moments.Moments:
    """Tr Cov of one draw by ``probs``, by the uniform and by the ideal law, from all the data."""
    truth = full_truth(problem, params)
    return second_moments.trace_covariance(second_moments.moments(jnp.asarray(truth.norms), probs), truth.square)


def squared(tree: Params) -> jax.Array:
    return optax.tree.norm(tree, squared=True)


def stale_moment(truth: Truth, probs: jax.Array) -> float:
    return float(second_moments.moments(jnp.asarray(truth.norms), probs).stale)


PIECE = 256


def stratified_mse(problem: Problem, truth: Truth, probs: jax.Array, order: jax.Array) -> float:
    """M * MSE of stratified draws along ``order``, from all the data."""
    at, weights, starts = strata_pieces(np.asarray(probs, np.float64), np.asarray(order))
    total = jax.jit(sum_of_squares, static_argnums=0)(
        problem.loss_fn, truth.params, problem.train, jnp.asarray(at), jnp.asarray(weights), jnp.asarray(starts)
    )
    return stale_moment(truth, probs) - float(total) / M


def strata_pieces(probs: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The examples of each stratum in pieces of 256, the weights of its mean gradient, and where strata start."""
    size = len(order)
    masses = probs[order] / probs.sum()
    ends = np.cumsum(masses)
    begins = np.concatenate([[0.0], ends[:-1]])
    at, weights, starts = [], [], []
    for stratum in range(M):
        low, high = stratum / M, (stratum + 1) / M
        part = slice(np.searchsorted(ends, low, side="right"), np.searchsorted(begins, high, side="left"))
        inside = np.maximum(np.minimum(ends[part], high) - np.maximum(begins[part], low), 0.0)
        weight, member = M * inside / (size * masses[part]), order[part]
        for start in range(0, len(member), PIECE):
            pad = (0, max(0, start + PIECE - len(member)))
            at.append(np.pad(member[start : start + PIECE], pad))
            weights.append(np.pad(weight[start : start + PIECE], pad))
            starts.append(start == 0)
    missing = size // PIECE + M + 1 - len(at)  # one shape for all laws
    pad = ((0, missing), (0, 0))
    return (
        np.pad(np.array(at, np.int32), pad),
        np.pad(np.array(weights, np.float32), pad),
        np.pad(np.array(starts), (0, missing)),
    )


def sum_of_squares(
    loss_fn: LossFn, params: Params, train: Batch, at: jax.Array, weights: jax.Array, starts: jax.Array
) -> jax.Array:
    """The sum over strata of ‖sum of weights * gradients‖²; a True in ``starts`` begins a stratum."""

    def add(state: tuple[Params, jax.Array], piece: tuple) -> tuple[tuple[Params, jax.Array], None]:
        stratum, total = state
        members, weight, is_first = piece
        total = total + jnp.where(is_first, squared(stratum), 0.0)
        grads = weighted_grad(loss_fn, params, take(train, members), weight)
        return (jax.tree.map(lambda s, g: jnp.where(is_first, g, s + g), stratum, grads), total), None

    start = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
    (last, total), _ = jax.lax.scan(add, start, (at, weights, starts))
    return total + squared(last)


def measured_mse(
    problem: Problem, truth: Truth, sampler: Callable[..., Draw], law: samplers.Law, batches: int = 200
) -> tuple[float, float]:
    """M * MSE over batches drawn, and the half-width of its 95 % interval."""

    @jax.jit
    def run(params: Params, mean: Params, train: Batch, law: samplers.Law, keys: jax.Array) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            draw = sampler(key, law, num_draws=M)
            weights = draw.mask / (problem.size * draw.probs * M)
            found = weighted_grad(problem.loss_fn, params, take(train, draw.indices), weights)
            return M * squared(jax.tree.map(jnp.subtract, found, mean))

        return jax.lax.map(one, keys)

    keys = jax.random.split(jax.random.key(SEED + 2), batches)
    found = np.asarray(run(truth.params, truth.mean_grad, problem.train, law, keys))
    return float(found.mean()), 1.96 * float(found.std(ddof=1)) / np.sqrt(batches)
