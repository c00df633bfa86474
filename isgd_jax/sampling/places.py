"""Uniform points that leave no gaps.

Guarantees:

* each point of `quasi_random` alone is uniform in the unit cube, so means over them are unbiased; all of them together
  are spread evenly, so means of smooth functions have far less variance than those over independent points;
* numbers are counted in 32-bit integers, which wrap exactly, so the millionth point is as evenly spread as the first.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from isgd_jax.errors import ArgumentError, ArgumentTypeError, check_whole
from isgd_jax.types import Key

__all__ = ["kronecker_steps", "quasi_random", "wrapped"]


def quasi_random(key: Key, count: int, dims: int, *, first: int | Array = 0) -> Float[Array, "count dims"]:
    """Uniform points of the unit cube that leave no gaps: a Kronecker sequence with a random start.

    >>> import jax
    >>> quasi_random(jax.random.key(0), 5, 2).shape
    (5, 2)

    The mean over N such points is nearer to the integral than that over N independent ones, where N is well above
    what the dimensions need: dozens in up to three, hundreds in up to six. A handful in five dimensions, or any few in
    ten or more, lie close to each other along the first axes, and are worse. `isgd_jax.domain_sampler` moves them to
    where they are wanted.

    Args:
        key: of the start, uniform in the cube.
        count: how many points, static.
        dims: coordinates of each, static.
        first: where in the sequence to begin: the parts of one sequence leave no gaps together.

    Returns:
        Points [count, dims], float32, each coordinate at least 0 and below 1. Each is uniform by itself; together they
        are no independent draws.

    Raises:
        TypeError: a number is no whole number.
        ValueError: a number is below 1, or ``first`` is several.

    Source: Cranley & Patterson (SIAM J. Numer. Anal. 13, 1976) for the random start; the step is one over the powers of
    the root of x^(d+1) = x + 1 (Roberts, The unreasonable effectiveness of quasirandom sequences, 2018).
    """
    count, dims = check_whole("count", count, least=1), check_whole("dims", dims, least=1)
    step = kronecker_steps(dims)
    start = jax.random.bits(key, (dims,), jnp.uint32)
    turns = wrapped("first", first) + jnp.arange(count, dtype=jnp.uint32)
    at = start[None] + turns[:, None] * step[None]  # fractions of one in 2^-32, which wrap
    return (at >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def wrapped(name: str, number: int | Array) -> Array:
    """A place in a sequence modulo 2^32, uint32, in which products and sums wrap exactly.

    Narrower integers would wrap sooner, and floats stand still where they are large: the same points again.

    Args:
        name: of the argument, as the caller knows it.
        number: whole; of Python, of NumPy, or a JAX array of any integer type.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is an array of several.
    """
    if np.ndim(number):
        raise ArgumentError(
            f"{name} must be one whole number, got an array of shape {np.shape(number)}: for several, jax.vmap"
        )
    if isinstance(number, Array):
        if not jnp.issubdtype(number.dtype, jnp.integer):
            raise ArgumentTypeError(f"{name} must be a whole number, got {number.dtype}")
        return number.astype(jnp.uint32)
    return jnp.uint32(check_whole(name, number, least=-(2**63), most=None) % 2**32)


def kronecker_steps(dims: int) -> np.ndarray:
    """What each coordinate of a Kronecker sequence moves on by, uint32 [dims] in 2^-32; for one the golden section.

    Args:
        dims: coordinates.
    """
    root = 2.0
    for _ in range(64):
        root = (1.0 + root) ** (1.0 / (dims + 1))
    return np.array([int((root ** -(i + 1.0) % 1.0) * 2**32) for i in range(dims)], np.uint32)
