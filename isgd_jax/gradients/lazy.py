"""The lazy contraction: what can be asked of factored gradients without forming them.

The gradients of a batch are a tree shaped like the parameters. A leaf stands for an array ``[b, *param.shape]``: either
that array itself, or a `leaf.Factored`, a sum of contractions whose factors are kept and whose product is not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec
from jaxtyping import Float

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients import costs
from isgd_jax.gradients.factors import conjugate, einsum, wide
from isgd_jax.gradients.leaf import (
    Grads,
    formed_squares,
    gram_of,
    inner_of,
    is_factored,
    is_plain,
    leaves_of,
    map_leaves,
    scaled_squares,
    shapes,
    squares_of_each,
    stacked,
    total_of,
    weighted_sum,
)
from isgd_jax.gradients.meshes import may_be_split
from isgd_jax.gradients.placement import as_parameters, placed, stacked_split
from isgd_jax.gradients.squares import MANY, Squares, has_cancelled, root, together

__all__ = [
    "first", "gram", "halves", "inner", "last", "norms", "scaled_norms", "stack", "weighted_mean", "weighted_sums",
]  # fmt: skip


@placed
def norms(grads: Grads, *, precision: Any = None) -> Float[Array, " b"]:
    """The norm of each example's gradient, over the whole tree.

    Each leaf is asked in the way that its shapes make cheapest: of its factors' norms, of the inner products of its
    rows (the Gram form), or of its products. Where the Gram sum of a leaf has cancelled, for any example, the leaf's
    products are formed after all.

    Args:
        grads: of `per_example_grads`, or any tree of stacked arrays ``[b, *param.shape]``.
        precision: of matrix products, a `jax.lax.Precision`; None: that which the program has, as an ordinary gradient
            would (TF32 on NVIDIA cards, bfloat16 on TPUs, unless ``jax_default_matmul_precision`` says otherwise).
            Norms are then as exact as those of gradients formed in it: a factor is rounded alike wherever it stands.

    Returns:
        ``sqrt(Σ |g|²)`` over all entries of all leaves, for each of the b examples; in float32 or, where gradients are
        wider, as wide as they are. Neither underflows nor overflows where the norm itself does not.

    Raises:
        ValueError: the tree has no leaves.

    Source: Goodfellow (arXiv 1510.01799) for layers used once; Li et al. (arXiv 2110.05679), section 4, for Gram sums
    over positions.
    """
    leaves = _small_joined(leaves_of(grads))
    found = squares_of_each(leaves, precision)
    risky = [at for at, squares in enumerate(found) if squares.sizes is not None]
    for asked in [[at] for at in risky] if costs.machine().cheap_conditions else [risky]:
        safe = _guarded([leaves[at] for at in asked], [found[at] for at in asked], precision)
        for at, squares in zip(asked, safe, strict=True):
            found[at] = squares
    return root(together(found))


def _guarded(leaves: Sequence[Any], found: Sequence[Squares], precision: Any) -> Sequence[Squares]:
    """Squares that a Gram sum found, or those of products if any sum has cancelled."""
    if not leaves:
        return found
    kept = [squares._replace(sizes=None) for squares in found]
    cancelled = [jnp.any(has_cancelled(squares)) for squares in found]

    def formed() -> list[Squares]:
        return [formed_squares(leaf, precision) for leaf in leaves]

    return lax.cond(jnp.any(jnp.stack(cancelled)), formed, lambda: kept)


_SMALL = 4096
"""Entries of a parameter whose gradients are joined with others to be squared, if all examples' are not `MANY`: biases,
scales, small tables. (The bias of a layer whose factors are asked for has the right one's norm, computed once.)"""


def _small_joined(leaves: Sequence[Any]) -> list[Any]:
    """The leaves, small stacked arrays in one row of each type: their norm is the same, for one reduction.

    A network has tens of biases and scales, and each by itself is a handful of kernels to compile and to start. Arrays
    on a mesh of several devices may be split, each in its own way, and stay as they are; not one device's own parts.
    """
    if may_be_split(leaves):
        return list(leaves)
    others, small = [], defaultdict(list)
    for leaf in leaves:
        if is_factored(leaf) or leaf.size > min(_SMALL * leaf.shape[0], MANY):
            others.append(leaf)
        else:
            small[wide(leaf.dtype)].append(leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:])))
    return others + [lax.concatenate([x.astype(dtype) for x in rows], 1) for dtype, rows in small.items()]


