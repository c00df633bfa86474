"""The lazy contraction: what a factored gradient is, and what can be asked of it without forming it.

The gradients of a batch are a tree shaped like the parameters. A leaf stands for an array ``[b, *param.shape]``: either
that array itself, or a `Factored`, a sum of contractions whose factors are kept and whose product is not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Float

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients import costs
from isgd_jax.gradients.factors import OneHot, Windows, conjugate, einsum, products, wide
from isgd_jax.gradients.slices import by_slices
from isgd_jax.gradients.squares import (
    Squares,
    abs_square,
    has_cancelled,
    largest,
    over,
    power_of_two,
    root,
    sum_squares,
    together,
)
from isgd_jax.gradients.terms import (
    Outer,
    fold,
    gram_pair,
    gram_squares,
    inner_term,
    shape,
    unit_factors,
    weighted_term,
)

__all__ = [
    "ANYWHERE",
    "Factored",
    "Grads",
    "first",
    "formed_if_cheaper",
    "gram",
    "halves",
    "how_squared",
    "inner",
    "is_factored",
    "last",
    "lies_on_a_mesh",
    "norms",
    "scaled_norms",
    "spec_of",
    "split_axis",
    "stack",
    "weighted_mean",
    "weighted_sums",
]

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

    Every array inside but ``shared`` has the leading axis b.
    """

    terms: tuple[Outer, ...]
    shape: tuple[int, ...]
    dtype: Any
    formed: Any = None
    shared: Any = None
    spec: PartitionSpec = ANYWHERE
    """How the parameter is split, where axes of a mesh are explicit."""

    @property
    def batch_size(self) -> int:
        """The number of examples, b."""
        return self.formed.shape[0] if self.formed is not None else self.terms[0].right.shape[0]


jax.tree_util.register_dataclass(
    Factored, data_fields=["terms", "formed", "shared"], meta_fields=["shape", "dtype", "spec"]
)

Grads: TypeAlias = Any
"""Per-example gradients: a tree like the parameters, every leaf a `Factored` or an array ``[b, *param.shape]``."""


def spec_of(x: Any) -> PartitionSpec:
    """How the axes of an array are split, as far as a mesh says so explicitly; on meshes left to the compiler, not."""
    return getattr(getattr(jax.typeof(x), "sharding", None), "spec", None) or ANYWHERE


def lies_on_a_mesh(tree: Any) -> bool:
    """Whether any array lies on a mesh of several devices, or is one device's part of such an array."""
    return any(mesh.size > 1 for mesh in _meshes(tree))


def _may_be_split(tree: Any) -> bool:
    """Whether any array lies on a mesh of several devices and is more than one device's part."""
    axes = [
        (mesh.shape[name], kind)
        for mesh in _meshes(tree)
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    ]
    return any(size > 1 and kind != AxisType.Manual for size, kind in axes)


def _meshes(tree: Any) -> list[Any]:
    """Those that arrays lie on; an empty one where JAX names none."""
    shardings = [getattr(jax.typeof(x), "sharding", None) for x in jax.tree.leaves(tree)]
    return [sharding.mesh for sharding in shardings if sharding is not None]


def split_axis(grads: Grads) -> Any:
    """The mesh axis that the batch axis of the gradients is split along; None unless a mesh says so explicitly."""
    arrays = jax.tree.leaves([replace(x, shared=None) if is_factored(x) else x for x in _leaves(grads)])
    return next((spec[0] for spec in map(spec_of, arrays) if spec and spec[0] is not None), None)


def _batch_split(grads: Grads) -> PartitionSpec:
    return PartitionSpec(split_axis(grads))


def _as_parameters(grads: Grads) -> Any:
    """How each parameter is split: a mean stays so, with no more copies than the parameters have."""
    return _map(lambda leaf: leaf.spec if is_factored(leaf) else PartitionSpec(*spec_of(leaf)[1:]), grads)


