"""A density on the unit cube that is constant in boxes: fitted to scored points, and drawn from by moving uniform ones.

The cube is halved again and again, each box along the axis that pays most, at the middle of its points; so there are
``2**depth`` boxes, small where the points and the scores are dense.

Guarantees:

* a uniform point, moved, lies anywhere with exactly the density that `densities` says there, up to roundings: draws
  weighted by one over it are unbiased for the integral over the cube, whatever the boxes were fitted to (places have 24
  bits along an axis, so the chance of a box is right to about 2^-24, of all 1,024 boxes of a line to 3e-5);
* moving keeps order along each axis within each box, so points that leave no gaps still leave none;
* no box is without volume or mass: the density is at least the uniform fraction everywhere.

Source: ours; uniform points are moved down a tree of halves as McCool & Harwood have it (Probability trees, 1997), and
a density that is constant in boxes is the custom of adaptive Monte Carlo (Lepage, J. Comput. Phys. 27, 1978).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from isgd_jax.gradients.jaxpr import made_varying
from isgd_jax.gradients.placement import laid_as

__all__ = ["MOST_BOXES", "POINTS_PER_BOX", "Boxes", "densities", "fitted", "moved", "uniform_boxes"]

POINTS_PER_BOX = 8
"""Points that a box's score is the root mean square of."""

MOST_BOXES = 2**15
"""Numbers of a box and a point of it are sorted as one int32."""

LEAST_SHARE = 0.25
"""Of its side a half of a box has at least so much: a rounding of coordinates never leaves a box without volume."""

SHORTEST_SIDE = 2.0**-16
"""A side of no more is not halved again, while there is a longer one, and else in equal parts: float32 has 2^-24 near
1."""


class Boxes(NamedTuple):
    """A binary tree of halved boxes, root first, level by level, and its leaves from left to right.

    Each is a box of uniform points, in proportion to its mass, that is moved to a box of the cube.
    """

    axes: Int[Array, " halved"]
    """Along which each is halved."""
    middles: Float[Array, " halved"]
    """Where, in the cube's coordinates."""
    splits: Float[Array, " halved"]
    """Where, in those of uniform points: so much of its mass lies below."""
    low: Float[Array, "boxes dims"]
    """Corners of the leaves."""
    high: Float[Array, "boxes dims"]
    start: Float[Array, "boxes dims"]
    """Corners of the boxes of uniform points that are moved there."""
    stop: Float[Array, "boxes dims"]
    mass: Float[Array, " boxes"]
    """The probability of each leaf."""

    @property
    def volume(self) -> Float[Array, " boxes"]:
        """Of each leaf."""
        return jnp.prod(self.high - self.low, axis=1)

    @property
    def depth(self) -> int:
        """Levels of halved boxes."""
        return self.mass.shape[0].bit_length() - 1


def uniform_boxes(depth: int, dims: int) -> Boxes:
    """The uniform density, in boxes of one size.

    Args:
        depth: 2**depth boxes.
        dims: of the cube.
    """
    low, high = jnp.zeros((1, dims), jnp.float32), jnp.ones((1, dims), jnp.float32)
    axes, middles = [], []
    for level in range(depth):
        axis = jnp.full(2**level, level % dims, jnp.int32)
        middle = 0.5 * (low + high)[:, level % dims]
        low, high = _halves(low, high, axis, middle)
        axes.append(axis)
        middles.append(middle)
    return _with_mass(jnp.concatenate(axes), jnp.concatenate(middles), low, high, jnp.prod(high - low, axis=1))


