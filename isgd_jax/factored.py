"""The lazy contraction: what a factored gradient is, and what can be asked of it without forming it.

The gradients of a batch are a tree shaped like the parameters. A leaf stands for an array ``[b, *param.shape]``: either
that array itself, or a `Factored`, a sum of contractions whose factors are kept and whose product is not. Every array
inside has the leading axis ``b``, so the tree can be sliced, sharded and mapped like any batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import Precision
from jax.typing import DTypeLike
from jaxtyping import Float, PyTree

Axes: TypeAlias = tuple[tuple[int, str], ...]
"""A parameter's axes in order, split as finely as needed: (size, "k" shared | "i" left factor's | "o" right's)."""


@dataclass(frozen=True)
class Outer:
    """One contraction: ``G[b, k, i, o] = Σ_t left[b, k, t, i] · right[b, k, t, o]``, its axes laid out as ``axes`` says."""

    left: Any
    right: Any
    axes: Axes


@dataclass(frozen=True)
class Factored:
    """A lazy leaf: the sum of ``terms``, each an `Outer`, standing for an array ``[b, *shape]``."""

    terms: tuple[Outer, ...]
    shape: tuple[int, ...]
    dtype: Any


jax.tree_util.register_dataclass(Outer, data_fields=["left", "right"], meta_fields=["axes"])
jax.tree_util.register_dataclass(Factored, data_fields=["terms"], meta_fields=["shape", "dtype"])

Grads: TypeAlias = PyTree
"""Per-example gradients: a tree like the parameters, every leaf a `Factored` or an array ``[b, *param.shape]``."""


def norms(grads: Grads, *, precision: Any = Precision.HIGHEST) -> Float[Array, " b"]:
    """The norm of each example's gradient, over the whole tree."""
    squares = [_squares(leaf, precision) for leaf in _leaves(grads)]
    return jnp.sqrt(jnp.maximum(sum(squares[1:], start=squares[0]), 0))  # a Gram sum may round below zero


def weighted_mean(grads: Grads, weights: Float[Array, " b"], *, precision: Any = Precision.HIGHEST) -> PyTree:
    """``(1/b) Σ_b weights[b] · g_b``: a tree like the parameters."""
    b = _batch_size(grads)
    if weights.shape != (b,):
        raise ValueError(f"weights of {b} examples must have shape ({b},), got {weights.shape}")
    return _map(lambda leaf: _weighted_sum(leaf, weights / b, precision), grads)


def stack(grads: Grads, *, precision: Any = Precision.HIGHEST) -> PyTree:
    """The definition: every leaf formed, ``[b, *param.shape]``."""
    return _map(lambda leaf: _stack(leaf, precision).astype(leaf.dtype), grads)


def gram(grads: Grads, *, precision: Any = Precision.HIGHEST) -> Float[Array, "b b"]:
    """Inner products between the gradients of all pairs of examples."""
    grams = [_gram(leaf, precision) for leaf in _leaves(grads)]
    return sum(grams[1:], start=grams[0])


def inner(grads: Grads, tree: PyTree, *, precision: Any = Precision.HIGHEST) -> Float[Array, " b"]:
    """Inner product of each example's gradient with one tree shaped like the parameters."""
    others = jax.tree.structure(grads, is_leaf=_is_factored).flatten_up_to(tree)
    products = [_inner(leaf, other, precision) for leaf, other in zip(_leaves(grads), others, strict=True)]
    return sum(products[1:], start=products[0])


def _is_factored(x: Any) -> bool:
    return isinstance(x, Factored)


def _map(function: Any, grads: Grads) -> PyTree:
    return jax.tree.map(function, grads, is_leaf=_is_factored)


def _leaves(grads: Grads) -> list[Any]:
    leaves = jax.tree.leaves(grads, is_leaf=_is_factored)
    if not leaves:
        raise ValueError("the gradients have no leaves, so neither batch size nor norms: are there any parameters?")
    return leaves


def _batch_size(grads: Grads) -> int:
    return jax.tree.leaves(_leaves(grads)[0])[0].shape[0]


def _accumulator(dtype: DTypeLike) -> Any:
    """Sums are kept in float32 or wider, whatever the factors are."""
    return jnp.promote_types(dtype, jnp.float32)


