"""Pruning: each epoch leaves examples out, by their latest known losses, which cost nothing.

prune      after InfoBatch, Qin et al. 2024 (arXiv 2303.04947): each epoch leaves out half of the examples whose last
           loss is below the mean, doubles the weight of the other half, and ends with an eighth of whole epochs. An
           epoch weighs all examples alike, in fewer and so in longer steps
repb       RePB, Resolving Pruning Biases ("Inconsistency Biases in Dynamic Data Pruning", ICLR 2026), as we understand
           its description: losses are compared inside their batch only; what is below its mean is left out of the next
           epoch with probability 1/2, what was out comes back with 1/2, and the weight of an example is the number of
           epochs over those it was in: in the long run all weigh alike
orderdp    OrderDP, Jin et al. 2026 (arXiv 2606.08574), as in their code: each epoch draws 3/4 of the examples at
           random and keeps the 85 % with the largest known losses, without weights: unbiased for a surrogate of the
           loss, biased towards large losses for the loss itself
seta       SeTa, Zhou et al. 2025 (arXiv 2503.13385), with the constants of their code for CIFAR: each epoch draws 9/10
           of the examples at random, groups them by loss (k-means, 5 groups) and takes a window of 4 groups that slides
           from easy to hard and starts again; the first epoch and the last eighth of the run take all groups. Biased
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from selection.contest import Choice, Method, Problem
from selection.orders import Epochs, epochs_of, new_epochs, next_batch

__all__ = ["Pruning", "Resampling", "groups_by_loss", "infobatch", "orderdp", "repb", "seta"]

Tree = Any
Array = jax.Array

PRUNED, PRUNED_UNTIL = 0.5, 0.875
SUBSET, KEPT = 0.75, 0.85
"""OrderDP: the share drawn at random, and of it the share kept."""
SETA_SUBSET, SETA_GROUPS, SETA_WINDOW = 0.9, 5, 4
LLOYD_STEPS = 20
UNKNOWN, THEIR_UNKNOWN = 1e6, 3.0
"""The loss of what was never seen: among the largest; for OrderDP and SeTa what their code starts from."""


class Pruning(NamedTuple):
    losses: Array
    weights: Array
    epochs: Epochs


def _learn(memory: Any, choice: Choice, losses: Array, measured: None, step: Array) -> Any:
    return memory._replace(losses=memory.losses.at[choice.indices].set(losses))


def infobatch(problem: Problem) -> Method:
    """Unbiased dynamic pruning by the last known loss."""
    size, num_examples = problem.batch_size, problem.num_examples

    def start(key: Array, data: Tree) -> tuple[Pruning, float]:
        epochs = new_epochs(key, jnp.arange(num_examples))
        return Pruning(jnp.full(num_examples, UNKNOWN), jnp.ones(num_examples), epochs), 0.0

    def begin_epoch(key: Array, memory: Pruning, progress: Array) -> Pruning:
        coin_key, order_key = jax.random.split(key)
        low = (memory.losses < jnp.mean(memory.losses)) & (progress < PRUNED_UNTIL)
        dropped = low & jax.random.bernoulli(coin_key, PRUNED, low.shape)
        weights = jnp.where(low, 1.0 / (1.0 - PRUNED), 1.0)
        return Pruning(memory.losses, weights, epochs_of(order_key, ~dropped, size))

    def choose(key: Array, memory: Pruning, params: Tree, data: Tree, progress: Array) -> tuple[Choice, Pruning]:
        over = memory.epochs.used + size > memory.epochs.count
        memory = jax.lax.cond(over, lambda: begin_epoch(key, memory, progress), lambda: memory)
        indices, epochs = next_batch(key, memory.epochs, size)
        return Choice(indices, memory.weights[indices], 0.0), memory._replace(epochs=epochs)

    return Method(start, choose, _learn)


class Resampling(NamedTuple):
    """What RePB remembers; masks and counts are [n]."""

    is_in: Array
    """In this epoch."""
    stays: Array
    """In the next one too, as far as is known."""
    spared: Array
    """Coins of this epoch: what stays below the mean of its batch as well."""
    times: Array
    """Epochs that an example was in, this one included."""
    number: Array
    """Epochs begun."""
    epochs: Epochs


def repb(problem: Problem) -> Method:
    """Pruning by comparison inside batches, weighted by how often an example was there."""
    size, num_examples = problem.batch_size, problem.num_examples

    def start(key: Array, data: Tree) -> tuple[Resampling, float]:
        everything = jnp.ones(num_examples, bool)
        coin_key, order_key = jax.random.split(key)
        spared = jax.random.bernoulli(coin_key, 1.0 - PRUNED, (num_examples,))
        epochs = new_epochs(order_key, jnp.arange(num_examples))
        return Resampling(everything, everything, spared, jnp.ones(num_examples), jnp.float32(1), epochs), 0.0

    def begin_epoch(key: Array, memory: Resampling) -> Resampling:
        coin_key, back_key, order_key = jax.random.split(key, 3)
        back = jax.random.bernoulli(back_key, 1.0 - PRUNED, (num_examples,))
        is_in = jnp.where(memory.is_in, memory.stays, back)
        spared = jax.random.bernoulli(coin_key, 1.0 - PRUNED, (num_examples,))
        epochs = epochs_of(order_key, is_in, size)
        return Resampling(is_in, is_in, spared, memory.times + is_in.astype(jnp.float32), memory.number + 1, epochs)

    def choose(key: Array, memory: Resampling, params: Tree, data: Tree, progress: Array) -> tuple[Choice, Any]:
        over = memory.epochs.used + size > memory.epochs.count
        memory = jax.lax.cond(over, lambda: begin_epoch(key, memory), lambda: memory)
        indices, epochs = next_batch(key, memory.epochs, size)
        return Choice(indices, memory.number / memory.times[indices], 0.0), memory._replace(epochs=epochs)

    def learn(memory: Resampling, choice: Choice, losses: Array, measured: None, step: Array) -> Resampling:
        stays = (losses >= jnp.mean(losses)) | memory.spared[choice.indices]
        return memory._replace(stays=memory.stays.at[choice.indices].set(stays))

    return Method(start, choose, learn)


class Subsets(NamedTuple):
    losses: Array
    begun: Array
    """Epochs begun."""
    epochs: Epochs


def orderdp(problem: Problem) -> Method:
    """The largest known losses of a random subset, each epoch anew."""
    num_examples = problem.num_examples
    drawn = round(SUBSET * num_examples)
    kept = round(KEPT * drawn)

    def chosen(key: Array, memory: Subsets, progress: Array) -> Array:
        subset = jax.random.permutation(key, num_examples)[:drawn]
        _, best = jax.lax.top_k(memory.losses[subset], kept)
        return jnp.zeros(num_examples, bool).at[subset[best]].set(True)

    return _of_subsets(problem, chosen)


def seta(problem: Problem) -> Method:
    """Groups of near losses in a window that slides from easy to hard."""
    num_examples = problem.num_examples
    drawn = round(SETA_SUBSET * num_examples)

    def chosen(key: Array, memory: Subsets, progress: Array) -> Array:
        subset = jax.random.permutation(key, num_examples)[:drawn]
        group = groups_by_loss(memory.losses[subset], SETA_GROUPS)
        start = memory.begun % (SETA_GROUPS - SETA_WINDOW + 1)
        is_inside = (group >= start) & (group < start + SETA_WINDOW)
        whole = (memory.begun == 0) | (progress >= PRUNED_UNTIL)
        return jnp.zeros(num_examples, bool).at[subset].set(is_inside | whole)

    return _of_subsets(problem, chosen)


def _of_subsets(problem: Problem, chosen: Any) -> Method:
    """A method whose epochs are ``chosen(key, memory, progress)``, a mask [n], without weights."""
    size, num_examples = problem.batch_size, problem.num_examples

    def start(key: Array, data: Tree) -> tuple[Subsets, float]:
        nothing = Epochs(jnp.arange(num_examples), jnp.int32(0), jnp.int32(0))
        return Subsets(jnp.full(num_examples, THEIR_UNKNOWN), jnp.int32(0), nothing), 0.0

    def begin_epoch(key: Array, memory: Subsets, progress: Array) -> Subsets:
        chosen_key, order_key = jax.random.split(key)
        epochs = epochs_of(order_key, chosen(chosen_key, memory, progress), size)
        return Subsets(memory.losses, memory.begun + 1, epochs)

    def choose(key: Array, memory: Subsets, params: Tree, data: Tree, progress: Array) -> tuple[Choice, Subsets]:
        over = memory.epochs.used + size > memory.epochs.count
        memory = jax.lax.cond(over, lambda: begin_epoch(key, memory, progress), lambda: memory)
        indices, epochs = next_batch(key, memory.epochs, size)
        return Choice(indices, jnp.ones(size), 0.0), memory._replace(epochs=epochs)

    return Method(start, choose, _learn)


def groups_by_loss(losses: Array, count: int) -> Array:
    """k-means of numbers [n]: the group of each [n], from the smallest losses to the largest.

    Lloyd's steps from quantiles; centers keep their order, so groups need no sorting.
    """
    centers = jnp.quantile(losses, (jnp.arange(count, dtype=losses.dtype) + 0.5) / count)

    def group(centers: Array) -> Array:
        return jnp.searchsorted((centers[1:] + centers[:-1]) / 2, losses, side="right")

    def step(_: Array, centers: Array) -> Array:
        nearest = group(centers)
        sums = jax.ops.segment_sum(losses, nearest, num_segments=count)
        sizes = jax.ops.segment_sum(jnp.ones_like(losses), nearest, num_segments=count)
        return jnp.where(sizes > 0, sums / jnp.maximum(sizes, 1.0), centers)

    return group(jax.lax.fori_loop(0, LLOYD_STEPS, step, centers))
