"""One lazy leaf: the gradients of a batch in one parameter, and what can be asked of them without forming them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.random import define_prng_impl
from jax.sharding import PartitionSpec
from jaxtyping import Float

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients import costs
from isgd_jax.gradients.factors import OneHot, Windows, conjugate, einsum, products, wide
from isgd_jax.gradients.slices import by_slices
from isgd_jax.gradients.squares import (
    Rows,
    Squares,
    has_lost,
    largest,
    over,
    power_of_two,
    square_of_scaled,
    sum_squares,
    sums_of_squares,
)
from isgd_jax.gradients.terms import (
    Outer,
    factor_rows,
    fold,
    gram_pair,
    gram_squares,
    inner_term,
    is_single_row,
    shape,
    single_row_squares,
    unit_factors,
    weighted_term,
)

__all__ = [
    "ANYWHERE", "Factored", "Grads", "formed", "formed_squares", "gram_of", "guard_of", "how_squared", "inner_of",
    "is_cheaper_formed", "is_factored", "is_plain", "leaves_of", "map_leaves", "scaled_squares", "shapes",
    "squares_of_each", "stacked", "total_of", "weighted_sum",
]  # fmt: skip

ANYWHERE = PartitionSpec()
"""Nothing is said of a placement."""


@dataclass(frozen=True)
class Factored:
    """A lazy leaf: the sum of ``terms``, ``formed`` [b, *shape], and ``shared`` [*shape], the same for all examples.

    Attributes:
        terms: contractions whose factors are held; see `terms.Outer`.
        shape: of the parameter.
        dtype: of the parameter.
        formed: what could not be cut, for each example; None if there is none.
        shared: what is the same for all examples, such as the gradient of a penalty; None if there is none.

    Every array inside but ``shared`` has the leading axis b. A lazy leaf is a pytree, so that it passes through
    `jax.jit` and loops; to scale its arrays would scale each factor, which ``guard`` refuses.
    """

    terms: tuple[Outer, ...]
    shape: tuple[int, ...]
    dtype: Any
    formed: Any = None
    shared: Any = None
    spec: PartitionSpec = ANYWHERE
    """How the parameter is split, where axes of a mesh are explicit."""
    guard: Any = None
    """See `guard_of`; of leaves that leave this library."""

    @property
    def batch_size(self) -> int:
        """The number of examples, b."""
        return self.formed.shape[0] if self.formed is not None else self.terms[0].right.shape[0]


jax.tree_util.register_dataclass(
    Factored, data_fields=["terms", "formed", "shared", "guard"], meta_fields=["shape", "dtype", "spec"]
)


def _refuse(*_: Any) -> Any:
    raise NotImplementedError("a guard is no key")


_GUARD = define_prng_impl(
    key_shape=(0,),
    seed=_refuse,
    split=_refuse,
    random_bits=_refuse,
    fold_in=_refuse,
    name="lazy gradient",
    tag="a lazy gradient, its arrays are factors: importance_weighting stands first in the chain, and "
    "isgd_jax.weighted_mean makes an ordinary gradient",
)


def guard_of(b: int) -> Array:
    """[b, 1] values of no bytes that take part in no arithmetic.

    Arrays of typed keys go through `jax.jit`, `jax.vmap`, loops and indexing, as factors do. Whoever scales, adds or
    clips all arrays of a lazy gradient, and so each factor, meets an error of JAX that names the type, which says what
    to do.
    """
    return jax.random.wrap_key_data(jnp.zeros((b, 1, 0), jnp.uint32), impl=_GUARD)


Grads: TypeAlias = Any
"""Per-example gradients: a tree like the parameters, every leaf a `Factored` or an array ``[b, *param.shape]``."""


def is_factored(x: Any) -> bool:
    """Whether a leaf is lazy; for ``is_leaf`` of `jax.tree.map`, which would otherwise walk into its factors."""
    return isinstance(x, Factored)


def map_leaves(function: Any, grads: Grads) -> Any:
    """A tree like the parameters, of a function of each leaf, lazy or stacked."""
    return jax.tree.map(function, grads, is_leaf=is_factored)


def leaves_of(grads: Grads) -> list[Any]:
    """All leaves, lazy or stacked; at least one."""
    leaves = jax.tree.leaves(grads, is_leaf=is_factored)
    if not leaves:
        raise ArgumentError("the gradients have no leaves, so neither batch size nor norms: are there any parameters?")
    return leaves


def total_of(arrays: Sequence[Array]) -> Array:
    """The sum of at least one array."""
    return sum(arrays[1:], start=arrays[0])


def shapes(leaf: Factored) -> list[costs.Shape]:
    """What `costs` counts with, of each term."""
    return [shape(term) for term in leaf.terms]


def _by_gram(leaf: Factored) -> bool:
    """Whether the norm of a leaf is asked pair by pair: its terms are laid out alike, and it is cheaper."""
    alike = all(term.axes == leaf.terms[0].axes for term in leaf.terms)
    return leaf.formed is None and alike and costs.prefers_gram(shapes(leaf))


def is_plain(leaf: Factored) -> bool:
    """Whether a leaf is terms alone."""
    return leaf.formed is None and leaf.shared is None


def how_squared(leaf: Factored) -> str:
    """In words, how the norm of a leaf is asked."""
    if not _by_gram(leaf):
        return "product"
    return "norms" if all(term.right.shape[2] == 1 for term in leaf.terms) else "Gram"


def is_cheaper_formed(leaf: Factored) -> bool:
    """Whether norms and a mean together are cheaper of the leaf formed than each asked of the factors."""
    return is_plain(leaf) and costs.prefers_formed(shapes(leaf))


def formed(leaf: Factored) -> Array:
    """The leaf formed, [b, *shape] in its dtype, by slices where windows are to be written out."""
    if not any(isinstance(term.left, Windows) for term in leaf.terms):
        return stacked(leaf, None).astype(leaf.dtype)  # all are kept, and there are no windows to write out: no slices
    return _in_slices(lambda part: stacked(part, None), leaf).astype(leaf.dtype)


def _in_slices(function: Any, leaf: Factored) -> Any:
    """``function(leaf)``, on so few examples at a time that their products stay in the cache."""
    apart = replace(leaf, shared=None, guard=None)
    return by_slices(lambda part: function(replace(part, shared=leaf.shared)), apart, costs.slice_size(shapes(leaf)))


def _squares_of(leaf: Factored, precision: Any) -> Squares:
    """Squared norms of a leaf in factors, and the sums of the sizes of what was added, where that can cancel."""
    if not _by_gram(leaf):
        return formed_squares(leaf, precision)
    squares = gram_squares(leaf.terms, precision)
    return squares if leaf.shared is None else _with_shared(leaf, squares, precision)


def squares_of_each(leaves: Sequence[Any], precision: Any) -> list[Squares]:
    """Squared norms of leaves, and the sums of the sizes of what was added, where that can cancel.

    Those that are stacked, or factors of one row, share conditions, see `sums_of_squares`.
    As many together as stay near in the cache, since what waits for a condition is held until then.
    """
    found: dict[int, Squares] = {}
    for group in _within_the_cache({at: rows for at, leaf in enumerate(leaves) if (rows := _plain_rows(leaf))}):
        squares = iter(sums_of_squares([rows for asked in group.values() for rows in asked]))
        for at, asked in group.items():
            found[at] = next(squares) if len(asked) == 1 else single_row_squares(next(squares), next(squares))
    return [found[at] if at in found else _squares_of(leaf, precision) for at, leaf in enumerate(leaves)]


def _plain_rows(leaf: Any) -> list[Rows]:
    """The arrays whose rows' squares are all that the norm of a leaf asks for, two of which are multiplied; or none."""
    if not is_factored(leaf):
        return [Rows(leaf.astype(wide(leaf.dtype)), is_slopes=True)]
    return factor_rows(leaf.terms[0]) if is_plain(leaf) and is_single_row(leaf.terms) and _by_gram(leaf) else []


