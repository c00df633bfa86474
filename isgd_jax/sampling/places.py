"""Points in space: a line along which neighbors are near each other, and uniform points that leave no gaps.

Guarantees:

* `along_hilbert_curve` gives each cell of a grid a number of its own, and cells with numbers in turn share a side;
* each point of `quasi_random` alone is uniform in the unit cube, so means over them are unbiased; all of them together
  are spread evenly, so means of smooth functions have far less variance than those over independent points;
* numbers are counted in 32-bit integers, which wrap exactly, so the millionth point is as evenly spread as the first.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from isgd_jax.errors import check_whole
from isgd_jax.types import Key

__all__ = ["along_hilbert_curve", "coordinates", "kronecker_steps", "quasi_random"]

CODE_BITS = 30
"""Of a number on the curve, an int32; shared out among the coordinates."""

COORDINATE_BITS = 10
"""Of a coordinate at most: a thousand cells along each."""


def coordinates(points: Any) -> Float[Array, "n d"] | None:
    """All numbers of each point side by side, in float32; keys are none, and None is said where there are no numbers.

    Args:
        points: a pytree of arrays [n, ...].
    """
    leaves = jax.tree.leaves(points)
    numbers = [leaf for leaf in leaves if leaf.size and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    if not numbers:
        return None
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1).astype(jnp.float32) for leaf in numbers], axis=1)


def along_hilbert_curve(places: Float[Array, "n d"]) -> Int[Array, " n"]:
    """Where points lie along a Hilbert curve through the box that they span: an order in which neighbors are near.

    Args:
        places: coordinates [n, d], d at least 1; of more than 30 the first 30 count.

    Returns:
        Whole numbers from 0 to below 2^30 [n], equal for points of the same cell.

    Source: Skilling, Programming the Hilbert curve (AIP Conf. Proc. 707, 2004).
    """
    places = places[:, :CODE_BITS]
    dims = places.shape[1]
    bits = min(COORDINATE_BITS, CODE_BITS // dims)
    low, high = jnp.min(places, axis=0), jnp.max(places, axis=0)
    inside = (places - low[None]) / jnp.maximum(high - low, jnp.finfo(jnp.float32).tiny)[None]
    cells = jnp.clip((inside * 2**bits).astype(jnp.int32), 0, 2**bits - 1)
    return _interleaved(_turned([cells[:, i] for i in range(dims)], bits), bits, places.shape[0])


def _turned(x: list[Array], bits: int) -> list[Array]:
    """Coordinates of cells to those of Skilling's "transpose": each subcube turned as the curve enters it."""
    dims = len(x)
    for bit in range(bits - 1, 0, -1):
        half, below = 1 << bit, (1 << bit) - 1
        for i in range(dims):
            is_far, swap = (x[i] & half) != 0, (x[0] ^ x[i]) & below
            x[0] = jnp.where(is_far, x[0] ^ below, x[0] ^ swap)
            if i:
                x[i] = jnp.where(is_far, x[i], x[i] ^ swap)
    for i in range(1, dims):  # Gray code
        x[i] = x[i] ^ x[i - 1]
    flips = jnp.zeros_like(x[-1])
    for bit in range(bits - 1, 0, -1):
        flips = jnp.where((x[-1] & (1 << bit)) != 0, flips ^ ((1 << bit) - 1), flips)
    return [each ^ flips for each in x]


def _interleaved(x: list[Array], bits: int, size: int) -> Int[Array, " n"]:
    code = jnp.zeros(size, jnp.int32)
    for bit in range(bits - 1, -1, -1):
        for each in x:
            code = (code << 1) | ((each >> bit) & 1)
    return code


def quasi_random(key: Key, count: int, dims: int) -> Float[Array, "count dims"]:
    """Uniform points of the unit cube that leave no gaps: a Kronecker sequence with a random start.

    >>> import jax
    >>> quasi_random(jax.random.key(0), 5, 2).shape
    (5, 2)

    For ``draw_points`` of `isgd_jax.pool_sampler`: the mean over a pool of N such points is nearer to the integral than
    that over N independent ones, and so is all that is learnt from the pool.

    Args:
        key: of the start, uniform in the cube.
        count: how many points, static.
        dims: coordinates of each, static.

    Returns:
        Points [count, dims], float32, each coordinate at least 0 and below 1. Each is uniform by itself; together they
        are no independent draws.

    Raises:
        TypeError: a number is no whole number.
        ValueError: a number is below 1.

    Source: Cranley & Patterson (SIAM J. Numer. Anal. 13, 1976) for the random start; the step is one over the powers of
    the root of x^(d+1) = x + 1 (Roberts, The unreasonable effectiveness of quasirandom sequences, 2018).
    """
    check_whole("count", count, least=1)
    check_whole("dims", dims, least=1)
    step = kronecker_steps(dims)
    start = jax.random.bits(key, (dims,), jnp.uint32)
    at = (
        start[None] + jnp.arange(count, dtype=jnp.uint32)[:, None] * step[None]
    )  # fractions of one in 2^-32, which wrap
    return (at >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def kronecker_steps(dims: int) -> np.ndarray:
    """What each coordinate of a Kronecker sequence moves on by, uint32 [dims] in 2^-32; for one the golden section.

    Args:
        dims: coordinates.
    """
    root = 2.0
    for _ in range(64):
        root = (1.0 + root) ** (1.0 / (dims + 1))
    return np.array([int((root ** -(i + 1.0) % 1.0) * 2**32) for i in range(dims)], np.uint32)
