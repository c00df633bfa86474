"""Factors of a contraction that are known by less than their entries: one-hot rows, and the windows of a convolution.

A factor is an array ``[b, k, t, i]``, or one of these, which can be written out as such an array. The batch axis comes
first, so that everything here can be sliced along it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from isgd_jax.gradients import costs
from isgd_jax.gradients.convolutions import in_fast_layout
from isgd_jax.gradients.meshes import reshaped
from isgd_jax.gradients.squares import largest

__all__ = [
    "Factor",
    "OneHot",
    "Window",
    "Windows",
    "as_one_example",
    "conjugate",
    "einsum",
    "likeness",
    "pieces",
    "products",
    "pulled",
    "row_sizes",
    "total",
    "wide",
    "written_out",
]


@dataclass(frozen=True)
class OneHot:
    """Row ``t`` has a one at ``indices[b, k, t]``, zeros elsewhere; zeros only, where the index is ``size`` or more.

    The left factor of an embedding's gradient, δ scattered to the rows that were looked up: T integers stand for a
    matrix of T·size numbers, and rows that no index names cost nothing.
    """

    indices: Any
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Written out, ``(b, k, t, size)``."""
        return (*self.indices.shape, self.size)


class Window(NamedTuple):
    """How a convolution walks, for each spatial axis: entry ``k·step + r·stride`` of the padded image, all static."""

    kernel: tuple[int, ...]
    positions: tuple[int, ...]
    step: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int, int], ...]

    def pad(self, image: Array, first: int) -> Array:
        """``image`` with its spatial axes (from axis ``first``) padded and dilated."""
        rest = image.ndim - first - len(self.kernel)
        return lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0)] * first + [*self.padding] + [(0, 0, 0)] * rest)

    def offsets(self) -> list[tuple[int, ...]]:
        """The kernel's entries, row by row."""
        return list(itertools.product(*map(range, self.kernel)))

    def slice(self, padded: Array, offset: tuple[int, ...], first: int) -> Array:
        """What the kernel's entry ``offset`` meets at every position.

        Args:
            padded: the image, as `pad` makes it.
            offset: of the entry, one number for each spatial axis.
            first: the first of the spatial axes.
        """
        starts, limits, strides = [0] * padded.ndim, list(padded.shape), [1] * padded.ndim
        for axis, (k, step, count, stride) in enumerate(
            zip(offset, self.step, self.positions, self.stride, strict=True)
        ):
            starts[first + axis] = k * step
            limits[first + axis] = k * step + (count - 1) * stride + 1
            strides[first + axis] = stride
        return lax.slice(padded, starts, limits, strides)


@dataclass(frozen=True)
class Windows:
    """The windows of ``image`` [b, k, c, *spatial, i]: written out, ``[b, k, (c, *positions), (*kernel, i)]``.

    The left factor of a convolution's kernel gradient. The image is kept once, where the windows would hold each entry
    as often as the kernel covers it: nine times for 3 by 3.
    """

    image: Any
    window: Window

    @property
    def shape(self) -> tuple[int, ...]:
        """Written out, ``(b, k, t, i)``."""
        b, k, c, *_, i = self.image.shape
        return b, k, c * math.prod(self.window.positions), math.prod(self.window.kernel) * i


jax.tree_util.register_dataclass(OneHot, data_fields=["indices"], meta_fields=["size"])
jax.tree_util.register_dataclass(Windows, data_fields=["image"], meta_fields=["window"])

Factor: TypeAlias = Any
"""An array ``[b, k, t, i]``, a `OneHot` or a `Windows`."""


def written_out(factor: Factor, dtype: Any = jnp.float32) -> Array:
    """Any factor as the array ``[b, k, t, i]`` it stands for: what its compressed form saves is paid here.

    Args:
        factor: an array, which is returned as it is, a `OneHot` or `Windows`.
        dtype: of the ones of a `OneHot`; other factors keep their own.
    """
    if isinstance(factor, OneHot):
        return jax.nn.one_hot(factor.indices, factor.size, dtype=dtype)
    if isinstance(factor, Windows):
        return jnp.concatenate(pieces(factor), axis=3)
    return factor


def pieces(windows: Windows) -> list[Array]:
    """The windows in pieces side by side, ``[b, k, t, (some of the kernel, i)]``.

    Trailing axes of the kernel are written out until a piece is wide enough for a matrix product to be fast; for the
    leading ones a piece is a view of the image.
    """
    image, window = windows.image, windows.window
    b, k, _, *_, i = image.shape
    padded, split = window.pad(image, 3), len(window.kernel)
    while split and i * math.prod(window.kernel[split:]) < _WIDE:
        split -= 1
    groups: dict[tuple[int, ...], list[Array]] = {}
    for at in window.offsets():
        groups.setdefault(at[:split], []).append(window.slice(padded, at, 3))
    joined = [jnp.concatenate(group, axis=-1) for group in groups.values()]
    return [reshaped(x, (b, k, windows.shape[2], x.shape[-1])) for x in joined]


