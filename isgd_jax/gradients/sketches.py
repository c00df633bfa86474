"""Sketches of gradients' directions, for orders by cells: a hundred numbers an example, for a forward pass.

The last layer's gradient says most of where the whole gradient points, and it is an outer product x ⊗ δ: projecting x
alone, with δ as it is where it is short, sketches the product without forming it.

Guarantees:

* the same key gives the same projection, so sketches of different calls compare;
* inner products of directions are kept without bias over keys;
* a gradient of zero has the sketch zero, never NaN.

Source: ours; Johnson & Lindenstrauss (1984) for the projections.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients import lazy
from isgd_jax.gradients.leaf import is_factored
from isgd_jax.gradients.per_example import per_example_grads
from isgd_jax.gradients.squares import over, sum_squares
from isgd_jax.gradients.terms import unfold
from isgd_jax.types import Batch, Example, Key, LossFn, Params

__all__ = ["LayerSketch", "Sketch", "last_layer", "last_layer_sketch", "nearest_to_loss", "of_gradient", "project"]

Sketch = Callable[[Params, Batch], Float[Array, "b dims"]]


@dataclass(frozen=True, eq=False)
class LayerSketch:
    """Sketches of the gradient of one layer: of gradients that a step has anyway, or of examples, for a forward pass.

    The two agree to rounding, so both may stand in one order (``importance_sampler(order=sketch)``).
    """

    key: Key
    loss_fn: Callable[..., Any]
    place: int
    """Of the layer's matrix among the leaves of the parameters."""
    axes: Any
    """How its gradient is laid out as an outer product; None where it is no single one."""
    width: int
    """Numbers an example that were asked for; ``dims`` is this or a little less."""
    dims: int

    def of_grads(self, grads: Params) -> Float[Array, "m dims"]:
        """The sketches of per-example gradients, lazy or stacked."""
        leaf = jax.tree.leaves(grads, is_leaf=is_factored)[self.place]
        if self.axes is None or _is_plain(leaf):
            return of_gradient(self.key, leaf, dims=self.width)
        formed = lazy.stack(leaf)  # its product was formed already: the same projections of its axes
        return _normalized(
            _of_product(self.key, jax.vmap(lambda one: unfold(one, self.axes))(formed), self.width), formed
        )

    def of_batch(self, params: Params, *args: Any) -> Float[Array, "b dims"]:
        """The sketches of the gradients that the examples of a batch, the last argument, would have."""
        return of_gradient(self.key, self._layer_grads(params, *args), dims=self.width)

    def _layer_grads(self, params: Params, *args: Any) -> Any:
        structure: Any = jax.tree.structure(params)
        values = jax.tree.leaves(params)

        def loss_of_layer(layer: Any, *rest: Any) -> Float[Array, ""]:
            others = [*values[: self.place], layer, *values[self.place + 1 :]]
            return self.loss_fn(jax.tree.unflatten(structure, others), *rest)

        return per_example_grads(loss_of_layer, joint=False)(values[self.place], *args)


def last_layer_sketch(
    loss_fn: Callable[..., Any], params: Params, *args: Any, dims: int = 128, key: Key | None = None
) -> LayerSketch:
    """How an order by clusters sees the examples of a model: by the gradient of the layer nearest to the loss.

    Only shapes are looked at: nothing is computed, and the sketch holds no parameters.

    Args:
        loss_fn: ``(params, example) -> scalar``, or with more arguments in between.
        params: of the model; only shapes matter.
        args: one item of the data set, without a batch axis, after whatever else the loss takes.
        dims: numbers an example; their order costs ``4 * dims`` bytes an example of memory.
        key: of the random projection, by default ``jax.random.key(0)``.

    Returns:
        The sketch; its ``dims`` may be a little less than asked for, a product of two whole numbers.

    Source: ours; Johnson & Lindenstrauss (1984) for the projections.
    """
    key = jax.random.key(0) if key is None else key
    *frozen, example = args
    made = LayerSketch(key, loss_fn, nearest_to_loss(loss_fn, params, *args), None, dims, dims)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), jax.eval_shape(lambda x: x, example))
    layer = jax.eval_shape(made._layer_grads, params, *frozen, batch)
    axes = layer.terms[0].axes if _is_plain(layer) else None
    return replace(made, axes=axes, dims=jax.eval_shape(made.of_batch, params, *frozen, batch).shape[1])


def last_layer(key: Key, loss_fn: LossFn, params: Params, example: Example, *, dims: int = 128) -> Sketch:
    """``(params, batch) -> [b, dims or a little less]``, of the gradient of the layer nearest to the loss.

    A forward pass and the backward pass of the last layer, whose gradient x ⊗ δ is not formed: δ is
    projected to √dims numbers where it is longer, x to as many as make dims with them, and the sketch is their product.

    Args:
        key: of the random projection; sketches of the same key compare.
        loss_fn: ``(params, example) -> scalar``.
        params: of the model; only shapes matter.
        example: one item of the data set, without a batch axis.
        dims: numbers an example.
    """
    return last_layer_sketch(loss_fn, params, example, dims=dims, key=key).of_batch


