"""From probabilities to draws: the prepared law, and pure functions ``(key, law, *, num_draws) -> Draw``.

A law lays its masses on a line (along ``order``, if given), sums them in blocks of 16, a cache line each, and keeps
the sums of the blocks in a binary tree. A draw descends from the root, so it costs O(log n); changing a few masses
repairs their ancestors only.

Guarantees:

* ``Draw.probs`` is the expected count divided by ``num_draws``: the weight ``1 / (N * probs)`` is right for each;
* an index of mass zero is never drawn, unless every mass is zero: then the law is uniform;
* every positive mass can be drawn, down to 2^-40 of the total: sums and queries carry more bits than float32;
* ``update`` gives bit for bit the law that ``prepare`` would build from the changed masses;
* masses that are not finite show as probabilities that are not finite, never as a quiet wrong draw.

All but ``poisson`` and ``without_replacement`` draw in O(num_draws log n) from a prepared law.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from isgd_jax.errors import ArgumentError
from isgd_jax.sampling import double_float
from isgd_jax.sampling.double_float import Pair
from isgd_jax.types import Draw, Key

BLOCK = 16
"""Masses summed one by one at the foot of the tree: 16 float32 are one cache line."""


class Law(NamedTuple):
    """Masses on a line and the tree of their sums; build it with `prepare`, change it with `update`.

    ``masses[p]`` belongs to the example ``order[p]``; ``positions`` is the inverse of ``order``; both are None when the
    line runs through the examples as they are numbered. Masses need not sum to one. ``tree`` [2k] is a heap: entry 1
    the total, entries 2i and 2i+1 the halves of entry i, entries k.. the blocks. The precision is that of a `Pair`.
    """

    masses: Float[Array, " n"]
    tree: Pair
    order: Int[Array, " n"] | None
    positions: Int[Array, " n"] | None


LawLike: TypeAlias = Float[Array, " n"] | Law
"""Probabilities [n], or the law prepared from them."""


def prepare(probs: Float[Array, " n"], order: Int[Array, " n"] | None = None) -> Law:
    """The law of ``probs`` [n] (any non-negative masses), laid along the permutation ``order`` [n]. O(n).

    Raises:
        ValueError: there are no examples, or 2^31 or more.
    """
    _check_size(probs.shape[0])
    masses = probs.astype(jnp.float32)
    if order is None:
        return Law(masses, _tree(masses), None, None)
    order = order.astype(jnp.int32)
    positions = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
    masses = masses[order]
    return Law(masses, _tree(masses), order, positions)


def update(law: Law, indices: Int[Array, " c"], probs: Float[Array, " c"]) -> Law:
    """The law with new masses for ``indices``; only their ancestors are summed again.

    Indices outside 0..n-1 are padding and are dropped. Of an index given twice, one mass stays. Donate the law
    (``jax.jit(update, donate_argnums=0)``) and the change is made in place.
    """
    size, num_blocks = law.masses.shape[0], _num_blocks(law)
    at = jnp.where((indices >= 0) & (indices < size), indices.astype(jnp.int32), size)
    if law.positions is not None:
        at = law.positions.at[at].get(mode="fill", fill_value=size)
    masses = law.masses.at[at].set(probs.astype(jnp.float32), mode="drop")
    blocks = jnp.minimum(at // BLOCK, num_blocks - 1)  # a block hit twice is summed twice, to the same bits
    node = blocks + num_blocks
    tree = _set(law.tree, node, _block_sums(lambda place: _mass_at(masses, blocks * BLOCK + place), blocks.shape))

    def climb(_: Int[Array, ""], state: tuple[Pair, Array]) -> tuple[Pair, Array]:
        tree, node = state
        node = node // 2
        return _set(tree, node, double_float.add(_get(tree, 2 * node), _get(tree, 2 * node + 1))), node

    tree, _ = jax.lax.fori_loop(0, _depth(num_blocks), climb, (tree, node))
    return law._replace(masses=masses, tree=tree)


def probabilities(law: Law) -> Float[Array, " n"]:
    """The probability [n] of each example, as the examples are numbered."""
    probs = _line_probabilities(law)
    return probs if law.positions is None else probs[law.positions]


def probabilities_of(law: Law, indices: Int[Array, " m"]) -> Float[Array, " m"]:
    """The probability [m] of each of these examples: O(m)."""
    at = indices if law.positions is None else law.positions[indices]
    total = law.tree.hi[1]
    return jnp.where(total == 0.0, 1.0 / law.masses.shape[0], law.masses[at] / total)


def order_by(*keys: Array) -> Int[Array, " n"]:
    """The permutation that sorts by the first key [n], ties by the second, and so on: an order for a law."""
    return jnp.lexsort(keys[::-1]).astype(jnp.int32)


def independent(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """Draws that know nothing of each other, each by the law: the paper's sampler."""
    return _draw(law, _unit_pair(key, num_draws), 1)


