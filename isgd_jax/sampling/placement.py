"""Draws shared out among devices, each of which has the whole state of the sampler."""

from typing import TypeVar

import jax
from jax import Array, lax

from isgd_jax.errors import ArgumentError
from isgd_jax.sampling.domain import DomainDraw
from isgd_jax.types import Draw

__all__ = ["share"]

Tree = TypeVar("Tree", Draw, DomainDraw)


def share(draw: Tree, axis_name: str) -> Tree:
    """The part of a draw that this device handles: equal parts along the axis, inside ``pmap`` or ``shard_map``.

    Scalars of the draw come whole. ``observe`` wants the whole draw again, with ``axis_name``.

    Args:
        draw: the same on all devices, as ``sample`` gives it from the same key and state; of a domain, too.
        axis_name: of the axis of devices; device d gets draws d m/D to (d + 1) m/D.

    Raises:
        ValueError: the draw cannot be cut into equal parts.
    """
    num_devices = lax.axis_size(axis_name)
    size, rest = divmod(draw.probs.shape[0], num_devices)
    if rest:
        raise ArgumentError(f"{draw.probs.shape[0]} draws cannot be shared equally among {num_devices} devices")
    start = lax.axis_index(axis_name) * size

    def part(x: Array) -> Array:
        return lax.dynamic_slice_in_dim(x, start, size) if x.ndim else x

    return jax.tree.map(part, draw)
