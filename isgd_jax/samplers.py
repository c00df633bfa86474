"""From probabilities to draws: the prepared law, and pure functions ``(key, law, *, num_draws) -> Draw``.

A law lays its masses on a line (along ``order``, if given) and keeps the sums of every 16 masses, of every 16 of those
sums, and so on: a tree whose nodes are cache lines. A draw descends from the root, so it costs O(log n); changing a
few masses repairs their ancestors only.

Guarantees:

* ``Draw.probs`` is the expected count divided by ``num_draws``: the weight ``1 / (N * probs)`` is right for each;
* an index of mass zero is never drawn, unless every mass is zero: then the law is uniform;
* every positive mass can be drawn, down to 2^-40 of the total: sums and queries carry more bits than float32;
* ``update`` gives bit for bit the law that ``prepare`` would build from the changed masses;
* masses that are not finite show as probabilities that are not finite, never as a quiet wrong draw.

``independent``, ``stratified``, ``systematic`` and ``uniform`` draw in O(num_draws log n) from a prepared law.
"""

import math
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from isgd_jax import sums
from isgd_jax.sums import Pair
from isgd_jax.typing import Draw, Key

FANOUT = 16
"""Children of a node: 16 float32 are one cache line."""


class Law(NamedTuple):
    """Masses on a line and the tree of their sums; build it with `prepare`, change it with `update`.

    ``masses[p]`` belongs to the example ``order[p]``; ``positions`` is the inverse of ``order``; both are None when the
    line runs through the examples as they are numbered. ``levels[0]`` holds the sums of 16 masses, the last level the
    total. Masses need not sum to one.
    """

    masses: Float[Array, " n"]
    levels: tuple[Pair, ...]
    order: Int[Array, " n"] | None
    positions: Int[Array, " n"] | None


LawLike: TypeAlias = Float[Array, " n"] | Law
"""Probabilities [n], or the law prepared from them."""


def prepare(probs: Float[Array, " n"], order: Int[Array, " n"] | None = None) -> Law:
    """The law of ``probs`` [n] (any non-negative masses), laid along the permutation ``order`` [n]. O(n)."""
    _check_size(probs.shape[0])
    masses = probs.astype(jnp.float32)
    if order is None:
        return Law(masses, _sum_levels(masses), None, None)
    order = order.astype(jnp.int32)
    positions = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
    masses = masses[order]
    return Law(masses, _sum_levels(masses), order, positions)


def update(law: Law, indices: Int[Array, " c"], probs: Float[Array, " c"]) -> Law:
    """The law with new masses for ``indices``; only their ancestors are summed again.

    Indices equal to n are padding and are dropped. Of an index given twice, one mass stays. Donate the law
    (``jax.jit(update, donate_argnums=0)``) and the change is made in place.
    """
    at = indices.astype(jnp.int32)
    if law.positions is not None:
        at = law.positions.at[at].get(mode="fill", fill_value=law.masses.shape[0])
    masses = law.masses.at[at].set(probs.astype(jnp.float32), mode="drop")
    below, levels = sums.exact(masses), []
    for level in law.levels:
        at = at // FANOUT  # a node hit twice is summed twice, to the same bits
        node = _pyramid(_children(below, at))[-1]
        below = Pair(*(whole.at[at].set(part[:, 0], mode="drop") for whole, part in zip(level, node, strict=True)))
        levels.append(below)
    return law._replace(masses=masses, levels=tuple(levels))


def probabilities(law: Law) -> Float[Array, " n"]:
    """The probability [n] of each example, as the examples are numbered."""
    probs = _line_probabilities(law)
    return probs if law.positions is None else probs[law.positions]


def order_by(*keys: Array) -> Int[Array, " n"]:
    """The permutation that sorts by the first key [n], ties by the second, and so on: an order for a law."""
    return jnp.lexsort(keys[::-1]).astype(jnp.int32)


