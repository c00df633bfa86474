"""Scoring a batch some examples at a time: the same scores, for bounded memory.

Guarantees:

* the scores are those of the whole batch, to rounding, for any size;
* "auto" depends on shapes and the kind of device alone, an accelerator's memory with it, so it is the same in every run
  and process, and nothing is compiled to find it;
* examples that lie on several devices stay there: each slice has as many of each device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun, jaxprs_in_params
from jax.sharding import PartitionSpec

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients import costs
from isgd_jax.gradients.meshes import spec_of

__all__ = ["Scoring", "at_a_time", "check_microbatch_size", "in_microbatches"]

Scoring = Callable[..., Any]
"""``(params, batch) -> [b]``, or a pytree of such arrays, each row depending on one example alone.

There may be more arguments, the same for all examples: the batch is the last."""

_TRACED = 64


def in_microbatches(score: Scoring, size: int | Literal["auto"] | None) -> Scoring:
    """``score``, on some examples of a batch at a time.

    Args:
        score: a pure function ``(params, batch) -> rows``, or with more arguments before the batch.
        size: so many at a time; "auto": as many as keep intermediate values within `costs.Machine.scored`,
            512 MiB on a CPU, on an accelerator twice its memory (of them a twelfth to a fifth is needed at once);
            None: all at once.

    Returns:
        A function of the same arguments and results.

    Raises:
        ValueError: ``size`` is neither a positive integer, nor "auto", nor None.

    Source: ours.
    """
    check_microbatch_size(size)
    fitting: dict[str, int] = {}
    return lambda *args: at_a_time(score, size, args, fitting)


def at_a_time(score: Scoring, size: int | Literal["auto"] | None, args: Sequence[Any], fitting: dict[str, int]) -> Any:
    """What ``score`` gives of some arguments, see `in_microbatches`.

    Args:
        score: traced up to four times.
        size: as there.
        args: of ``score``, the batch last.
        fitting: kept by whoever calls again: the sizes that were found, by the shapes of the arguments.
    """
    *shared, batch = args
    b = jax.tree.leaves(batch)[0].shape[0]
    if size is None or b == 1:
        return score(*args)
    if size != "auto":
        return _sliced(score, shared, batch, size)
    traced, rows = jax.make_jaxpr(score, return_shape=True)(*args)
    most = costs.machine().scored
    if _bytes(traced.jaxpr) <= most:  # what was traced to be looked at is what runs: tracing takes seconds
        found = jaxpr_as_fun(traced)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(rows), found)
    key = str(traced.in_avals)
    if key not in fitting:
        fitting[key] = max(1, most // max(1, _bytes_an_example(score, shared, batch)))
    return _sliced(score, shared, batch, fitting[key])


def check_microbatch_size(size: Any) -> None:
    """Raises ValueError unless ``size`` is a positive integer, "auto" or None."""
    if size not in (None, "auto") and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ArgumentError(f'microbatch_size must be a positive integer, "auto" or None, got {size!r}')


def _sliced(score: Scoring, shared: Sequence[Any], batch: Any, size: int) -> Any:
    """Slice i has the examples i, i + count, i + 2 count, ...: of each device's part, where a mesh splits the batch."""
    b = jax.tree.leaves(batch)[0].shape[0]
    if size >= b:
        return score(*shared, batch)
    split = next((x for x in jax.tree.leaves(batch) if any(name is not None for name in spec_of(x))), None)
    if split is not None:  # rows come out split as they came in
        slices = jax.sharding.auto_axes(partial(_in_turn, score), out_sharding=PartitionSpec(spec_of(split)[0]))
        with jax.sharding.use_abstract_mesh(jax.typeof(split).sharding.mesh):
            return slices(shared, batch, size=size)
    return _in_turn(score, shared, batch, size=size)


def _in_turn(score: Scoring, shared: Sequence[Any], batch: Any, *, size: int) -> Any:
    b = jax.tree.leaves(batch)[0].shape[0]
    count = -(-b // size)
    size = -(-b // count)  # slices of one size: the last examples again are harmless padding
    padded = jax.tree.map(lambda x: jnp.concatenate([x, x[b - (size * count - b) :]]) if size * count > b else x, batch)
    columns = jax.tree.map(lambda x: x.reshape(size, count, *x.shape[1:]), padded)

    def slice_(i: Any) -> Any:
        return score(*shared, jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 1, keepdims=False), columns))

    rows = lax.map(slice_, jnp.arange(count, dtype=jnp.int32))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(size * count, *x.shape[2:])[:b], rows)


def _bytes_an_example(score: Scoring, shared: Sequence[Any], batch: Any) -> int:
    """By how much the intermediate values grow with an example more: a line through two sizes, as wholes may slice."""

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), (shared, batch))

    def of(b: int) -> int:
        examples = jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype), shapes[1])
        return _bytes(jax.make_jaxpr(score)(*shapes[0], examples).jaxpr)

    return (of(2 * _TRACED) - of(_TRACED)) // _TRACED


def _bytes(jaxpr: Any) -> int:
    """Of all values that a program computes; of a loop, those of one turn and what it leaves, of branches the most."""
    total = 0
    for eqn in jaxpr.eqns:
        inside = [_bytes(inner) for inner in jaxprs_in_params(eqn.params)]
        total += max(inside, default=0) if eqn.primitive.name == "cond" else sum(inside)
        total += sum(math.prod(var.aval.shape) * getattr(var.aval.dtype, "itemsize", 8) for var in eqn.outvars)
    return total