def _within_the_cache(asked: dict[int, list[Rows]]) -> list[dict[int, list[Rows]]]:
    """The same in groups, each of at most `costs.Machine.part` bytes, or of one leaf."""
    groups: list[dict[int, list[Rows]]] = []
    room = 0
    for at, rows in asked.items():
        size = sum(part.array.size * part.array.dtype.itemsize for part in rows)
        if size > room:
            groups.append({})
            room = costs.machine().part
        groups[-1][at] = rows
        room -= size
    return groups


def _with_shared(leaf: Factored, squares: Squares, precision: Any) -> Squares:
    """``‖A + S‖² = ‖A‖² + 2⟨A, S⟩ + ‖S‖²``, of the terms' sum A and the shared S, each over its own scale."""
    own = sum_squares(leaf.shared.astype(wide(leaf.dtype))[None])
    unit = over(leaf.shared.astype(wide(leaf.dtype)), own.scale[0])
    each = squares.scale[:, None, None, None]
    terms = tuple(replace(term, right=over(term.right.astype(wide(term.right.dtype)), each)) for term in leaf.terms)
    scale = jnp.maximum(squares.scale, own.scale)
    mine, yours = squares.scale / scale, own.scale / scale
    cross = 2 * inner_of(replace(leaf, terms=terms, shared=None), unit, precision) * mine * yours
    values, common = squares.values * square_of_scaled(mine), own.values * square_of_scaled(yours)
    sizes = values if squares.sizes is None else squares.sizes * square_of_scaled(mine)
    return Squares(scale, values + cross + common, sizes + jnp.abs(cross) + common)


