"""Convolutions laid out as XLA's fast ones on a CPU are.

There a convolution is fast in one layout alone: examples, spatial axes, channels; of the kernel spatial axes, channels
in, channels out. XLA turns others into it, but not inside a loop: there a convolution's gradient, which is laid out
otherwise, takes tens of times as long. So axes are moved here, which is what XLA does outside of loops.

Source: ours; the pass of XLA is its ``ConvCanonicalization``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jax import Array, lax

from isgd_jax.gradients import costs
from isgd_jax.gradients.meshes import may_be_split

__all__ = ["in_fast_layout"]


def in_fast_layout(
    convolve: Callable[[Array, Array, lax.ConvDimensionNumbers], Array],
    left: Array,
    right: Array,
    numbers: lax.ConvDimensionNumbers,
) -> Array:
    """What ``convolve(left, right, numbers)`` gives, in the fast layout where the machine has one, or on a mesh.

    Args:
        convolve: a convolution of two arrays in the layout that it is told.
        left: the images.
        right: the kernels.
        numbers: their layout, and that of the result.
    """
    axes = tuple(range(1, left.ndim - 1))
    first, last = 0, left.ndim - 1
    images, kernels, results = numbers
    fast = lax.ConvDimensionNumbers(
        (first, last, *axes), (last, last - 1, *(axis - 1 for axis in axes)), (first, last, *axes)
    )
    # Of kernels that are split along their channels XLA (of JAX 0.10.2) makes wrong gradients of single examples in
    # other layouts, as those of `vmap(grad)` are.
    if numbers == fast or not (costs.machine().one_layout or may_be_split((left, right))):
        return convolve(left, right, numbers)
    found = convolve(
        _moved(left, (images[0], *images[2:], images[1])),
        _moved(right, (*kernels[2:], kernels[1], kernels[0])),
        fast,
    )
    order = (results[0], *results[2:], results[1])
    return _moved(found, [order.index(axis) for axis in range(found.ndim)])


def _moved(array: Array, order: Sequence[int]) -> Array:
    return lax.transpose(array, order) if tuple(order) != tuple(range(array.ndim)) else array
