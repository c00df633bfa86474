"""Where a gradient is cut: the last contraction before a parameter's gradient, kept as its two factors.

The gradient program of ONE example is read backwards from each output. What only rearranges or adds (transposes,
reshapes, sums, signs, casts) is remembered; what contracts two factors is cut there. Everything else stays whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import lax

from isgd_jax._jaxpr import Constant, Node, Value, emit

_fresh = itertools.count()


@dataclass(frozen=True)
class Axis:
    """A named axis, as in an einsum; equality is identity of the name."""

    name: int
    size: int

    @classmethod
    def new(cls, size: int) -> Axis:
        return cls(next(_fresh), size)


@dataclass(frozen=True)
class Contraction:
    """An einsum not yet done: ``left``, ``right`` with named axes; ``out`` the result's axes, ``shape`` their grouping."""

    left: Node
    left_axes: tuple[Axis, ...]
    right: Node
    right_axes: tuple[Axis, ...]
    out: tuple[Axis, ...]
    shape: tuple[int, ...]


Terms: TypeAlias = list[Contraction]


@dataclass(frozen=True)
class Whole:
    """What could not be cut: the value itself, and the primitive that stood in the way."""

    value: Node
    because: str


def cut(node: Node) -> Terms | Whole:
    """The contractions that sum to ``node``, or the node whole."""
    if isinstance(node, Constant) or node.op is None:
        return Whole(node, "input")
    rule = _RULES.get(node.op.name)
    terms = rule(node) if rule else None
    return Whole(node, node.op.name) if terms is None else terms


_RULES: dict[str, Callable[[Value], Terms | None]] = {}


def _rule(*names: str) -> Callable[[Any], Any]:
    def register(function: Any) -> Any:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


@_rule("dot_general")
def _dot_general(node: Value) -> Terms | None:
    left, right = node.op.inputs
    (left_over, right_over), (left_batch, right_batch) = node.op.params["dimension_numbers"]
    left_axes = [Axis.new(size) for size in left.shape]
    right_axes = [Axis.new(size) for size in right.shape]
    for mine, yours in zip((*left_over, *left_batch), (*right_over, *right_batch), strict=True):
        right_axes[yours] = left_axes[mine]
    shared = [left_axes[a] for a in left_batch]
    free = [a for a in left_axes if a not in right_axes], [a for a in right_axes if a not in left_axes]
    if not free[0] or not free[1]:
        return None  # elementwise in what is left: the product is no larger than its factors
    return [Contraction(left, tuple(left_axes), right, tuple(right_axes), (*shared, *free[0], *free[1]), node.shape)]


@_rule("add", "add_any")
def _add(node: Value) -> Terms | None:
    parts = [cut(x) for x in node.op.inputs]
    return None if any(isinstance(part, Whole) for part in parts) else [term for part in parts for term in part]


@_rule("neg")
def _neg(node: Value) -> Terms | None:
    return _each(node, lambda term: replace(term, right=emit("neg", jnp.negative, term.right)))


@_rule("convert_element_type", "copy", "copy_p", "reduce_precision")
def _same(node: Value) -> Terms | None:
    return _each(node, lambda term: term)


@_rule("reshape", "squeeze", "expand_dims")
def _reshape(node: Value) -> Terms | None:
    return _each(node, lambda term: replace(term, shape=node.shape))


@_rule("transpose")
def _transpose(node: Value) -> Terms | None:
    def permute(term: Contraction) -> Contraction | None:
        term = _aligned(term)
        if term is None:
            return None
        groups = _groups(term)
        order = node.op.params["permutation"]
        return replace(term, out=tuple(a for p in order for a in groups[p]), shape=node.shape)

    return _each(node, permute)


def _each(node: Value, change: Callable[[Contraction], Contraction | None]) -> Terms | None:
    terms = cut(node.op.inputs[0])
    if isinstance(terms, Whole):
        return None
    changed = [change(term) for term in terms]
    return None if any(term is None for term in changed) else changed


def _groups(term: Contraction) -> list[tuple[Axis, ...]]:
    """The named axes that make up each dimension of an aligned term."""
    axes, groups = list(term.out), []
    for size in term.shape:
        group: list[Axis] = []
        while math.prod(a.size for a in group) < size:
            group.append(axes.pop(0))
        groups.append(tuple(group))
    return groups


def _aligned(term: Contraction) -> Contraction | None:
    """Split axes until each dimension of ``shape`` is a run of whole axes; None if the sizes do not divide."""
    term = replace(term, out=tuple(a for a in term.out if a.size != 1))
    start = 0
    for size in term.shape:
        room = size
        while room > 1:
            axis = term.out[start]
            if axis.size > room:
                if axis.size % room:
                    return None
                term = _split(term, axis, room)
                axis = term.out[start]
            if room % axis.size:
                return None
            room //= axis.size
            start += 1
    return term


def _split(term: Contraction, axis: Axis, outer: int) -> Contraction:
    """``axis`` as two, the first of size ``outer``, in the result and in the factors that carry it."""
    pair = Axis.new(outer), Axis.new(axis.size // outer)

    def names(axes: Sequence[Axis]) -> tuple[Axis, ...]:
        return tuple(new for a in axes for new in (pair if a == axis else (a,)))

    def values(node: Node, axes: Sequence[Axis]) -> Node:
        sizes = [a.size for a in names(axes)]
        return emit("split", lambda x: lax.reshape(x, sizes), node) if axis in axes else node

    left, right = values(term.left, term.left_axes), values(term.right, term.right_axes)
    return Contraction(left, names(term.left_axes), right, names(term.right_axes), names(term.out), term.shape)


@dataclass(frozen=True)
class Canonical:
    """A contraction as `factored.Outer` has it, for one example: left [k, t, i], right [k, t, o]."""

    left: Value
    right: Value
    axes: tuple[tuple[int, str], ...]


def canonical(term: Contraction) -> Canonical:
    """The two factors brought to [k, t, i] and [k, t, o]; the factor that holds the first axis is the left one."""
    k = [a for a in term.out if a in term.left_axes and a in term.right_axes]
    first = next((a for a in term.out if a not in k), None)
    if first not in term.left_axes:
        left, right = term.right, term.left
        left_axes, right_axes = term.right_axes, term.left_axes
    else:
        left, right, left_axes, right_axes = term.left, term.right, term.left_axes, term.right_axes
    t = [a for a in left_axes if a not in term.out]
    i = [a for a in term.out if a in left_axes and a not in k]
    o = [a for a in term.out if a in right_axes and a not in k]
    roles = tuple((a.size, "k" if a in k else "i" if a in i else "o") for a in term.out)
    return Canonical(_laid_out(left, left_axes, k, t, i), _laid_out(right, right_axes, k, t, o), roles)


def _laid_out(node: Node, axes: Sequence[Axis], *groups: Sequence[Axis]) -> Value:
    order = [axes.index(a) for group in groups for a in group]
    sizes = [math.prod(a.size for a in group) for group in groups]
    return emit("lay out", lambda x: lax.reshape(lax.transpose(x, order), sizes), node)
