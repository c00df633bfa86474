"""The rules of what multiplies: products, convolutions and rows taken by index are where a gradient is cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from isgd_jax.gradients.contraction import Contraction, Parts, Side, axes_of
from isgd_jax.gradients.factors import OneHot, Window
from isgd_jax.gradients.jaxpr import Node, Op, Value, emit
from isgd_jax.gradients.meshes import reshaped

__all__ = ["BITS", "convolution", "dot_general", "is_coarse", "outer_or_none", "scatter_add"]

BITS = 7
"""Of bfloat16, after the point."""


def is_coarse(dtype: Any) -> bool:
    """Whether a type of floating point has fewer than 7 bits after the point: those of eight bits and fewer."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).nmant < BITS


def outer_or_none(term: Contraction) -> Contraction | None:
    """None where the product is no larger than a factor, so that nothing is won by keeping it lazy."""
    left, right = (
        any(a not in other.axes for a in term.out if a in side.axes)
        for side, other in ((term.left, term.right), (term.right, term.left))
    )
    return term if left and right else None


def dot_general(node: Value, op: Op) -> Parts | None:
    """A product contracts its operands; axes that it maps over belong to both.

    Args:
        node: the product.
        op: that makes it.
    """
    left, right = op.inputs
    (left_over, right_over), (left_batch, right_batch) = op.params["dimension_numbers"]
    left_axes, right_axes = axes_of(left.shape), list(axes_of(right.shape))
    for mine, yours in zip((*left_over, *left_batch), (*right_over, *right_batch), strict=True):
        right_axes[yours] = left_axes[mine]
    shared = [left_axes[place] for place in left_batch]
    free = [a for a in left_axes if a not in right_axes] + [a for a in right_axes if a not in left_axes]
    if not _cannot_wrap(left, right, node, math.prod(left.shape[place] for place in left_over)):
        return None
    sides = Side(_floating(left), left_axes), Side(_floating(right), tuple(right_axes))
    return _one(Contraction(*sides, (*shared, *free), node.shape, node.dtype, origin=node))


def _cannot_wrap(left: Node, right: Node, node: Value, count: int) -> bool:
    """Whether the sum of so many products fits the type of the result, whatever the numbers are."""
    if not jnp.issubdtype(node.dtype, jnp.integer):
        return True
    if not all(jnp.issubdtype(x.dtype, jnp.integer) for x in (left, right)):
        return False  # of floating point, cut to integers
    ends = [jnp.iinfo(x.dtype) for x in (left, right)]
    products = [int(a) * int(b) for a in (ends[0].min, ends[0].max) for b in (ends[1].min, ends[1].max)]
    room = jnp.iinfo(node.dtype)
    return count * min(products) >= int(room.min) and count * max(products) <= int(room.max)


def _floating(node: Node) -> Node:
    """A factor as the rest of the library takes it: whole numbers and eight-bit ones as float32, which holds them."""
    if jnp.issubdtype(node.dtype, jnp.inexact) and not is_coarse(node.dtype):
        return node
    return emit("convert_element_type", lambda x: x.astype(jnp.float32), node)


def _one(term: Contraction) -> Parts | None:
    kept = outer_or_none(term)
    return None if kept is None else [kept.cast(kept.dtype)]  # of bfloat16, it is rounded from the first


def convolution(node: Value, op: Op) -> Parts | None:
    """A convolution contracts the windows of the left operand with the right one.

    The kernel's gradient is one in which the *output's* places are the kernel's and the right operand's are the
    positions, so the windows are small however large the image is.

    Args:
        node: the convolution.
        op: that makes it.
    """
    params, (left, right) = op.params, op.inputs
    count = math.prod(right.shape) // max(1, right.shape[params["dimension_numbers"].rhs_spec[0]])
    if not _cannot_wrap(left, right, node, count):
        return None
    left, right = _floating(left), _floating(right)
    numbers, groups, batch_groups = (
        params["dimension_numbers"],
        params["feature_group_count"],
        params["batch_group_count"],
    )
    n, c, *spatial = (left.shape[place] for place in numbers.lhs_spec)
    o, _, *positions = (right.shape[place] for place in numbers.rhs_spec)
    kernel = [node.shape[place] for place in numbers.out_spec[2:]]
    g = max(groups, batch_groups)
    (group, rows, over, outs), at, inside = (
        axes_of([g, n // batch_groups, c // groups, o // g]),
        axes_of(kernel),
        axes_of(positions),
    )
    sizes = (batch_groups, rows.size, groups, over.size, *spatial)

    def image(x: Any) -> Any:
        x = reshaped(lax.transpose(x, numbers.lhs_spec), sizes)
        return x[:, :, 0] if groups == 1 else x[0].swapaxes(0, 1) if batch_groups == 1 else x

    window = Window(
        tuple(kernel),
        tuple(positions),
        tuple(params["window_strides"]),
        tuple(params["rhs_dilation"]),
        tuple((lo, hi, d - 1) for (lo, hi), d in zip(params["padding"], params["lhs_dilation"], strict=True)),
    )
    windows = Side(emit("image", image, left), (group, rows, over, *at, *inside), window)
    laid = (g, outs.size, over.size, *positions)
    slopes = emit("slopes", lambda x: reshaped(lax.transpose(x, numbers.rhs_spec), laid), right)
    term = Contraction(
        windows, Side(slopes, (group, outs, over, *inside)), (rows, group, outs, *at), (), node.dtype, origin=node
    )
    dims = dict(zip(numbers.out_spec, [(rows,), (group, outs), *((a,) for a in at)], strict=True))
    return _one(term.rearranged([dims[place] for place in range(len(dims))]))


def scatter_add(node: Value, op: Op, cut: Callable[[Node], Parts]) -> Parts | None:
    """The gradient of rows taken by index: one-hot rows times what flowed back to them.

    Args:
        node: the sum of rows.
        op: that makes it.
        cut: reads what the rows are added to.
    """
    numbers, (operand, indices, updates) = op.params["dimension_numbers"], op.inputs
    rows = numbers.inserted_window_dims
    if len(rows) != 1 or rows != numbers.scatter_dims_to_operand_dims or numbers.operand_batching_dims:
        return None
    if indices.shape[-1] != 1 or len(node.shape) == 1:
        return None
    (row,), window = rows, numbers.update_window_dims
    axes, (classes,) = axes_of(updates.shape), axes_of([node.shape[row]])
    if [axes[place].size for place in window] != [size for place, size in enumerate(node.shape) if place != row]:
        return None
    over = tuple(a for place, a in enumerate(axes) if place not in window)
    dims = [(axes[place],) for place in window]
    dims.insert(row, (classes,))
    updates = _floating(updates)
    places = emit("rows", lambda x: _rows(x[..., 0], classes.size, "CLIP" in str(op.params["mode"])), indices)
    term = Contraction(Side(places, (*over, classes), OneHot), Side(updates, axes), (), (), node.dtype, origin=node)
    return [*cut(operand), term.rearranged(dims)]


def _rows(indices: Any, size: int, clip: bool) -> Any:
    """Indices as `OneHot` has them: whatever is out of range is ``size`` and matches nothing."""
    indices = indices.astype(jnp.int32) if indices.dtype.itemsize < 4 else indices  # ``size`` must fit
    if clip:
        return jnp.clip(indices, 0, size - 1).astype(jnp.int32)
    return jnp.where((indices < 0) | (indices >= size), size, indices).astype(jnp.int32)
