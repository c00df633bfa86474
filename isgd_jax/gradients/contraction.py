"""A contraction not yet done, with named axes: how it is rearranged without being computed.

Everything here speaks of ONE example and of static shapes; the factors are nodes of the gradient's program.
"""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from isgd_jax.gradients.factors import Factor, OneHot, Window, Windows, wide, written_out
from isgd_jax.gradients.jaxpr import Node, emit
from isgd_jax.gradients.meshes import reshaped

__all__ = ["Axis", "Canonical", "Contraction", "Parts", "Side", "Whole", "axes_of", "canonical", "merged", "signature"]

_names = itertools.count()


@dataclass(frozen=True)
class Axis:
    """An index of an einsum; two axes are one when their names are."""

    name: int
    size: int


def axes_of(sizes: Sequence[int]) -> tuple[Axis, ...]:
    """New axes of these sizes, whose names nobody else has."""
    return tuple(Axis(next(_names), size) for size in sizes)


@dataclass(frozen=True)
class Side:
    """One factor. With a ``view``, the trailing axes are not the array's own but those the view unrolls it to:

    ``OneHot``: the class axis, after the axes of the indices;
    ``Window``: the kernel's axes and the positions', in place of the spatial axes, which the array has last.
    """

    node: Node
    axes: tuple[Axis, ...]
    view: type[OneHot] | Window | None = None

    @property
    def plain(self) -> tuple[Axis, ...]:
        """The axes that the array itself has."""
        if isinstance(self.view, Window):
            return self.axes[: len(self.axes) - 2 * len(self.view.kernel)]
        return self.axes[:-1] if self.view else self.axes

    @property
    def is_complex(self) -> bool:
        """Whether its entries are complex numbers."""
        return bool(jnp.issubdtype(self.node.dtype, jnp.complexfloating))

    def unrolled(self, dtype: Any) -> Side:
        """The same factor without a view: its entries written out."""
        if self.view is None:
            return self
        return Side(emit("unroll", lambda x: _unroll(x, self, dtype), self.node), self.axes)

    def mapped(self, function: Callable[[Array], Array]) -> Side:
        """The same axes, of ``function`` of the array; a new operation of the program."""
        return replace(self, node=emit(getattr(function, "__name__", "map"), function, self.node))


def _unroll(x: Array, side: Side, dtype: Any) -> Array:
    sizes = [axis.size for axis in side.axes]
    if isinstance(side.view, Window):
        lead = math.prod(axis.size for axis in side.plain)
        image = reshaped(x, (1, 1, lead, *x.shape[len(side.plain) :], 1))
        places = len(side.view.kernel)
        windows = written_out(Windows(image, side.view))[0, 0]
        unrolled = reshaped(windows, (lead, *side.view.positions, *side.view.kernel))
        swapped = (0, *range(1 + places, 1 + 2 * places), *range(1, 1 + places))
        return reshaped(unrolled.transpose(swapped), sizes)
    return written_out(OneHot(x, sizes[-1]), dtype)


