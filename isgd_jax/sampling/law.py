"""The law: masses on a line, and the tree of their sums by which a place on it is found.

A law lays its masses on a line (along ``order``, if given) and keeps their running sums in a tree of 16 branches, a
cache line each. A draw descends from the root, so it costs O(log n) with few steps; changing a few masses repairs
their ancestors only.

Guarantees:

* every positive mass can be found, down to 2^-40 of the total: sums and queries carry more bits than float32;
* a mass of zero never is, unless every mass is zero: then the law is uniform;
* masses may be as small or as large as float32 goes: those of 1e-40 and those whose sum is beyond it have their shares;
* ``update`` gives bit for bit the law that ``prepare`` would build from the changed masses, where both take the same
  ``scale``;
* on a mesh with explicit axes a law is whole on each device, whatever it was made of;
* a mass that is negative or not finite is refused; where values cannot be seen, inside ``jax.jit``, all probabilities
  are then NaN: never a quiet wrong draw.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from isgd_jax.errors import ArgumentError, check_array, first_wrong
from isgd_jax.gradients.meshes import replicated
from isgd_jax.sampling import double_float
from isgd_jax.sampling.double_float import Pair

__all__ = [
    "Law",
    "LawLike",
    "as_law",
    "at_fractions",
    "capped",
    "check_size",
    "example_at",
    "line_probabilities",
    "order_by",
    "prepare",
    "probabilities",
    "probabilities_of",
    "update",
]

BLOCK = 4
"""Masses in a block at the foot of the tree, which a draw adds up one by one."""

BRANCHES = 16
"""Children of each node. Their running sums lie side by side, in two cache lines: what a draw pays for is lines that
are far away, 32 draws a few hundred of them in a binary tree over a million examples."""

ROWS = 16
"""The number of nodes is a multiple of it, so that the tree can be split over as many devices."""


class Law(NamedTuple):
    """Masses on a line and the tree of their sums; build it with `prepare`, change it with `update`.

    Masses need not sum to one. A law holds 14 bytes an example with an order, 6 without.
    """

    masses: Float[Array, " n"]
    """Of the example ``order[p]`` at each place p of the line, times a power of two (`scale`) that keeps their sums
    within float32: 1 unless the largest is below 2^-32 or above 2^64."""
    sums: Float[Array, "k 16 2"]
    """Nodes of the tree: running sums over 16 children, each the two words of a `Pair`. Node 0 has the total and the
    scale, node 1 is the root, and the levels follow one another, each without gaps."""
    order: Int[Array, " n"] | None
    """The example at each place, a permutation; None where the line runs through the examples as they are numbered."""
    positions: Int[Array, " n"] | None
    """The inverse of ``order``."""

    @property
    def scale(self) -> Float[Array, ""]:
        """What masses were multiplied with: a power of two."""
        return self.sums[0, 1, 0]


LawLike: TypeAlias = Float[Array, " n"] | Law
"""Probabilities [n], or the law prepared from them."""


def prepare(probs: Float[Array, " n"], order: Int[Array, " n"] | None = None) -> Law:
    """The law of any masses, laid along a line. O(n).

    >>> law = prepare(jnp.array([1.0, 3.0, 0.0, 4.0]))
    >>> probabilities(law).tolist()
    [0.125, 0.375, 0.0, 0.5]

    Args:
        probs: probabilities [n], or any masses that are not negative.
        order: a permutation [n] of the examples, such as `order_by` makes; None takes them as they are numbered.

    Raises:
        TypeError: the probabilities or the order are no array, such as a list.
        ValueError: there are no examples, or 2^31 or more; ``order`` is not one number an example; or, where values
            can be seen, a mass is negative or not finite.
    """
    check_array("probs", probs)
    check_size(probs.shape[0])
    _check_masses(probs)
    masses = replicated(probs).astype(jnp.float32)
    masses, scale = double_float.in_range(jnp.where(jnp.isfinite(masses) & (masses >= 0.0), masses, jnp.nan))
    if order is None:
        return Law(masses, _sums(masses, scale), None, None)
    check_array("order", order)
    if order.shape != probs.shape:
        raise ArgumentError(f"order must have one number for each of the {probs.shape[0]} masses, got {order.shape}")
    order = replicated(order).astype(jnp.int32)
    positions = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
    masses = masses[order]
    return Law(masses, _sums(masses, scale), order, positions)


def update(law: Law, indices: Int[Array, " c"], probs: Float[Array, " c"]) -> Law:
    """The law with new masses for some examples; only their ancestors are summed again.

    Donate the law (``jax.jit(update, donate_argnums=0)``) and the change is made in place.

    Args:
        law: as `prepare` made it.
        indices: examples [c]. Those outside 0..n-1 are padding and are dropped; of one given twice, one mass stays.
        probs: their masses [c], on the scale of those that the law was made of.

    Raises:
        TypeError: the indices or their masses are no array, such as a list.
        ValueError: where values can be seen, a mass is negative or not finite.
    """
    check_array("indices", indices)
    check_array("probs", probs)
    _check_masses(probs)
    law, indices, probs = _whole(law), replicated(indices), replicated(probs)
    if not indices.shape[0]:
        return law
    size = law.masses.shape[0]
    at = jnp.where((indices >= 0) & (indices < size), indices.astype(jnp.int32), size)
    if law.positions is not None:
        at = law.positions.at[at].get(mode="fill", fill_value=size)
    given = probs.astype(jnp.float32)
    given = jnp.where(jnp.isfinite(given) & (given >= 0.0), given, jnp.nan) * law.scale
    masses = law.masses.at[at].set(given, mode="drop")
    levels = _levels(size)
    node = jnp.minimum(at, size - 1) // (BLOCK * BRANCHES)  # a node hit twice is summed twice, to the same bits
    blocks = node[:, None] * BRANCHES + jnp.arange(BRANCHES, dtype=jnp.int32)[None]
    totals, sums = _block_totals(lambda place: _mass_at(masses, blocks * BLOCK + place), blocks.shape), law.sums
    for depth in reversed(range(len(levels))):
        nodes = _running(totals)
        sums = sums.at[levels[depth].start + node].set(nodes)
        if depth:
            node = node // BRANCHES
            children = node[:, None] * BRANCHES + jnp.arange(BRANCHES, dtype=jnp.int32)[None]
            last = sums[levels[depth].start + jnp.minimum(children, len(levels[depth]) - 1), -1]
            is_there = children < len(levels[depth])
            totals = Pair(*(jnp.where(is_there, last[..., word], 0.0) for word in (0, 1)))
    # The total as it was added up: read back from the tree, it would cost XLA two copies of the whole of it.
    return law._replace(masses=masses, sums=sums.at[0, 0].set(nodes[0, -1]))


def probabilities(law: Law) -> Float[Array, " n"]:
    """The probability [n] of each example, as the examples are numbered.

    They sum to one but for rounding, and are 1/n each where every mass is zero. A capped law gives inclusion
    probabilities over its size.
    """
    law = _whole(law)
    probs = line_probabilities(law)
    return probs if law.positions is None else probs[law.positions]


def probabilities_of(law: Law, indices: Int[Array, " m"]) -> Float[Array, " m"]:
    """The probability [m] of each of these examples, NaN for indices outside 0..n-1: O(m).

    Args:
        law: as `prepare` made it.
        indices: examples [m]; NaN, not an error, is what an index outside gets, since inside ``jax.jit`` it cannot be
            seen.
    """
    law, indices = _whole(law), replicated(indices)
    size, total = law.masses.shape[0], law.sums[0, 0, 0]
    is_there = (indices >= 0) & (indices < size)
    at = indices if law.positions is None else law.positions[indices]
    probs = jnp.where(total == 0.0, 1.0 / size, law.masses[at] / total)
    return jnp.where(is_there, probs, jnp.nan)


def order_by(*keys: Array) -> Int[Array, " n"]:
    """The permutation that sorts by the first key [n], ties by the second, and so on: an order for a law.

    >>> order_by(jnp.array([1, 0, 1, 0]), jnp.array([0.5, 2.0, 0.1, 1.0])).tolist()
    [3, 1, 2, 0]
    """
    return jnp.lexsort([replicated(key) for key in keys[::-1]]).astype(jnp.int32)


def capped(law: LawLike, *, num_draws: int | float) -> Law:
    """The law with no mass above 1/num_draws of the new total, smaller masses as they are: inclusion probabilities.

    A few rounds of O(n): each lowers the cap until no further mass is above it.

    >>> probabilities(capped(jnp.array([0.8, 0.1, 0.1]), num_draws=2)).tolist()
    [0.5, 0.25, 0.25]

    Args:
        law: prepared by `prepare`, or probabilities [n].
        num_draws: the size, above 0 and at most n; an expected one need not be whole. ``num_draws`` times a probability
            of the result is the probability that the example is in a draw.

    Raises:
        ValueError: ``num_draws`` is out of range, or the law cannot be prepared.
    """
    law = as_law(law)
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

    total = law.sums[0, 0, 0]
    start = (total / num_draws, jnp.int32(0), total > 0.0)
    cap, _, _ = jax.lax.while_loop(lambda state: state[2], lower, start)
    masses = jnp.minimum(law.masses, cap)
    # Far below the largest mass, products of what is left would be lost to float32. A law of tiny masses is scaled up
    # already, and its scale has no room for more.
    raised, factor = double_float.in_range(masses)
    has_room = law.scale <= 1.0
    masses = jnp.where(has_room, raised, masses)
    return law._replace(masses=masses, sums=_sums(masses, law.scale * jnp.where(has_room, factor, 1.0)))


def at_fractions(
    law: Law, numerator: Pair, denominator: Float[Array, "..."], by_mass: Bool[Array, ""] | None = None
) -> tuple[Int[Array, " m"], Float[Array, " m"]]:
    """The places [m] of the line at these fractions of its length, and the probability of each.

    Args:
        law: as `prepare` made it.
        numerator: of the fractions [m].
        denominator: of all, or of each [m].
        by_mass: whether masses count; else all examples are alike. None is True.
    """
    size, total = law.masses.shape[0], _total(law)
    by_mass = total.hi != 0.0 if by_mass is None else by_mass & (total.hi != 0.0)
    at = jnp.where(
        by_mass, _descend(law, _scaled(numerator, denominator, total)), _scaled_index(size, numerator, denominator)
    )
    return at, jnp.where(by_mass, law.masses[at] / total.hi, 1.0 / size)


def as_law(law: LawLike) -> Law:
    return _whole(law) if isinstance(law, Law) else prepare(law)


def example_at(law: Law, at: Int[Array, " m"]) -> Int[Array, " m"]:
    return at if law.order is None else law.order[at]


def line_probabilities(law: Law) -> Float[Array, " n"]:
    total = law.sums[0, 0, 0]
    return jnp.where(total == 0.0, 1.0 / law.masses.shape[0], law.masses / total)


def check_size(size: int) -> int:
    if not 0 < size < 2**31:
        raise ArgumentError(f"a law holds 1 to 2^31 - 1 examples (indices are int32), got {size}; split the data set")
    return size


def _whole(law: Law) -> Law:
    return jax.tree.map(replicated, law)


def _check_masses(masses: Array) -> None:
    """Refuse what is no mass, where values can be seen."""
    wrong = first_wrong(lambda values: (values >= 0) & (values < math.inf), masses)
    if wrong is not None:
        raise ArgumentError(
            f"masses must be at least 0 and finite, got {wrong.value} at {wrong.at}: a score that is none belongs in "
            "proposal.smooth, which sets it aside"
        )


# Inline: traced once for each set of shapes, and written out in the program of whoever calls it.
@partial(jax.jit, inline=True)
def _scaled(numerator: Pair, denominator: Float[Array, "..."], length: Pair) -> Pair:
    step = double_float.divide(length, denominator)
    return double_float.multiply(numerator, Pair(*(jnp.broadcast_to(part, numerator.hi.shape) for part in step)))


@partial(jax.jit, inline=True, static_argnames="size")
def _scaled_index(size: int, numerator: Pair, denominator: Float[Array, "..."]) -> Int[Array, " m"]:
    """The places of the fractions on a line of ``size`` examples that are all alike."""
    length = Pair(jnp.float32(size), jnp.float32(size - int(jnp.finfo(jnp.float32).dtype.type(size))))
    place = _scaled(numerator, denominator, length)
    whole = jnp.floor(place.hi)
    index = whole.astype(jnp.int32) + jnp.floor((place.hi - whole) + place.lo).astype(jnp.int32)
    return jnp.clip(index, 0, size - 1)


@partial(jax.jit, inline=True)
def _descend(law: Law, rest: Pair) -> Int[Array, " m"]:
    """The places on the line where the running sums pass these numbers, from the root down.

    In loops, although their lengths are known: a CPU runs the few small kernels of a body faster than hundreds in line.
    One gather a level: XLA shares out a kernel that reads a large array among threads, which costs it microseconds.
    """
    levels = _levels(law.masses.shape[0])
    starts = jnp.asarray([level.start for level in levels], jnp.int32)

    def down(depth: Int[Array, ""], state: tuple[Pair, Array]) -> tuple[Pair, Array]:
        rest, node = state
        child, rest = _choose(law.sums[starts[depth] + node], rest)
        return rest, node * BRANCHES + child

    start = (rest, jnp.zeros(rest.hi.shape, jnp.int32))
    rest, node = jax.lax.fori_loop(0, len(levels), down, start)
    return _find_in_block(law.masses, rest, node * BLOCK)


def _choose(sums: Float[Array, "m 16 2"], rest: Pair) -> tuple[Int[Array, " m"], Pair]:
    """The first child [m] of these nodes whose running sum is above the rest, and the rest that is left within it.

    A child without mass has the running sum of the one before, so it is never the first; and where roundings have left
    a rest of the whole node or more, the last child with mass is taken.
    """
    high, low = sums[..., 0], sums[..., 1]
    is_passed = double_float.at_least(Pair(*(word[:, None] for word in rest)), Pair(high, low))
    is_passed &= ~double_float.at_least(Pair(high, low), Pair(high[:, -1:], low[:, -1:]))
    child = jnp.sum(is_passed, axis=1, dtype=jnp.int32)  # running sums rise: those that are passed come first
    before = jnp.take_along_axis(sums, jnp.maximum(child - 1, 0)[:, None, None], axis=1)[:, 0]
    before = jnp.where((child > 0)[:, None], before, 0.0)
    return child, double_float.add(rest, double_float.negative(Pair(before[:, 0], before[:, 1])))


def _find_in_block(masses: Float[Array, " n"], rest: Pair, start: Int[Array, " m"]) -> Int[Array, " m"]:
    block = _mass_at(masses, start[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)[None])

    def look(place: Int[Array, ""], state: tuple[Pair, Array, Array]) -> tuple[Pair, Array, Array]:
        rest, found, searching = state
        mass = block[:, place]
        found = jnp.where(searching & (mass > 0.0), start + place, found)
        passed = double_float.at_least(rest, double_float.exact(mass)) | (mass == 0.0)
        rest = double_float.where(searching & passed, double_float.add(rest, double_float.exact(-mass)), rest)
        return rest, found, searching & passed

    state = (rest, start, jnp.ones(start.shape, bool))
    return jax.lax.fori_loop(0, BLOCK, look, state)[1]


def _levels(size: int) -> list[range]:
    """The nodes of each level, from the root down; the children of the last are the blocks of masses."""
    counts = [-(-size // BLOCK)]
    while counts[0] > 1 or len(counts) == 1:
        counts.insert(0, -(-counts[0] // BRANCHES))
    starts, levels = 1, []
    for count in counts[:-1]:
        levels.append(range(starts, starts + count))
        starts += count
    return levels


@partial(jax.jit, inline=True)
def _sums(masses: Float[Array, " n"], scale: Float[Array, ""]) -> Float[Array, "k 16 2"]:
    """The tree over these masses, from the foot up."""
    levels = _levels(masses.shape[0])
    rows = _in_rows(masses, BLOCK)
    totals = _block_totals(lambda place: rows[:, place], (rows.shape[0],))
    made: list[Array] = []
    for _ in levels:
        nodes = _running(Pair(*(_in_rows(word, BRANCHES) for word in totals)))
        made.insert(0, nodes)
        totals = Pair(nodes[:, -1, 0], nodes[:, -1, 1])
    header = jnp.zeros((1, BRANCHES, 2), jnp.float32)
    padding = jnp.zeros((-levels[-1].stop % ROWS, BRANCHES, 2), jnp.float32)
    return _with_header(jnp.concatenate([header, *made, padding]), scale)


def _with_header(sums: Float[Array, "k 16 2"], scale: Float[Array, ""]) -> Float[Array, "k 16 2"]:
    """The tree with the total and the scale in node 0."""
    return sums.at[0, 0].set(sums[1, -1]).at[0, 1, 0].set(scale)


def _in_rows(values: Float[Array, " n"], width: int) -> Float[Array, "r width"]:
    return jnp.pad(values, (0, -values.shape[0] % width)).reshape(-1, width)


def _running(masses: Pair) -> Float[Array, "r 16 2"]:
    """The nodes over children of these masses [r, 16]: added one by one, never in a flat reduction."""

    def add(total: Pair, mass: Pair) -> tuple[Pair, Array]:
        total = double_float.add(total, mass)
        return total, jnp.stack(total, axis=-1)

    nothing = double_float.exact(jnp.zeros(masses.hi.shape[0], jnp.float32))
    return jnp.moveaxis(jax.lax.scan(add, nothing, Pair(masses.hi.T, masses.lo.T))[1], 0, 1)


def _block_totals(masses_at: Callable[[Int[Array, ""]], Float[Array, "..."]], shape: tuple[int, ...]) -> Pair:
    """The sums of blocks, of which ``masses_at(place)`` gives one mass each; one by one, too."""

    def add(place: Int[Array, ""], total: Pair) -> Pair:
        return double_float.add(total, double_float.exact(masses_at(place)))

    return jax.lax.fori_loop(0, BLOCK, add, double_float.exact(jnp.zeros(shape, jnp.float32)))


def _mass_at(masses: Float[Array, " n"], places: Int[Array, "..."]) -> Float[Array, "..."]:
    return masses.at[places].get(mode="fill", fill_value=0.0)


def _total(law: Law) -> Pair:
    return Pair(law.sums[0, 0, 0], law.sums[0, 0, 1])
