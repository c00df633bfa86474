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

POINTS_PER_BOX = 4
"""Points that a box's score is the root mean square of."""

MOST_BOXES = 2**15
"""Numbers of a box and a point of it are sorted as one int32."""

LEAST_SHARE = 0.25
"""Of its side a half of a box has at least so much: a rounding of coordinates never leaves a box without volume."""

SHORTEST_SIDE = 2.0**-16
"""A side of no more is not halved again, while there is a longer one, and else in equal parts: float32 has 2^-24 near
1."""


class Boxes(NamedTuple):
    """A binary tree of halved boxes, root first, level by level, and its leaves from left to right."""

    axes: Int[Array, " halved"]
    """Along which each is halved."""
    middles: Float[Array, " halved"]
    """Where, in the cube's coordinates."""
    left: Float[Array, " halved"]
    """The share of its mass that lies below."""
    low: Float[Array, "boxes dims"]
    """Corners of the leaves."""
    high: Float[Array, "boxes dims"]
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
    known = _Scored(points, weights * jnp.square(scores), weights, order)
    row = jnp.arange(count, dtype=jnp.int32)
    ranks = jnp.stack([jnp.zeros(count, jnp.int32).at[order[:, axis]].set(row) for axis in range(dims)], axis=1)
    corners = jnp.zeros((2**depth, dims), jnp.float32), jnp.ones((2**depth, dims), jnp.float32)
    # One program for all levels: of each level's arrays the first 2**level rows count, and the next level's are written
    # over the others.
    tree = jnp.zeros(2 ** (depth + 1), jnp.int32), jnp.zeros(2 ** (depth + 1), jnp.float32)

    def halve(level: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        members, (low, high), (axes, middles) = carry
        axis, middle, is_upper = _best_halves(known, ranks, members, low, high, level)
        at = (jnp.left_shift(jnp.int32(1), level.astype(jnp.int32)) - 1,)
        axes = jax.lax.dynamic_update_slice(axes, axis, at)
        middles = jax.lax.dynamic_update_slice(middles, middle, at)
        low, high = (corner[: 2**depth] for corner in _halves(low, high, axis, middle))
        return 2 * members + is_upper, (low, high), (axes, middles)

    first = jnp.zeros(count, jnp.int32)
    # Inside `jax.shard_map` what goes in must differ between devices as what comes out does; on a mesh, lie on it.
    carry = made_varying(laid_as((first, corners, tree), known), known)
    members, (low, high), (axes, middles) = jax.lax.fori_loop(0, depth, halve, carry)
    volume = jnp.prod(high - low, axis=1)
    wanted = volume * _root_mean_square(known, row, members, 2**depth)
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
    node = jnp.zeros(unit.shape[0], jnp.int32)
    for level in range(boxes.depth):
        at = node + (2**level - 1)
        along, share = boxes.axes[at], boxes.left[at]
        here = _along(unit, along)
        is_left = here < share
        inside = jnp.where(is_left, here / share, (here - share) / (1.0 - share))
        unit = jnp.where(_one_hot(along, unit.shape[1]), inside[:, None], unit)
        node = 2 * node + jnp.where(is_left, 0, 1)
    low, high = boxes.low[node], boxes.high[node]
    return low + jnp.clip(unit, 0.0, 1.0) * (high - low), node


def densities(boxes: Boxes, points: Float[Array, "m dims"]) -> Float[Array, " m"]:
    """The density at points of the cube, whose mean over the cube is 1.

    Args:
        boxes: the density.
        points: anywhere in the cube.
    """
    node = jnp.zeros(points.shape[0], jnp.int32)
    for level in range(boxes.depth):
        at = node + (2**level - 1)
        is_left = _along(points, boxes.axes[at]) < boxes.middles[at]
        node = 2 * node + jnp.where(is_left, 0, 1)
    return (boxes.mass / boxes.volume)[node]


class _Scored(NamedTuple):
    """What boxes are fitted to."""

    points: Float[Array, "n dims"]
    squares: Float[Array, " n"]
    """Of the scores, weighted."""
    weights: Float[Array, " n"]
    order: Int[Array, "n dims"]
    """The points along each axis."""


def _order(points: Array) -> Array:
    """The points along each axis [n, dims]: coordinates and numbers in one int32, which sorts several times as fast.

    What differs by less than 2^-31 times their number may change places.
    """
    count = points.shape[0]
    steps = 2**31 // count
    rounded = jnp.clip((points * steps).astype(jnp.int32), 0, steps - 1)
    return jnp.sort(rounded * count + jnp.arange(count, dtype=jnp.int32)[:, None], axis=0) % count


def _best_halves(
    known: _Scored, ranks: Array, members: Array, low: Array, high: Array, level: Array
) -> tuple[Array, Array, Array]:
    """For each box of a level the axis to halve it along and the middle, and of each point whether it lies above.

    What halving is to lower is the sum of volume times root mean square: the deviation of draws by these boxes.

    Args:
        known: the points.
        ranks: of each point along each axis [n, dims].
        members: the box of each point [n].
        low: corners of the boxes, of which the first ``2**level`` count.
        high: the others.
        level: how often the cube has been halved.
    """
    count = known.points.shape[0]
    boxes = jnp.arange(low.shape[0], dtype=jnp.int32)
    half = jnp.right_shift(jnp.int32(count), level.astype(jnp.int32) + 1)
    part = jnp.arange(count, dtype=jnp.int32) // half  # box by box, each in two halves

    def along(points: Array, order: Array, rank: Array, low: Array, high: Array) -> tuple[Array, Array, Array]:
        own = order[jnp.sort(members * count + rank) % count]
        at = points[own]
        side = high - low
        last = (2 * boxes + 1) * half
        share = (0.5 * (at[(last - 1) % count] + at[last % count]) - low) / side
        least = jnp.where(side > SHORTEST_SIDE, LEAST_SHARE, 0.5)
        share = jnp.clip(share, least, 1.0 - least)
        size = _root_mean_square(known, own, part, low.shape[0])
        below, above = size[2 * boxes % len(size)], size[(2 * boxes + 1) % len(size)]
        cost = jnp.where(side > SHORTEST_SIDE, share * below + (1.0 - share) * above, jnp.inf)
        return cost, low + share * side, jnp.zeros(count, jnp.int32).at[own].set(part % 2)

    costs, middles, uppers = jax.vmap(along, in_axes=1)(known.points, known.order, ranks, low, high)
    best = jnp.argmin(costs, axis=0).astype(jnp.int32)
    is_upper = uppers[best[members], jnp.arange(count, dtype=jnp.int32)]
    return best, middles[best, boxes], is_upper


def _root_mean_square(known: _Scored, points: Array, parts: Array, count: int) -> Array:
    """Of the scores in each of so many parts [count], where ``parts`` says in which each of the points is."""
    squares = jax.ops.segment_sum(known.squares[points], parts, num_segments=count)
    weights = jax.ops.segment_sum(known.weights[points], parts, num_segments=count)
    return jnp.sqrt(squares / jnp.where(weights > 0.0, weights, 1.0))


def _halves(low: Array, high: Array, axis: Array, middle: Array) -> tuple[Array, Array]:
    """Corners of the halves of boxes, the lower one first."""
    is_along = _one_hot(axis, low.shape[1])
    lower_high = jnp.where(is_along, middle[:, None], high)
    upper_low = jnp.where(is_along, middle[:, None], low)
    shape = (2 * low.shape[0], low.shape[1])
    return jnp.stack([low, upper_low], axis=1).reshape(shape), jnp.stack([lower_high, high], axis=1).reshape(shape)


def _with_mass(axes: Array, middles: Array, low: Array, high: Array, mass: Array) -> Boxes:
    """The boxes with shares of mass summed up from the leaves."""
    mass = mass / jnp.sum(mass)
    left, level = [], mass
    while level.shape[0] > 1:
        pairs = level.reshape(-1, 2)
        level = jnp.sum(pairs, axis=1)
        left.append(pairs[:, 0] / level)
    return Boxes(axes, middles, jnp.concatenate(left[::-1]), low, high, mass)


def _one_hot(axis: Array, dims: int) -> Array:
    return axis[:, None] == jnp.arange(dims, dtype=axis.dtype)[None]


def _along(points: Array, axis: Array) -> Array:
    """The coordinate of each point along its own axis."""
    return jnp.sum(jnp.where(_one_hot(axis, points.shape[1]), points, 0.0), axis=1)