_WIDE = 64
"""Columns from which on a matrix product is fast on a CPU."""


def einsum(spec: str, *arrays: Array, precision: Any) -> Array:
    """`jnp.einsum` that sums in float32 or wider, whatever the factors are.

    Args:
        spec: as `jnp.einsum` takes it.
        arrays: of any floating types, also different ones.
        precision: of the products of float32, a `jax.lax.Precision`.
    """
    types = {jnp.dtype(x.dtype) for x in arrays}
    if len(types) > 1:  # eight-bit types promote to nothing
        arrays = tuple(x.astype(wide(x.dtype)) if x.dtype.itemsize < 2 else x for x in arrays)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.einsum(spec, *arrays, precision=precision, preferred_element_type=wide(jnp.result_type(*arrays)))


def wide(dtype: Any) -> Any:
    """The type that sums are kept in: float32 or wider, complex where ``dtype`` is."""
    is_narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize < 4
    if is_narrow or jnp.issubdtype(dtype, jnp.integer):
        return jnp.float32  # types of eight bits or fewer promote to nothing
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)


def conjugate(factor: Factor) -> Factor:
    """The factor with conjugate entries; the same object where they are real."""
    if isinstance(factor, Windows):
        return replace(factor, image=conjugate(factor.image))
    if isinstance(factor, OneHot) or not jnp.iscomplexobj(factor):
        return factor
    return jnp.conj(factor)


def products(left: Factor, right: Array, precision: Any, *, is_rounded: bool = False) -> Array:
    """``Σ_t left · right`` for each example: the contraction done, [b, k, i, o] in float32 or wider.

    b·k·t·i·o multiplications, and an array as large as b parameters; of a `OneHot` b·k·t·o additions.

    Args:
        left: a factor [b, k, t, i].
        right: [b, k, t, o].
        precision: of the matrix products.
        is_rounded: whether the program rounds them to bfloat16. Ours are then too, if that is faster and both factors
            are bfloat16: XLA reads them as float32 without writing them again.
    """
    if isinstance(left, OneHot):
        return jax.vmap(lambda rows, values: _collected(rows, values, left.size))(left.indices, right)
    if isinstance(left, Windows):
        goes_in_turn = costs.machine().one_layout and jax.typeof(right).sharding.mesh.size <= 1  # not over devices
        if goes_in_turn and right.shape[1] == 1 and math.prod(left.window.kernel) > 1:
            return _each_convolved(left, right, precision)
        each = [einsum("bkti,bkto->bkio", x, right, precision=precision) for x in pieces(left)]
        return jnp.concatenate(each, axis=2)
    if is_rounded and costs.machine().as_written and left.dtype == right.dtype == jnp.bfloat16:
        return jnp.einsum("bkti,bkto->bkio", left, right, precision=precision).astype(jnp.float32)
    return einsum("bkti,bkto->bkio", left, right, precision=precision)


def _each_convolved(left: Windows, right: Array, precision: Any) -> Array:
    """The gradient of a convolution's kernel for each example, by a convolution in its turn: [b, 1, i, o].

    On a CPU two thirds of the time of products with windows written out.
    """

    def one(example: tuple[Windows, Array]) -> Array:
        windows, slopes = jax.tree.map(lambda x: x[None], example)
        return _convolved(windows, slopes, precision)

    return lax.map(one, (left, right))


def total(left: Factor, right: Array, precision: Any) -> Array:
    """``Σ_bt left · right``, over all examples: [k, i, o]. The ordinary gradient, at its ordinary cost.

    b·k·t·i·o multiplications in one matrix product, whose result is of the size of the parameter: no example's own
    product is formed. Of windows it is the ordinary convolution that XLA differentiates to; of a `OneHot` a scatter.

    Args:
        left: a factor [b, k, t, i].
        right: [b, k, t, o]; the weights of examples are to be in it already.
        precision: of the matrix products.
    """
    if isinstance(left, OneHot):
        rows, values = (jnp.moveaxis(x, 0, 1) for x in (left.indices, right))
        flat = values.reshape(values.shape[0], -1, values.shape[-1])
        return _collected(rows.reshape(rows.shape[0], -1), flat, left.size)
    if isinstance(left, Windows) and right.shape[1] == 1:
        return _convolved(left, right, precision)
    left = written_out(left, right.dtype)
    if right.shape[1] > 1:
        return einsum("bkti,bkto->kio", left, right, precision=precision)
    left, right = (x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in (left, right))
    return einsum("ti,to->io", left, right, precision=precision)[None]


def _collected(rows: Array, values: Array, size: int) -> Array:
    """Rows ``values`` [k, t, o] added up by index: [k, size, o]."""
    zeros = jnp.zeros((size, values.shape[-1]), wide(values.dtype))
    return jax.vmap(lambda r, v: zeros.at[r].add(v.astype(zeros.dtype), mode="drop"))(rows, values)


