"""Orders for stratified draws: lines along which neighbours have similar gradients.

With labels, `samplers.order_by(label, runner_up, score)` is good and free. Better, and for models without labels, are
cells of the gradients' directions: a random projection of a part of each gradient (the last layer's says most and costs
one small product), grouped by k-means, the cells chained by nearness.

Guarantees:

* every order is a permutation of the examples, whatever the sketch; so draws stay unbiased;
* sketches preserve inner products of directions up to about 1/sqrt(dims);
* a gradient of zero has the sketch zero, never NaN.

Not guaranteed: the same clusters on several devices as on one. Their sketches differ in a last bit, because products
over parts of a batch round otherwise than over the whole. Nothing is left to it where lengths are equal, as those of
clusters of one example are; but an example just between two clusters may go to the other one, and k-means makes much of
it: an order made of sketches of observed gradients, and so the draws after it, may differ. Draws stay unbiased.

Source: ours; Johnson & Lindenstrauss (1984); Lloyd, "Least squares quantization in
PCM" (1982).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from isgd_jax.errors import ArgumentError
from isgd_jax.types import Key

__all__ = ["by_cells", "cells", "chain", "nearest"]

ROWS = 4096
"""Examples compared with all cells at a time."""

AS_LONG = 1e-5
"""Relative difference of squared lengths that is taken for rounding."""


def by_cells(
    key: Key,
    sketches: Float[Array, "n dims"],
    scores: Float[Array, " n"],
    *,
    num_cells: int = 128,
    rounds: int = 15,
    sample: int = 8192,
    known: Bool[Array, " n"] | None = None,
) -> Int[Array, " n"]:
    """The order of cells of similar directions, chained by nearness; by score inside a cell.

    O(n num_cells dims) for the assignment, and one sort; k-means over more than ``sample`` examples is done on so many
    drawn by score: five times faster, and as good.

    Args:
        key: of the start of k-means.
        sketches: of the gradients' directions [n, dims] (`isgd_jax.gradients.sketches`); finite.
        scores: [n], at least 0. Those that are drawn most shape the cells; all zero counts as all alike.
        num_cells: about as many as draws in a batch, 1 to n.
        rounds: of k-means.
        sample: examples that shape the cells.
        known: which examples have a sketch [n]; the others shape no cell, and come last, by score. None where all have.

    Returns:
        The example at each place of the line, a permutation [n].

    Raises:
        ValueError: ``num_cells`` is not in 1..n.
    """
    if known is not None:
        every, shaping = scores, jnp.where(known, scores, 0.0)
        sure = jnp.where(known, 1.0, 0.0)
        scores = jnp.where(jnp.sum(shaping) > 0.0, shaping, sure)
    if sketches.shape[0] <= sample:
        centres = cells(key, sketches, scores, num_cells=num_cells, rounds=rounds)
    else:
        first, key = jax.random.split(key)
        at = _spread(first, jnp.where(jnp.sum(scores) > 0.0, scores, 1.0), sample)
        centres = cells(key, sketches[at], jnp.ones(sample, jnp.float32), num_cells=num_cells, rounds=rounds)
    rank = jnp.argsort(chain(centres))[nearest(sketches, centres)]
    if known is not None:
        scores, rank = every, jnp.where(known, rank, num_cells)
    return jnp.lexsort((scores, rank)).astype(jnp.int32)


def cells(
    key: Key, sketches: Float[Array, "n dims"], scores: Float[Array, " n"], *, num_cells: int, rounds: int
) -> Float[Array, "cells dims"]:
    """Centres of the cells: weighted k-means, from ``num_cells`` examples drawn by score.

    A cell that loses all its examples keeps its centre.

    Args:
        key: of the start.
        sketches: [n, dims].
        scores: weights of the examples [n], at least 0; all zero counts as all alike.
        num_cells: 1 to n.
        rounds: of assignment and mean, O(n num_cells dims) each.

    Raises:
        ValueError: ``num_cells`` is not in 1..n.
    """
    if not 0 < num_cells <= sketches.shape[0]:
        raise ArgumentError(f"num_cells must lie in 1..n={sketches.shape[0]}, got {num_cells}")
    weights = jnp.where(jnp.sum(scores) > 0.0, scores, 1.0)
    start = sketches[_spread(key, weights, num_cells)]

    def improve(_: Int[Array, ""], centres: Float[Array, "cells dims"]) -> Float[Array, "cells dims"]:
        cell = nearest(sketches, centres)
        mass = jax.ops.segment_sum(weights, cell, num_cells)[:, None]
        total = jax.ops.segment_sum(sketches * weights[:, None], cell, num_cells)
        return jnp.where(mass > 0.0, total / jnp.where(mass > 0.0, mass, 1.0), centres)  # an empty cell stays

    return jax.lax.fori_loop(0, rounds, improve, start)


def _spread(key: Key, weights: Float[Array, " n"], count: int) -> Int[Array, " count"]:
    """Examples by weight, one in each of ``count`` equal parts of a line that need not be exact."""
    line = jnp.cumsum(weights / jnp.max(weights))
    at = (jnp.arange(count, dtype=jnp.float32) + jax.random.uniform(key, (count,), jnp.float32)) / count * line[-1]
    return jnp.minimum(jnp.searchsorted(line, at), weights.shape[0] - 1)


def nearest(sketches: Float[Array, "n dims"], centres: Float[Array, "cells dims"]) -> Int[Array, " n"]:
    """The cell of each example, a few thousand at a time: no [n, cells] array is ever formed."""
    half = 0.5 * jnp.sum(jnp.square(centres), axis=1)
    return jax.lax.map(
        lambda row: jnp.argmax(centres @ row - half).astype(jnp.int32), sketches, batch_size=min(ROWS, len(sketches))
    )


def chain(centres: Float[Array, "cells dims"]) -> Int[Array, " cells"]:
    """The cells in the order of a walk that always goes to the nearest cell not yet visited, from the longest.

    Of those that are as long as the longest but for rounding, as all cells of one unit vector are, the first.

    The nearest-neighbor heuristic of the traveling salesman, O(cells²) time and memory: it need not be the shortest
    walk, only one whose steps are short.
    """
    square = jnp.sum(jnp.square(centres), axis=1)
    distance = square[:, None] + square[None] - 2.0 * centres @ centres.T
    count = centres.shape[0]

    def go(step: Int[Array, ""], state: tuple[Array, Array]) -> tuple[Array, Array]:
        walk, visited = state
        following = jnp.argmin(jnp.where(visited, jnp.inf, distance[walk[step - 1]])).astype(jnp.int32)
        return walk.at[step].set(following), visited.at[following].set(True)

    first = jnp.argmax(square >= (1.0 - AS_LONG) * jnp.max(square)).astype(jnp.int32)
    state = (jnp.zeros(count, jnp.int32).at[0].set(first), jnp.zeros(count, bool).at[first].set(True))
    return jax.lax.fori_loop(1, count, go, state)[0]
