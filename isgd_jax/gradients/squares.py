"""Squared sizes that do not leave their type: each comes with a power of two that it is counted in.

A norm of 1e-25 is a float32, its square is not. So the entries of one example are divided by a power of two near their
largest before they are squared, and the root is multiplied by it again; dividing by a power of two rounds nothing. To
find the largest takes longer than to square them all: where a condition is cheap, squares are summed as they are, and
only where any sum has come near the ends of its type once more over a scale.

Source: ours, after Blue's scaled Euclidean norm (ACM TOMS 4, 1978).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Inexact

from isgd_jax.gradients import costs

__all__ = [
    "MANY",
    "Rows",
    "Squares",
    "abs_square",
    "has_cancelled",
    "has_lost",
    "largest",
    "over",
    "power_of_two",
    "root",
    "square_of_scaled",
    "sum_squares",
    "sums_of_squares",
    "together",
]

MANY = 1 << 14
"""Entries from which on a pass over them is worth a condition."""

_SLOPE = 2.0**-24
"""What slopes are divided by before it is known how small they are. Of rows of 256 float32 the squares are then right
where the norm is from 4e-22 to 8e6; of others from 7e-15 to 1e14."""

_RISK = 1e-3
"""A Gram sum less than this part of the sum of its terms' sizes has lost three digits of float32: form the product."""


class Squares(NamedTuple):
    """Squared norms over ``scale²``, for each example; ``sizes`` of what was added, where that can cancel, or None."""

    scale: Float[Array, "b ..."]
    values: Float[Array, "b ..."]
    sizes: Float[Array, "b ..."] | None = None


def abs_square(x: Array) -> Array:
    """``|x|²``, entry by entry, real: the square of a real number, re² + im² of a complex one."""
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def square_of_scaled(x: Array) -> Array:
    """The same of what was divided by a scale, also where the compiler knows what was.

    Of (c / s)², with c a constant, XLA makes c² / s²: 0/0, where both squares are too small. Not through a choice
    (below the least number there is -∞ alone, whose square is the same).
    """
    if jnp.iscomplexobj(x):
        return square_of_scaled(x.real) + square_of_scaled(x.imag)
    least = jnp.finfo(x.dtype).min
    return jnp.square(jnp.where(x < least, least, x))


def largest(x: Array, axes: Sequence[int]) -> Array:
    """The largest of all entries (of a complex one the larger part), without a sign; 0 of no entries at all."""
    if jnp.iscomplexobj(x):
        return jnp.maximum(largest(x.real, axes), largest(x.imag, axes))
    axes = tuple(axes)
    if any(x.shape[axis] == 0 for axis in axes):
        return jnp.zeros([size for axis, size in enumerate(x.shape) if axis not in axes], x.dtype)
    dense, axes, units = _without_units(x, axes)
    return lax.expand_dims(lax.reduce_max(lax.abs(dense), axes), units)


def power_of_two(x: Array) -> Array:
    """The power of two at or below each number >= 0 (float32 or float64), so far inside the type that 1 / it is too."""
    small = x.dtype.itemsize == 4
    exponent, bits = (np.int32(0x7F800000), np.int32) if small else (np.int64(0x7FF0000000000000), np.int64)
    power = lax.bitcast_convert_type(lax.bitcast_convert_type(x, bits) & exponent, x.dtype)
    edge = 2.0 ** (125 if small else 1021)
    return lax.clamp(np.asarray(1 / edge, x.dtype), power, np.asarray(edge, x.dtype))


def over(x: Array, scale: Array) -> Array:
    """``x`` divided by powers of two, which any type of floating point holds; the parts of a complex number apart."""
    if jnp.iscomplexobj(x):
        return lax.complex(over(x.real, scale), over(x.imag, scale))
    # Not x / scale: XLA makes one divisor of two, and that of two tiny scales is 0.
    return x * (1 / scale).astype(x.dtype)


class Rows(NamedTuple):
    """An array [b, ...], float32 or wider, real or complex, to be squared and summed over all but ``lead`` axes.

    ``is_slopes``: a right factor or a gradient, whose rows become small while examples are learnt.
    """

    array: Inexact[Array, "b ..."]
    lead: int = 1
    is_slopes: bool = False


def sum_squares(array: Inexact[Array, "b ..."], lead: int = 1, *, is_slopes: bool = False) -> Squares:
    """The squared norm of each row of an array over its own scale: exact where a plain sum of squares would be 0 or
    infinite.

    >>> squares = sum_squares(jnp.array([[3e-25, 4e-25]], jnp.float32))
    >>> print(root(squares), jnp.sum(jnp.square(jnp.float32(4e-25))))
    [5.e-25] 0.0

    Args:
        array: [b, ...], float32 or wider, real or complex.
        lead: how many axes are kept, from the first; all others are summed over.
        is_slopes: see `Rows`.
    """
    return sums_of_squares([Rows(array, lead, is_slopes)])[0]