def formed_squares(leaf: Factored, precision: Any) -> Squares:
    """Squared norms by the leaf's products."""
    return _in_slices(lambda part: sum_squares(_products(part, precision)), leaf)


def scaled_squares(leaf: Any, scale: Array, precision: Any) -> Squares:
    """Squared norms of the leaf times ``scale``, which is shaped like the parameter, entry by entry."""
    if not is_factored(leaf):
        return sum_squares(_times(leaf.astype(wide(leaf.dtype)), scale))
    if is_plain(leaf) and is_single_row(leaf.terms):  # Σ_io |x_i|² |s_io|² |δ_o|²
        return _scaled_outer(leaf, leaf.terms[0], scale, precision)
    return _in_slices(lambda part: sum_squares(_times(stacked(part, precision), scale)), leaf)


def _scaled_outer(leaf: Factored, term: Outer, scale: Array, precision: Any) -> Squares:
    """Of one outer product: the squares of the factors, contracted with the squares of ``scale``."""
    scale = scale.astype(wide(scale.dtype))
    unit = power_of_two(largest(scale, range(scale.ndim)))
    each, left, right = unit_factors(term)
    square = Outer(square_of_scaled(left), square_of_scaled(right), term.axes)
    values = inner_of(replace(leaf, terms=(square,)), square_of_scaled(over(scale, unit)), precision)
    return Squares(each * unit, values)


def _times(array: Array, scale: Array) -> Array:
    with jax.numpy_dtype_promotion("standard"):
        return array * scale.astype(wide(scale.dtype))[None]


def _products(leaf: Any, precision: Any) -> Array:
    """A leaf formed, its axes in the parameter's order only where that matters: for sums of several parts."""
    if is_factored(leaf) and is_plain(leaf) and len(leaf.terms) == 1:
        return _product(leaf.terms[0], precision)
    return stacked(leaf, precision)


def _product(term: Outer, precision: Any) -> Array:
    return products(term.left, term.right, precision, is_rounded=term.is_rounded)


def stacked(leaf: Any, precision: Any) -> Array:
    """The leaf formed, [b, *shape], in float32 or wider."""
    if not is_factored(leaf):
        return leaf.astype(wide(leaf.dtype))
    rows = [term for term in leaf.terms if _is_rows(term)] if len(leaf.terms) > 1 else []
    others = [term for term in leaf.terms if not any(term is other for other in rows)]
    parts = [fold(_product(term, precision), term.axes, leaf.shape) for term in others]
    parts += [] if leaf.formed is None else [leaf.formed.astype(wide(leaf.dtype))]
    if leaf.shared is not None:
        parts.append(jnp.broadcast_to(leaf.shared.astype(wide(leaf.dtype)), (leaf.batch_size, *leaf.shape)))
    if not parts:
        return total_of([fold(_product(term, precision), term.axes, leaf.shape) for term in rows])
    return reduce(_with_rows, rows, total_of(parts))


