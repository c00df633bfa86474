"""A scorer over all devices of this process: same type, values and placement as the scorer it wraps."""

from collections.abc import Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from isgd_jax.errors import ArgumentError, ArgumentTypeError
from isgd_jax.gradients.captured import CapturingJit, captured, passing
from isgd_jax.types import Batch, Params, Scorer, SketchingScorer

__all__ = ["sharded"]


@overload
def sharded(scorer: Scorer, devices: Sequence[jax.Device] | None = None) -> Scorer: ...


@overload
def sharded(scorer: SketchingScorer, devices: Sequence[jax.Device] | None = None) -> SketchingScorer: ...


def sharded(scorer: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """``scorer`` mapped over ``devices`` with `jax.pmap`, a slice of the batch on each.

    Guarantees:

    * the scores are those of ``scorer``, to rounding, for any batch size (the last slice is padded);
    * the scores come home: one plain array where ``scorer`` would have left it, so that nothing downstream spreads;
    * sketches, where ``scorer`` returns ``(scores, sketches)``, come home with them;
    * parameters are copied to the devices once, however often they are used: passing the same arrays again, or arrays
      already replicated over the devices, copies nothing;
    * parameters that are split over a mesh stay split: then the batch is split over the whole mesh, by `jax.jit`;
    * large arrays that the scorer captures, such as frozen weights, are copied to the devices once, and are not written
      into the program.

    Call it outside `jax.jit`: it places arrays on devices itself.

    Args:
        scorer: ``(params, batch) -> scores [b]``, or ``(scores [b], sketches [b, dims])``, not jitted; or with more
            arguments before the batch.
        devices: who scores; all local ones by default. One device alone is plain `jax.jit`.

    Raises:
        TypeError: when called inside a jax transformation.
        ValueError: when called, ``scorer`` does not return one row an example.
    """
    devices = list(devices or jax.local_devices())
    if len(devices) == 1 and jax.process_count() == 1:
        return CapturingJit(scorer)
    mesh = Mesh(np.array(devices), ("devices",))
    mapped = _Mapped(scorer, devices)
    replicate = _Replicator(NamedSharding(mesh, PartitionSpec()))
    split = NamedSharding(mesh, PartitionSpec("devices"))
    whole = CapturingJit(scorer)

    def score(*args: Any) -> Any:
        *params, batch = args
        _check_concrete(params, batch)
        over = _mesh_of(params)
        if over is not None:
            return _bring_home(_scored_over(over, whole, params, batch), None, batch)
        size = jax.tree.leaves(batch)[0].shape[0]
        each = -(-size // len(devices))
        rows = np.minimum(np.arange(each * len(devices)), size - 1)  # the last example, again, is harmless padding
        slices = jax.tree.map(lambda x: x[rows].reshape(len(devices), each, *x.shape[1:]), batch)
        found = jax.device_get(mapped(replicate(params), jax.device_put(slices, split), replicate.sharding))
        joined = jax.tree.map(lambda x: _of_rows(x, each).reshape(-1, *x.shape[2:])[:size], found)
        return _bring_home(joined, params, batch)

    return score


class _Mapped:
    """A scorer under `jax.pmap`, a slice of the batch for each device."""

    def __init__(self, scorer: Any, devices: Sequence[jax.Device]):
        self._jitted, self._devices = jax.jit(scorer), list(devices)
        self._mapped: Any = None
        self._copies: list[jax.Array] = []

    def __call__(self, shared: Sequence[Any], slices: Batch, everywhere: NamedSharding) -> Any:
        """The scores [devices, each], of arguments on every device and slices [devices, each, ...]."""
        if self._mapped is None:
            one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), slices)
            found = captured(self._jitted, *shared, one)
            call = passing(self._jitted, found)
            self._copies = jax.device_put(found, everywhere)
            self._mapped = jax.pmap(
                lambda whole, part: call(whole[0], *whole[1], part), "devices", in_axes=(None, 0), devices=self._devices
            )
        return self._mapped((self._copies, list(shared)), slices)


def _mesh_of(params: Sequence[Any]) -> Mesh | None:
    """The mesh over which parameters are split, if they are."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) and not leaf.is_fully_replicated:
            mesh = leaf.sharding.mesh
            return Mesh(mesh.devices, mesh.axis_names, axis_types=mesh.axis_types)
    return None


def _of_rows(found: Any, each: int) -> Any:
    """What each device found [devices, each, ...], one row an example: else no row is known to be whose."""
    if found.shape[1:2] != (each,):
        raise ArgumentError(
            f"the scorer must return one row an example, [{each}] or [{each}, dims] floating-point scores, got "
            f"{found.dtype}{list(found.shape[1:])}"
        )
    return found


def _is_on_one(x: Any) -> bool:
    return isinstance(x, jax.Array) and x.committed and len(x.devices()) == 1


def _scored_over(mesh: Mesh, scorer: Any, params: Sequence[Any], batch: Batch) -> Any:
    """The scores of a batch, split over all devices of a mesh, by parameters that stay where they are."""
    size = jax.tree.leaves(batch)[0].shape[0]
    rows = np.minimum(np.arange(-(-size // mesh.size) * mesh.size), size - 1)  # the last example, again, as padding
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.tree.map(lambda x: _laid(x, whole) if _is_on_one(x) else x, params)
    found = scorer(*params, jax.tree.map(lambda x: _laid(x[rows], split), batch))
    if mesh.is_multi_process:
        found = multihost_utils.process_allgather(found, tiled=True)
    return jax.tree.map(lambda x: _of_rows(np.asarray(x)[None], len(rows))[0, :size], found)


def _laid(x: Any, where: NamedSharding) -> jax.Array:
    """An array that every process has, on the devices of all."""
    if not where.mesh.is_multi_process:
        return jax.device_put(x, where)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


class _Replicator:
    """Copies parameters to all devices, and remembers the last ones: many batches are scored between two publishes."""

    def __init__(self, sharding: NamedSharding):
        self.sharding = sharding
        self._leaves: list[Any] = []
        self._copies: list[jax.Array] = []

    def __call__(self, params: Params) -> Params:
        leaves, structure = jax.tree.flatten(params)
        if not self._has(leaves):
            self._copies = [self._copy(x) for x in leaves]
            self._leaves = leaves
        return jax.tree.unflatten(structure, self._copies)

    def _has(self, leaves: list[Any]) -> bool:
        """Identity is enough for jax arrays, which never change; numpy arrays may."""
        same = len(leaves) == len(self._leaves) and all(a is b for a, b in zip(leaves, self._leaves, strict=True))
        return same and all(isinstance(x, jax.Array) for x in leaves)

    def _copy(self, x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(self.sharding, x.ndim):
            return x
        return jax.device_put(jnp.copy(x), self.sharding)  # the caller may donate its own


def _check_concrete(params: Sequence[Any], batch: Batch) -> None:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, batch))):
        raise ArgumentTypeError("a sharded scorer places arrays on devices itself: call it outside jit, vmap and grad")


def _bring_home(found: Any, params: Any, batch: Batch) -> Any:
    """Plain arrays on the device the inputs were committed to, else on the default one."""
    arrays = [x for x in jax.tree.leaves((batch, params)) if isinstance(x, jax.Array)]
    homes = {next(iter(x.devices())) for x in arrays if x.committed and len(x.devices()) == 1}
    return jax.device_put(found, homes.pop()) if len(homes) == 1 else jax.tree.map(jnp.asarray, found)