def of_gradient(key: Key, leaf: Any, *, dims: int) -> Float[Array, "b dims"]:
    """The sketch of one leaf's directions: of its factors, where it has two plain ones.

    Args:
        key: of the projection.
        leaf: per-example gradients of one parameter, lazy or stacked. One that is several terms, or complex, is formed
            and projected whole.
        dims: numbers an example; from factors a little less.

    Returns:
        [b, dims], in float32, of unit gradients shrunk; rows of zeros where a gradient is zero.
    """
    if not _is_plain(leaf):
        return project(key, lazy.stack(leaf), dims=dims)
    left, right = leaf.terms[0].left, leaf.terms[0].right
    keys, wide, short = _widths(key, right.shape[-1], dims)
    left = _projected(keys[0], left, wide)
    product = jnp.einsum("bkti,bkto->bkio", left, _projected(keys[1], right, short), precision="highest")
    return _normalized(product, leaf)


def _widths(key: Key, outputs: int, dims: int) -> tuple[Array, int, int]:
    """The keys of both projections, and to how many numbers inputs and outputs are projected."""
    short = min(outputs, max(1, math.isqrt(dims)))
    return jax.random.split(key), max(1, dims // short), short


def _of_product(key: Key, product: Float[Array, "b k i o"], dims: int) -> Float[Array, "b k w s"]:
    """What `of_gradient` makes of the factors, made of their product."""
    keys, wide, short = _widths(key, product.shape[-1], dims)
    right = _projected(keys[1], product, short)
    return jnp.swapaxes(_projected(keys[0], jnp.swapaxes(right, 2, 3), wide), 2, 3)


def _normalized(product: Float[Array, "b ..."], leaf: Any) -> Float[Array, "b dims"]:
    norms = lazy.norms(leaf).astype(jnp.float32)[:, None]
    return product.reshape(product.shape[0], -1) / jnp.where(norms > 0.0, norms, 1.0)


def project(key: Key, grads: Any, *, dims: int = 128) -> Float[Array, "b dims"]:
    """Random projections of the directions of stacked gradients: of each gradient over its norm.

    The projection is a matrix [p, dims] of normal numbers, made anew at each call from the key: for parts of a model,
    not for millions of parameters.

    Args:
        key: the same each time.
        grads: a tree of arrays [b, ...] (``isgd_jax.stack`` of lazy ones); complex numbers count as two.
        dims: numbers an example; inner products are kept to about 1/√dims.
    """
    flat = jnp.concatenate([_real_rows(leaf) for leaf in jax.tree.leaves(grads)], axis=1)
    squares = sum_squares(flat)
    flat = over(flat, squares.scale[:, None])
    norms = jnp.sqrt(squares.values)[:, None]
    projection = jax.random.normal(key, (flat.shape[1], dims), jnp.float32) / math.sqrt(dims)
    return (flat / jnp.where(norms > 0.0, norms, 1.0)) @ projection


def _real_rows(leaf: Array) -> Float[Array, "b p"]:
    """An example a row, in float32; of complex numbers both parts, so that inner products stay."""
    rows = leaf.reshape(leaf.shape[0], -1)
    parts = [rows.real, rows.imag] if jnp.iscomplexobj(rows) else [rows]
    return jnp.concatenate([part.astype(jnp.float32) for part in parts], axis=1)


def nearest_to_loss(loss_fn: Callable[..., Any], params: Params, *args: Any) -> int:
    """The place among the leaves of the matrix whose gradient takes the shortest program: the last layer's.

    Programs are traced and counted, one for each leaf, and none is run. Vectors and scalars are taken only where there
    is no matrix; of equals the last one is. Whole numbers, such as counts, have no gradient, and are passed over.

    Args:
        loss_fn: ``(params, example) -> scalar``, or with more arguments in between.
        params: of the model; only shapes matter.
        args: one item of the data set, after whatever else the loss takes.

    Raises:
        ValueError: no parameter is a floating-point or complex array.
    """
    leaves, structure = jax.tree.flatten(params)
    learnt = [place for place, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if not learnt:
        raise ArgumentError("params must have a floating-point or complex array to learn, got none")

    def length(place: int) -> tuple[bool, int, int]:
        def loss(leaf: Array, others: list[Array], *rest: Any) -> Array:
            return loss_fn(jax.tree.unflatten(structure, [*others[:place], leaf, *others[place + 1 :]]), *rest)

        closed = jax.make_jaxpr(jax.grad(loss))(leaves[place], leaves, *args)  # shapes are enough
        return leaves[place].ndim < 2, _count(closed.jaxpr), -place

    return min(learnt, key=length)


def _is_plain(leaf: Any) -> bool:
    one = is_factored(leaf) and leaf.formed is None and leaf.shared is None and len(leaf.terms) == 1
    if not one or not isinstance(leaf.terms[0].left, jax.Array | jax.ShapeDtypeStruct):
        return False
    return not any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in (leaf.terms[0].left, leaf.terms[0].right))


def _projected(key: Key, factor: Float[Array, "b k t i"], width: int) -> Float[Array, "b k t w"]:
    """A random projection to ``width`` numbers; what is not wider is left as it is."""
    factor = factor.astype(jnp.float32)
    if factor.shape[-1] <= width:
        return factor
    projection = jax.random.normal(key, (factor.shape[-1], width), jnp.float32) / math.sqrt(width)
    return jnp.einsum("bkti,iw->bktw", factor, projection)


def _count(jaxpr: Any) -> int:
    """Equations of a program, those of its inner programs included."""
    inner = (sub for eqn in jaxpr.eqns for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program))
    return len(jaxpr.eqns) + sum(_count(getattr(sub, "jaxpr", sub)) for sub in inner if _is_program(sub))


def _is_program(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")