def sums_of_squares(parts: Sequence[Rows]) -> list[Squares]:
    """`sum_squares` of several arrays, of which those that are worth a condition share one."""
    reduced = [_without_units(part.array, tuple(range(part.lead, part.array.ndim))) for part in parts]
    cheap = costs.machine().cheap_conditions
    guessed = [at for at, (dense, _, _) in enumerate(reduced) if cheap and dense.size >= MANY]
    found = dict(zip(guessed, _by_a_guess([(*reduced[at][:2], parts[at].is_slopes) for at in guessed]), strict=True))
    for at, (dense, axes, _) in enumerate(reduced):
        if at not in found:
            found[at] = _by_their_own_scale(dense, axes)
    return [Squares(*(lax.expand_dims(x, units) for x in found[at])) for at, (_, _, units) in enumerate(reduced)]


def _by_a_guess(asked: Sequence[tuple[Array, tuple[int, ...], bool]]) -> list[tuple[Array, Array]]:
    """The same numbers to the last bit, without passes for the scales where one power of two suits all rows of each
    array."""
    if not asked:
        return []
    units = [jnp.asarray(_SLOPE if is_slopes else 1.0, x.real.dtype) for x, _, is_slopes in asked]
    sums = [jnp.sum(abs_square(over(x, unit)), axes) for (x, axes, _), unit in zip(asked, units, strict=True)]

    def is_safe(x: Array, sums: Array) -> Array:
        kind = jnp.finfo(sums.dtype)
        count = x.size // max(sums.size, 1)
        least = float(kind.tiny) * count * 2 / float(kind.eps)  # all squares that are lost come to half a bit of it
        return (sums >= least) & (sums <= 1 / least)

    def of_sums() -> list[tuple[Array, Array]]:
        scales = [power_of_two(jnp.sqrt(found)) for found in sums]
        return [
            (scale * unit, over(over(found, scale), scale))
            for scale, unit, found in zip(scales, units, sums, strict=True)
        ]

    def by_their_own() -> list[tuple[Array, Array]]:
        return [_by_their_own_scale(x, axes) for x, axes, _ in asked]

    safe: dict[Any, Array] = {}  # those of one shape are one operation
    for (x, _, _), found in zip(asked, sums, strict=True):
        safe[found.shape] = safe.get(found.shape, True) & is_safe(x, found)
    return lax.cond(jnp.all(jnp.stack([jnp.all(each) for each in safe.values()])), of_sums, by_their_own)


def _by_their_own_scale(x: Array, axes: Sequence[int]) -> tuple[Array, Array]:
    scale = power_of_two(largest(x, axes))
    return scale, jnp.sum(square_of_scaled(over(x, lax.expand_dims(scale, axes))), axes)


def together(parts: Sequence[Squares]) -> Squares:
    """The sum of squares that each have a scale of their own, over the largest of them.

    Args:
        parts: of the leaves of a tree, say; at least one. Sizes are kept if any part has them; of the others, which
            cannot cancel, the squares count as sizes.
    """
    if len(parts) == 1:
        return parts[0]
    scales = _stacked([part.scale for part in parts])
    scale = jnp.max(scales, axis=0)
    # A ratio of powers of two below 2^-63 squares to 0: what it belongs to is too small to be seen beside the rest.
    shares = square_of_scaled(scales / scale[None])
    values = jnp.sum(_stacked([part.values for part in parts]) * shares, axis=0)
    if all(part.sizes is None for part in parts):
        return Squares(scale, values)
    sizes = [part.values if part.sizes is None else part.sizes for part in parts]
    return Squares(scale, values, jnp.sum(_stacked(sizes) * shares, axis=0))


def has_cancelled(squares: Squares) -> Bool[Array, " b"]:
    """For which examples too little is left of a sum that can cancel, or no number at all; ``sizes`` must be known."""
    assert squares.sizes is not None
    return ~(squares.values >= _RISK * squares.sizes)


def has_lost(products: Float[Array, "b b"], sizes: Float[Array, "b b"]) -> Bool[Array, "b b"]:
    """For which pairs too little is left of sums that can cancel, beside the norms of both, or no number at all.

    Args:
        products: inner products; on the diagonal squared norms.
        sizes: sums of what was added, without signs.
    """
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(products), 0))
    return ~(norms[:, None] * norms[None] >= _RISK * sizes)


def root(squares: Squares) -> Float[Array, " b"]:
    """The norms."""
    return squares.scale * jnp.sqrt(jnp.maximum(squares.values, 0))  # a Gram sum may round below zero


def _without_units(x: Array, axes: Sequence[int]) -> tuple[Array, tuple[int, ...], list[int]]:
    """An array to reduce over ``axes``, without the other axes of size 1; ``axes`` in it; where the result has those.

    What a layer reads and what its bias asks for have none: XLA then reduces that array itself, where otherwise it
    would compute it a second time, sines and all, to lay it out anew.
    """
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    units = [axis for axis in kept[1:] if x.shape[axis] == 1]
    places = [axis for axis in range(x.ndim) if axis not in units]
    return lax.squeeze(x, units), tuple(places.index(axis) for axis in axes), [kept.index(axis) for axis in units]


def _stacked(rows: Sequence[Array]) -> Array:
    """One below another, in the widest of their types."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*rows)
    return lax.concatenate([lax.expand_dims(lax.convert_element_type(row, dtype), (0,)) for row in rows], 0)