def _is_rows(term: Outer) -> bool:
    """Whether a term is rows of the parameter, by index: of a table that is used otherwise too."""
    return isinstance(term.left, OneHot) and [role for _, role in term.axes] == ["i"] + ["o"] * (len(term.axes) - 1)


def _with_rows(dense: Array, term: Outer) -> Array:
    """A stacked array and rows that are added to it, with no array of zeros to collect them in."""

    def add(one: Array, rows: Array, values: Array) -> Array:
        return one.at[rows].add(values.astype(one.dtype).reshape(-1, *one.shape[1:]), mode="drop")

    return jax.vmap(add)(dense, term.left.indices[:, 0], term.right[:, 0])


def weighted_sum(leaf: Any, weights: Float[Array, " b"], precision: Any) -> Array:
    """``Σ_b weights[b] · g_b`` of one leaf, lazy or stacked, not yet rounded to the parameter's dtype."""
    if not is_factored(leaf):
        return _weighted_rows(weights, leaf, precision)
    parts = [weighted_term(term, leaf.shape, weights, precision) for term in leaf.terms]
    parts += [] if leaf.formed is None else [_weighted_rows(weights, leaf.formed, precision)]
    parts += (
        []
        if leaf.shared is None
        else [jnp.sum(weights.astype(wide(leaf.dtype))) * leaf.shared.astype(wide(leaf.dtype))]
    )
    return total_of(parts)


def _weighted_rows(weights: Float[Array, " b"], rows: Array, precision: Any) -> Array:
    """``Σ_b weights[b] · rows[b]``; by a sum where a matrix product would write rows anew, in float32."""
    if not costs.machine().as_written:
        return einsum("b,b...->...", weights, rows, precision=precision)
    with jax.numpy_dtype_promotion("standard"):
        dtype = wide(jnp.promote_types(weights.dtype, rows.dtype))
    return jnp.sum(lax.expand_dims(weights, range(1, rows.ndim)).astype(dtype) * rows.astype(dtype), axis=0)


def gram_of(leaf: Any, precision: Any) -> Float[Array, "b b"]:
    """Inner products between the gradients of all pairs of examples, in this leaf.

    By pairs of rows where that is cheaper, and by the products where any sum of pairs has cancelled beside the two
    norms, as `norms` has it.
    """

    def formed() -> Array:
        flat = stacked(leaf, precision)
        flat = flat.reshape(flat.shape[0], math.prod(flat.shape[1:]))  # -1 cannot be told of an empty batch
        return jnp.real(einsum("ap,bp->ab", flat, conjugate(flat), precision=precision))

    if not (is_factored(leaf) and costs.prefers_batch_gram(shapes(leaf)) and is_plain(leaf)):
        return formed()
    pairs = [gram_pair(one, other, precision) for one in leaf.terms for other in leaf.terms]
    products, sizes = (total_of(parts) for parts in zip(*pairs, strict=True))
    if is_single_row(leaf.terms) or not leaf.batch_size:
        return products
    lost = jnp.any(has_lost(products, sizes))
    return lax.cond(lost, lambda: formed().astype(products.dtype), lambda: products)


def inner_of(leaf: Any, other: Array, precision: Any) -> Float[Array, " b"]:
    """Inner products of each example's gradient, in this leaf, with an array shaped like the parameter."""
    if not is_factored(leaf):
        flat = leaf.reshape(leaf.shape[0], -1)
        return jnp.real(einsum("bp,p->b", flat, conjugate(other.reshape(-1)), precision=precision))
    parts = [inner_term(term, other, precision) for term in leaf.terms]
    parts += [] if leaf.formed is None else [inner_of(leaf.formed, other, precision)]
    parts += [] if leaf.shared is None else [inner_of(leaf.shared[None], other, precision)]
    return total_of(parts)
