"""One term of a factored gradient: a contraction whose two factors are kept, and what can be asked of it alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Inexact

from isgd_jax.gradients import costs
from isgd_jax.gradients.factors import (
    Factor,
    OneHot,
    Windows,
    as_one_example,
    conjugate,
    einsum,
    likeness,
    pulled,
    row_sizes,
    total,
    wide,
)
from isgd_jax.gradients.meshes import spec_of
from isgd_jax.gradients.squares import (
    Rows,
    Squares,
    abs_square,
    largest,
    over,
    power_of_two,
    square_of_scaled,
    sums_of_squares,
)

__all__ = [
    "Axes",
    "Outer",
    "factor_rows",
    "fold",
    "gram_pair",
    "gram_squares",
    "inner_term",
    "is_single_row",
    "shape",
    "single_row_squares",
    "stacked_terms",
    "unfold",
    "unit_factors",
    "weighted_term",
]

Axes: TypeAlias = tuple[tuple[int, str], ...]
"""A parameter's axes in order, split as finely as needed: (size, "k" shared | "w", "i" left factor's | "o" right's)."""


@dataclass(frozen=True)
class Outer:
    """One contraction, ``G[b, k, (w, i), o] = Σ_t left[b, k, t, (w, i)] · right[b, k, t, o]``, laid out by ``axes``.

    A dense layer has one row an example where it sees one vector, T where it sees a sequence: ``left`` are its inputs,
    ``right`` the slopes of its outputs. k are axes that inputs and slopes share, such as the groups of a convolution or
    the heads of a layer with a matrix each; they are not multiplied with each other. What the gradient would hold, i·o
    numbers an example, are t·(i + o) here.
    """

    left: Factor
    right: Any
    axes: Axes
    is_rounded: bool = False
    """Whether the program rounds the product to bfloat16, so that ours may be, see `costs.Machine.as_written`."""


jax.tree_util.register_dataclass(Outer, data_fields=["left", "right"], meta_fields=["axes", "is_rounded"])


def shape(term: Outer) -> costs.Shape:
    """What `costs` counts with."""
    b, k, t, i = term.left.shape
    return costs.Shape(b, k, t, i, term.right.shape[-1], type(term.left).__name__, term.right.dtype.itemsize)


_FAR = 1e15
"""Rows larger than this, or smaller than one over it, are not multiplied with each other: float32 ends at 1e38."""

_FARTHEST = 2.0**50
"""What rows are scaled by at most: of two scales XLA makes their product where rows are constant, which must be a
float32 for rows of zeros to stay zero. Whether larger and smaller rows are right is `_any_far`'s to say."""

_NEVER_SAFE = 1e30
"""A size beside which every square has cancelled."""


def gram_squares(terms: Sequence[Outer], precision: Any) -> Squares:
    """Squared norms of the sum of the terms, pair by pair; the sums of the pairs' sizes, where these can cancel.

    ‖Σ_t x_t ⊗ δ_t‖² = Σ_ts (x_t·x_s)(δ_t·δ_s): b·k·t²·(i + o) multiplications for a term of t rows, against b·k·t·i·o
    to form the product, so it is the cheaper way for short sequences and wide layers; `costs` decides. With one row it
    is ‖x‖²‖δ‖², and nothing can cancel. Several terms of one parameter, from a weight that is used twice, bring the
    inner products between them.

    The right factors carry the size of the left one's rows, over the scale. Rows of the left factors multiply each
    other as they are: where any that counts is out of range, sizes are so large that the caller forms the products.

    Args:
        terms: of one parameter, laid out alike.
        precision: of the matrix products. A factor is rounded alike wherever it stands, so the sum is the squared norm
            of a gradient of rounded factors, as a product in this precision has it too.

    Returns:
        The squares, over the scale of each example; where pairs can cancel also ``sizes``, the sum of the pairs without
        their signs, of which the rounding is about 2^-24.
    """
    first = terms[0]
    if is_single_row(terms):
        return single_row_squares(*sums_of_squares(factor_rows(first)))
    left_sizes, bounds, scale, rights = _scaled(terms)
    if len(terms) == 1 and isinstance(first.left, OneHot):
        return Squares(scale, _rows_squares(first.left, rights[0], precision))
    squares, sizes = [], []
    for place, one in enumerate(terms):
        for times, at in zip([1] + [2] * len(terms), range(place, len(terms)), strict=False):
            other = conjugate(rights[at])
            alike = einsum("bkto,bkso->bkts", rights[place], other, precision=precision)
            like = likeness(one.left, conjugate(terms[at].left), precision)
            like = like.astype(wide(like.dtype))
            like = over(over(like, left_sizes[place][..., :, None]), left_sizes[at][..., None, :])
            pairs = times * _real_product(alike, like)
            squares.append(jnp.sum(pairs, axis=(1, 2, 3)))
            sizes.append(jnp.sum(jnp.abs(pairs), axis=(1, 2, 3)))
    far = _any_far(left_sizes, bounds, scale)
    values, sums = (sum(x[1:], start=x[0]) for x in (squares, sizes))
    return Squares(scale, jnp.where(far, 0, values), jnp.where(far, _NEVER_SAFE, sums))


