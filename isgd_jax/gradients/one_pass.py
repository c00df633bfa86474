"""Losses, norms and a weighted mean gradient of a batch in one pass, by slices where that is faster.

The backward pass of a whole batch writes its intermediate values to memory and reads them back. A few examples at a
time they stay in the processor's cache; what is kept of each slice is its losses, its norms and its part of the mean.
Whoever asks `norms` and `weighted_mean` of the gradients of `per_example_grads` has them of the whole batch, since each
is asked when all examples are done; here both are known beforehand.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients import lazy
from isgd_jax.gradients.batching import check_microbatch_size
from isgd_jax.gradients.factors import wide
from isgd_jax.gradients.jaxpr import made_varying
from isgd_jax.gradients.plan import Plan, make_plan

__all__ = ["sums_by_slices", "value_norms_and_mean"]


def value_norms_and_mean(
    loss_fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    microbatch_size: int | Literal["auto"] | None = "auto",
    precision: Any = None,
) -> Callable[..., tuple[Any, Float[Array, " b"], Any]]:
    """A function ``(params, batch, weights) -> (losses [b], norms [b], mean)``: what a step needs of its batch.

    The numbers are those of `norms` and `weighted_mean` of `per_example_value_and_grad`, to rounding: for weights known
    before the gradients, such as ``draw.target / draw.probs``, this is the faster way to both, for less memory.

    Args:
        loss_fn: ``(params, example) -> scalar``, the loss of ONE example. It may take more arguments: the last is the
            example, all others are the same for the whole batch.
        argnums: which of the arguments to differentiate, as for `jax.value_and_grad`; with a tuple, ``mean`` is one.
        has_aux: ``loss_fn`` returns ``(loss, aux)``, and the first result is ``(losses, aux)``, aux stacked.
        microbatch_size: so many examples at a time; "auto": on a CPU as many as its cache favors; all at once on
            other devices, where arrays lie on a mesh of several, and where parameters are large beside what is written
            for the examples; None: all at once.
        precision: of matrix products.

    Returns:
        A function of the arguments of the loss, with a batch in the place of the example, and ``weights`` [b]. It
        returns the losses, the norm of each example's gradient [b], and ``(1/b) Σ_b weights[b] · g_b``, a tree like
        the parameters in their dtypes; sums are kept in float32 or wider.

    Raises:
        ValueError: ``microbatch_size`` is neither a positive integer, nor "auto", nor None; when called, it is an
            integer and arrays lie on a mesh of several devices, there is not one weight an example, the loss is no
            scalar, or an array of the batch has no batch axis.
        TypeError: when called, there is nothing to differentiate, or a random key is among the parameters.

    >>> step = value_norms_and_mean(lambda w, x: 0.5 * (w - x) ** 2)
    >>> losses, norms, mean = step(jnp.float32(1.0), jnp.array([0.0, 3.0]), jnp.array([1.0, 2.0]))
    >>> print(losses, norms, mean)
    [0.5 2. ] [1. 2.] -1.5
    """
    check_microbatch_size(microbatch_size)

    def asked(*args: Any) -> tuple[Any, Any, Any]:
        *shared, batch, weights = args
        shared = made_varying(shared, batch)
        plan = make_plan(loss_fn, argnums, has_aux, shared, batch)
        b = jax.tree.leaves(batch)[0].shape[0]
        if jnp.shape(weights) != (b,):
            raise ArgumentError(f"weights of {b} examples must have shape ({b},), got {jnp.shape(weights)}")
        (losses, aux), norms, mean = _computed(plan, microbatch_size, precision, shared, batch, jnp.asarray(weights))
        return ((losses, aux) if has_aux else losses), norms, mean

    return asked


def _computed(plan: Plan, size: int | Literal["auto"] | None, precision: Any, *args: Any) -> tuple[Any, Any, Any]:
    b = args[-1].shape[0]
    whole, on_a_mesh = partial(_rounded, plan, precision, None), lazy.lies_on_a_mesh(args)
    if size not in (None, "auto") and on_a_mesh:
        raise ArgumentError(
            f'microbatch_size must be "auto" or None where arrays lie on a mesh of several devices, got {size}: there '
            "each device has its examples at once"
        )
    fitting = (None if on_a_mesh else plan.examples_at_a_time(b)) if size == "auto" else size
    if fitting is None or fitting >= b:
        return whole(*args)
    sliced = partial(_rounded, plan, precision, fitting)
    return lax.platform_dependent(*args, cpu=sliced, default=whole) if size == "auto" else sliced(*args)


def _rounded(plan: Plan, precision: Any, size: int | None, shared: Any, batch: Any, weights: Any) -> Any:
    """Losses, norms, and the weighted mean in the dtypes of the parameters."""
    value, norms, sums = sums_by_slices(plan, shared, batch, weights / weights.shape[0], size, precision=precision)
    dtypes = jax.tree.unflatten(plan.grads_tree, [leaf.param.dtype for leaf in plan.leaves])
    return value, norms, jax.tree.map(lambda total, dtype: total.astype(dtype), sums, dtypes)


def sums_by_slices(
    plan: Plan,
    shared: Any,
    batch: Any,
    weights: Float[Array, " b"],
    size: int | None,
    *,
    precision: Any = None,
) -> tuple[tuple[Any, Any], Float[Array, " b"], Any]:
    """Losses, norms and the weighted sum of the gradients of a batch, ``size`` examples at a time.

    Of the batch no more than a slice is copied. The last slice begins early enough to be whole; what it has of the one
    before weighs nothing there.

    Args:
        plan: of the gradients, as `plan.make_plan` made it of ``shared`` and ``batch``.
        shared: the arguments of the loss but the example.
        batch: examples with a leading axis b.
        weights: of each example.
        size: of a slice, which becomes smaller where as many slices then do; None, or b and more, takes all at once.
        precision: of matrix products.

    Returns:
        ``(losses, aux)`` [b, ...], the norm of each example's gradient [b], and ``Σ_b weights[b] · g_b``, a tree like
        the parameters in float32 or wider: whoever wants it in their dtypes rounds once.
    """

    def of_slice(examples: Any, own: Array) -> tuple[Any, Any, Any]:
        value, grads = plan.run(shared, examples, joint=True)
        sums = lazy.weighted_sums(grads, own, precision=precision)
        return value, lazy.norms(grads, precision=precision), sums

    b = weights.shape[0]
    if size is None or size >= b:
        return of_slice(batch, weights)
    count = -(-b // size)
    size = -(-b // count)
    last = (count - 1) * size
    again = count * size - b
    shares = jnp.concatenate([weights[:last], jnp.zeros(again, weights.dtype), weights[last:]]).reshape(count, size)
    starts = jnp.minimum(jnp.arange(count, dtype=jnp.int32) * size, b - size)

    def add(totals: Any, some: tuple[Array, Array]) -> tuple[Any, Any]:
        start, own = some
        examples = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), batch)
        value, norms, sums = of_slice(examples, own)
        return jax.tree.map(jnp.add, totals, sums), (value, norms)

    zeros = [jnp.zeros(leaf.param.shape, wide(leaf.param.dtype)) for leaf in plan.leaves]
    totals, rows = lax.scan(add, jax.tree.unflatten(plan.grads_tree, zeros), (starts, shares))

    def in_a_row(x: Array) -> Array:
        x = x.reshape(count * size, *x.shape[2:])
        return jnp.concatenate([x[:last], x[last + again :]]) if again else x

    value, norms = jax.tree.map(in_a_row, rows)
    return value, norms, totals
