"""One step in equal parts on several devices, of one process or of all: one program, the same draw everywhere.

The parameters, the optimizer's state and the sampler's are on every device; only the batch is split. The compiler adds
the collectives, so the step is the very function that one device runs.

Guarantees:

* the state is the same bits on every device, so every process draws the same indices;
* of numbers by which processes could differ (clocks, signals) the largest counts, for all.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from isgd_jax.errors import ArgumentError

Tree = TypeVar("Tree")

AXIS = "devices"


class DataParallel:
    """Where steps are made, if not on the default device alone.

    Args:
        batch_size: draws in a step; each device handles an equal part.
        devices: all devices of all processes by default.

    Raises:
        ValueError: the batch cannot be cut into equal parts.
    """

    def __init__(self, batch_size: int, devices: Sequence[jax.Device] | None = None) -> None:
        devices = list(devices or jax.devices())
        self.num_devices, self.num_processes = len(devices), jax.process_count()
        if batch_size % self.num_devices:
            raise ArgumentError(
                f"batch_size must be a multiple of the {self.num_devices} devices that train, so that each handles an "
                f"equal part; got {batch_size}"
            )
        mesh = jax.sharding.Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec(AXIS))

    def replicate(self, tree: Tree) -> Tree:
        """Arrays of the host, or of one device, on every device."""
        return jax.tree.map(self._copied, tree)

    def split(self, batch: Tree) -> Tree:
        """A batch inside a step, a part of it on each device."""
        return jax.lax.with_sharding_constraint(batch, self._split)

    def same(self, tree: Tree) -> Tree:
        """Results of a step, whole on every device."""
        return jax.lax.with_sharding_constraint(tree, self._everywhere)

    def _copied(self, x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        if isinstance(x, jax.Array) and self.num_processes == 1:
            return jax.device_put(x, self._everywhere, may_alias=False)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, self._everywhere, lambda index: host[index])


def local_copy(tree: Tree) -> Tree:
    """What every device holds, as arrays of one device of this process: for what is not part of a step."""

    def one(x: Any) -> Any:
        if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
            return x.addressable_data(0)
        return x

    return jax.tree.map(one, tree)


def agree(number: float) -> float:
    """The largest of the numbers that the processes have; called by all at the same step."""
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.process_allgather(np.float32(number)).max())
