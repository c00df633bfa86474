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

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from isgd_jax.gradients import control_flow, cut_products
from isgd_jax.gradients.contraction import Contraction, Parts, Whole
from isgd_jax.gradients.cut_products import BITS, is_coarse, outer_or_none
from isgd_jax.gradients.factors import wide
from isgd_jax.gradients.jaxpr import Constant, Node, Op, Value, emit, is_zero
from isgd_jax.gradients.layers import side_by_side

__all__ = ["RULES", "Rule", "cut", "rule"]

Rule: TypeAlias = Callable[[Value, Op], Parts | None]

RULES: dict[str, Rule] = {}
"""How the output of each primitive is cut, by the primitive's name."""

_IN_INTEGERS = frozenset({
    "copy", "copy_p", "optimization_barrier", "pvary", "reshape", "squeeze", "expand_dims", "broadcast_in_dim",
    "transpose", "pad", "slice", "split", "stack", "unstack", "concatenate", "dot_general", "conv_general_dilated",
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
    if node.parts is None:
        node.parts = _parts(node)
    return list(node.parts)


def _parts(node: Value) -> Parts:
    if math.prod(node.shape) == 0:
        return []
    if node.op is None:
        return [Whole(node, "input")]
    known = RULES.get(node.op.name) if _is_linear(node) else None
    parts = known(node, node.op) if known else None
    if parts is None or _too_many_ways(parts):
        return [Whole(node, node.op.name)]
    return [part for part in parts if isinstance(part, Whole) or not part.is_empty]


_WAYS = 8
"""Ways that one product may reach a gradient by, until it is formed, and added up as the program does."""


def _too_many_ways(parts: Parts) -> bool:
    """Whether a product is there again and again, as after ``w = w + w.T`` ten times: 2^10 terms of one."""
    counts = collections.Counter(part.origin for part in parts if isinstance(part, Contraction))
    return max(counts.values(), default=0) > _WAYS


def _is_linear(node: Value) -> bool:
    """Whether sums and products in the type of ``node`` are those of the real or complex numbers, to rounding."""
    if jnp.issubdtype(node.dtype, jnp.integer):
        return node.op is not None and node.op.name in _IN_INTEGERS
    return not is_coarse(node.dtype) and bool(jnp.issubdtype(node.dtype, jnp.inexact))


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
    thin: list[Node] = []
    others: list[Node] = []
    for x in _summands(node):
        (thin if _thin_slice(x) else others).append(x)
    if len(thin) < 2:
        for x in _sums_within(node):
            cut(x)
        return _unless_whole([part for x in op.inputs for part in cut(x)])
    return _unless_whole([*_layers(thin, node.shape), *(part for x in others for part in cut(x))])


def _unless_whole(parts: Parts) -> Parts | None:
    """A sum of parts; None where it is better computed as it stands."""
    whole = [part for part in parts if isinstance(part, Whole)]
    return None if len(whole) == len(parts) > 1 else parts


def _layers(thin: Sequence[Node], shape: tuple[int, ...]) -> Parts:
    """The parts of a sum of slices, each padded to an array of this shape."""
    axes, slices = set(), []
    for axis, place, slice_ in filter(None, map(_thin_slice, thin)):
        axes.add(axis)
        slices.append((place, cut(slice_)))
    found = side_by_side(slices, axes.pop(), shape) if len(axes) == 1 else None
    return [Whole(x, "pad") for x in thin] if found is None else found


def _summands(node: Node) -> Iterator[Node]:
    """What a sum of sums adds; a sum that is added twice is taken apart once."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node.op is not None and node.op.name in ("add", "add_any") and node not in seen:
            seen.add(node)
            waiting += reversed(node.op.inputs)
        else:
            yield node


_PASSED_ON = frozenset({"add", "add_any", "sub", "neg", "copy", "convert_element_type"})


def _sums_within(node: Value) -> list[Value]:
    """What a sum is made of by sums alone and is not cut yet, what is added before what it is added to: cut in this
    order, a chain of a thousand sums is no recursion of a thousand calls.
    """
    found: dict[Value, None] = {}
    waiting = [(x, False) for x in (node.op.inputs if node.op else ())]
    while waiting:
        x, is_ready = waiting.pop()
        if isinstance(x, Constant) or x.op is None or x.parts is not None or x.op.name not in _PASSED_ON:
            continue
        if is_ready:
            found.setdefault(x)
        elif x not in found:
            waiting += [(x, True), *((y, False) for y in x.op.inputs)]
    return list(found)


def _thin_slice(node: Node) -> tuple[int, int, Node] | None:
    """The axis that a slice of thickness one is padded along, its place, and the slice; None if a value is not that."""
    if node.op is None or node.op.name != "pad" or not is_zero(node.op.inputs[1]):
        return None
    padded = [(axis, around) for axis, around in enumerate(node.op.params["padding_config"]) if any(around)]
    if len(padded) != 1 or node.op.inputs[0].shape[padded[0][0]] != 1:
        return None
    axis, (low, high, _) = padded[0]
    return (axis, int(low), node.op.inputs[0]) if low >= 0 <= high else None


@rule("sub")
def _sub(node: Value, op: Op) -> Parts | None:
    negated = emit("neg", jnp.negative, op.inputs[1])
    return _add(node, replace(op, inputs=[op.inputs[0], negated]))


@rule("neg")
def _neg(node: Value, op: Op) -> Parts | None:
    return _each(node, op, lambda term: term.scaled(jnp.negative))


@rule("copy", "copy_p", "optimization_barrier", "pvary")
def _same(node: Value, op: Op) -> Parts | None:
    if len(op.outputs) > 1:
        return cut(op.inputs[node.index])
    return _each(node, op, lambda term: term)


@rule("convert_element_type")
def _cast(node: Value, op: Op) -> Parts | None:
    """To a type of floating point (`cut` lets no other pass); of a complex number to a real one, the real part."""

    def cast(term: Contraction) -> Parts:
        if jnp.issubdtype(node.dtype, jnp.complexfloating):
            return [term.cast(node.dtype)]
        return [part.cast(node.dtype) for part in term.real()]

    return None if is_coarse(op.inputs[0].dtype) else _each(node, op, cast)


@rule("reduce_precision")
def _reduce_precision(node: Value, op: Op) -> Parts | None:
    if op.params["mantissa_bits"] < BITS or op.params["exponent_bits"] < jnp.finfo(jnp.float16).nexp:
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
    return [] if is_zero(op.inputs[0]) else _reshape(node, op) if same_size else None


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
        return None if split is None else outer_or_none(split[0].rearranged(change(split[1])))

    return _each(node, op, regroup)


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


@rule("unstack")
def _unstack(node: Value, op: Op) -> Parts | None:
    """The gradient of arrays that were stacked."""
    axis, shape = op.params["axis"], list(op.inputs[0].shape)
    shape[axis] = 1
    layer = _sliced(node.index, node.index + 1, 1)

    def apply(term: Contraction) -> Contraction | None:
        changed = _changed(term, shape, lambda place, _: layer if place == axis else None)
        return None if changed is None else outer_or_none(changed.reshaped(node.shape))

    return _each(node, op, apply)


@rule("stack")
def _stack(node: Value, op: Op) -> Parts | None:
    """The gradient of an array that was taken apart into layers."""
    return side_by_side([(place, cut(x)) for place, x in enumerate(op.inputs)], op.params["axis"], node.shape)


@rule("concatenate")
def _concatenate(node: Value, op: Op) -> Parts | None:
    """The gradient of an array that was split: of each piece, padding with zeros; one thick they are layers."""
    along = op.params["dimension"]
    if all(x.shape[along] == 1 for x in op.inputs):
        return side_by_side([(place, cut(x)) for place, x in enumerate(op.inputs)], along, node.shape)
    parts: Parts = []
    stop = 0
    for x in op.inputs:
        start, stop = stop, stop + x.shape[along]
        padded = _padded_part(node, along, start, node.shape[along] - stop)
        for part in map(padded, cut(x)):
            if part is None:
                return None
            parts.append(part)
    return _unless_whole(parts)


def _padded_part(node: Value, along: int, low: int, high: int) -> Callable[[Contraction | Whole], Any]:
    """A part of a piece of ``node`` as one of ``node``."""
    pad = _padded(low, high, 0)

    def padded(part: Contraction | Whole) -> Contraction | Whole | None:
        if isinstance(part, Whole):
            return part if pad is None else Whole(emit("pad", lambda x: pad(x, along), part.value), part.because)
        return _changed(part, node.shape, lambda place, _: pad if place == along else None)

    return padded


def _along(node: Value, op: Op, change: Callable[[int, int], Any]) -> Parts | None:
    """An operation on dimensions one by one: ``change(place, size)`` is what is done to each, or None."""
    return _each(node, op, lambda term: _changed(term, node.shape, change))


def _changed(term: Contraction, shape: Sequence[int], change: Callable[[int, int], Any]) -> Contraction | None:
    """A contraction after ``change(place, size)`` of its dimensions, then of this shape; None where that cannot be."""
    split = term.dims()
    if split is None:
        return None
    term, groups = split
    for place, group in enumerate(groups):
        function = change(place, term.shape[place])
        if function is None:
            continue
        axes = [a for a in group if a.size > 1] or list(group[:1])
        changed = term.changed(axes[0], shape[place], function) if len(axes) == 1 else None
        if changed is None:
            return None
        term = changed
    return term.reshaped(tuple(shape))


RULES |= {"dot_general": cut_products.dot_general, "conv_general_dilated": cut_products.convolution}


@rule("scatter-add")
def _scatter_add(node: Value, op: Op) -> Parts | None:
    return cut_products.scatter_add(node, op, cut)


@rule("scan")
def _scan(node: Value, op: Op) -> Parts | None:
    return control_flow.cut_scan(node, op, cut)


@rule("cond")
def _cond(node: Value, op: Op) -> Parts | None:
    return control_flow.cut_cond(node, op, cut)