def independent(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """Draws that know nothing of each other, each by the law: the paper's sampler."""
    return _draw(law, _unit_pair(key, num_draws), 1)


def stratified(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """The line cut into ``num_draws`` equal masses, one draw in each: never more variance than `independent`.

    How much less depends on the order: neighbours on the line should have similar gradients. Source: ours (METHOD,
    "Ordered stratified draws"); Cochran, "Sampling Techniques", chapter 5.
    """
    strata = sums.exact(jnp.arange(num_draws, dtype=jnp.float32))
    return _draw(law, sums.add(strata, _unit_pair(key, num_draws)), num_draws)


def systematic(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """One random offset, then equal steps along the line: each index is drawn floor or ceil of its expected count.

    Its variance is not bounded by that of `independent`: an order with the period of the step defeats it. Source:
    Madow, "On the theory of systematic sampling" (1949).
    """
    offset = Pair(*(jnp.broadcast_to(part, (num_draws,)) for part in _unit_pair(key, 1)))
    strata = sums.exact(jnp.arange(num_draws, dtype=jnp.float32))
    return _draw(law, sums.add(strata, offset), num_draws)


def without_replacement(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """Distinct indices, index n with inclusion probability min(1, kappa q_n): `systematic` from the `capped` law. O(n).

    A kept law is capped once, ``capped(law, num_draws=m)``, and then drawn from with `systematic` in O(m log n).
    Only a law with fewer than ``num_draws`` positive masses repeats an index.
    """
    return systematic(key, capped(law, num_draws=num_draws), num_draws=num_draws)


def poisson(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """Every index decides for itself, with probability min(1, kappa q_n): a design of random size, masked. O(n).

    ``num_draws`` is the room. The expected size is chosen so that the room is too small less than once in a million
    draws (Chernoff's bound); a random excess is then left out, which shifts expected counts by less than 1e-6 of
    themselves. Source: Hajek, "Sampling from a finite population" (1981).
    """
    law, size = _as_law(law), _poisson_size(num_draws)
    if num_draws > law.masses.shape[0]:
        raise ValueError(f"poisson draws distinct indices: num_draws={num_draws} exceeds n={law.masses.shape[0]}")
    probs = _line_probabilities(capped(law, num_draws=size))
    choose, shuffle = jax.random.split(key)
    included = ~sums.at_least(_unit_pair(choose, probs.shape[0]), sums.exact(probs * size))
    priority = jnp.where(included, jax.random.uniform(shuffle, included.shape), -1.0)
    priority, at = jax.lax.top_k(priority, num_draws)
    return Draw(_example(law, at.astype(jnp.int32)), probs[at] * (size / num_draws), priority >= 0.0)


def uniform(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """Draws with replacement, all examples alike; of the law it only takes n."""
    size = (law.masses if isinstance(law, Law) else law).shape[0]
    indices = jax.random.randint(key, (num_draws,), 0, _check_size(size), dtype=jnp.int32)
    return Draw(indices, jnp.full((num_draws,), 1.0 / size, jnp.float32), jnp.ones((num_draws,), bool))


def capped(law: LawLike, *, num_draws: float) -> Law:
    """The law with no mass above 1/num_draws of the new total, smaller masses as they are: inclusion probabilities."""
    law = _as_law(law)
    if not 0 < num_draws <= law.masses.shape[0]:
        raise ValueError(f"num_draws must lie in 1..n={law.masses.shape[0]} to draw distinct indices, got {num_draws}")

    def lower(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        cap, count, _ = state
        over = law.masses >= cap
        rest, new_count = sums.tree_sum(jnp.where(over, 0.0, law.masses)), over.sum(dtype=jnp.int32)
        room = num_draws - new_count.astype(jnp.float32)
        new_cap = jnp.where((rest > 0.0) & (room > 0.0), rest / room, cap)
        return new_cap, new_count, new_count > count

    total = law.levels[-1].hi[0]
    start = (total / num_draws, jnp.int32(0), total > 0.0)
    cap, _, _ = jax.lax.while_loop(lambda state: state[2], lower, start)
    masses = jnp.minimum(law.masses, cap)
    return law._replace(masses=masses, levels=_sum_levels(masses))


def _as_law(law: LawLike) -> Law:
    return law if isinstance(law, Law) else prepare(law)


def _check_size(size: int) -> int:
    if not 0 < size < 2**31:
        raise ValueError(f"a law holds 1 to 2^31 - 1 examples (indices are int32), got {size}; split the data set")
    return size


def _draw(law: LawLike, numerator: Pair, denominator: int) -> Draw:
    """The examples at the fractions ``numerator / denominator`` [m] of the line."""
    law = _as_law(law)
    total = Pair(*(part[0] for part in law.levels[-1]))
    nothing = total.hi == 0.0
    at = jnp.where(nothing, _scaled_index(law, numerator, denominator), _descend(law, numerator, denominator))
    probs = jnp.where(nothing, 1.0 / law.masses.shape[0], law.masses[at] / total.hi)
    return Draw(_example(law, at), probs, jnp.ones(at.shape, bool))


def _example(law: Law, at: Int[Array, " m"]) -> Int[Array, " m"]:
    return at if law.order is None else law.order[at]


def _line_probabilities(law: Law) -> Float[Array, " n"]:
    total = law.levels[-1].hi[0]
    return jnp.where(total == 0.0, 1.0 / law.masses.shape[0], law.masses / total)


def _scaled(numerator: Pair, denominator: int, length: Pair) -> Pair:
    step = sums.divide(length, jnp.float32(denominator))
    return sums.multiply(numerator, Pair(*(jnp.broadcast_to(part, numerator.hi.shape) for part in step)))


def _scaled_index(law: Law, numerator: Pair, denominator: int) -> Int[Array, " m"]:
    """The places of the fractions on the line of a law without mass: all examples alike."""
    size = law.masses.shape[0]
    length = Pair(jnp.float32(size), jnp.float32(size - int(jnp.finfo(jnp.float32).dtype.type(size))))
    place = _scaled(numerator, denominator, length)
    whole = jnp.floor(place.hi)
    index = whole.astype(jnp.int32) + jnp.floor((place.hi - whole) + place.lo).astype(jnp.int32)
    return jnp.clip(index, 0, size - 1)


def _descend(law: Law, numerator: Pair, denominator: int) -> Int[Array, " m"]:
    """The places on the line where the prefix sums pass the fractions of the total, from the root down."""
    rest = _scaled(numerator, denominator, Pair(*(part[0] for part in law.levels[-1])))
    levels = (*law.levels[-2::-1], sums.exact(law.masses))

    # A loop, although the levels are few: unrolled, XLA fuses level into level and computes each again for every use.
    def down(depth: Array, state: tuple[Pair, Array]) -> tuple[Pair, Array]:
        rest, at = state
        children = jax.lax.switch(depth, [partial(_children, level) for level in levels], at)
        rest, child = _choose(rest, _pyramid(children))
        return rest, at * FANOUT + child

    _, at = jax.lax.fori_loop(0, len(levels), down, (rest, jnp.zeros(numerator.hi.shape, jnp.int32)))
    return at


def _choose(rest: Pair, pyramid: list[Pair]) -> tuple[Pair, Int[Array, " m"]]:
    """Halve a node four times: right when the rest has reached the left half's mass (prefix sums, side="right").

    Never into a half without mass, so roundings at the end of the line cannot draw an index of mass zero.
    """
    child = jnp.zeros(rest.hi.shape, jnp.int32)
    for depth in range(len(pyramid) - 2, -1, -1):
        left, right = (Pair(part.hi[:, side], part.lo[:, side]) for part in [pyramid[depth]] for side in (0, 1))
        go = (sums.at_least(rest, left) | (left.hi == 0.0)) & (right.hi > 0.0)
        rest = sums.where(go, sums.add(rest, sums.negative(left)), rest)
        child = child * 2 + go.astype(jnp.int32)
        pyramid = [_half(part, go) for part in pyramid[:depth]]
    return rest, child


def _half(pair: Pair, right: Array) -> Pair:
    width = pair.hi.shape[1] // 2
    return Pair(*(jnp.where(right[:, None], part[:, width:], part[:, :width]) for part in pair))


def _pyramid(children: Pair) -> list[Pair]:
    """The children [k, 16] of nodes, the sums of neighbours [k, 8], and so on to the sums of all [k, 1]."""
    pyramid = [children]
    while pyramid[-1].hi.shape[1] > 1:
        last = pyramid[-1]
        pyramid.append(sums.add(*(Pair(last.hi[:, side::2], last.lo[:, side::2]) for side in (0, 1))))
    return pyramid


def _children(level: Pair, nodes: Int[Array, " k"]) -> Pair:
    """The members [k, 16] of a level under ``nodes`` [k] of the level above; zeros beyond its end."""
    at = nodes[:, None] * FANOUT + jnp.arange(FANOUT, dtype=jnp.int32)[None]
    return Pair(*(part.at[at].get(mode="fill", fill_value=0.0) for part in level))


def _sum_levels(masses: Float[Array, " n"]) -> tuple[Pair, ...]:
    level = sums.exact(masses)
    levels: list[Pair] = []
    while not levels or level.hi.shape[0] > 1:
        rows = (jnp.pad(part, (0, -part.shape[0] % FANOUT)).reshape(-1, FANOUT) for part in level)
        level = Pair(*(part[:, 0] for part in _pyramid(Pair(*rows))[-1]))
        levels.append(level)
    return tuple(levels)


def _unit_pair(key: Key, size: int) -> Pair:
    """Uniform on [0, 1) in steps of 2^-48: the 24 bits of one float32 cannot reach every item beyond 16 million."""
    bits = (jax.random.bits(key, (2, size), jnp.uint32) >> 8).astype(jnp.float32)
    return sums.two_sum(bits[0] * 2.0**-24, bits[1] * 2.0**-48)


def _poisson_size(room: int) -> float:
    """The largest expected size lam with P(size > room) <= 1e-6, by Chernoff: lam - k + k log(k / lam) >= log(1e6)."""
    over, low, high = room + 1, 0.0, float(room)
    for _ in range(50):
        middle = (low + high) / 2
        enough = middle - over + over * math.log(over / middle) >= math.log(1e6)
        low, high = (middle, high) if enough else (low, middle)
    return low
