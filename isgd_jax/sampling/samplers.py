"""From probabilities to draws: pure functions ``(key, law, *, num_draws) -> Draw``.

Guarantees:

* ``Draw.probs`` is the expected count divided by ``num_draws``: the weight ``1 / (N * probs)`` is right for each (of
  `poisson`, given how many were included);
* an index of mass zero is never drawn, unless every mass is zero, and every positive mass can be drawn (`law`);
* draws of one key at successive steps (`on_line`) are spread evenly over the line, and each by itself is distributed as
  one of a fresh key.

All but ``poisson`` and ``without_replacement`` draw in O(num_draws log n) from a prepared law.
"""

import math
from functools import partial
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, UInt

from isgd_jax.errors import ArgumentError, check_array, check_whole
from isgd_jax.sampling import double_float
from isgd_jax.sampling.double_float import Pair
from isgd_jax.sampling.law import (
    Law,
    LawLike,
    as_law,
    at_fractions,
    capped,
    check_size,
    example_at,
    line_probabilities,
    order_by,
    prepare,
    probabilities,
    probabilities_of,
    update,
)
from isgd_jax.sampling.places import kronecker_steps
from isgd_jax.types import Draw, Key, Sampler

__all__ = [
    "Law",
    "LawLike",
    "capped",
    "in_halves",
    "independent",
    "on_line",
    "order_by",
    "poisson",
    "poisson_size",
    "prepare",
    "probabilities",
    "probabilities_of",
    "stratified",
    "systematic",
    "uniform",
    "uniform_strata",
    "update",
    "without_replacement",
]

GOLDEN = kronecker_steps(1)[0]
"""The golden section in 2^-32: multiples of it modulo one stay the most even, however many there are."""

OTHER = kronecker_steps(2)[0]
"""What the second of two halves moves on by. Its multiples do not keep pace with those of `GOLDEN`, so the errors of
the two do not go together."""

Kind: TypeAlias = Literal["stratified", "systematic", "independent"]
"""The ways to lay ``num_draws`` places on the line of a law."""


