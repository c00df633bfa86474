"""Where arrays lie on a mesh of devices: what is split there, results that stay so, and what must be whole."""

from __future__ import annotations

from dataclasses import replace
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from isgd_jax.gradients.leaf import Grads, is_factored, leaves_of, map_leaves
from isgd_jax.gradients.meshes import explicit_mesh, is_split, spec_of

__all__ = [
    "as_parameters",
    "laid_as",
    "laid_like",
    "placed",
    "rows_of",
    "split_axis",
    "stacked_split",
]


def rows_of(x: Any, indices: Array) -> Array:
    """``x[indices]``, also of an array whose rows a mesh with explicit axes splits: the rows then lie on each device.

    Args:
        x: an array of JAX or NumPy, or a tracer, with the axis that is looked up first.
        indices: of rows, whole on each device.
    """
    x = jnp.asarray(x)
    spec = spec_of(x)
    if not spec or spec[0] is None:
        return x[indices]
    rest = PartitionSpec(*(None,) * indices.ndim, *spec[1:])
    return x.at[indices].get(out_sharding=NamedSharding(jax.typeof(x).sharding.mesh, rest))


def laid_as(tree: Any, other: Any) -> Any:
    """``tree``, its arrays whole on the mesh with explicit axes that those of ``other`` lie on, if they lie on one.

    Arrays that are made inside a program, such as the first of a loop, lie there only where ``jax.set_mesh`` says so,
    and JAX lets the two kinds not take each other's place.
    """
    mesh = explicit_mesh(other)
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec())), tree)


def laid_like(tree: Any, other: Any) -> Any:
    """``tree``, each array split as its counterpart of the same shape in ``other`` is, where a mesh says so explicitly.

    Args:
        tree: arrays that are whole on each device.
        other: a tree of the same structure and shapes.
    """

    def as_it(x: Array, like: Array) -> Array:
        return jax.sharding.reshard(x, jax.typeof(like).sharding) if is_split(like) else x

    return jax.tree.map(as_it, tree, other)


def split_axis(grads: Grads) -> Any:
    """The mesh axis that the batch axis of the gradients is split along; None unless a mesh says so explicitly."""
    arrays = jax.tree.leaves([replace(x, shared=None) if is_factored(x) else x for x in leaves_of(grads)])
    return next((spec[0] for spec in map(spec_of, arrays) if spec and spec[0] is not None), None)


def _are_split(grads: Grads) -> bool:
    """Whether a mesh says explicitly that any axis of anything is split, of a batch or of parameters."""
    parameters = [leaf.spec for leaf in leaves_of(grads) if is_factored(leaf)]
    return any(map(is_split, jax.tree.leaves(grads))) or any(axis is not None for spec in parameters for axis in spec)


def _batch_split(grads: Grads) -> PartitionSpec:
    return PartitionSpec(split_axis(grads))


def placed(function: Any = None, *, out: Any = _batch_split) -> Any:
    """Where axes of a mesh are explicit, ``function(grads, ...)`` leaves placement to the compiler, as elsewhere.

    What comes out is split as ``out(grads)`` says: by default along its batch axis alone.
    """
    if function is None:
        return partial(placed, out=out)

    @wraps(function)
    def left_to_the_compiler(grads: Grads, *args: Any, **options: Any) -> Any:
        if not _are_split(grads):
            return function(grads, *args, **options)
        to = _on_their_mesh(out(grads), grads)
        return jax.sharding.auto_axes(partial(function, **options), out_sharding=to)(grads, *args)

    return left_to_the_compiler


def _on_their_mesh(specs: Any, grads: Grads) -> Any:
    """The specs with the mesh that the gradients lie on, where no ``jax.set_mesh`` says which: JAX would leave nothing
    to the compiler.
    """
    mesh = explicit_mesh(grads)
    if mesh is None or not jax.sharding.get_abstract_mesh().empty:
        return specs
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def as_parameters(grads: Grads) -> Any:
    """How each parameter is split: a mean stays so, with no more copies than the parameters have."""
    return map_leaves(lambda leaf: leaf.spec if is_factored(leaf) else PartitionSpec(*spec_of(leaf)[1:]), grads)


def stacked_split(grads: Grads) -> Any:
    """The same, below the batch axis; no mesh axis can split two axes of one array."""
    batch = split_axis(grads)
    taken = set(batch) if isinstance(batch, tuple) else {batch}

    def free(names: Any) -> Any:
        left = tuple(name for name in (names if isinstance(names, tuple) else (names,)) if name not in taken)
        return left if isinstance(names, tuple) and left else left[0] if left else None

    return jax.tree.map(
        lambda spec: PartitionSpec(batch, *(free(names) for names in spec)),
        as_parameters(grads),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