@dataclass(frozen=True)
class Contraction:
    """``einsum(left, right -> out)``, then reshaped to ``shape``: axes of ``out`` are kept, all others summed over.

    Attributes:
        left: one factor.
        right: the other; scales and signs are applied to it.
        out: the axes of the result, in order; each is an axis of a factor, or of both.
        shape: of the value in the program. Its dimensions need not be runs of ``out``: see `dims`.
        dtype: of the value in the program.
        is_rounded: whether the value, or one that it was made of, is rounded to bfloat16 in the program.
        origin: the product of the program that it began as.
    """

    left: Side
    right: Side
    out: tuple[Axis, ...]
    shape: tuple[int, ...]
    dtype: Any
    is_rounded: bool = False
    origin: Node | None = None

    def cast(self, dtype: Any) -> Contraction:
        """In another type of the program."""
        return replace(self, dtype=dtype, is_rounded=self.is_rounded or dtype == jnp.bfloat16)

    @property
    def is_empty(self) -> bool:
        """Whether it sums over nothing: then it is zero."""
        return any(axis.size == 0 for side in (self.left, self.right) for axis in side.axes)

    def scaled(self, function: Callable[[Array], Array]) -> Contraction:
        """``function``, which must be linear in each entry, applied to the right factor (which has no view)."""
        return replace(self, right=self.right.mapped(function))

    def real(self) -> list[Contraction]:
        """The real part, ``Re(x δ) = Re x · Re δ - Im x · Im δ``: one or two real contractions."""
        both = self.left.is_complex and self.right.is_complex
        second = [self._parts(jnp.imag, lambda x: -jnp.imag(x))] if both else []
        return [self._parts(jnp.real, jnp.real), *second]

    def imag(self) -> list[Contraction]:
        """The imaginary part, ``Re x · Im δ + Im x · Re δ``: none, one or two real contractions."""
        first = [self._parts(jnp.real, jnp.imag)] if self.right.is_complex else []
        return [*first, *([self._parts(jnp.imag, jnp.real)] if self.left.is_complex else [])]

    def conj(self) -> list[Contraction]:
        """The complex conjugate."""
        return [self._parts(jnp.conj, jnp.conj)]

    def _parts(self, of_left: Callable[[Array], Array], of_right: Callable[[Array], Array]) -> Contraction:
        """A function on each factor that is complex."""
        left = self.left.mapped(of_left) if self.left.is_complex else self.left
        right = self.right.mapped(of_right) if self.right.is_complex else self.right
        return replace(self, left=left, right=right)

    def reshaped(self, shape: tuple[int, ...]) -> Contraction:
        """The same numbers in another shape: nothing moves until the axes are asked for (`dims`)."""
        return replace(self, shape=shape)

    def dims(self) -> tuple[Contraction, list[tuple[Axis, ...]]] | None:
        """The same with axes split until each dimension of ``shape`` is a run of axes; None where none divides so."""
        term, stop, groups = self, 0, []
        for size in self.shape:
            start, room = stop, size
            while stop < len(term.out) and (room > 1 or term.out[stop].size == 1):
                if term.out[stop].size > room and term.out[stop].size % room == 0:
                    term = term._split(term.out[stop], room)
                if room % term.out[stop].size:
                    return None
                room //= term.out[stop].size
                stop += 1
            groups.append((start, stop))
        return term, [term.out[start:stop] for start, stop in groups]

    def rearranged(self, groups: Sequence[Sequence[Axis]]) -> Contraction:
        """Each dimension made of the given axes; axes left out are summed over. A transposition of the result costs
        nothing here.
        """
        shape = tuple(math.prod(axis.size for axis in group) for group in groups)
        return replace(self, out=tuple(axis for group in groups for axis in group), shape=shape)

    def changed(self, axis: Axis, size: int, function: Callable[[Array, int], Array]) -> Contraction | None:
        """``function(array, place)`` along ``axis``, then ``size`` long; None if no factor has the axis.

        A slice, a reversal or a padding of the result is one of the factor that holds the axis, which is the smaller
        array, or of both that share it.

        Args:
            axis: of the result; a view that it belongs to is written out.
            size: of the axis afterwards.
            function: of the factor's array and the place of the axis in it; linear, and the same for all other axes.
        """
        if axis not in (*self.left.axes, *self.right.axes):
            return None
        (new,) = axes_of([size])
        is_shared = axis in self.left.axes and axis in self.right.axes

        def change(side: Side) -> Side:
            if axis not in side.axes:
                return side
            # An index that is padded names row 0: harmless where the other factor is padded with zeros.
            is_kept = axis in side.plain and (is_shared or side.view is not OneHot)
            side = side if is_kept else side.unrolled(self.dtype)
            place = side.axes.index(axis)
            return replace(side.mapped(lambda x: function(x, place)), axes=_swap(side.axes, axis, (new,)))

        return replace(self, left=change(self.left), right=change(self.right), out=_swap(self.out, axis, (new,)))

    def _split(self, axis: Axis, outer: int) -> Contraction:
        """``axis`` as two, the first of size ``outer``, wherever it stands."""
        pair = axes_of([outer, axis.size // outer])

        def split(side: Side) -> Side:
            if axis not in side.axes:
                return side
            if axis not in side.plain:
                side = side.unrolled(self.dtype)
            plain = [a.size for a in _swap(side.plain, axis, pair)]
            return replace(
                side.mapped(lambda x: reshaped(x, (*plain, *x.shape[len(side.plain) :]))),
                axes=_swap(side.axes, axis, pair),
            )

        return replace(self, left=split(self.left), right=split(self.right), out=_swap(self.out, axis, pair))


def signature(term: Contraction) -> Any:
    """Equal for contractions that differ in nothing but their values."""
    names: dict[Axis, int] = {}
    sides = [
        (side.node.shape, str(side.node.dtype), side.view, tuple(names.setdefault(a, len(names)) for a in side.axes))
        for side in (term.left, term.right)
    ]
    out = tuple(names.setdefault(a, len(names)) for a in term.out)
    return *sides, out, term.shape, str(term.dtype), term.is_rounded


@dataclass(frozen=True)
class Whole:
    """What could not be cut: the value itself, and the primitive that stood in the way."""

    value: Node
    because: str


Parts: TypeAlias = list[Contraction | Whole]
"""What a value is the sum of; nothing at all if it is zero."""


def _swap(axes: Sequence[Axis], old: Axis, new: Sequence[Axis]) -> tuple[Axis, ...]:
    return tuple(n for axis in axes for n in (new if axis == old else (axis,)))


@dataclass(frozen=True)
class Canonical:
    """A contraction brought to the form of `terms.Outer`, for one example.

    ``right`` is [k, t, o]; ``left`` is [k, t, i], or the indices [k, t], or the image [k, c, *spatial, i] of the view.
    """

    left: Node
    right: Node
    roles: tuple[tuple[int, str], ...]
    view: type[OneHot] | Window | None
    is_rounded: bool
    """Whether the program rounds the product to bfloat16."""

    def factor(self, left: Array) -> Factor:
        """The left factor, made of the left array of a whole batch."""
        if isinstance(self.view, Window):
            return Windows(left, self.view)
        return OneHot(left, math.prod(size for size, role in self.roles if role == "i")) if self.view else left


def canonical(term: Contraction) -> Canonical:
    """A viewed factor becomes the left one; without views, the one that holds the first axis of the result.

    Axes of the result that both factors have become k, those of one i or o; axes that are summed over become t. Nothing
    is multiplied: factors are transposed and reshaped, and summed over what only one of them has.
    """
    left, right = _summed(term.left, term.right, term), _summed(term.right, term.left, term)
    shared = [a for a in term.out if a in left.axes and a in right.axes]
    first = next(a for a in term.out if a not in shared)
    if left.view is None and (right.view is not None or first not in left.axes):
        left, right = right, left
    left, right = _fitted(left, shared, term), right.unrolled(term.dtype)
    over = [a for a in left.axes if a not in term.out]
    kernel = _kernel(left)
    mine = [a for a in term.out if a in left.plain and a not in shared]
    yours = [a for a in term.out if a in right.axes and a not in shared]
    roles = {**dict.fromkeys(shared, "k"), **dict.fromkeys(kernel, "w"), **dict.fromkeys(yours, "o")}
    if left.view is OneHot:
        groups = [shared, over]
    elif left.view is None:
        groups = [shared, over, mine]
    else:
        groups = [shared, [a for a in over if a in left.plain], mine]
    return Canonical(
        _laid_out(left, groups),
        _laid_out(right, [shared, over, yours]),
        tuple((a.size, roles.get(a, "i")) for a in term.out),
        left.view,
        term.is_rounded,
    )


def merged(terms: Sequence[Canonical]) -> list[Canonical]:
    """The same sum in fewer terms: of those that share a factor the others are added, ``x⊗a + x⊗b = x⊗(a + b)``.

    Terms are edges between left and right factors, and what is wanted is few factors that touch them all: always the
    one that most of the terms left over have. Derivatives inside a loss use the same values again and again.
    """
    found: list[Canonical] = []
    rest = list(terms)
    while rest:
        held = [(key, term) for term in rest for key in _shareable(term)]
        counts = collections.Counter(key for key, _ in held)
        (key, count) = counts.most_common(1)[0]
        taken = [term for other, term in held if other == key]
        found.append(taken[0] if count == 1 else _added(taken, key[0]))
        rest = [term for term in rest if not any(term is other for other in taken)]
    return found


def _shareable(term: Canonical) -> list[tuple[str, Any]]:
    """What other terms may share with this one: its left factor, or the right one if left ones can be added."""
    of_left = ("left", (term.left, term.roles, term.view, term.right.shape))
    return [of_left] if term.view is not None else [of_left, ("right", (term.right, term.roles, term.left.shape))]


def _added(terms: Sequence[Canonical], same: str) -> Canonical:
    """Terms that have one factor in common, as one; what is added is added in float32 or wider."""
    if same == "left":
        return replace(terms[0], right=emit("add", _sum_wide, *(term.right for term in terms)))
    return replace(terms[0], left=emit("add", _sum_wide, *(term.left for term in terms)))


def _sum_wide(*arrays: Array) -> Array:
    with jax.numpy_dtype_promotion("standard"):
        dtype = wide(jnp.result_type(*arrays))
    return sum((x.astype(dtype) for x in arrays[1:]), start=arrays[0].astype(dtype))


def _kernel(side: Side) -> tuple[Axis, ...]:
    if not isinstance(side.view, Window):
        return ()
    return side.axes[len(side.plain) : len(side.plain) + len(side.view.kernel)]


def _summed(side: Side, other: Side, term: Contraction) -> Side:
    """Axes that neither the result nor the other factor has are summed over at once."""
    alone = [a for a in side.axes if a not in term.out and a not in other.axes]
    if not alone:
        return side
    side = side.unrolled(term.dtype)
    places = tuple(side.axes.index(a) for a in alone)
    return replace(
        side.mapped(lambda x: jnp.sum(x, places, dtype=wide(x.dtype))),
        axes=tuple(a for a in side.axes if a not in alone),
    )


def _fitted(side: Side, shared: Sequence[Axis], term: Contraction) -> Side:
    """A view is kept only where `factors` knows its form: classes, or the kernel, as axes of the left factor alone, and
    the kernel's in their order.
    """
    kept = [a for a in side.axes if a in term.out and a not in shared]
    kernel = _kernel(side)
    fits = (
        kept == [side.axes[-1]]
        if side.view is OneHot
        else tuple(a for a in term.out if a in kernel and a not in shared) == kernel
        and not any(a in term.out for a in side.axes[len(side.plain) + len(kernel) :])
    )
    return side if fits else side.unrolled(term.dtype)


def _laid_out(side: Side, groups: Sequence[Sequence[Axis]]) -> Node:
    """The array with its plain axes grouped; the spatial axes of a window stand before the last group."""
    spatial = side.node.shape[len(side.plain) :]
    order = [side.plain.index(a) for group in groups for a in group]
    inside = len(order) - len(groups[-1])
    order[inside:inside] = range(len(side.plain), len(side.plain) + len(spatial))
    sizes = [math.prod(a.size for a in group) for group in groups]
    sizes[-1:-1] = spatial
    if order == list(range(len(order))) and tuple(sizes) == side.node.shape:
        return side.node
    return emit("lay out", _Layout(tuple(order), tuple(sizes)), side.node)


@dataclass(frozen=True)
class _Layout:
    """Axes in another order, then grouped."""

    order: tuple[int, ...]
    sizes: tuple[int, ...]

    def __call__(self, x: Array) -> Array:
        return reshaped(lax.transpose(x, self.order), self.sizes)