def independent(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """Draws that know nothing of each other, each by the law: the paper's sampler.

    Args:
        key: of this draw alone.
        law: prepared by `prepare`, or probabilities [n], which are prepared at each call.
        num_draws: m, at least 1; static under ``jax.jit``. The same three arguments make every sampler.

    Raises:
        TypeError: ``num_draws`` is no whole number.
        ValueError: ``num_draws`` is below 1, or the law cannot be prepared.
    """
    return on_line("independent", key, law, num_draws=num_draws)


def stratified(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """The line cut into ``num_draws`` equal masses, one draw in each: never more variance than `independent`.

    How much less depends on the order: neighbors on the line should have similar gradients. Each index is drawn once in
    every whole stratum that its mass fills, so a mass above 1/m of the total is drawn again and again.
    Source: Cochran, "Sampling Techniques", chapter 5, for strata; laying them along an order of gradients is ours.

    >>> draw = stratified(jax.random.key(0), jnp.array([0.5, 0.0, 0.5]), num_draws=2)
    >>> draw.indices.tolist(), draw.probs.tolist()
    ([0, 2], [0.5, 0.5])

    Args:
        key: of this draw alone.
        law: prepared by `prepare`, or probabilities [n].
        num_draws: m, at least 1; errors are those of `independent`.

    Returns:
        m draws in the order of the line, which is not that of the examples.
    """
    return on_line("stratified", key, law, num_draws=num_draws)


def systematic(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """One random offset, then equal steps along the line: each index is drawn floor or ceil of its expected count.

    Its variance is not bounded by that of `independent`: an order with the period of the step defeats it, and no
    estimate from one draw tells. Source: Madow, "On the theory of systematic sampling" (1949).

    Args:
        key: of this draw alone.
        law: prepared by `prepare`, or probabilities [n].
        num_draws: m, at least 1; errors are those of `independent`.

    Returns:
        m draws in the order of the line.
    """
    return on_line("systematic", key, law, num_draws=num_draws)


def without_replacement(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """Distinct indices, index n with inclusion probability min(1, kappa q_n): `systematic` from the `capped` law. O(n).

    A kept law is capped once, ``capped(law, num_draws=m)``, and then drawn from with `systematic` in O(m log n).
    Only a law with fewer than ``num_draws`` positive masses repeats an index.

    Args:
        key: of this draw alone.
        law: prepared by `prepare`, or probabilities [n].
        num_draws: m, 1 to n.

    Returns:
        The draw; ``probs`` are inclusion probabilities over m.

    Raises:
        TypeError: ``num_draws`` is no whole number.
        ValueError: ``num_draws`` is not in 1..n, or the law cannot be prepared.
    """
    num_draws = check_whole("num_draws", num_draws, least=1)
    return systematic(key, capped(law, num_draws=num_draws), num_draws=num_draws)


def poisson(key: Key, law: LawLike, *, num_draws: int, part_of: int | None = None) -> Draw:
    """Every index decides for itself, with probability min(1, kappa q_n): a design of random size, masked. O(n).

    The expected size is chosen so that the room is too small less than once in a million draws (Chernoff's bound); for
    128 places it is about 78. A random excess is then left out, and ``probs`` of the others are lowered by as much, so
    that estimates are unbiased however often it happens. Source: Hajek, "Sampling from a finite population" (1981).

    Args:
        key: of this draw alone.
        law: prepared by `prepare`, or probabilities [n].
        num_draws: the room m, 1 to n; not the expected size.
        part_of: the room of the whole batch that this is a part of, such as a half of it. As many draws are then
            expected as fall to the part, and the room is too small more often; None where it is the whole.

    Returns:
        m places; ``mask`` is false on the empty ones, whose index and ``probs`` mean nothing. Sums of target/probs
        over the others, divided by m, estimate the target.

    Raises:
        TypeError: ``num_draws`` is no whole number.
        ValueError: ``num_draws`` is not in 1..n, or the law cannot be prepared.
    """
    num_draws = check_whole("num_draws", num_draws, least=1)
    whole = num_draws if part_of is None else part_of
    law, size = as_law(law), poisson_size(whole) * (num_draws / whole)
    if num_draws > law.masses.shape[0]:
        raise ArgumentError(f"poisson draws distinct indices: num_draws={num_draws} exceeds n={law.masses.shape[0]}")
    # Fewer examples with mass than the expected size are all included, once, whatever their number.
    chance = jnp.minimum(line_probabilities(capped(law, num_draws=size)) * size, 1.0)
    choose, shuffle = jax.random.split(key)
    included = ~double_float.at_least(_unit_pair(choose, chance.shape[0], None), double_float.exact(chance))
    priority = jnp.where(included, jax.random.uniform(shuffle, included.shape, jnp.float32), -1.0)
    priority, at = jax.lax.top_k(priority, num_draws)
    kept = num_draws / jnp.maximum(jnp.sum(included, dtype=jnp.int32), num_draws).astype(jnp.float32)
    return Draw(example_at(law, at.astype(jnp.int32)), kept * chance[at] / num_draws, priority >= 0.0)


def uniform(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """Draws with replacement, all examples alike.

    Args:
        key: of this draw alone.
        law: of it only n is taken.
        num_draws: m, at least 1; it may exceed n.

    Raises:
        TypeError: ``num_draws`` is no whole number.
        ValueError: ``num_draws`` is below 1.
    """
    num_draws = check_whole("num_draws", num_draws, least=1)
    if not isinstance(law, Law):
        check_array("law", law)
    size = (law.masses if isinstance(law, Law) else law).shape[0]
    indices = jax.random.randint(key, (num_draws,), 0, check_size(size), dtype=jnp.int32)
    return Draw(indices, jnp.full((num_draws,), 1.0 / size, jnp.float32), jnp.ones((num_draws,), bool))


def uniform_strata(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """All examples alike, the law's line cut into ``num_draws`` equal parts, one draw in each; masses do not matter.

    Never more variance than `uniform`: what is left of a good order when its probabilities are not to be trusted.
    Source: ours.

    Args:
        key: of this draw alone.
        law: prepared by `prepare`, or probabilities [n].
        num_draws: m, at least 1; errors are those of `independent`.
    """
    return on_line("stratified", key, law, num_draws=num_draws, is_open=jnp.asarray(False))


def on_line(
    kind: Kind,
    key: Key,
    law: LawLike,
    *,
    num_draws: int,
    is_halved: Bool[Array, ""] | None = None,
    is_open: Bool[Array, ""] | None = None,
    step: Int[Array, ""] | None = None,
) -> Draw:
    """Draws at places on the line: by the masses or uniformly, whole or in two independent halves, in one program.

    Which of the four it is may be known at run time only: all differ in where the places lie, which costs a few
    operations on [m] numbers, so nothing is branched on.

    Args:
        kind: how the places are laid.
        key: of this draw alone.
        law: prepared by `prepare`, or probabilities [n].
        num_draws: m.
        is_halved: whether the first ``m // 2`` places are laid by themselves, and the others by themselves.
        is_open: whether masses count. Else all examples are alike, and a systematic draw is a stratified one.
        step: how many draws of this key went before; None where the key is of this draw alone. The place in each part
            moves on by the golden section from one draw of the key to the next, so that every stretch of the line is
            reached evenly over the steps, where draws of independent keys leave gaps and return too soon: what
            shuffled epochs do for uniform batches. Each draw alone is distributed as without. "independent" has no
            parts, and makes nothing of it.

    Raises:
        TypeError: ``num_draws`` is no whole number.
        ValueError: ``num_draws`` is below 1, or the law cannot be prepared.
    """
    num_draws = check_whole("num_draws", num_draws, least=1)
    law = as_law(law)
    at, probs = at_fractions(law, *_places(kind, key, num_draws, is_halved, is_open, step), is_open)
    return Draw(example_at(law, at), probs, jnp.ones((num_draws,), bool))


def in_halves(sampler: Sampler, key: Key, law: Law, *, num_draws: int) -> Draw:
    """Two half-batches, drawn independently, one after the other; the second has one more where ``num_draws`` is odd.

    ``probs`` are those of the half that an index was drawn in. Each half is unbiased by itself, so the mean over all m
    draws is too, also where the two have other probabilities.

    Args:
        sampler: ``(key, law, *, num_draws) -> Draw``.
        key: split between the halves.
        law: prepared by `samplers.prepare`.
        num_draws: m, at least 2.
    """
    first, second = jax.random.split(key)
    parts = sampler(first, law, num_draws=num_draws // 2), sampler(second, law, num_draws=num_draws - num_draws // 2)
    return jax.tree.map(lambda *both: jnp.concatenate(both), *parts)


def _places(
    kind: Kind,
    key: Key,
    num_draws: int,
    is_halved: Bool[Array, ""] | None,
    is_open: Bool[Array, ""] | None,
    step: Int[Array, ""] | None,
) -> tuple[Pair, Float[Array, "..."]]:
    """Where draws lie on the line, as numerators [m] and denominators of fractions of its length."""
    if kind == "independent":
        return _unit_pair(key, num_draws, None), jnp.float32(1.0)
    first, second = num_draws // 2, num_draws - num_draws // 2
    whole = jnp.arange(num_draws, dtype=jnp.float32)
    start, parts = whole, jnp.float32(num_draws)
    if is_halved is not None:
        in_first = whole < first
        start = jnp.where(is_halved & ~in_first, whole - first, whole)
        parts = jnp.where(is_halved, jnp.where(in_first, float(first), float(second)), parts)
    pace = jnp.where(is_halved & (whole >= first), OTHER, GOLDEN) if is_halved is not None else GOLDEN
    offset = _unit_pair(key, num_draws, None if step is None else step.astype(jnp.uint32) * pace)
    if kind == "systematic":  # one for all, or one for each half
        shared = jnp.zeros(num_draws, jnp.int32)
        if is_halved is not None:
            shared = jnp.where(is_halved & (whole >= first), first, shared)
        one = Pair(*(word[shared] for word in offset))
        offset = one if is_open is None else double_float.where(is_open, one, offset)
    return double_float.add(double_float.exact(start), offset), parts


@partial(jax.jit, inline=True, static_argnames="size")
def _unit_pair(key: Key, size: int, moved: UInt[Array, "..."] | None) -> Pair:
    """Uniform on [0, 1) in steps of 2^-48: the 24 bits of one float32 cannot reach every item beyond 16 million.

    Each number may be moved on, in fractions of one in 2^-32, which wrap: with multiples of a constant it is the term
    of a Kronecker sequence that starts at random.
    """
    bits = jax.random.bits(key, (2, size), jnp.uint32)
    if moved is not None:
        bits = bits.at[0].add(moved)
    bits = (bits >> 8).astype(jnp.float32)
    return double_float.two_sum(bits[0] * 2.0**-24, bits[1] * 2.0**-48)


def poisson_size(room: int) -> float:
    """The draws that `poisson` expects in this room: the most, lam, with P(size > room) <= 1e-6.

    By Chernoff's bound, with k = room + 1: lam - k + k log(k / lam) >= log(1e6).
    """
    over, low, high = room + 1, 0.0, float(room)
    for _ in range(50):
        middle = (low + high) / 2
        enough = middle - over + over * math.log(over / middle) >= math.log(1e6)
        low, high = (middle, high) if enough else (low, middle)
    return low
