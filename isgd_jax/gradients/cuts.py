"""Where a gradient is cut: the last contraction before a parameter's gradient, kept as its two factors.

The gradient program of ONE example is read backwards from each output. What only rearranges or adds (transposes,
reshapes, sums, signs, casts between wide types) is remembered; what contracts two factors is cut there. Everything
else stays whole, and is computed for each example as `jax.grad` would.

A rule stands here only if it is linear in the numbers that the program's types hold:

* types of floating point with 7 bits after the point or more (bfloat16, float16 and up) are read as exact: ours rounds
  less often than the program. Results in eight bits or fewer, and rounding to such, stay whole;
* integers wrap, so of them only rearrangements are read, and products whose sum cannot leave the type of the result;
* scalars are applied in the type that the program applies them in, or a wider one;
* real and imaginary parts are linear over the real numbers: those of a product are sums of products.

`tests/gradients/test_rules.py` holds each rule, in each type, to one `jax.grad` an example in float64.

Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from isgd_jax.gradients import control_flow
from isgd_jax.gradients.contraction import Contraction, Parts, Side, Whole, axes_of
from isgd_jax.gradients.factors import OneHot, Window, wide
from isgd_jax.gradients.jaxpr import Constant, Node, Op, Value, emit, is_zero

__all__ = ["RULES", "Rule", "cut", "rule"]

Rule: TypeAlias = Callable[[Value, Op], Parts | None]

RULES: dict[str, Rule] = {}
"""How the output of each primitive is cut, by the primitive's name."""

_IN_INTEGERS = frozenset({
    "copy", "copy_p", "optimization_barrier", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "transpose",
    "pad", "slice", "split", "dot_general", "conv_general_dilated",
})  # fmt: skip
"""Rules that hold where numbers wrap: they only rearrange, or look after the sum themselves."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how the output of a primitive is cut; a rule returns None for what it cannot read."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def cut(node: Node) -> Parts:
    """The parts that sum to ``node``: contractions where it could be cut."""
    if isinstance(node, Constant):
        return [] if is_zero(node) else [Whole(node, "constant")]
    if math.prod(node.shape) == 0:
        return []
    if node.op is None:
        return [Whole(node, "input")]
    known = RULES.get(node.op.name) if _is_linear(node) else None
    parts = known(node, node.op) if known else None
    if parts is None:
        return [Whole(node, node.op.name)]
    return [part for part in parts if isinstance(part, Whole) or not part.is_empty]


def _is_linear(node: Value) -> bool:
    """Whether sums and products in the type of ``node`` are those of the real or complex numbers, to rounding."""
    if jnp.issubdtype(node.dtype, jnp.integer):
        return node.op is not None and node.op.name in _IN_INTEGERS
    return not _is_coarse(node.dtype) and bool(jnp.issubdtype(node.dtype, jnp.inexact))


def _is_coarse(dtype: Any) -> bool:
    """Whether a type of floating point has fewer than 7 bits after the point: those of eight bits and fewer."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).nmant < _BITS


_BITS = 7
"""Of bfloat16, after the point."""


def _each(node: Value, op: Op, change: Callable[[Contraction], Contraction | Parts | None]) -> Parts | None:
    """The parts of the first input, each changed as the operation changes it; None if one of them cannot be."""
    parts: Parts = []
    for part in cut(op.inputs[0]):
        if isinstance(part, Whole):
            parts.append(Whole(_applied(node, op, part.value), part.because))
        else:
            changed = change(part)
            if changed is None:
                return None
            parts.extend([changed] if isinstance(changed, Contraction) else changed)
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


@rule("copy", "copy_p", "optimization_barrier")
def _same(node: Value, op: Op) -> Parts | None:
    if len(op.outputs) > 1:
        return cut(op.inputs[node.index])
    return _each(node, op, lambda term: term)


@rule("convert_element_type")
def _cast(node: Value, op: Op) -> Parts | None:
    """To a type of floating point (`cut` lets no other pass); of a complex number to a real one, the real part."""

    def cast(term: Contraction) -> Parts:
        if jnp.issubdtype(node.dtype, jnp.complexfloating):
            return [replace(term, dtype=node.dtype)]
        return [replace(part, dtype=node.dtype) for part in term.real()]

    return None if _is_coarse(op.inputs[0].dtype) else _each(node, op, cast)


@rule("reduce_precision")
def _reduce_precision(node: Value, op: Op) -> Parts | None:
    if op.params["mantissa_bits"] < _BITS or op.params["exponent_bits"] < jnp.finfo(jnp.float16).nexp:
        return None
    return _each(node, op, lambda term: term)


