"""The gradient norms of all examples of a data set, and their mean gradient: the exact numbers that estimates are of.

Guarantees:

* both are those of the definition, one `jax.grad` an example, to rounding, whatever ``batch_size`` is;
* no ``[n, parameters]`` array is made, and of data on the host no more than a batch is on the device;
* one program for each loss, batch size and data set: asking again along a run compiles nothing.

Source: the paper, section 4.1: the variance of every proposal is a function of these norms and of the mean gradient.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients import lazy
from isgd_jax.gradients.captured import CapturingJit
from isgd_jax.gradients.factors import wide
from isgd_jax.gradients.per_example import per_example_grads
from isgd_jax.types import Batch, Params

__all__ = ["norms_and_mean_gradient"]


def norms_and_mean_gradient(
    loss_fn: Callable[..., Any], params: Params, data: Batch, *, frozen: Any = None, batch_size: int = 256
) -> tuple[Float[Array, " n"], Params]:
    """Differentiate every example once, at fixed parameters.

    With both, Tr Cov of one draw by any probabilities is known without sampling error
    (`isgd_jax.variance.second_moments`).

    Args:
        loss_fn: ``(params, example) -> scalar``, the loss of ONE example; with ``frozen``, ``(params, frozen,
            example)``. Pass the same function each time: what was compiled is found by it.
        params: a pytree of arrays.
        data: the examples, a pytree of arrays with one leading axis n. On the device, or traced inside ``jax.jit``,
            all is one program; on the host (NumPy, memory-mapped) batches pass through the device in turn.
        frozen: arrays that the loss needs and nobody differentiates.
        batch_size: examples differentiated together: what memory allows.

    Returns:
        The norm of each example's gradient [n], and the mean of all gradients, a tree like ``params``; both in float32
        or, where gradients are wider, as wide as they are.

    Raises:
        ValueError: there are no examples, or ``batch_size`` is not positive.

    >>> import jax.numpy as jnp
    >>> norms, mean = norms_and_mean_gradient(lambda w, x: 0.5 * (w - x) ** 2, jnp.float32(1.0), jnp.array([0.0, 3.0]))
    >>> print(norms, mean)
    [1. 2.] -0.5
    """
    size = jax.tree.leaves(data)[0].shape[0]
    if size < 1 or batch_size < 1:
        raise ArgumentError(f"expected at least one example and a positive batch_size, got {size} and {batch_size}")
    width = min(batch_size, size)
    if all(isinstance(leaf, Array) for leaf in jax.tree.leaves(data)):
        return _programs(loss_fn, width)[1](params, frozen, data)
    total, norms = _zeros(params), []
    for start in range(0, size, width):
        # The last batch is cut to what is left: one more program, and no row of the host's is read twice.
        batch = jax.tree.map(lambda x, start=start: x[start : start + width], data)
        counts = jnp.ones(min(width, size - start), jnp.float32)
        total, some = _programs(loss_fn, width)[0](params, frozen, batch, total, counts)
        norms.append(some)
    return jnp.concatenate(norms), _over(total, size)


@lru_cache(maxsize=64)
def _programs(loss_fn: Callable[..., Any], width: int) -> tuple[CapturingJit, CapturingJit]:
    """`_added` and `_scanned` of a loss, compiled."""

    def scanned(params: Params, frozen: Any, data: Batch) -> tuple[Float[Array, " n"], Params]:
        return _scanned(loss_fn, width, params, frozen, data)

    return CapturingJit(partial(_added, loss_fn)), CapturingJit(scanned)


def _scanned(
    loss_fn: Callable[..., Any], width: int, params: Params, frozen: Any, data: Batch
) -> tuple[Float[Array, " n"], Params]:
    size = jax.tree.leaves(data)[0].shape[0]
    rows = jnp.arange(-(-size // width) * width, dtype=jnp.int32).reshape(-1, width)

    def add(total: Params, at: Int[Array, " b"]) -> tuple[Params, Array]:
        batch = jax.tree.map(lambda x: x[jnp.minimum(at, size - 1)], data)  # padded with the last example
        return _added(loss_fn, params, frozen, batch, total, (at < size).astype(jnp.float32))

    total, norms = lax.scan(add, _zeros(params), rows)
    return norms.reshape(-1)[:size], _over(total, size)


def _added(
    loss_fn: Callable[..., Any],
    params: Params,
    frozen: Any,
    batch: Batch,
    total: Params,
    counts: Float[Array, " b"],
) -> tuple[Params, Float[Array, " b"]]:
    """The sum of gradients with those of a batch added, and their norms; padding ``counts`` 0."""
    grads = per_example_grads(loss_fn)(params, *(() if frozen is None else (frozen,)), batch)
    mean = lazy.weighted_mean(grads, counts)
    size = counts.shape[0]
    return jax.tree.map(lambda t, m: t + m.astype(t.dtype) * size, total, mean), lazy.norms(grads)


def _zeros(params: Params) -> Params:
    """Where gradients are summed: in float32 or wider, since the mean of many is small beside each."""
    return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), wide(jnp.result_type(x))), params)


def _over(total: Params, size: int) -> Any:
    return jax.tree.map(lambda x: x / size, total)
