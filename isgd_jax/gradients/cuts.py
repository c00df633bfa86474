"""Where a gradient is cut: the last contraction before a parameter's gradient, kept as its two factors.

The gradient program of ONE example is read backwards from each output. What only rearranges or adds (transposes,
reshapes, sums, signs, casts) is remembered; what contracts two factors is cut there. Everything else stays whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax

from isgd_jax.gradients import control_flow
from isgd_jax.gradients.contraction import Contraction, Parts, Side, Whole, axes_of
from isgd_jax.gradients.factors import OneHot, Window
from isgd_jax.gradients.jaxpr import Constant, Node, Op, Value, emit

Rule: TypeAlias = Callable[[Value, Op], Parts | None]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how the output of a primitive is cut; a rule returns None for what it cannot read."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def cut(node: Node) -> Parts:
    """The parts that sum to ``node``: contractions where it could be cut."""
    if isinstance(node, Constant):
        return [] if not np.any(node.value) else [Whole(node, "constant")]
    if node.op is None:
        return [Whole(node, "input")]
    known = _RULES.get(node.op.name)
    parts = known(node, node.op) if known else None
    return [Whole(node, node.op.name)] if parts is None else parts


def _each(node: Value, op: Op, change: Callable[[Contraction], Contraction | None]) -> Parts | None:
    """The parts of the first input, each changed as the operation changes it; None if one of them cannot be."""
    parts: Parts = []
    for part in cut(op.inputs[0]):
        if isinstance(part, Whole):
            parts.append(Whole(_applied(node, op, part.value), part.because))
        else:
            changed = change(part)
            if changed is None:
                return None
            parts.append(changed)
    return parts


def _applied(node: Value, op: Op, value: Node) -> Node:
    """The (linear) operation on a part of its first input."""
    if value is op.inputs[0]:
        return node
    return emit(op.name, lambda x, *rest: op.apply(x, *rest)[node.index], value, *op.inputs[1:])


@rule("add", "add_any")
def _add(node: Value, op: Op) -> Parts | None:
    parts = [part for x in op.inputs for part in cut(x)]
    whole = [part for part in parts if isinstance(part, Whole)]
    return None if len(whole) == len(parts) > 1 else parts


@rule("sub")
def _sub(node: Value, op: Op) -> Parts | None:
    negated = emit("neg", jnp.negative, op.inputs[1])
    return _add(node, replace(op, inputs=[op.inputs[0], negated]))


@rule("neg")
def _neg(node: Value, op: Op) -> Parts | None:
    return _each(node, op, lambda term: term.scaled(jnp.negative))


@rule("convert_element_type", "copy", "copy_p", "reduce_precision", "optimization_barrier")
def _same(node: Value, op: Op) -> Parts | None:
    if len(op.outputs) > 1:
        return cut(op.inputs[node.index])
    return _each(node, op, lambda term: term)


@rule("mul", "div")
def _mul(node: Value, op: Op) -> Parts | None:
    """By a scalar, on either side."""
    x, y = op.inputs
    if op.name == "mul" and x.shape == () != y.shape:
        x, y = y, x
    if y.shape != ():
        return None
    scale = _times if op.name == "mul" else _over
    parts = cut(x)
    if all(isinstance(part, Whole) for part in parts):
        return None if parts else []

    def scaled(part: Contraction | Whole) -> Contraction | Whole:
        if isinstance(part, Whole):
            return Whole(emit(op.name, scale, part.value, y), part.because)
        right = part.right.unrolled(part.dtype)
        return replace(part, right=replace(right, node=emit(op.name, scale, right.node, y)))

    return [scaled(part) for part in parts]


def _times(x: Any, scalar: Any) -> Any:
    return x * lax.convert_element_type(scalar, x.dtype)


def _over(x: Any, scalar: Any) -> Any:
    return x / lax.convert_element_type(scalar, x.dtype)


@rule("broadcast_in_dim")
def _broadcast(node: Value, op: Op) -> Parts | None:
    """Of zero, or a reshape in disguise."""
    same_size = np.prod(node.shape, dtype=int) == np.prod(op.inputs[0].shape, dtype=int)
    parts = cut(op.inputs[0]) if not op.inputs[0].shape and isinstance(op.inputs[0], Constant) else None
    return [] if parts == [] else _reshape(node, op) if same_size else None


@rule("reshape", "squeeze", "expand_dims")
def _reshape(node: Value, op: Op) -> Parts | None:
    return _each(node, op, lambda term: term.reshaped(node.shape))


@rule("transpose")
def _transpose(node: Value, op: Op) -> Parts | None:
    return _regrouped(node, op, lambda groups: [groups[place] for place in op.params["permutation"]])


@rule("reduce_sum")
def _reduce_sum(node: Value, op: Op) -> Parts | None:
    def rest(groups: list[Any]) -> list[Any]:
        return [group for place, group in enumerate(groups) if place not in op.params["axes"]]

    return _regrouped(node, op, rest)


def _regrouped(node: Value, op: Op, change: Callable[[list[Any]], list[Any]]) -> Parts | None:
    def regroup(term: Contraction) -> Contraction | None:
        split = term.dims()
        return None if split is None else _outer_or_none(split[0].rearranged(change(split[1])))

    return _each(node, op, regroup)


def _outer_or_none(term: Contraction) -> Contraction | None:
    """None where the product is no larger than a factor, so that nothing is won by keeping it lazy."""
    left, right = (any(a not in other.axes for a in term.out if a in side.axes) for side, other in _pairs(term))
    return term if left and right else None


def _pairs(term: Contraction) -> list[tuple[Side, Side]]:
    return [(term.left, term.right), (term.right, term.left)]


@rule("pad")
def _pad(node: Value, op: Op) -> Parts | None:
    """The gradient of a slice of a parameter: padding with zeros."""
    if not isinstance(op.inputs[1], Constant) or np.any(op.inputs[1].value):
        return None
    return _along(node, op, lambda place, _: _padded(*map(int, op.params["padding_config"][place])))


@rule("slice")
def _slice(node: Value, op: Op) -> Parts | None:
    """The gradient of a concatenation of parameters."""
    strides = op.params["strides"] or (1,) * len(node.shape)
    limits = list(zip(op.params["start_indices"], op.params["limit_indices"], strides, strict=True))
    return _along(node, op, lambda place, size: None if limits[place] == (0, size, 1) else _sliced(*limits[place]))


@rule("split")
def _split(node: Value, op: Op) -> Parts | None:
    sizes, along = [int(size) for size in op.params["sizes"]], op.params["axis"]
    start = sum(sizes[: node.index])
    piece = _sliced(start, start + sizes[node.index], 1)
    return _along(node, op, lambda place, size: piece if place == along else None)


def _padded(low: int, high: int, inside: int) -> Any:
    if low == high == inside == 0:
        return None

    def pad(x: Any, place: int) -> Any:
        around = [(low, high, inside) if axis == place else (0, 0, 0) for axis in range(x.ndim)]
        return lax.pad(x, jnp.zeros((), x.dtype), around)

    return pad


def _sliced(start: int, limit: int, stride: int) -> Any:
    return lambda x, place: lax.slice_in_dim(x, start, limit, stride, axis=place)


def _along(node: Value, op: Op, change: Callable[[int, int], Any]) -> Parts | None:
    """An operation on dimensions one by one: ``change(place, size)`` is what is done to each, or None."""

    def apply(term: Contraction) -> Contraction | None:
        split = term.dims()
        if split is None:
            return None
        term, groups = split
        for place, group in enumerate(groups):
            function = change(place, term.shape[place])
            if function is None:
                continue
            axes = [a for a in group if a.size > 1] or list(group[:1])
            changed = term.changed(axes[0], node.shape[place], function) if len(axes) == 1 else None
            if changed is None:
                return None
            term = changed
        return term.reshaped(node.shape)

    return _each(node, op, apply)


@rule("dot_general")
def _dot_general(node: Value, op: Op) -> Parts | None:
    left, right = op.inputs
    (left_over, right_over), (left_batch, right_batch) = op.params["dimension_numbers"]
    left_axes, right_axes = axes_of(left.shape), list(axes_of(right.shape))
    for mine, yours in zip((*left_over, *left_batch), (*right_over, *right_batch), strict=True):
        right_axes[yours] = left_axes[mine]
    shared = [left_axes[place] for place in left_batch]
    free = [a for a in left_axes if a not in right_axes] + [a for a in right_axes if a not in left_axes]
    sides = Side(left, left_axes), Side(right, tuple(right_axes))
    return _one(Contraction(*sides, (*shared, *free), node.shape, node.dtype))


def _one(term: Contraction) -> Parts | None:
    kept = _outer_or_none(term)
    return None if kept is None else [kept]


@rule("conv_general_dilated")
def _convolution(node: Value, op: Op) -> Parts | None:
    """A convolution contracts the windows of the left operand with the right one.

    The kernel's gradient is one in which the *output's* places are the kernel's and the right operand's are the
    positions, so the windows are small however large the image is.
    """
    params, (left, right) = op.params, op.inputs
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
        x = lax.transpose(x, numbers.lhs_spec).reshape(sizes)
        return x[:, :, 0] if groups == 1 else x[0].swapaxes(0, 1) if batch_groups == 1 else x

    window = Window(
        tuple(kernel),
        tuple(positions),
        tuple(params["window_strides"]),
        tuple(params["rhs_dilation"]),
        tuple((lo, hi, d - 1) for (lo, hi), d in zip(params["padding"], params["lhs_dilation"], strict=True)),
    )
    windows = Side(emit("image", image, left), (group, rows, over, *at, *inside), window)
    slopes = emit(
        "slopes", lambda x: lax.transpose(x, numbers.rhs_spec).reshape(g, outs.size, over.size, *positions), right
    )
    term = Contraction(windows, Side(slopes, (group, outs, over, *inside)), (rows, group, outs, *at), (), node.dtype)
    dims = dict(zip(numbers.out_spec, [(rows,), (group, outs), *((a,) for a in at)], strict=True))
    return _one(term.rearranged([dims[place] for place in range(len(dims))]))


@rule("scatter-add")
def _scatter_add(node: Value, op: Op) -> Parts | None:
    """The gradient of rows taken by index: one-hot rows times what flowed back to them."""
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
    places = emit("rows", lambda x: _rows(x[..., 0], classes.size, "CLIP" in str(op.params["mode"])), indices)
    term = Contraction(Side(places, (*over, classes), OneHot), Side(updates, axes), (), (), node.dtype)
    return [*cut(operand), term.rearranged(dims)]


def _rows(indices: Any, size: int, clip: bool) -> Any:
    """Indices as `OneHot` has them: whatever is out of range is ``size`` and matches nothing."""
    if clip:
        return jnp.clip(indices, 0, size - 1).astype(jnp.int32)
    return jnp.where((indices < 0) | (indices >= size), size, indices).astype(jnp.int32)


@rule("scan")
def _scan(node: Value, op: Op) -> Parts | None:
    return control_flow.cut_scan(node, op, cut)


@rule("cond")
def _cond(node: Value, op: Op) -> Parts | None:
    return control_flow.cut_cond(node, op, cut)
