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
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from isgd_jax import orders
from isgd_jax.factoring import factored
from isgd_jax.gradients import per_example_grads
from isgd_jax.typing import Batch, Example, Key, LossFn, Params

Sketch = Callable[[Params, Batch], Float[Array, "b dims"]]


def last_layer(key: Key, loss_fn: LossFn, params: Params, example: Example, *, dims: int = 128) -> Sketch:
    """``(params, batch) -> [b, dims or a little less]``, of the gradient of the layer nearest to the loss."""
    structure: Any = jax.tree.structure(params)
    place = nearest_to_loss(loss_fn, params, example)

    def sketch(params: Params, batch: Batch) -> Float[Array, "b dims"]:
        values = jax.tree.leaves(params)

        def loss_of_layer(layer: Any, example: Example) -> Float[Array, ""]:
            return loss_fn(jax.tree.unflatten(structure, [*values[:place], layer, *values[place + 1 :]]), example)

        return of_gradient(key, per_example_grads(loss_of_layer, joint=False)(values[place], batch), dims=dims)

    return sketch


def of_gradient(key: Key, leaf: Any, *, dims: int) -> Float[Array, "b dims"]:
    """The sketch of one leaf's directions: of its factors, where it has two plain ones."""
    if not _is_plain(leaf):
        return orders.sketch(key, factored.stack(leaf), dims=dims)
    left, right = leaf.terms[0].left, leaf.terms[0].right
    keys, short = jax.random.split(key), min(right.shape[-1], max(1, math.isqrt(dims)))
    left = _projected(keys[0], left, max(1, dims // short))
    product = jnp.einsum("bkti,bkto->bkio", left, _projected(keys[1], right, short), precision="highest")
    norms = factored.norms(leaf)[:, None]
    return product.reshape(product.shape[0], -1) / jnp.where(norms > 0.0, norms, 1.0)


def nearest_to_loss(loss_fn: LossFn, params: Params, example: Example) -> int:
    """The place among the leaves of the matrix whose gradient takes the shortest program: the last layer's."""
    leaves, structure = jax.tree.flatten(params)

    def length(place: int) -> tuple[bool, int, int]:
        def loss(leaf: Array) -> Array:
            return loss_fn(jax.tree.unflatten(structure, [*leaves[:place], leaf, *leaves[place + 1 :]]), example)

        return leaves[place].ndim < 2, _count(jax.make_jaxpr(jax.grad(loss))(leaves[place]).jaxpr), -place

    return min(range(len(leaves)), key=length)


def _is_plain(leaf: Any) -> bool:
    one = factored.is_factored(leaf) and leaf.formed is None and leaf.shared is None and len(leaf.terms) == 1
    return one and isinstance(leaf.terms[0].left, jax.Array)


def _projected(key: Key, factor: Float[Array, "b k t i"], width: int) -> Float[Array, "b k t w"]:
    """A random projection to ``width`` numbers; what is not wider is left as it is."""
    if factor.shape[-1] <= width:
        return factor
    projection = jax.random.normal(key, (factor.shape[-1], width)) / math.sqrt(width)
    return jnp.einsum("bkti,iw->bktw", factor.astype(jnp.float32), projection)


def _count(jaxpr: Any) -> int:
    """Equations of a program, those of its inner programs included."""
    inner = (sub for eqn in jaxpr.eqns for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program))
    return len(jaxpr.eqns) + sum(_count(getattr(sub, "jaxpr", sub)) for sub in inner if _is_program(sub))


def _is_program(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")