def is_single_row(terms: Sequence[Outer]) -> bool:
    """Whether the sum is one outer product an example, so that its norm is that of its factors."""
    first = terms[0]
    return len(terms) == 1 and first.left.shape[2] == 1 and not isinstance(first.left, OneHot | Windows)


def factor_rows(term: Outer) -> list[Rows]:
    """What is asked of the two factors of a single row."""
    left, right = term.left.astype(wide(term.left.dtype)), term.right.astype(wide(term.right.dtype))
    return [Rows(left, 3), Rows(right, 3, is_slopes=True)]


def single_row_squares(rows: Squares, slopes: Squares) -> Squares:
    """``Σ_k ‖x_k‖²‖δ_k‖²`` of factors [b, k, 1, ...], each row over a scale of its own.

    Args:
        rows: squares of the left factor's [b, k, 1].
        slopes: of the right one's.
    """
    with jax.numpy_dtype_promotion("standard"):
        scales, values = rows.scale * slopes.scale, rows.values * slopes.values  # 0 or infinite where the norm is
    scale = power_of_two(jnp.max(scales, axis=(1, 2)))
    return Squares(scale, jnp.sum(values * square_of_scaled(over(scales, scale[:, None, None])), axis=(1, 2)))


def unit_factors(term: Outer) -> tuple[Array, Array, Array]:
    """The scale of each example, and factors of a single row, whose product over the scale is theirs.

    Their largest entries are about 1, so that squares stay in their type. The left factor is an array.
    """
    left, right = term.left.astype(wide(term.left.dtype)), term.right.astype(wide(term.right.dtype))
    rows, slopes = (power_of_two(largest(x, (3,))) for x in (left, right))
    with jax.numpy_dtype_promotion("standard"):
        scales = rows * slopes
    scale = power_of_two(jnp.max(scales, axis=(1, 2)))
    shares = over(scales, scale[:, None, None])[..., None]
    return scale, over(left, rows[..., None]), over(right, slopes[..., None]) * shares.astype(right.dtype)


def _scaled(terms: Sequence[Outer]) -> tuple[list[Array], list[Array], Array, list[Array]]:
    """Sizes of the left factors' rows, bounds on each row's product, their scale; right factors times sizes over it."""
    found = [row_sizes(term.left) for term in terms]
    left_sizes = [jnp.clip(power_of_two(rows), 1 / _FARTHEST, _FARTHEST) for rows in found]
    # bfloat16 holds the powers of two of float32, so it can stay.
    rights = [x if x.dtype == jnp.bfloat16 else x.astype(wide(x.dtype)) for x in (term.right for term in terms)]
    highest = [largest(right, (3,)).astype(wide(right.real.dtype)) for right in rights]
    with jax.numpy_dtype_promotion("standard"):
        bounds = [rows * high for rows, high in zip(found, highest, strict=True)]
        scale = power_of_two(largest(jnp.concatenate(bounds, axis=2), (1, 2)))
    each = scale[:, None, None, None]
    rights = [over(over(x, 1 / rows[..., None]), each) for rows, x in zip(left_sizes, rights, strict=True)]
    return left_sizes, bounds, scale, rights


def _any_far(left_sizes: Sequence[Array], bounds: Sequence[Array], scale: Array) -> Array:
    """Whether any row is too large to multiply with others, or too small and counts beside the largest."""
    found = [
        (rows > _FAR) | ((rows < 1 / _FAR) & (bound > 1e-8 * scale[:, None, None]))
        for rows, bound in zip(left_sizes, bounds, strict=True)
    ]
    return sum((jnp.any(far, axis=(1, 2)) for far in found), start=jnp.zeros(scale.shape, bool))


def _real_product(one: Array, other: Array) -> Array:
    """The real part of a product."""
    with jax.numpy_dtype_promotion("standard"):
        if jnp.iscomplexobj(one) and jnp.iscomplexobj(other):
            return one.real * other.real - one.imag * other.imag
        return jnp.real(one) * jnp.real(other)


def _rows_squares(left: OneHot, right: Array, precision: Any) -> Float[Array, " b"]:
    """Rows taken by index: those of the same index are added up, and counted once; nothing can cancel."""
    same = likeness(left, left, precision)
    sums = einsum("bkts,bkso->bkto", same.astype(right.dtype), right, precision=precision)
    times = jnp.maximum(jnp.sum(same.astype(sums.real.dtype), axis=3), 1)
    return jnp.sum(_sum_last(sums) / times, axis=(1, 2))