@placed
def scaled_norms(grads: Grads, scale: Any, *, precision: Any = None) -> Float[Array, " b"]:
    """The norm of each example's gradient times ``scale``, entry by entry.

    With the inverse root of Adam's second moments, it is the norm of the step that an example alone would make.

    Args:
        grads: per-example gradients, as for `norms`.
        scale: a tree like the parameters, of real numbers.
        precision: of matrix products.

    Returns:
        ``sqrt(Σ |scale · g|²)`` for each of the b examples.

    Raises:
        ValueError: the trees differ in structure.
    """
    pairs = zip(leaves_of(grads), _alongside(grads, scale), strict=True)
    return root(together([scaled_squares(leaf, other, precision) for leaf, other in pairs]))


@placed(out=as_parameters)
def weighted_mean(grads: Grads, weights: Float[Array, " b"], *, precision: Any = None) -> Any:
    """``(1/b) Σ_b weights[b] · g_b``: a tree like the parameters.

    For the cost of the ordinary gradient's last contraction; no example's own gradient is made.

    Args:
        grads: per-example gradients of b examples, as for `norms`.
        weights: of each example, such as ``1 / (N p)``; ones give the gradient of the mean loss.
        precision: of matrix products.

    Returns:
        The mean, every leaf in its parameter's dtype; sums are kept in float32 or wider.

    Raises:
        ValueError: there is not one weight an example.
    """
    b = _batch_size(grads)
    _check_weights(weights, b)
    return map_leaves(lambda leaf: weighted_sum(leaf, weights / b, precision).astype(leaf.dtype), grads)


@placed(out=as_parameters)
def weighted_sums(grads: Grads, weights: Float[Array, " b"], *, precision: Any = None) -> Any:
    """``Σ_b weights[b] · g_b``, not rounded to the dtypes of the parameters: what is to be added to others.

    Args:
        grads: per-example gradients of b examples, as for `norms`.
        weights: of each example.
        precision: of matrix products.

    Returns:
        The sum, a tree like the parameters, every leaf in float32 or wider.

    Raises:
        ValueError: there is not one weight an example.
    """
    _check_weights(weights, _batch_size(grads))

    def summed(leaf: Any) -> Array:
        return weighted_sum(leaf, weights, precision).astype(wide(leaf.dtype))

    return map_leaves(summed, grads)


def _check_weights(weights: Array, b: int) -> None:
    if weights.shape != (b,):
        raise ArgumentError(f"weights of {b} examples must have shape ({b},), got {weights.shape}")


@placed(out=stacked_split)
def stack(grads: Grads, *, precision: Any = None) -> Any:
    """The definition: every leaf formed, ``[b, *param.shape]``.

    Args:
        grads: per-example gradients, as for `norms`; arrays are given back as they are.
        precision: of matrix products.

    Returns:
        What ``vmap(jax.grad(loss_fn))`` gives, for the memory that it takes: b times the parameters.
    """
    return map_leaves(lambda leaf: stacked(leaf, precision).astype(leaf.dtype), grads)


def first(grads: Grads, count: int) -> Grads:
    """The gradients of the first ``count`` examples of the batch, lazy where ``grads`` are."""
    return _part(grads, slice(None, count))


def last(grads: Grads, count: int) -> Grads:
    """The gradients of the last ``count`` examples of the batch, at least one."""
    return _part(grads, slice(-count, None))


