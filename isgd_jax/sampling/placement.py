"""Where arrays of a sampler lie: whole on each device, also where a mesh with explicit axes has them split."""

import jax
from jax import Array
from jax.sharding import PartitionSpec

from isgd_jax.gradients.placement import spec_of

__all__ = ["replicated"]


def replicated(x: Array) -> Array:
    """``x`` with no axis split, where a mesh with explicit axes says that one is; else ``x`` itself.

    Running sums and look-ups by index need all of an array, and JAX refuses both along an axis that is split. With
    Auto axes the compiler sees to it.

    Args:
        x: an array of any shape, or a tracer of one.

    Returns:
        The same values, of the same shape: one all-gather where an axis was split. Source: ours.
    """
    if all(axis is None for axis in spec_of(x)):
        return x
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec()))