def weighted_term(term: Outer, shape: tuple[int, ...], weights: Float[Array, " b"], precision: Any) -> Array:
    """The weighted sum over examples, laid out as the parameter: one ordinary backward pass of the layer.

    Args:
        term: of the parameter.
        shape: the parameter's.
        weights: [b]; they are multiplied into the right factor.
        precision: of the matrix products.
    """
    right = term.right.astype(wide(term.right.dtype))
    right = right * weights.astype(right.dtype)[:, None, None, None]
    return fold(total(term.left, right, precision), term.axes, shape)


def gram_pair(one: Outer, other: Outer, precision: Any) -> tuple[Float[Array, "b b"], Float[Array, "b b"]]:
    """Real inner products of the one term's products with the other's, between all pairs of examples: [b, b].

    b²·k·t·s·(i + o) multiplications: the rows of all examples are taken for those of one.

    Args:
        one: of a parameter.
        other: of the same parameter, laid out alike.
        precision: of the matrix products.

    Returns:
        The inner products, and the sums of what was added to each without its signs.
    """
    b = one.right.shape[0]
    others = conjugate(as_one_example(other.right))
    rights = einsum("zkto,zkso->zkts", as_one_example(one.right), others, precision=precision)
    lefts = likeness(as_one_example(one.left), conjugate(as_one_example(other.left)), precision)
    pairs = _real_product(rights, lefts.astype(wide(lefts.dtype)))
    pairs = pairs.reshape(rights.shape[1], b, one.right.shape[2], b, other.right.shape[2])
    return jnp.sum(pairs, axis=(0, 2, 4)), jnp.sum(jnp.abs(pairs), axis=(0, 2, 4))


def inner_term(term: Outer, other: Array, precision: Any) -> Float[Array, " b"]:
    """The real inner product [b] of each example's product with one array, without forming any product.

    Args:
        term: of the parameter.
        other: an array shaped like the parameter, such as a mean gradient.
        precision: of the matrix products.
    """
    slopes = pulled(term.left, unfold(conjugate(other), term.axes), precision)
    return jnp.real(einsum("bkto,bkto->b", slopes, term.right, precision=precision))


def stacked_terms(terms: Sequence[Outer]) -> tuple[Outer, ...]:
    """The same sum in fewer terms: rows of terms that are laid out alike stand in one.

    A weight used T times, by a loop unrolled in Python say, is then one contraction of T rows and not T² pairs.
    """
    groups: dict[Any, list[Outer]] = {}
    for term in terms:
        groups.setdefault(_layout(term), []).append(term)
    return tuple(_one_below_another(group) for group in groups.values())


def _layout(term: Outer) -> Any:
    """Equal for terms that differ in their number of rows alone, and are split alike over explicit axes of a mesh."""
    arrays = [*jax.tree.leaves(term.left), term.right]
    return (
        term.axes,
        term.is_rounded,
        jax.tree.structure(term.left),
        tuple((x.dtype, x.ndim, x.shape[1:2], x.shape[3:], spec_of(x)) for x in arrays),
    )


def _one_below_another(terms: Sequence[Outer]) -> Outer:
    if len(terms) == 1:
        return terms[0]
    left = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *(term.left for term in terms))
    return replace(terms[0], left=left, right=jnp.concatenate([term.right for term in terms], axis=2))


def _sum_last(array: Array) -> Array:
    return jnp.sum(abs_square(array.astype(wide(array.dtype))), axis=-1)


def fold(folded: Array, axes: Axes, shape: tuple[int, ...]) -> Array:
    """``[..., k, i, o]`` laid out as the parameter: ``[..., *shape]``. Transposes and reshapes alone.

    Args:
        folded: with any leading axes, such as that of the batch.
        axes: how the parameter's axes are divided among k, i and o.
        shape: the parameter's.
    """
    lead, order = folded.shape[:-3], _by_role(axes)
    split = folded.reshape(*lead, *(axes[place][0] for place in order))
    places = [len(lead) + order.index(place) for place in range(len(axes))]
    return split.transpose(*range(len(lead)), *places).reshape(*lead, *shape)


def unfold(array: Array, axes: Axes) -> Inexact[Array, "k i o"]:
    """The inverse of `fold`, for one array shaped like the parameter."""
    k, o = (math.prod(size for size, role in axes if role == which) for which in "ko")
    return array.reshape([size for size, _ in axes]).transpose(_by_role(axes)).reshape(k, -1, o)


def _by_role(axes: Axes) -> list[int]:
    return sorted(range(len(axes)), key=lambda place: "kwio".index(axes[place][1]))
