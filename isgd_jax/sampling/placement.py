"""Draws shared out among devices, each of which has the whole state of the sampler; and states that come split."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax import Array, lax

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients.meshes import is_split, replicated
from isgd_jax.gradients.placement import laid_like
from isgd_jax.sampling.domain import DomainDraw
from isgd_jax.sampling.state import SamplerState
from isgd_jax.types import Draw

__all__ = ["share", "taking_split"]

Tree = TypeVar("Tree", Draw, DomainDraw)
Function = TypeVar("Function", bound=Callable[..., Any])


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


def taking_split(function: Function) -> Function:
    """``function``, which also takes states and draws that a mesh with explicit axes splits: it is given them whole.

    Look-ups by index need all of an array, and JAX refuses them along an axis that is split; with Auto axes the
    compiler sees to it. A state comes back laid as it came, so that a loop can carry it.

    Args:
        function: of a sampler. Other arguments, such as parameters and gradients, are left as they are.
    """

    @functools.wraps(function)
    def laid(*args: Any, **options: Any) -> Any:
        given = [x for x in (*args, *options.values()) if isinstance(x, SamplerState | Draw)]
        if not any(map(is_split, jax.tree.leaves(given))):
            return function(*args, **options)
        found = function(*map(_whole, args), **{name: _whole(x) for name, x in options.items()})
        before = next((x for x in given if isinstance(x, SamplerState)), None)
        return laid_like(found, before) if isinstance(found, SamplerState) and before is not None else found

    return cast(Function, laid)


def _whole(argument: Any) -> Any:
    return jax.tree.map(replicated, argument) if isinstance(argument, SamplerState | Draw) else argument