def _stacked_split(grads: Grads) -> Any:
    """The same, below the batch axis; no mesh axis can split two axes of one array."""
    batch = split_axis(grads)
    taken = set(batch) if isinstance(batch, tuple) else {batch}

    def free(names: Any) -> Any:
        left = tuple(name for name in (names if isinstance(names, tuple) else (names,)) if name not in taken)
        return left if isinstance(names, tuple) and left else left[0] if left else None

    return jax.tree.map(
        lambda spec: PartitionSpec(batch, *(free(names) for names in spec)),
        _as_parameters(grads),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def _is_split(grads: Grads) -> bool:
    """Whether a mesh says explicitly that any axis of anything is split, of a batch or of parameters."""
    specs = [leaf.spec for leaf in _leaves(grads) if is_factored(leaf)]
    specs += [spec_of(x) for x in jax.tree.leaves(grads)]
    return any(name is not None for spec in specs for name in spec)


def _placed(function: Any = None, *, out: Any = _batch_split) -> Any:
    """Where axes of a mesh are explicit, ``function(grads, ...)`` leaves placement to the compiler, as elsewhere.

    What comes out is split as ``out(grads)`` says: by default along its batch axis alone.
    """
    if function is None:
        return partial(_placed, out=out)

    @wraps(function)
    def placed(grads: Grads, *args: Any, **options: Any) -> Any:
        if not _is_split(grads):
            return function(grads, *args, **options)
        return jax.sharding.auto_axes(partial(function, **options), out_sharding=out(grads))(grads, *args)

    return placed


@_placed
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
    leaves = _small_joined(_leaves(grads))
    found = [_squares(leaf, precision) for leaf in leaves]
    risky = [at for at, squares in enumerate(found) if squares.sizes is not None]
    for asked in [[at] for at in risky] if costs.machine().guards_each else [risky]:
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
        return [_formed_squares(leaf, precision) for leaf in leaves]

    return lax.cond(jnp.any(jnp.stack(cancelled)), formed, lambda: kept)


@_placed
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
    pairs = zip(_leaves(grads), _alongside(grads, scale), strict=True)
    return root(together([_scaled_squares(leaf, other, precision) for leaf, other in pairs]))


@_placed(out=_as_parameters)
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
    return _map(lambda leaf: _weighted_sum(leaf, weights / b, precision).astype(leaf.dtype), grads)


@_placed(out=_as_parameters)
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
        return _weighted_sum(leaf, weights, precision).astype(wide(leaf.dtype))

    return _map(summed, grads)


def _check_weights(weights: Array, b: int) -> None:
    if weights.shape != (b,):
        raise ArgumentError(f"weights of {b} examples must have shape ({b},), got {weights.shape}")


@_placed(out=_stacked_split)
def stack(grads: Grads, *, precision: Any = None) -> Any:
    """The definition: every leaf formed, ``[b, *param.shape]``.

    Args:
        grads: per-example gradients, as for `norms`; arrays are given back as they are.
        precision: of matrix products.

    Returns:
        What ``vmap(jax.grad(loss_fn))`` gives, for the memory that it takes: b times the parameters.
    """
    return _map(lambda leaf: _stack(leaf, precision).astype(leaf.dtype), grads)


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

    return _map(part, grads)


@_placed
def gram(grads: Grads, *, precision: Any = None) -> Float[Array, "b b"]:
    """Inner products between the gradients of all pairs of examples; the diagonal holds the squares of `norms`.

    Args:
        grads: per-example gradients of b examples, as for `norms`.
        precision: of matrix products.

    Returns:
        ``G[i, j] = Re⟨g_i, g_j⟩``, over all leaves; [b, b]. Not scaled: a square that leaves float32 is 0 or infinite.
    """
    return _sum([_gram(leaf, precision) for leaf in _leaves(grads)])


@_placed(out=lambda grads: (PartitionSpec(), PartitionSpec()))
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
        if is_factored(leaf) and costs.prefers_gram_of_means(_shapes(leaf)) and _is_plain(leaf):
            return einsum("ua,ab,vb->uv", rows, _gram(leaf, precision), rows, precision=precision)
        parts = [(rows[0, :half], first(leaf, half)), (rows[1, half:], last(leaf, rest))]
        means = [_weighted_sum(part, own, precision) for own, part in parts]
        flat = jnp.stack([mean.astype(wide(mean.dtype)).reshape(-1) for mean in means])
        return jnp.real(einsum("up,vp->uv", flat, conjugate(flat), precision=precision))

    pairs = _sum([products_of(leaf).astype(jnp.float32) for leaf in _leaves(grads)])
    parts = jnp.asarray([half / b, rest / b], jnp.float32)
    return pairs[0, 1], jnp.einsum("u,uv,v->", parts, pairs, parts, precision=precision)


@_placed
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
    pairs = zip(_leaves(grads), _alongside(grads, tree), strict=True)
    return _sum([_inner(leaf, other, precision) for leaf, other in pairs])


def is_factored(x: Any) -> bool:
    """Whether a leaf is lazy; for ``is_leaf`` of `jax.tree.map`, which would otherwise walk into its factors."""
    return isinstance(x, Factored)


def _map(function: Any, grads: Grads) -> Any:
    return jax.tree.map(function, grads, is_leaf=is_factored)


def _leaves(grads: Grads) -> list[Any]:
    leaves = jax.tree.leaves(grads, is_leaf=is_factored)
    if not leaves:
        raise ArgumentError("the gradients have no leaves, so neither batch size nor norms: are there any parameters?")
    return leaves


def _alongside(grads: Grads, tree: Any) -> list[Any]:
    """The leaves of a tree that must have the structure of the gradients."""
    return jax.tree.leaves(jax.tree.map(lambda _, other: other, grads, tree, is_leaf=is_factored))


def _batch_size(grads: Grads) -> int:
    first = _leaves(grads)[0]
    return first.batch_size if is_factored(first) else first.shape[0]


def _sum(arrays: Sequence[Array]) -> Array:
    return sum(arrays[1:], start=arrays[0])


def _shapes(leaf: Factored) -> list[costs.Shape]:
    return [shape(term) for term in leaf.terms]


def _by_gram(leaf: Factored) -> bool:
    """Whether the norm of a leaf is asked pair by pair: its terms are laid out alike, and it is cheaper."""
    alike = all(term.axes == leaf.terms[0].axes for term in leaf.terms)
    return leaf.formed is None and alike and costs.prefers_gram(_shapes(leaf))


def _is_plain(leaf: Factored) -> bool:
    """Whether a leaf is terms alone."""
    return leaf.formed is None and leaf.shared is None


def how_squared(leaf: Factored) -> str:
    """In words, how the norm of a leaf is asked."""
    if not _by_gram(leaf):
        return "product"
    return "norms" if all(term.right.shape[2] == 1 for term in leaf.terms) else "Gram"


def formed_if_cheaper(leaf: Factored) -> Any:
    """The leaf, formed if norms and a mean together are then cheaper than each asked of the factors."""
    if leaf.formed is not None or leaf.shared is not None or not costs.prefers_formed(_shapes(leaf)):
        return leaf
    return _in_slices(lambda part: _stack(part, None), leaf).astype(leaf.dtype)


def _in_slices(function: Any, leaf: Factored) -> Any:
    """``function(leaf)``, on so few examples at a time that their products stay in the cache."""
    apart = replace(leaf, shared=None)
    return by_slices(lambda part: function(replace(part, shared=leaf.shared)), apart, costs.slice_size(_shapes(leaf)))


_SMALL = 4096
"""Entries of a parameter whose gradients are joined with others to be squared: biases, scales, small tables."""


def _small_joined(leaves: Sequence[Any]) -> list[Any]:
    """The leaves, small stacked arrays in one row of each type: their norm is the same, for one reduction.

    A network has tens of biases and scales, and each by itself is a handful of kernels to compile and to start. Arrays
    on a mesh of several devices may be split, each in its own way, and stay as they are; not one device's own parts.
    """
    if _may_be_split(leaves):
        return list(leaves)
    others, small = [], defaultdict(list)
    for leaf in leaves:
        if is_factored(leaf) or leaf.size > _SMALL * leaf.shape[0]:
            others.append(leaf)
        else:
            small[wide(leaf.dtype)].append(leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:])))
    return others + [lax.concatenate([x.astype(dtype) for x in rows], 1) for dtype, rows in small.items()]


