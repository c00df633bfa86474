"""Sums that float32 alone would lose: a number as an unevaluated pair of float32, and sums by trees.

A flat float32 prefix sum over 10 million masses rounds away whatever is smaller than its last bit, and the examples
behind it can never be drawn. A pair carries about 47 bits, in plain float32 additions that every device has; nothing
here needs 64-bit mode.

Guarantees:

* ``two_sum`` is exact, compiled or not: ``hi + lo`` is the true sum (short of overflow and underflow);
* ``two_prod``, ``add``, ``multiply`` and ``divide`` of numbers of one sign are right to 44 bits;
* ``tree_sum`` of n numbers of one sign is right to about log2(n) roundings, whatever n is.

Source: Dekker, "A floating-point technique for extending the available precision" (1971); Knuth, TAOCP vol. 2, 4.2.2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float

__all__ = [
    "Pair",
    "add",
    "at_least",
    "divide",
    "exact",
    "in_range",
    "multiply",
    "negative",
    "tree_sum",
    "two_prod",
    "two_sum",
    "where",
]

_EXPONENT = 1 << 23
"""One step of a float32's exponent, in its bits."""


class Pair(NamedTuple):
    """The number ``hi + lo``, with ``hi`` its rounding to float32; arrays of one shape."""

    hi: Float[Array, "..."]
    lo: Float[Array, "..."]


def exact(a: Float[Array, "..."]) -> Pair:
    """A float32 as a pair."""
    return Pair(a, jnp.zeros_like(a))


def two_sum(a: Float[Array, "..."], b: Float[Array, "..."]) -> Pair:
    """``a + b`` without error, by Knuth's six additions, in any order of size.

    >>> total = two_sum(jnp.float32(1.0), jnp.float32(1e-9))
    >>> float(total.hi), round(float(total.lo) * 1e9, 6)
    (1.0, 1.0)
    """
    total = a + b
    b_seen = total - a
    return Pair(total, (a - (total - b_seen)) + (b - b_seen))


def _halves(a: Float[Array, "..."]) -> tuple[Array, Array]:
    """``a`` as two numbers of 12 bits each. By masking: products of halves are then exact, fused or not."""
    high = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(a, jnp.uint32) & jnp.uint32(0xFFFFF000), jnp.float32
    )
    return high, a - high


def two_prod(a: Float[Array, "..."], b: Float[Array, "..."]) -> Pair:
    """``a * b`` to about 46 bits. Not Dekker's exact form: a fused multiply-add would undo its subtraction."""
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    middle = two_sum(a1 * b2, a2 * b1)
    top = two_sum(a1 * b1, middle.hi)
    return two_sum(top.hi, top.lo + (middle.lo + a2 * b2))


def add(x: Pair, y: Pair) -> Pair:
    """``x + y`` to about 47 bits."""
    high, low = two_sum(x.hi, y.hi), two_sum(x.lo, y.lo)
    first = two_sum(high.hi, high.lo + low.hi)
    return two_sum(first.hi, first.lo + low.lo)


def negative(x: Pair) -> Pair:
    """``-x``, without error."""
    return Pair(-x.hi, -x.lo)


def multiply(x: Pair, y: Pair) -> Pair:
    """``x * y`` to about 45 bits."""
    product = two_prod(x.hi, y.hi)
    return two_sum(product.hi, product.lo + (x.hi * y.lo + x.lo * y.hi))


def divide(x: Pair, divisor: Float[Array, "..."]) -> Pair:
    """``x / divisor`` to about 45 bits."""
    quotient = x.hi / divisor
    remainder = add(x, negative(two_prod(quotient, divisor)))
    return two_sum(quotient, remainder.hi / divisor)


def at_least(x: Pair, y: Pair) -> Bool[Array, "..."]:
    """``x >= y``. Pairs are kept with ``hi`` the rounding of the whole, so they compare word by word."""
    return (x.hi > y.hi) | ((x.hi == y.hi) & (x.lo >= y.lo))


def where(condition: Bool[Array, "..."], x: Pair, y: Pair) -> Pair:
    """Element by element, one pair or the other; shapes broadcast.

    Args:
        condition: where it holds, ``x``.
        x: a pair.
        y: another.
    """
    return Pair(jnp.where(condition, x.hi, y.hi), jnp.where(condition, x.lo, y.lo))


def in_range(values: Float[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """Numbers of at least 0 times a power of two, and that power: their sums then stay within float32.

    It is 1 unless the largest number is below 2^-32 or above 2^64. Devices flush numbers below 2^-126 to zero, so those
    are read from their bits. NaN stays NaN.

    >>> scaled, scale = in_range(jnp.array([1e-40, 3e-40], jnp.float32))
    >>> float(scale) == 2.0**100, round(float(scaled[1] / scaled[0]), 3)
    (True, 3.0)
    """
    bits = lax.bitcast_convert_type(values, jnp.int32)  # of numbers of at least 0 they sort as the numbers do
    largest = jnp.max(jnp.where(bits < _EXPONENT * 255, bits, 0))
    is_tiny = (largest > 0) & (largest < _EXPONENT * (127 - 32))
    scale = jnp.where(largest > _EXPONENT * (127 + 64), 2.0**-64, jnp.where(is_tiny, 2.0**100, 1.0))
    subnormal = bits.astype(jnp.float32) * 2.0 ** (100 - 149)
    return jnp.where(is_tiny & (bits > 0) & (bits < _EXPONENT), subnormal, values * scale), scale


def tree_sum(values: Float[Array, " n"]) -> Float[Array, ""]:
    """The sum by a tree of 64-fold sums. A flat float32 reduction over 10^8 numbers may keep three digits."""
    while values.shape[0] > 1:
        values = jnp.pad(values, (0, -values.shape[0] % 64)).reshape(-1, 64).sum(axis=1)
    return values.reshape(())
