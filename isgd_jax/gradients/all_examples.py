"""The gradient norms of all examples of a data set, and their mean gradient: the exact numbers that estimates are of.

Guarantees:

* both are those of the definition, one `jax.grad` an example, to rounding, whatever ``batch_size`` is;
* the mean is summed in float32 or wider, and not rounded to the dtypes of the parameters on the way;
* no ``[n, parameters]`` array is made, and of data on the host no more than a batch is on the device;
* one program for each loss, batch size and data set: asking again along a run compiles nothing.

Source: the paper, section 4.1: the variance of every proposal is a function of these norms and of the mean gradient.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients.captured import CapturingJit
from isgd_jax.gradients.factors import wide
from isgd_jax.gradients.jaxpr import made_varying
from isgd_jax.gradients.one_pass import sums_by_slices
from isgd_jax.gradients.plan import make_plan
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
            example)``. Pass the same function each time: what was compiled is found by it, unless it has no hash.
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
    try:
        program = _program(loss_fn, batch_size)
    except TypeError:  # a loss that is a module with arrays has no hash: nothing compiled can be found by it
        program = _program.__wrapped__(loss_fn, batch_size)
    if all(isinstance(leaf, Array) for leaf in jax.tree.leaves(data)):
        norms, total = program(params, frozen, data, None)
        return norms, _over(total, size)
    total, every = _zeros(params), []  # with a first sum of None, the first batch would be a program of its own
    for start in range(0, size, batch_size):
        # The last batch is cut to what is left: one more program, and no row of the host's is read twice.
        batch = jax.tree.map(lambda x, start=start: x[start : start + batch_size], data)
        norms, total = program(params, frozen, batch, total)
        every.append(norms)
    return jnp.concatenate(every), _over(total, size)


@lru_cache(maxsize=64)
def _program(loss_fn: Callable[..., Any], batch_size: int) -> CapturingJit:
    """``(params, frozen, data, total) -> (norms, total)``, the gradients of the data added; compiled."""

    def added(params: Params, frozen: Any, data: Batch, total: Params | None) -> tuple[Float[Array, " n"], Params]:
        shared = made_varying([params] if frozen is None else [params, frozen], data)
        plan = make_plan(loss_fn, 0, False, shared, data)
        alike = jnp.ones(jax.tree.leaves(data)[0].shape[0], jnp.float32)
        made = sums_by_slices(plan, shared, data, alike, batch_size)
        return made.norms, made.sums if total is None else jax.tree.map(jnp.add, total, made.sums)

    return CapturingJit(added)


def _zeros(params: Params) -> Params:
    return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), wide(jnp.result_type(x))), params)


def _over(total: Params, size: int) -> Any:
    return jax.tree.map(lambda x: x / size, total)
