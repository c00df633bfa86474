"""One step in equal parts on several devices, of one process or of all: one program, the same draw everywhere.

The sampler's state is on every device, the batch is split; the parameters and the optimizer's state are on every device
too or, with ``shard_params``, each in equal parts (fully sharded data parallelism, ZeRO-3; Rajbhandari et al. 2020).
The compiler adds the collectives, so the step is the very function that one device runs.

Guarantees:

* the sampler's state is the same bits on every device, so every process draws the same indices;
* with ``shard_params`` no device holds the whole of a parameter that can be cut, but while it is used: neither at the
  start nor between steps;
* of numbers by which processes could differ (clocks, signals) the largest counts, for all.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from isgd_jax.errors import ArgumentError

__all__ = ["AXIS", "DataParallel", "Tree", "agree", "local_copy"]

Tree = TypeVar("Tree")

AXIS = "devices"


class DataParallel:
    """Where steps are made, if not on the default device alone.

    Args:
        batch_size: draws in a step; each device handles an equal part.
        devices: all devices of all processes by default.
        shard_params: keep of each parameter, and of what the optimizer has of it, an equal part on each device: along
            its longest axis that the number of devices divides. Arrays without such an axis are on every device.

    Raises:
        ValueError: the batch cannot be cut into equal parts.
    """

    def __init__(
        self, batch_size: int, devices: Sequence[jax.Device] | None = None, *, shard_params: bool = False
    ) -> None:
        devices = list(devices or jax.devices())
        self.num_devices: int = len(devices)
        self.num_processes: int = jax.process_count()
        if batch_size % self.num_devices:
            raise ArgumentError(
                f"batch_size must be a multiple of the {self.num_devices} devices that train, so that each handles an "
                f"equal part; got {batch_size}"
            )
        mesh = jax.sharding.Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec(AXIS))
        self.shard_params = shard_params

    def replicate(self, tree: Tree) -> Tree:
        """Arrays of the host, or of one device, on every device.

        Copies, so that donating them does not cost the caller its own. Of several processes each gives the same values.
        """
        return jax.tree.map(self._copied, tree)

    def split(self, batch: Tree) -> Tree:
        """A batch inside a step, a part of it on each device."""
        return jax.lax.with_sharding_constraint(batch, self._split)

    def same(self, tree: Tree) -> Tree:
        """Results of a step, whole on every device."""
        return jax.lax.with_sharding_constraint(tree, self._everywhere)

    def parted(self, tree: Tree) -> Tree:
        """Parameters, or what is shaped like them, inside a step: in parts where parameters are, else whole."""
        return jax.lax.with_sharding_constraint(tree, self._parts(tree))

    def made(self, make: Callable[..., Tree], *args: Any) -> Tree:
        """``make(*args)``, parameters or what is shaped like them, made where they belong: never whole on a device.

        Args:
            make: pure; it is traced, and compiled with the placement of its results.
            args: small things such as a key.
        """
        return jax.jit(make, out_shardings=self._parts(jax.eval_shape(make, *args)))(*args)

    def place(self, params: Tree) -> Tree:
        """Arrays of the host, such as those of a checkpoint, where parameters of their shape belong."""
        if not self.shard_params:
            return self.replicate(params)
        return jax.tree.map(lambda x: self._laid(x, self._part(jnp.shape(x))), params)

    def placed(self, state: Any) -> Any:
        """A state of training from the memory of the host: parameters and optimizer in parts, the sampler everywhere.

        Args:
            state: a named tuple of ``params``, ``opt_state``, ``sampler``, and ``plain``, a sampler's too or None.
        """
        return state._replace(
            params=self.place(state.params),
            opt_state=self.place(state.opt_state),
            sampler=self.replicate(state.sampler),
            plain=self.replicate(state.plain),
        )

    def moved(self, state: Any) -> Any:
        """A state of training from anywhere, such as a run on other devices: `placed`, if it does not lie here."""
        parts = state.params, state.opt_state, state.sampler, state.plain
        devices = set(self._everywhere.mesh.devices.flat)
        lies = (isinstance(x, jax.Array) and x.sharding.device_set == devices for x in jax.tree.leaves(parts))
        return state if all(lies) else self.placed(state)

    def _parts(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: self._part(jnp.shape(x)), tree)

    def _part(self, shape: tuple[int, ...]) -> NamedSharding:
        """Along the longest axis that can be cut."""
        can = [axis for axis, length in enumerate(shape) if length and length % self.num_devices == 0]
        if not self.shard_params or not can:
            return self._everywhere
        longest = max(can, key=lambda axis: shape[axis])
        return NamedSharding(self._everywhere.mesh, PartitionSpec(*[None] * longest, AXIS))

    def _copied(self, x: Any) -> jax.Array:
        return self._laid(x, self._everywhere)

    def _laid(self, x: Any, where: NamedSharding) -> jax.Array:
        """A copy there, also of the caller's own, which is not to be lost where the state is donated."""
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        if isinstance(x, jax.Array) and self.num_processes == 1:
            return jax.device_put(jnp.copy(x), where)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def local_copy(tree: Tree) -> Tree:
    """What all devices hold, as arrays of one device of this process: for what is not part of a step.

    What is split over the devices of this process is put together.
    """

    def one(x: Any) -> Any:
        if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
            return x.addressable_data(0) if x.is_fully_replicated else jnp.asarray(np.asarray(x))
        return x

    return jax.tree.map(one, tree)


def agree(number: float) -> float:
    """The largest of the numbers that the processes have; called by all at the same step.

    Float32: seconds of a run keep milliseconds for some hours. With one process the number is returned as it is; with
    several it is a barrier: one that does not call it leaves the others waiting.
    """
    if jax.process_count() == 1:
        return number
    return float(multihost_utils.process_allgather(np.float32(number)).max())
