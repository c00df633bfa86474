"""One term of a factored gradient: a contraction whose two factors are kept, and what can be asked of it alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from isgd_jax.gradients import costs
from isgd_jax.gradients.factors import Factor, OneHot, Windows, as_one_example, einsum, likeness, pulled, total, wide

Axes: TypeAlias = tuple[tuple[int, str], ...]
"""A parameter's axes in order, split as finely as needed: (size, "k" shared | "w", "i" left factor's | "o" right's)."""


@dataclass(frozen=True)
class Outer:
    """One contraction, ``G[b, k, (w, i), o] = Σ_t left[b, k, t, (w, i)] · right[b, k, t, o]``, laid out by ``axes``."""

    left: Factor
    right: Any
    axes: Axes


jax.tree_util.register_dataclass(Outer, data_fields=["left", "right"], meta_fields=["axes"])


def shape(term: Outer) -> costs.Shape:
    """What `costs` counts with."""
    b, k, t, i = term.left.shape
    return costs.Shape(b, k, t, i, term.right.shape[-1], type(term.left).__name__, term.right.dtype.itemsize)


def gram_squares(terms: Sequence[Outer], precision: Any) -> tuple[Float[Array, " b"], Float[Array, " b"] | None]:
    """Squared norms of the sum of the terms, pair by pair; the sums of the pairs' sizes, where these can cancel."""
    first = terms[0]
    if len(terms) == 1 and first.left.shape[2] == 1 and not isinstance(first.left, OneHot | Windows):
        return jnp.sum(_sum_last(first.left) * _sum_last(first.right), axis=(1, 2)), None
    if len(terms) == 1 and isinstance(first.left, OneHot):
        return _rows_squares(first, precision), None
    squares, sizes = [], []
    for place, one in enumerate(terms):
        for times, other in zip([1] + [2] * len(terms), terms[place:], strict=False):
            alike = einsum("bkto,bkso->bkts", one.right, other.right, precision=precision)
            pairs = times * alike * likeness(one.left, other.left, precision).astype(alike.dtype)
            squares.append(jnp.sum(pairs, axis=(1, 2, 3)))
            sizes.append(jnp.sum(jnp.abs(pairs), axis=(1, 2, 3)))
    return sum(squares[1:], start=squares[0]), sum(sizes[1:], start=sizes[0])


def _rows_squares(term: Outer, precision: Any) -> Float[Array, " b"]:
    """Rows taken by index: those of the same index are added up, and counted once; nothing can cancel."""
    same = likeness(term.left, term.left, precision).astype(term.right.dtype)
    sums = einsum("bkts,bkso->bkto", same, term.right, precision=precision)
    times = jnp.maximum(jnp.sum(same.astype(sums.dtype), axis=3), 1)
    return jnp.sum(_sum_last(sums) / times, axis=(1, 2))


def weighted_term(term: Outer, shape: tuple[int, ...], weights: Float[Array, " b"], precision: Any) -> Array:
    """The weighted sum over examples, laid out as the parameter, which has this ``shape``."""
    right = term.right.astype(wide(term.right.dtype))
    right = right * weights.astype(right.dtype)[:, None, None, None]
    return fold(total(term.left, right, precision), term.axes, shape)


def gram_pair(one: Outer, other: Outer, precision: Any) -> Float[Array, "b b"]:
    """Inner products of the one term's products with the other's, between all pairs of examples."""
    b = one.right.shape[0]
    rights = einsum("zkto,zkso->zkts", as_one_example(one.right), as_one_example(other.right), precision=precision)
    lefts = likeness(as_one_example(one.left), as_one_example(other.left), precision).astype(rights.dtype)
    return jnp.sum(
        (lefts * rights).reshape(rights.shape[1], b, one.right.shape[2], b, other.right.shape[2]), axis=(0, 2, 4)
    )


def inner_term(term: Outer, other: Array, precision: Any) -> Float[Array, " b"]:
    """The inner product of each example's product with one array shaped like the parameter."""
    slopes = pulled(term.left, unfold(other, term.axes), precision)
    return einsum("bkto,bkto->b", slopes, term.right, precision=precision)


def _sum_last(array: Array) -> Array:
    return jnp.sum(jnp.square(array.astype(wide(array.dtype))), axis=-1)


def fold(folded: Array, axes: Axes, shape: tuple[int, ...]) -> Array:
    """``[..., k, i, o]`` laid out as the parameter: ``[..., *shape]``."""
    lead, order = folded.shape[:-3], _by_role(axes)
    split = folded.reshape(*lead, *(axes[place][0] for place in order))
    places = [len(lead) + order.index(place) for place in range(len(axes))]
    return split.transpose(*range(len(lead)), *places).reshape(*lead, *shape)


def unfold(array: Array, axes: Axes) -> Float[Array, "k i o"]:
    """The inverse of `fold`, for one array shaped like the parameter."""
    k, o = (math.prod(size for size, role in axes if role == which) for which in "ko")
    return array.reshape([size for size, _ in axes]).transpose(_by_role(axes)).reshape(k, -1, o)


def _by_role(axes: Axes) -> list[int]:
    return sorted(range(len(axes)), key=lambda place: "kwio".index(axes[place][1]))