def fitted(
    points: Float[Array, "n dims"],
    scores: Float[Array, " n"],
    weights: Float[Array, " n"],
    *,
    uniform_fraction: float | Float[Array, ""],
) -> Boxes:
    """Boxes in proportion to volume times the root mean square of the scores inside, mixed with the uniform density.

    Args:
        points: of the unit cube, ``POINTS_PER_BOX * 2**depth`` of them.
        scores: of each, finite and at least 0: sizes of what is averaged. Where all are 0 the density is uniform.
        weights: one over the density that each point was drawn with, up to a factor.
        uniform_fraction: share of the mass that is spread uniformly, above 0.
    """
    count, dims = points.shape
    depth = (count // POINTS_PER_BOX).bit_length() - 1
    order = _order(points)
    row = jnp.arange(count, dtype=jnp.int32)
    ranks = jnp.stack([jnp.zeros(count, jnp.int32).at[order[axis]].set(row) for axis in range(dims)])
    known = _Scored(points.T, weights * jnp.square(scores), weights, ranks)
    corners = jnp.zeros((2**depth, dims), jnp.float32), jnp.ones((2**depth, dims), jnp.float32)
    # One program for all levels: of each level's arrays the first 2**level rows count, and the next level's are written
    # over the others.
    tree = jnp.zeros(2 ** (depth + 1), jnp.int32), jnp.zeros(2 ** (depth + 1), jnp.float32)

    def halve(level: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        order, members, (low, high), (axes, middles) = carry
        axis, middle, is_upper = _best_halves(known, order, members, low, high, level)
        at = (jnp.left_shift(jnp.int32(1), level.astype(jnp.int32)) - 1,)
        axes = jax.lax.dynamic_update_slice(axes, axis, at)
        middles = jax.lax.dynamic_update_slice(middles, middle, at)
        low, high = (corner[: 2**depth] for corner in _halves(low, high, axis, middle))
        order = jax.vmap(_parted, in_axes=(0, None, None))(order, is_upper, level)
        return order, 2 * members + is_upper, (low, high), (axes, middles)

    members = jnp.zeros(count, jnp.int32)
    # Inside `jax.shard_map` what goes in must differ between devices as what comes out does; on a mesh, lie on it.
    carry = made_varying(laid_as((order, members, corners, tree), known), known)
    order, _, (low, high), (axes, middles) = jax.lax.fori_loop(0, depth, halve, carry)
    volume = jnp.prod(high - low, axis=1)
    wanted = volume * _root_mean_squares(known, order[0], depth)[-1]
    total = jnp.sum(wanted)
    learnt = jnp.where(total > 0.0, wanted / jnp.where(total > 0.0, total, 1.0), volume)
    mass = (1.0 - uniform_fraction) * learnt + uniform_fraction * volume
    return _with_mass(axes[: 2**depth - 1], middles[: 2**depth - 1], low, high, mass)


def moved(boxes: Boxes, unit: Float[Array, "m dims"]) -> tuple[Float[Array, "m dims"], Int[Array, " m"]]:
    """Points with the boxes' density for uniform ones of the cube, and the boxes that they lie in.

    Args:
        boxes: the density.
        unit: uniform points. Those of a sequence that leaves no gaps come out so, too.
    """
    box = _box_of(boxes.axes, boxes.splits, unit)
    low, high, start, stop = boxes.low[box], boxes.high[box], boxes.start[box], boxes.stop[box]
    share = (unit - start) / jnp.where(stop > start, stop - start, 1.0)
    return low + jnp.clip(share, 0.0, 1.0) * (high - low), box


def densities(boxes: Boxes, points: Float[Array, "m dims"]) -> Float[Array, " m"]:
    """The density at points of the cube, whose mean over the cube is 1.

    Args:
        boxes: the density.
        points: anywhere in the cube.
    """
    return (boxes.mass / boxes.volume)[_box_of(boxes.axes, boxes.middles, points)]


def _box_of(axes: Array, places: Array, points: Array) -> Array:
    """The leaf that each point [m, dims] lies in, where halved boxes part at these places along these axes."""
    columns = tuple(points.T)

    def down(level: Array, node: Array) -> Array:
        at = node + (jnp.left_shift(jnp.int32(1), level.astype(jnp.int32)) - 1)
        along, here = axes[at], columns[0]
        for axis, column in enumerate(columns[1:], start=1):
            here = jnp.where(along == axis, column, here)
        return 2 * node + jnp.where(here < places[at], 0, 1)

    # In a loop: unrolled, XLA computes a level anew for each use in those below it, up to five times the time.
    node = jnp.zeros(points.shape[0], jnp.int32)
    node = made_varying(laid_as(node, (axes, places, points)), (axes, places, points))
    return jax.lax.fori_loop(0, axes.shape[0].bit_length(), down, node)


class _Scored(NamedTuple):
    """What boxes are fitted to."""

    columns: Float[Array, "dims n"]
    """Coordinates of the points."""
    squares: Float[Array, " n"]
    """Of the scores, weighted."""
    weights: Float[Array, " n"]
    ranks: Int[Array, "dims n"]
    """Of the points along each axis."""


def _order(points: Array) -> Array:
    """The points along each axis [dims, n]: coordinates and numbers in one int32, which sorts several times as fast.

    What differs by less than 2^-31 times their number may change places.
    """
    count = points.shape[0]
    steps = 2**31 // count
    rounded = jnp.clip((points.T * steps).astype(jnp.int32), 0, steps - 1)
    return jnp.sort(rounded * count + jnp.arange(count, dtype=jnp.int32)[None], axis=1) % count


def _best_halves(
    known: _Scored, order: Array, members: Array, low: Array, high: Array, level: Array
) -> tuple[Array, Array, Array]:
    """For each box of a level the axis to halve it along and the middle, and of each point whether it lies above.

    What halving is to lower is the sum of volume times root mean square: the deviation of draws by these boxes.

    Args:
        known: the points.
        order: box by box, and along each axis within a box [dims, n].
        members: the box of each point [n].
        low: corners of the boxes, of which the first ``2**level`` count.
        high: the others.
        level: how often the cube has been halved.
    """
    count, depth = members.shape[0], low.shape[0].bit_length() - 1
    boxes = jnp.arange(low.shape[0], dtype=jnp.int32)
    half = _points_of_half(count, level)
    last = (2 * boxes + 1) * half  # the first point of the upper half

    def along(column: Array, ranks: Array, own: Array, low: Array, high: Array) -> tuple[Array, Array, Array]:
        side = high - low
        above = own[last % count]
        share = (0.5 * (column[own[(last - 1) % count]] + column[above]) - low) / side
        least = jnp.where(side > SHORTEST_SIDE, LEAST_SHARE, 0.5)
        share = jnp.clip(share, least, 1.0 - least)
        size = _root_mean_squares(known, own, depth)[level]
        lower, upper = size[2 * boxes % len(size)], size[(2 * boxes + 1) % len(size)]
        cost = jnp.where(side > SHORTEST_SIDE, share * lower + (1.0 - share) * upper, jnp.inf)
        return cost, low + share * side, ranks[above]

    costs, middles, firsts = jax.vmap(along, in_axes=(0, 0, 0, 1, 1))(known.columns, known.ranks, order, low, high)
    best = jnp.argmin(costs, axis=0).astype(jnp.int32)
    at = best[members]
    rank = known.ranks[at, jnp.arange(count, dtype=jnp.int32)]
    return best, middles[best, boxes], (rank >= firsts[at, members]).astype(jnp.int32)


def _points_of_half(count: int, level: Array) -> Array:
    """Points in each half of a box."""
    return jnp.right_shift(jnp.int32(count), level.astype(jnp.int32) + 1)


def _parted(own: Array, is_upper: Array, level: Array) -> Array:
    """Points box by box [n], each box's lower half before the upper and else in their order.

    Args:
        own: points box by box.
        is_upper: of each point, whether it is of the upper half of its box: as many as are not.
        level: how often the cube has been halved.
    """
    count = own.shape[0]
    half = _points_of_half(count, level)
    row, up = jnp.arange(count, dtype=jnp.int32), is_upper[own]
    uppers = jnp.cumsum(up, dtype=jnp.int32) - up  # before each, of all boxes
    halves = row // (2 * half) * half  # of the boxes before
    place = jnp.where(up == 1, halves + half + uppers, halves + row - uppers)
    return jnp.zeros_like(own).at[place].set(own, unique_indices=True)


def _root_mean_squares(known: _Scored, own: Array, depth: int) -> Array:
    """Of the scores in each half of the boxes of each level [depth, 2**depth]: of level l the first ``2**(l + 1)``.

    Args:
        known: the points.
        own: their order, box by box.
        depth: levels.
    """
    sums = jnp.stack([known.squares, known.weights])[:, own]
    rows: list[Array] = []
    while sums.shape[1] > 2**depth:
        sums = sums[:, ::2] + sums[:, 1::2]
    for _ in range(depth):
        squares, weights = sums
        size = jnp.sqrt(squares / jnp.where(weights > 0.0, weights, 1.0))
        rows.insert(0, jnp.pad(size, (0, 2**depth - size.shape[0])))
        sums = sums[:, ::2] + sums[:, 1::2]
    return jnp.stack(rows)


def _halves(low: Array, high: Array, axis: Array, middle: Array) -> tuple[Array, Array]:
    """Corners of the halves of boxes, the lower one first."""
    is_along = _one_hot(axis, low.shape[1])
    lower_high = jnp.where(is_along, middle[:, None], high)
    upper_low = jnp.where(is_along, middle[:, None], low)
    shape = (2 * low.shape[0], low.shape[1])
    return jnp.stack([low, upper_low], axis=1).reshape(shape), jnp.stack([lower_high, high], axis=1).reshape(shape)


def _with_mass(axes: Array, middles: Array, low: Array, high: Array, mass: Array) -> Boxes:
    """The boxes, those of uniform points by shares of mass that are summed up from the leaves."""
    mass = mass / jnp.sum(mass)
    shares: list[Array] = []
    level = mass
    while level.shape[0] > 1:
        pairs = level.reshape(-1, 2)
        level = jnp.sum(pairs, axis=1)
        shares.insert(0, pairs[:, 0] / level)
    start, stop, splits = jnp.zeros((1, low.shape[1]), jnp.float32), jnp.ones((1, low.shape[1]), jnp.float32), []
    for share in shares:
        axis = axes[len(share) - 1 : 2 * len(share) - 1]
        first, last = _along(start, axis), _along(stop, axis)
        split = first + share * (last - first)
        splits.append(split)
        start, stop = _halves(start, stop, axis, split)
    return Boxes(axes, middles, jnp.concatenate(splits), low, high, start, stop, mass)


def _one_hot(axis: Array, dims: int) -> Array:
    return axis[:, None] == jnp.arange(dims, dtype=axis.dtype)[None]


def _along(points: Array, axis: Array) -> Array:
    """The coordinate of each point along its own axis."""
    return jnp.sum(jnp.where(_one_hot(axis, points.shape[1]), points, 0.0), axis=1)
