"""What a mesh of devices says of an array: how its axes are split, and the same values laid otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec

__all__ = ["explicit_mesh", "is_split", "lies_on_a_mesh", "may_be_split", "replicated", "reshaped", "spec_of"]


def spec_of(x: Any) -> PartitionSpec:
    """How the axes of an array are split, as far as a mesh says so explicitly; on meshes left to the compiler, not."""
    return getattr(getattr(jax.typeof(x), "sharding", None), "spec", None) or PartitionSpec()


def is_split(x: Any) -> bool:
    """Whether a mesh says explicitly that any axis of an array is split."""
    return any(axis is not None for axis in spec_of(x))


def lies_on_a_mesh(tree: Any) -> bool:
    """Whether any array lies on a mesh of several devices, or is one device's part of such an array."""
    return any(mesh.size > 1 for mesh in _meshes(tree))


def may_be_split(tree: Any) -> bool:
    """Whether any array lies on a mesh of several devices and is more than one device's part."""
    axes = [
        (mesh.shape[name], kind)
        for mesh in _meshes(tree)
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    ]
    return any(size > 1 and kind != AxisType.Manual for size, kind in axes)


def explicit_mesh(tree: Any) -> Any:
    """A mesh with explicit axes that any array lies on, or None."""
    return next((mesh for mesh in _meshes(tree) if AxisType.Explicit in mesh.axis_types), None)


def _meshes(tree: Any) -> list[Any]:
    """Those that arrays lie on; an empty one where JAX names none."""
    shardings = [getattr(jax.typeof(x), "sharding", None) for x in jax.tree.leaves(tree)]
    return [sharding.mesh for sharding in shardings if sharding is not None]


def replicated(x: Array) -> Array:
    """``x`` with no axis split, where a mesh with explicit axes says that one is; else ``x`` itself.

    Running sums and look-ups by index need all of an array, and JAX refuses both along an axis that is split. With
    Auto axes the compiler sees to it.

    Args:
        x: an array of any shape, or a tracer of one.

    Returns:
        The same values, of the same shape: one all-gather where an axis was split. Source: ours.
    """
    if not is_split(x):
        return x
    return jax.sharding.reshard(x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec()))


def reshaped(x: Array, sizes: Sequence[int]) -> Array:
    """``x.reshape(sizes)``, on a mesh with explicit axes in steps of one axis each: JAX knows where these lie.

    Args:
        x: an array of one example; the axis of the batch is not seen, and may be split.
        sizes: of the result, as many entries as ``x`` has.
    """
    if explicit_mesh(x) is None or not x.size:
        return x.reshape(sizes)
    dims, wanted = ([size for size in shape if size != 1] for shape in (x.shape, sizes))
    x, done = x.reshape(dims), 0
    while done < len(wanted):
        merged, split = 1, 1
        while x.shape[done : done + merged] != tuple(wanted[done : done + split]):
            have, want = math.prod(x.shape[done : done + merged]), math.prod(wanted[done : done + split])
            if have == want:  # the axes of both are of one size together
                x = replicated(x)
                x = x.reshape(*x.shape[:done], have, *x.shape[done + merged :])
                x = x.reshape(*x.shape[:done], *wanted[done : done + split], *x.shape[done + 1 :])
                break
            merged, split = merged + (have < want), split + (have > want)
        done += split
    return x.reshape(sizes)
