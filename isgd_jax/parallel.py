"""Where a step is made: on one device, or in parts on all devices of all processes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from isgd_jax.clock import Clock
from isgd_jax.typing import Draw

Tree = TypeVar("Tree")
Update = Callable[..., Any]
Weighting: TypeAlias = optax.GradientTransformationExtraArgs

AXIS = "devices"


class OneDevice:
    """The whole step on the default device."""

    num_devices = 1
    num_processes = 1
    writes = True
    """Whether this process writes what the run leaves."""

    def spread(self, tree: Tree) -> Tree:
        """Arrays of the host, where steps need them."""
        return jax.device_put(tree)

    def local(self, tree: Tree) -> Tree:
        """The copy of a spread tree on the first device of this process, for what is not part of a step."""
        return tree

    def agree(self, number: float) -> float:
        """The largest of the numbers that the processes have, such as their clocks; called by all at the same step."""
        return number

    def clock(self, clock: Clock) -> Clock:
        """A clock by which decisions may be made; read by all at the same step."""
        return clock

    def share(self, draw: Draw) -> Draw:
        """The part of a draw that a device handles; inside a step, as all that follow."""
        return draw

    def gather(self, x: Array) -> Array:
        """The parts of all devices, one after the other."""
        return x

    def mean(self, x: Array) -> Array:
        """The mean over devices."""
        return x

    def averaged(self, weighting: Weighting) -> Weighting:
        """A reweighting whose result is the mean over devices: of the batch, not of a part."""
        return weighting

    def jit(self, update: Update) -> Update:
        """``update(state, law, data, key, seconds) -> (state, info)``, jitted, its state donated."""
        return jax.jit(update, donate_argnames="state")


class AllDevices(OneDevice):
    """A step in equal parts on every device of every process, or on some of one: one program, the same draw everywhere.

    Guarantees:
        * State and law are the same bits on every device, so every process draws the same indices.
        * A part's gradients are averaged over devices before the optimiser, and nothing else is exchanged but losses
          and fresh scores. (With its replication check on, `jax.shard_map` would have `jax.grad` sum over devices.)
        * Of numbers by which processes could differ (clocks, signals) the largest counts, for all.

    Raises:
        ValueError: the batch cannot be cut into equal parts.
    """

    def __init__(self, batch_size: int, devices: Sequence[jax.Device] | None = None) -> None:
        devices = devices or jax.devices()
        self.num_devices, self.num_processes = len(devices), jax.process_count()
        self.writes = jax.process_index() == 0
        self._mesh = Mesh(np.array(devices), (AXIS,))
        self._everywhere = NamedSharding(self._mesh, PartitionSpec())
        if batch_size % self.num_devices:
            raise ValueError(
                f"--batch-size must be a multiple of the {self.num_devices} devices that train, so that each "
                f"handles an equal part; got {batch_size}"
            )

    def spread(self, tree: Tree) -> Tree:
        return jax.tree.map(self._spread, tree)

    def local(self, tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x, tree)

    def agree(self, number: float) -> float:
        return float(multihost_utils.process_allgather(np.float32(number)).max())

    def clock(self, clock: Clock) -> Clock:
        return _AgreedClock(clock, self.agree)

    def share(self, draw: Draw) -> Draw:
        size = draw.indices.shape[0] // self.num_devices
        start = lax.axis_index(AXIS) * size
        return Draw(*(lax.dynamic_slice_in_dim(x, start, size) for x in draw[:3]))

    def gather(self, x: Array) -> Array:
        return lax.all_gather(x, AXIS, tiled=True)

    def mean(self, x: Array) -> Array:
        return lax.pmean(x, AXIS)

    def averaged(self, weighting: Weighting) -> Weighting:
        def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            mean, state = weighting.update(grads, state, params, **extra)
            return jax.tree.map(self.mean, mean), state

        return Weighting(weighting.init, update)

    def jit(self, update: Update) -> Update:
        everywhere, parts = PartitionSpec(), PartitionSpec(AXIS)

        def part(state: Any, law: Any, data: Any, key: Any, seconds: Array) -> Any:
            return update(state, law, data, key, lax.pmax(seconds[0], AXIS))

        specs = (everywhere, everywhere, everywhere, everywhere, parts)
        mapped = jax.shard_map(part, mesh=self._mesh, in_specs=specs, out_specs=everywhere, check_vma=False)
        jitted = jax.jit(mapped, donate_argnums=0)

        def call(state: Any, law: Any, data: Any, key: Any, seconds: Any) -> Any:
            return jitted(state, law, data, key, self._each(np.float32(seconds)))

        return call

    def _spread(self, x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, self._everywhere, lambda index: host[index])

    def _each(self, number: np.float32) -> jax.Array:
        """One number a device, each process its own."""
        sharding = NamedSharding(self._mesh, PartitionSpec(AXIS))
        return jax.make_array_from_callback((self.num_devices,), sharding, lambda index: np.full(1, number))


class _AgreedClock(Clock):
    """The clock of a process, but that what it says is agreed upon by all."""

    def __init__(self, clock: Clock, agree: Callable[[float], float]) -> None:
        super().__init__()
        self._clock, self._agree = clock, agree
        self.spent = clock.spent  # one account

    def __call__(self) -> float:
        return self._agree(self._clock())

    @contextmanager
    def spending(self, on: str) -> Iterator[None]:
        with self._clock.spending(on):
            yield