def _convolved(left: Windows, right: Array, precision: Any) -> Array:
    """The ordinary gradient of a convolution's kernel, examples being one more axis that is summed over."""
    window, image = left.window, left.image[:, 0]
    image = image.reshape(-1, *image.shape[2:])
    slopes = right.reshape(image.shape[0], *window.positions, right.shape[-1])
    if image.dtype != jnp.bfloat16 or jnp.iscomplexobj(slopes):  # bfloat16 has the range of float32: it may stay
        image = image.astype(_both(image, slopes))
    spatial = tuple(range(1, 1 + len(window.kernel)))
    spec = (image.ndim - 1, 0, *spatial)
    numbers = lax.ConvDimensionNumbers(spec, spec, (len(spatial), len(spatial) + 1, *range(len(spatial))))

    def convolve(image: Array, slopes: Array, numbers: lax.ConvDimensionNumbers) -> Array:
        return lax.conv_general_dilated(
            image,
            slopes,
            window_strides=window.step,
            padding=[(low, high) for low, high, _ in window.padding],
            lhs_dilation=[inside + 1 for _, _, inside in window.padding],
            rhs_dilation=window.stride,
            dimension_numbers=numbers,
            precision=precision,
            preferred_element_type=wide(image.dtype),
        )

    out = in_fast_layout(convolve, image, slopes.astype(image.dtype), numbers)
    return out.reshape(1, -1, out.shape[-1])


def _both(one: Array, other: Array) -> Any:
    """The type that holds both, float32 or wider."""
    with jax.numpy_dtype_promotion("standard"):
        return wide(jnp.promote_types(wide(one.dtype), wide(other.dtype)))


def likeness(one: Factor, other: Factor, precision: Any) -> Array:
    """Inner products of the rows of two left factors, ``Σ_i one[t, i] · other[s, i]``: [b, k, t, s].

    Half of a Gram norm: ‖Σ_t x_t ⊗ δ_t‖² = Σ_ts (x_t·x_s)(δ_t·δ_s). b·k·t·s·i multiplications; of two `OneHot` a
    comparison of indices, of one a look-up.

    Args:
        one: a factor [b, k, t, i].
        other: [b, k, s, i], conjugated already where it is complex.
        precision: of the matrix products.

    Returns:
        The products; of two `OneHot` booleans.
    """
    if isinstance(one, OneHot) and isinstance(other, OneHot):
        rows, columns = one.indices[..., :, None], other.indices[..., None, :]
        return (rows == columns) & (rows < one.size)
    if isinstance(one, OneHot):
        rows = jnp.where(one.indices < one.size, one.indices, 0)
        found = jnp.take_along_axis(jnp.swapaxes(written_out(other), 2, 3), rows[..., None], axis=2)
        return found * (one.indices < one.size)[..., None]
    if isinstance(other, OneHot):
        return jnp.swapaxes(likeness(other, one, precision), 2, 3)
    return einsum("bkti,bksi->bkts", written_out(one), written_out(other), precision=precision)


def row_sizes(factor: Factor) -> Array:
    """The largest entry of each row without its sign, [b, k, t] in float32 or wider."""
    if isinstance(factor, OneHot):
        return jnp.ones(factor.indices.shape, jnp.float32)
    rows = written_out(factor)
    return largest(rows.astype(wide(rows.dtype)), (3,))


def pulled(left: Factor, tree: Array, precision: Any) -> Array:
    """``left`` applied to an array [k, i, o] that all examples share: [b, k, t, o].

    What an inner product of each example's gradient with one given tree needs: ⟨Σ_t x_t ⊗ δ_t, W⟩ = Σ_t (x_t W)·δ_t, a
    forward pass of the layer with W as its weights, b·k·t·i·o multiplications and nothing of the size of b parameters.

    Args:
        left: a factor [b, k, t, i].
        tree: [k, i, o].
        precision: of the matrix products.
    """
    if isinstance(left, OneHot):
        rows = jax.vmap(lambda at: jax.vmap(lambda x, r: x.at[r].get(mode="fill", fill_value=0))(tree, at))
        return rows(left.indices)
    if isinstance(left, Windows):
        parts = pieces(left)
        entries = zip(parts, jnp.split(tree, len(parts), axis=1), strict=True)
        slopes = [einsum("bkti,kio->bkto", x, entry, precision=precision) for x, entry in entries]
        return sum(slopes[1:], start=slopes[0])
    return einsum("bkti,kio->bkto", left, tree, precision=precision)


def as_one_example(factor: Factor) -> Factor:
    """All rows of all examples as those of one: [1, k, (b, t), i]."""
    if isinstance(factor, Windows):
        return as_one_example(written_out(factor))
    if isinstance(factor, OneHot):
        rows = jnp.moveaxis(factor.indices, 0, 1)
        return OneHot(rows.reshape(1, rows.shape[0], -1), factor.size)
    rows = jnp.moveaxis(factor, 0, 1)
    return rows.reshape(1, rows.shape[0], -1, rows.shape[-1])