def stratified(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """The line cut into ``num_draws`` equal masses, one draw in each: never more variance than `independent`.

    How much less depends on the order: neighbours on the line should have similar gradients. Source: Cochran,
    "Sampling Techniques", chapter 5, for strata; laying them along an order of gradients is ours.
    """
    return _draw(law, _one_a_stratum(key, num_draws), num_draws)


def systematic(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """One random offset, then equal steps along the line: each index is drawn floor or ceil of its expected count.

    Its variance is not bounded by that of `independent`: an order with the period of the step defeats it. Source:
    Madow, "On the theory of systematic sampling" (1949).
    """
    offset = Pair(*(jnp.broadcast_to(part, (num_draws,)) for part in _unit_pair(key, 1)))
    strata = double_float.exact(jnp.arange(num_draws, dtype=jnp.float32))
    return _draw(law, double_float.add(strata, offset), num_draws)


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

    Raises:
        ValueError: ``num_draws`` exceeds the number of examples.
    """
    law, size = _as_law(law), _poisson_size(num_draws)
    if num_draws > law.masses.shape[0]:
        raise ArgumentError(f"poisson draws distinct indices: num_draws={num_draws} exceeds n={law.masses.shape[0]}")
    probs = _line_probabilities(capped(law, num_draws=size))
    choose, shuffle = jax.random.split(key)
    included = ~double_float.at_least(_unit_pair(choose, probs.shape[0]), double_float.exact(probs * size))
    priority = jnp.where(included, jax.random.uniform(shuffle, included.shape, jnp.float32), -1.0)
    priority, at = jax.lax.top_k(priority, num_draws)
    return Draw(_example(law, at.astype(jnp.int32)), probs[at] * (size / num_draws), priority >= 0.0)


def uniform(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """Draws with replacement, all examples alike; of the law it only takes n."""
    size = (law.masses if isinstance(law, Law) else law).shape[0]
    indices = jax.random.randint(key, (num_draws,), 0, _check_size(size), dtype=jnp.int32)
    return Draw(indices, jnp.full((num_draws,), 1.0 / size, jnp.float32), jnp.ones((num_draws,), bool))


def uniform_strata(key: Key, law: LawLike, *, num_draws: int) -> Draw:
    """All examples alike, the law's line cut into ``num_draws`` equal parts, one draw in each; masses do not matter.

    Never more variance than `uniform`: what is left of a good order when its probabilities are not to be trusted. Ours.
    """
    law = _as_law(law)
    at = _scaled_index(law, _one_a_stratum(key, num_draws), num_draws)
    probs = jnp.full((num_draws,), 1.0 / law.masses.shape[0], jnp.float32)
    return Draw(_example(law, at), probs, jnp.ones((num_draws,), bool))


def capped(law: LawLike, *, num_draws: int | float) -> Law:
    """The law with no mass above 1/num_draws of the new total, smaller masses as they are: inclusion probabilities.

    Raises:
        ValueError: ``num_draws`` is not in 1..n.
    """
    law = _as_law(law)
    if not 0 < num_draws <= law.masses.shape[0]:
        raise ArgumentError(
            f"num_draws must lie in 1..n={law.masses.shape[0]} to draw distinct indices, got {num_draws}"
        )

    def lower(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        cap, count, _ = state
        over = law.masses >= cap
        rest, new_count = double_float.tree_sum(jnp.where(over, 0.0, law.masses)), over.sum(dtype=jnp.int32)
        room = num_draws - new_count.astype(jnp.float32)
        new_cap = jnp.where((rest > 0.0) & (room > 0.0), rest / room, cap)
        return new_cap, new_count, new_count > count

    total = law.tree.hi[1]
    start = (total / num_draws, jnp.int32(0), total > 0.0)
    cap, _, _ = jax.lax.while_loop(lambda state: state[2], lower, start)
    masses = jnp.minimum(law.masses, cap)
    return law._replace(masses=masses, tree=_tree(masses))


def _as_law(law: LawLike) -> Law:
    return law if isinstance(law, Law) else prepare(law)


def _check_size(size: int) -> int:
    if not 0 < size < 2**31:
        raise ArgumentError(f"a law holds 1 to 2^31 - 1 examples (indices are int32), got {size}; split the data set")
    return size


def _draw(law: LawLike, numerator: Pair, denominator: int) -> Draw:
    """The examples at the fractions ``numerator / denominator`` [m] of the line."""
    law = _as_law(law)
    total = _total(law)
    nothing = total.hi == 0.0
    at = jnp.where(nothing, _scaled_index(law, numerator, denominator), _descend(law, numerator, denominator))
    probs = jnp.where(nothing, 1.0 / law.masses.shape[0], law.masses[at] / total.hi)
    return Draw(_example(law, at), probs, jnp.ones(at.shape, bool))


def _example(law: Law, at: Int[Array, " m"]) -> Int[Array, " m"]:
    return at if law.order is None else law.order[at]


def _line_probabilities(law: Law) -> Float[Array, " n"]:
    total = law.tree.hi[1]
    return jnp.where(total == 0.0, 1.0 / law.masses.shape[0], law.masses / total)


def _scaled(numerator: Pair, denominator: int, length: Pair) -> Pair:
    step = double_float.divide(length, jnp.float32(denominator))
    return double_float.multiply(numerator, Pair(*(jnp.broadcast_to(part, numerator.hi.shape) for part in step)))


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
    rest = _scaled(numerator, denominator, _total(law))
    num_blocks = _num_blocks(law)

    def halve(_: Int[Array, ""], state: tuple[Pair, Array]) -> tuple[Pair, Array]:
        # Right when the rest has reached the left half (prefix sums, side="right"); never into a half without mass.
        rest, node = state
        left, right = _get(law.tree, 2 * node), law.tree.hi[2 * node + 1]
        go = (double_float.at_least(rest, left) | (left.hi == 0.0)) & (right > 0.0)
        return double_float.where(go, double_float.add(rest, double_float.negative(left)), rest), 2 * node + go.astype(
            jnp.int32
        )

    rest, node = jax.lax.fori_loop(0, _depth(num_blocks), halve, (rest, jnp.ones(rest.hi.shape, jnp.int32)))
    return _find_in_block(law.masses, rest, (node - num_blocks) * BLOCK)


def _find_in_block(masses: Float[Array, " n"], rest: Pair, start: Int[Array, " m"]) -> Int[Array, " m"]:
    def look(place: Int[Array, ""], state: tuple[Pair, Array, Array]) -> tuple[Pair, Array, Array]:
        rest, found, searching = state
        mass = _mass_at(masses, start + place)
        found = jnp.where(searching & (mass > 0.0), start + place, found)
        passed = double_float.at_least(rest, double_float.exact(mass)) | (mass == 0.0)
        rest = double_float.where(searching & passed, double_float.add(rest, double_float.exact(-mass)), rest)
        return rest, found, searching & passed

    state = (rest, start, jnp.ones(start.shape, bool))
    return jax.lax.fori_loop(0, BLOCK, look, state)[1]


def _tree(masses: Float[Array, " n"]) -> Pair:
    size = masses.shape[0]
    num_blocks = 1 << (-(-size // BLOCK) - 1).bit_length()
    rows = jnp.pad(masses, (0, num_blocks * BLOCK - size)).reshape(num_blocks, BLOCK)
    level = _block_sums(lambda place: rows[:, place], (num_blocks,))
    levels = [level]
    while levels[0].hi.shape[0] > 1:
        levels.insert(0, double_float.add(*(Pair(*(part[side::2] for part in levels[0])) for side in (0, 1))))
    levels.insert(0, double_float.exact(jnp.zeros(1, jnp.float32)))  # entry 0 of a heap is not used
    return Pair(*(jnp.concatenate(parts) for parts in zip(*levels, strict=True)))


def _block_sums(masses_at: Callable[[Int[Array, ""]], Float[Array, " k"]], shape: tuple[int, ...]) -> Pair:
    """The sums [k] of blocks, of which ``masses_at(place)`` gives one mass each. One by one: never a flat reduction."""

    def add(place: Int[Array, ""], total: Pair) -> Pair:
        return double_float.add(total, double_float.exact(masses_at(place)))

    return jax.lax.fori_loop(0, BLOCK, add, double_float.exact(jnp.zeros(shape, jnp.float32)))


def _mass_at(masses: Float[Array, " n"], places: Int[Array, " k"]) -> Float[Array, " k"]:
    return masses.at[places].get(mode="fill", fill_value=0.0)


def _get(tree: Pair, nodes: Int[Array, " k"]) -> Pair:
    return Pair(tree.hi[nodes], tree.lo[nodes])


def _set(tree: Pair, nodes: Int[Array, " k"], values: Pair) -> Pair:
    return Pair(*(part.at[nodes].set(value, mode="drop") for part, value in zip(tree, values, strict=True)))


def _total(law: Law) -> Pair:
    return Pair(law.tree.hi[1], law.tree.lo[1])


def _num_blocks(law: Law) -> int:
    return law.tree.hi.shape[0] // 2


def _depth(num_blocks: int) -> int:
    return num_blocks.bit_length() - 1


def _one_a_stratum(key: Key, num_draws: int) -> Pair:
    """A random place in each of ``num_draws`` strata of length one."""
    return double_float.add(double_float.exact(jnp.arange(num_draws, dtype=jnp.float32)), _unit_pair(key, num_draws))


def _unit_pair(key: Key, size: int) -> Pair:
    """Uniform on [0, 1) in steps of 2^-48: the 24 bits of one float32 cannot reach every item beyond 16 million."""
    bits = (jax.random.bits(key, (2, size), jnp.uint32) >> 8).astype(jnp.float32)
    return double_float.two_sum(bits[0] * 2.0**-24, bits[1] * 2.0**-48)


def _poisson_size(room: int) -> float:
    """The largest expected size lam with P(size > room) <= 1e-6, by Chernoff: lam - k + k log(k / lam) >= log(1e6)."""
    over, low, high = room + 1, 0.0, float(room)
    for _ in range(50):
        middle = (low + high) / 2
        enough = middle - over + over * math.log(over / middle) >= math.log(1e6)
        low, high = (middle, high) if enough else (low, middle)
    return low