def _squares(leaf: Any, precision: Any) -> Squares:
    """Squared norms of a leaf, and the sums of the sizes of what was added, where that can cancel."""
    if not is_factored(leaf):
        return sum_squares(leaf.astype(wide(leaf.dtype)))
    if not _by_gram(leaf):
        return _formed_squares(leaf, precision)
    squares = gram_squares(leaf.terms, precision)
    return squares if leaf.shared is None else _with_shared(leaf, squares, precision)


def _with_shared(leaf: Factored, squares: Squares, precision: Any) -> Squares:
    """``‖A + S‖² = ‖A‖² + 2⟨A, S⟩ + ‖S‖²``, of the terms' sum A and the shared S, each over its own scale."""
    own = sum_squares(leaf.shared.astype(wide(leaf.dtype))[None])
    unit = over(leaf.shared.astype(wide(leaf.dtype)), own.scale[0])
    each = squares.scale[:, None, None, None]
    terms = tuple(replace(term, right=over(term.right.astype(wide(term.right.dtype)), each)) for term in leaf.terms)
    scale = jnp.maximum(squares.scale, own.scale)
    mine, yours = squares.scale / scale, own.scale / scale
    cross = 2 * _inner(replace(leaf, terms=terms, shared=None), unit, precision) * mine * yours
    values, common = squares.values * jnp.square(mine), own.values * jnp.square(yours)
    sizes = values if squares.sizes is None else squares.sizes * jnp.square(mine)
    return Squares(scale, values + cross + common, sizes + jnp.abs(cross) + common)