def _part(grads: Grads, which: slice) -> Grads:
    def part(leaf: Any) -> Any:
        if not is_factored(leaf):
            return leaf[which]
        return replace(jax.tree.map(lambda x: x[which], replace(leaf, shared=None)), shared=leaf.shared)

    return map_leaves(part, grads)


@placed
def gram(grads: Grads, *, precision: Any = None) -> Float[Array, "b b"]:
    """Inner products between the gradients of all pairs of examples; the diagonal holds the squares of `norms`.

    Args:
        grads: per-example gradients of b examples, as for `norms`.
        precision: of matrix products.

    Returns:
        ``G[i, j] = Re⟨g_i, g_j⟩``, over all leaves; [b, b]. Not scaled: a square that leaves float32 is 0 or infinite.
    """
    return total_of([gram_of(leaf, precision) for leaf in leaves_of(grads)])


@placed(out=lambda grads: (PartitionSpec(), PartitionSpec()))
def halves(
    grads: Grads, weights: Float[Array, " b"], *, precision: Any = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """``⟨first, second⟩`` of the weighted means of the two halves of a batch, and the squared norm of the whole mean.

    From inner products between examples where that is cheaper than making a mean, which is as large as the parameters.
    For gradients whose batch axis lies on one device.

    Args:
        grads: per-example gradients of a batch of at least two.
        weights: of each example, [b]; the first half of an odd batch is the smaller one.

    Source: ours.
    """
    b = _batch_size(grads)
    half, rest = b // 2, b - b // 2
    is_first = jnp.arange(b, dtype=jnp.int32) < half
    shares = weights.astype(jnp.float32) * jnp.where(is_first, 1.0 / half, 1.0 / rest)
    rows = jnp.stack([jnp.where(is_first, shares, 0.0), jnp.where(is_first, 0.0, shares)])

    def products_of(leaf: Any) -> Array:  # of the two means, two by two
        if is_factored(leaf) and costs.prefers_gram_of_means(shapes(leaf)) and is_plain(leaf):
            return einsum("ua,ab,vb->uv", rows, gram_of(leaf, precision), rows, precision=precision)
        parts = [(rows[0, :half], first(leaf, half)), (rows[1, half:], last(leaf, rest))]
        means = [weighted_sum(part, own, precision) for own, part in parts]
        flat = jnp.stack([mean.astype(wide(mean.dtype)).reshape(-1) for mean in means])
        return jnp.real(einsum("up,vp->uv", flat, conjugate(flat), precision=precision))

    pairs = total_of([products_of(leaf).astype(jnp.float32) for leaf in leaves_of(grads)])
    parts = jnp.asarray([half / b, rest / b], jnp.float32)
    return pairs[0, 1], jnp.einsum("u,uv,v->", parts, pairs, parts, precision=precision)


@placed
def inner(grads: Grads, tree: Any, *, precision: Any = None) -> Float[Array, " b"]:
    """Inner product of each example's gradient with one tree shaped like the parameters.

    With the gradient of a validation loss it says how far a step on each example would lower that loss.

    Args:
        grads: per-example gradients of b examples, as for `norms`.
        tree: of arrays shaped like the parameters.
        precision: of matrix products.

    Returns:
        ``Re⟨g_i, tree⟩`` over all leaves, [b].

    Raises:
        ValueError: the trees differ in structure.
    """
    pairs = zip(leaves_of(grads), _alongside(grads, tree), strict=True)
    return total_of([inner_of(leaf, other, precision) for leaf, other in pairs])


def _alongside(grads: Grads, tree: Any) -> list[Any]:
    """The leaves of a tree that must have the structure of the gradients."""
    return jax.tree.leaves(jax.tree.map(lambda _, other: other, grads, tree, is_leaf=is_factored))


def _batch_size(grads: Grads) -> int:
    first = leaves_of(grads)[0]
    return first.batch_size if is_factored(first) else first.shape[0]