@rule("real", "imag", "conj")
def _part_of_complex(node: Value, op: Op) -> Parts | None:
    """Linear over the real numbers: parts of a product are sums of products of parts."""
    how = {"real": Contraction.real, "imag": Contraction.imag, "conj": Contraction.conj}[op.name]
    return _each(node, op, lambda term: [replace(part, dtype=node.dtype) for part in how(term)])


@rule("complex")
def _complex(node: Value, op: Op) -> Parts | None:
    """``x + iy``."""

    def of(x: Node, place: Callable[[Any], Any]) -> Parts:
        return [
            Whole(emit("complex", place, part.value), part.because)
            if isinstance(part, Whole)
            else replace(part.scaled(lambda x: place(x.astype(wide(x.dtype)))), dtype=node.dtype)
            for part in cut(x)
        ]

    x, y = op.inputs
    parts = [*of(x, lambda x: lax.complex(x, jnp.zeros_like(x))), *of(y, lambda y: lax.complex(jnp.zeros_like(y), y))]
    return None if parts and all(isinstance(part, Whole) for part in parts) else parts


@rule("mul", "div")
def _mul(node: Value, op: Op) -> Parts | None:
    """By a scalar, on either side; in the type of the result, or a wider one: the factors may be narrower."""
    x, y = op.inputs
    if op.name == "mul" and x.shape == () != y.shape:
        x, y = y, x
    if y.shape != ():
        return None
    scale = jnp.multiply if op.name == "mul" else jnp.divide
    parts = cut(x)
    if all(isinstance(part, Whole) for part in parts):
        return None if parts else []

    def scaled(part: Contraction | Whole) -> Contraction | Whole:
        if isinstance(part, Whole):
            return Whole(emit(op.name, scale, part.value, y), part.because)
        right = part.right
        dtype = _scaled_type(right.node.dtype, node.dtype)
        times = emit(op.name, lambda x, y: scale(x.astype(dtype), y.astype(dtype)), right.node, y)
        return replace(part, right=replace(right, node=times))

    return [scaled(part) for part in parts]


def _scaled_type(factor: Any, result: Any) -> Any:
    """What a factor is scaled in. bfloat16 has the range of float32; float16 has not, and entries are no sums."""
    if factor == result == jnp.bfloat16:
        return result
    with jax.numpy_dtype_promotion("standard"):
        return wide(jnp.promote_types(wide(factor), wide(result)))


@rule("broadcast_in_dim")
def _broadcast(node: Value, op: Op) -> Parts | None:
    """Of zero, or a reshape in disguise."""
    same_size = np.prod(node.shape, dtype=int) == np.prod(op.inputs[0].shape, dtype=int)
    parts = cut(op.inputs[0]) if not op.inputs[0].shape and isinstance(op.inputs[0], Constant) else None
    return [] if parts == [] else _reshape(node, op) if same_size else None


@rule("reshape", "squeeze", "expand_dims")
def _reshape(node: Value, op: Op) -> Parts | None:
    if op.name == "reshape" and op.params.get("dimensions") is not None:
        return None
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
    if not is_zero(op.inputs[1]):
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
    if not _cannot_wrap(left, right, node, math.prod(left.shape[place] for place in left_over)):
        return None
    sides = Side(_floating(left), left_axes), Side(_floating(right), tuple(right_axes))
    return _one(Contraction(*sides, (*shared, *free), node.shape, node.dtype))


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
    if jnp.issubdtype(node.dtype, jnp.inexact) and not _is_coarse(node.dtype):
        return node
    return emit("convert_element_type", lambda x: x.astype(jnp.float32), node)


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
    updates = _floating(updates)
    places = emit("rows", lambda x: _rows(x[..., 0], classes.size, "CLIP" in str(op.params["mode"])), indices)
    term = Contraction(Side(places, (*over, classes), OneHot), Side(updates, axes), (), (), node.dtype)
    return [*cut(operand), term.rearranged(dims)]


def _rows(indices: Any, size: int, clip: bool) -> Any:
    """Indices as `OneHot` has them: whatever is out of range is ``size`` and matches nothing."""
    indices = indices.astype(jnp.int32) if indices.dtype.itemsize < 4 else indices  # ``size`` must fit
    if clip:
        return jnp.clip(indices, 0, size - 1).astype(jnp.int32)
    return jnp.where((indices < 0) | (indices >= size), size, indices).astype(jnp.int32)


@rule("scan")
def _scan(node: Value, op: Op) -> Parts | None:
    return control_flow.cut_scan(node, op, cut)


@rule("cond")
def _cond(node: Value, op: Op) -> Parts | None:
    return control_flow.cut_cond(node, op, cut)