def _einsum(spec: str, *arrays: Array, precision: Any) -> Array:
    dtype = _accumulator(jnp.result_type(*arrays))
    with jax.numpy_dtype_promotion("standard"):
        return jnp.einsum(spec, *arrays, precision=precision, preferred_element_type=dtype)


def _product(term: Outer, precision: Any) -> Float[Array, "b k i o"]:
    return _einsum("bkti,bkto->bkio", term.left, term.right, precision=precision)


def _fold(folded: Array, axes: Axes, shape: tuple[int, ...]) -> Array:
    """``[..., k, i, o]`` laid out as the parameter: ``[..., *shape]``."""
    lead = folded.shape[:-3]
    order = sorted(range(len(axes)), key=lambda a: "kio".index(axes[a][1]))
    split = folded.reshape(*lead, *(axes[a][0] for a in order))
    places = [len(lead) + order.index(a) for a in range(len(axes))]
    return split.transpose(*range(len(lead)), *places).reshape(*lead, *shape)


def _unfold(array: Array, axes: Axes) -> Float[Array, "k i o"]:
    """The inverse of `_fold`, for one array shaped like the parameter."""
    order = sorted(range(len(axes)), key=lambda a: "kio".index(axes[a][1]))
    sizes = [math.prod(size for size, role in axes if role == which) for which in "kio"]
    return array.reshape([size for size, _ in axes]).transpose(order).reshape(sizes)


def _stack(leaf: Any, precision: Any) -> Array:
    if not _is_factored(leaf):
        return leaf.astype(_accumulator(leaf.dtype))
    formed = [_fold(_product(term, precision), term.axes, leaf.shape) for term in leaf.terms]
    return sum(formed[1:], start=formed[0])


def _squares(leaf: Any, precision: Any) -> Float[Array, " b"]:
    if _is_factored(leaf) and len(leaf.terms) == 1:
        term = leaf.terms[0]
        return _gram_squares(term, precision) if _gram_is_cheaper(term) else _sum_squares(_product(term, precision))
    return _sum_squares(_stack(leaf, precision))


def _gram_is_cheaper(term: Outer) -> bool:
    (_, _, t, i), o = term.left.shape, term.right.shape[-1]
    return t * (i + o) < i * o


def _gram_squares(term: Outer, precision: Any) -> Float[Array, " b"]:
    left, right = (_einsum("bkti,bksi->bkts", x, x, precision=precision) for x in (term.left, term.right))
    return jnp.sum(left * right, axis=(1, 2, 3))


def _sum_squares(array: Array) -> Float[Array, " b"]:
    return jnp.sum(jnp.square(array), axis=tuple(range(1, array.ndim)))


def _weighted_sum(leaf: Any, weights: Float[Array, " b"], precision: Any) -> Array:
    if not _is_factored(leaf):
        return _einsum("b,b...->...", weights, leaf, precision=precision).astype(leaf.dtype)
    parts = []
    for term in leaf.terms:
        right = term.right.astype(_accumulator(term.right.dtype)) * weights[:, None, None, None]
        parts.append(_fold(_einsum("bkti,bkto->kio", term.left, right, precision=precision), term.axes, leaf.shape))
    return sum(parts[1:], start=parts[0]).astype(leaf.dtype)


def _gram(leaf: Any, precision: Any) -> Float[Array, "b b"]:
    if _is_factored(leaf) and len(leaf.terms) == 1 and leaf.terms[0].left.shape[2] == 1:
        factors = leaf.terms[0].left, leaf.terms[0].right
        left, right = (_einsum("akti,bkti->kab", x, x, precision=precision) for x in factors)
        return jnp.sum(left * right, axis=0)
    flat = _stack(leaf, precision)
    flat = flat.reshape(flat.shape[0], -1)
    return _einsum("ap,bp->ab", flat, flat, precision=precision)


def _inner(leaf: Any, other: Array, precision: Any) -> Float[Array, " b"]:
    if not _is_factored(leaf):
        return _einsum("bp,p->b", leaf.reshape(leaf.shape[0], -1), other.reshape(-1), precision=precision)
    parts = []
    for term in leaf.terms:
        pulled = _einsum("bkti,kio->bkto", term.left, _unfold(other, term.axes), precision=precision)
        parts.append(jnp.sum(pulled * term.right.astype(pulled.dtype), axis=(1, 2, 3)))
    return sum(parts[1:], start=parts[0])
