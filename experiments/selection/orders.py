"""Orders without replacement: shuffled epochs, random subsets in turn, and orders that balance gradients.

uniform    epoch-shuffled SGD
rs2        Repeated Random Sampling, Okanovic et al. 2024 (arXiv 2305.18424), without replacement: rounds of a random
           subset each, every example once before any comes again, and a rate that decays to zero over the shortened
           run. In a comparison at fixed budgets, where every method decays fully, that is `uniform` itself; this one
           has random numbers of its own, so what it differs by from `uniform` is the noise of the comparison
grab       GraB, Lu, Guo & De Sa 2022 (arXiv 2205.10733, algorithm 4): each epoch goes in an order made during the last
           one, in which running sums of gradients, less the mean gradient of the epoch before, stay small
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import isgd_jax as isgd
from selection.contest import FORWARD, Choice, Method, Problem

__all__ = ["Balancing", "Epochs", "epochs_of", "grab", "new_epochs", "next_batch", "rs2", "uniform"]

Tree = Any
Array = jax.Array


class Epochs(NamedTuple):
    """Indices in random order, how many of them count, and how many are used."""

    order: Array
    count: Array
    used: Array


def new_epochs(key: Array, indices: Array) -> Epochs:
    """An epoch of all the indices."""
    return Epochs(jax.random.permutation(key, indices), jnp.int32(len(indices)), jnp.int32(0))


def epochs_of(key: Array, chosen: Array, at_least: int) -> Epochs:
    """An epoch of the examples that are chosen, a mask [n], filled up to a batch by others at random."""
    places = jax.random.uniform(key, chosen.shape) + jnp.where(chosen, 0.0, 2.0)
    count = jnp.maximum(jnp.sum(chosen, dtype=jnp.int32), at_least)
    return Epochs(jnp.argsort(places), count, jnp.int32(0))


def next_batch(key: Array, epochs: Epochs, size: int) -> tuple[Array, Epochs]:
    """The next ``size`` indices; what does not fill a batch is left out of its epoch."""
    over = epochs.used + size > epochs.count
    epochs = jax.lax.cond(over, lambda: new_epochs(key, epochs.order), lambda: epochs)
    return jax.lax.dynamic_slice_in_dim(epochs.order, epochs.used, size), epochs._replace(used=epochs.used + size)


def uniform(problem: Problem, *, batches: int = 1, share: float = 1.0, stream: int = 0) -> Method:
    """Epoch-shuffled SGD, on a random ``share`` of the data, with the random numbers of a ``stream``."""
    size, kept = batches * problem.batch_size, round(share * problem.num_examples)

    def own(key: Array) -> Array:
        return jax.random.fold_in(key, stream) if stream else key

    def start(key: Array, data: Tree) -> tuple[Epochs, float]:
        chosen = jax.random.permutation(jax.random.fold_in(own(key), 1), problem.num_examples)[:kept]
        return new_epochs(own(key), chosen), 0.0

    def choose(key: Array, memory: Epochs, params: Tree, data: Tree, progress: Array) -> tuple[Choice, Epochs]:
        indices, memory = next_batch(own(key), memory, size)
        return Choice(indices, jnp.ones(size), 0.0), memory

    return Method(start, choose)


def rs2(problem: Problem) -> Method:
    """Random subsets in turn, without replacement: a uniform run with random numbers of its own."""
    return uniform(problem, stream=2)


class Balancing(NamedTuple):
    """What GraB remembers."""

    order: Array
    """The order [n] of this epoch."""
    later: Array
    """That of the next, filled from both ends."""
    used: Array
    front: Array
    total: Tree
    """The signed sum of the gradients of this epoch, less the mean each; as large as the parameters."""
    mean: Tree
    """The mean gradient of the epoch before."""
    fresh: Tree
    """That of this one, so far."""


class Signed(NamedTuple):
    """What a batch adds."""

    is_front: Array
    total: Tree
    mean: Tree


def grab(problem: Problem) -> Method:
    """Gradient balancing, example by example, from lazy gradients.

    Signs come from inner products alone: of each gradient with the sum and with the mean, and between the gradients of
    the batch, since each sign moves the sum that the next one is compared with. An example goes to the front of the
    next epoch if adding its centered gradient makes the sum smaller, else to the back with the opposite sign. What does
    not fill a batch stands in the middle of the next epoch.

    Its cost: three contractions with arrays as large as the parameters (two of inner products, one of the signed sum),
    each as dear as a forward pass, and a Gram matrix: an example is two passes and more.
    """
    n, size = problem.num_examples, problem.batch_size
    batches = n // size
    cost = size * (3 * FORWARD + _gram_passes(problem))

    def start(key: Array, data: Tree) -> tuple[Balancing, float]:
        shapes = jax.eval_shape(problem.init, key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        order = jax.random.permutation(key, n)
        return Balancing(order, order, jnp.int32(0), jnp.int32(0), zeros, zeros, zeros), 0.0

    def begin_epoch(memory: Balancing) -> Balancing:
        later = memory.later
        if rest := n - batches * size:
            later = jax.lax.dynamic_update_slice_in_dim(later, memory.order[-rest:], memory.front, 0)
        zeros = jax.tree.map(jnp.zeros_like, memory.total)
        return Balancing(later, later, jnp.int32(0), jnp.int32(0), zeros, memory.fresh, zeros)

    def choose(key: Array, memory: Balancing, params: Tree, data: Tree, progress: Array) -> tuple[Choice, Balancing]:
        over = memory.used == batches * size
        memory = jax.lax.cond(over, begin_epoch, lambda memory: memory, memory)
        indices = jax.lax.dynamic_slice_in_dim(memory.order, memory.used, size)
        return Choice(indices, jnp.ones(size), cost), memory

    def measure(memory: Balancing, grads: Any, mean: Tree) -> Signed:
        by_mean = isgd.inner(grads, memory.mean)
        square = _dot(memory.mean, memory.mean)
        centered = isgd.gram(grads) - by_mean[:, None] - by_mean[None, :] + square
        is_front = _balance(isgd.inner(grads, memory.total) - _dot(memory.total, memory.mean), centered)
        signs = jnp.where(is_front, 1.0, -1.0)
        added = isgd.weighted_mean(grads, signs)
        total = jax.tree.map(lambda t, a, m: t + size * a - jnp.sum(signs) * m, memory.total, added, memory.mean)
        return Signed(is_front, total, mean)

    def learn(memory: Balancing, choice: Choice, losses: Array, measured: Signed, step: Array) -> Balancing:
        fronts, done = jnp.cumsum(measured.is_front), memory.used
        backs = jnp.arange(1, size + 1) - fronts
        places = jnp.where(measured.is_front, memory.front + fronts - 1, n - (done - memory.front) - backs)
        return memory._replace(
            later=memory.later.at[places].set(choice.indices),
            used=done + size,
            front=memory.front + fronts[-1],
            total=measured.total,
            fresh=jax.tree.map(lambda f, m: f + m / batches, memory.fresh, measured.mean),
        )

    return Method(start, choose, learn, measure=measure)


def _balance(products: Array, gram: Array) -> Array:
    """Which gradients make the sum smaller, one after another: by products with the sum [m] and each other [m, m]."""

    def body(products: Array, row_and_place: tuple[Array, Array]) -> tuple[Array, Array]:
        row, place = row_and_place
        is_front = products[place] < 0
        return products + jnp.where(is_front, row, -row), is_front

    return jax.lax.scan(body, products, (gram, jnp.arange(len(gram))))[1]


def _dot(a: Tree, b: Tree) -> Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)), jnp.float32(0))


def _gram_passes(problem: Problem) -> float:
    """Passes an example that inner products in a batch of m take: m (inputs + outputs) a dense layer."""
    widths = (problem.train["x"].shape[-1], *problem.hidden, problem.num_classes)
    pairs = list(itertools.pairwise(widths))
    products = sum(problem.batch_size * (i + o) for i, o in pairs)
    return FORWARD * products / sum(i * o for i, o in pairs)