def _formed_squares(leaf: Factored, precision: Any) -> Squares:
    return _in_slices(lambda part: sum_squares(_products(part, precision)), leaf)


def _scaled_squares(leaf: Any, scale: Array, precision: Any) -> Squares:
    if not is_factored(leaf):
        return sum_squares(_times(leaf.astype(wide(leaf.dtype)), scale))
    if leaf.formed is None and leaf.shared is None and len(leaf.terms) == 1:
        term = leaf.terms[0]
        if term.left.shape[2] == 1 and not isinstance(term.left, OneHot | Windows):  # Σ_io |x_i|² |s_io|² |δ_o|²
            return _scaled_outer(leaf, term, scale, precision)
    return _in_slices(lambda part: sum_squares(_times(_stack(part, precision), scale)), leaf)


def _scaled_outer(leaf: Factored, term: Outer, scale: Array, precision: Any) -> Squares:
    """Of one outer product: the squares of the factors, contracted with the squares of ``scale``."""
    scale = scale.astype(wide(scale.dtype))
    unit = power_of_two(largest(scale, range(scale.ndim)))
    each, left, right = unit_factors(term)
    square = Outer(abs_square(left), abs_square(right), term.axes)
    values = _inner(replace(leaf, terms=(square,)), abs_square(over(scale, unit)), precision)
    return Squares(each * unit, values)


def _times(array: Array, scale: Array) -> Array:
    with jax.numpy_dtype_promotion("standard"):
        return array * scale.astype(wide(scale.dtype))[None]


def _products(leaf: Any, precision: Any) -> Array:
    """A leaf formed, its axes in the parameter's order only where that matters: for sums of several parts."""
    if is_factored(leaf) and len(leaf.terms) == 1 and leaf.formed is None and leaf.shared is None:
        return products(leaf.terms[0].left, leaf.terms[0].right, precision)
    return _stack(leaf, precision)


def _stack(leaf: Any, precision: Any) -> Array:
    if not is_factored(leaf):
        return leaf.astype(wide(leaf.dtype))
    parts = [fold(products(term.left, term.right, precision), term.axes, leaf.shape) for term in leaf.terms]
    parts += [] if leaf.formed is None else [leaf.formed.astype(wide(leaf.dtype))]
    parts += [] if leaf.shared is None else [jnp.broadcast_to(leaf.shared, (leaf.batch_size, *leaf.shape))]
    return _sum(parts)


def _weighted_sum(leaf: Any, weights: Float[Array, " b"], precision: Any) -> Array:
    """``Σ_b weights[b] · g_b`` of one leaf, lazy or stacked, not yet rounded to the parameter's dtype."""
    if not is_factored(leaf):
        return einsum("b,b...->...", weights, leaf, precision=precision)
    parts = [weighted_term(term, leaf.shape, weights, precision) for term in leaf.terms]
    parts += [] if leaf.formed is None else [einsum("b,b...->...", weights, leaf.formed, precision=precision)]
    parts += (
        []
        if leaf.shared is None
        else [jnp.sum(weights.astype(wide(leaf.dtype))) * leaf.shared.astype(wide(leaf.dtype))]
    )
    return _sum(parts)


def _gram(leaf: Any, precision: Any) -> Float[Array, "b b"]:
    if is_factored(leaf) and costs.prefers_batch_gram(_shapes(leaf)) and _is_plain(leaf):
        return _sum([gram_pair(one, other, precision) for one in leaf.terms for other in leaf.terms])
    flat = _stack(leaf, precision)
    flat = flat.reshape(flat.shape[0], math.prod(flat.shape[1:]))  # -1 cannot be told of an empty batch
    return jnp.real(einsum("ap,bp->ab", flat, conjugate(flat), precision=precision))


def _inner(leaf: Any, other: Array, precision: Any) -> Float[Array, " b"]:
    if not is_factored(leaf):
        flat = leaf.reshape(leaf.shape[0], -1)
        return jnp.real(einsum("bp,p->b", flat, conjugate(other.reshape(-1)), precision=precision))
    parts = [inner_term(term, other, precision) for term in leaf.terms]
    parts += [] if leaf.formed is None else [_inner(leaf.formed, other, precision)]
    parts += [] if leaf.shared is None else [_inner(leaf.shared[None], other, precision)]
    return _sum(parts)
