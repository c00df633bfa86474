"""Losses, norms and a weighted mean gradient of a batch in one pass, by slices where that is faster.

The backward pass of a whole batch writes its intermediate values to memory and reads them back. A few examples at a
time they stay in the processor's cache; what is kept of each slice is its losses, its norms and its part of the mean.
Whoever asks `norms` and `weighted_mean` of the gradients of `per_example_grads` has them of the whole batch, since each
is asked when all examples are done; here both are known beforehand.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients import costs, lazy, meshes, placement
from isgd_jax.gradients.batching import check_microbatch_size
from isgd_jax.gradients.factors import wide
from isgd_jax.gradients.jaxpr import made_varying, relaid
from isgd_jax.gradients.plan import Plan, make_plan
from isgd_jax.gradients.slices import rows_and_sums, slices_of

__all__ = ["Pass", "favored_size", "mean_gradient", "sums_by_slices", "value_norms_and_mean", "weighted_gradient"]


def value_norms_and_mean(
    loss_fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    halves: bool = False,
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
        halves: in place of the mean return two trees whose average it is, made of the first ``b // 2`` examples and of
            the others: ``observe(halves=)`` estimates the variance by them. b is then at least 2.
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
            scalar, an array of the batch has no batch axis, or one example has no halves.
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
        if halves and b < 2:
            raise ArgumentError(f"halves need a batch of at least 2 examples, got {b}")
        how = partial(_rounded, plan, precision, halves)
        (losses, aux), norms, mean = _computed(how, plan, microbatch_size, shared, batch, jnp.asarray(weights))
        return ((losses, aux) if has_aux else losses), norms, mean

    return asked


def _computed(
    how: Callable[..., Any], plan: Plan, size: int | Literal["auto"] | None, *args: Any
) -> tuple[Any, Any, Any]:
    b, whole = args[-1].shape[0], partial(how, None)
    if size not in (None, "auto") and meshes.lies_on_a_mesh(args):
        raise ArgumentError(
            f'microbatch_size must be "auto" or None where arrays lie on a mesh of several devices, got {size}: there '
            "each device has its examples at once"
        )
    fitting = plan.examples_at_a_time(*args[:-1]) if size == "auto" else size
    if fitting is None or fitting >= b:
        return whole(*args)
    sliced = partial(how, fitting)
    return lax.platform_dependent(*args, cpu=sliced, default=whole) if size == "auto" else sliced(*args)


def _rounded(
    plan: Plan, precision: Any, halves: bool, size: int | None, shared: Any, batch: Any, weights: Any
) -> tuple[Any, Any, Any]:
    """Losses, norms, and the weighted mean, or two trees whose average it is, in the dtypes of the parameters."""
    over = weights.shape[0] / (2 if halves else 1)
    made = sums_by_slices(plan, shared, batch, weights / over, size, precision=precision, halves=halves)
    dtypes = jax.tree.unflatten(plan.grads_tree, [leaf.param.dtype for leaf in plan.leaves])

    def rounded(sums: Any) -> Any:
        return jax.tree.map(lambda total, dtype: total.astype(dtype), sums, dtypes)

    return made.value, made.norms, tuple(map(rounded, made.sums)) if halves else rounded(made.sums)


class Pass(NamedTuple):
    """What is kept of the gradients of a batch."""

    value: tuple[Any, Any]
    """The losses [b], and what the loss returns besides."""
    norms: Float[Array, " b"]
    """Of each example's gradient."""
    sums: Any
    """``Σ_b weights[b] · g_b``, a tree like the parameters in float32 or wider: whoever wants it in their dtypes rounds
    once. With ``halves``, a pair of them, of the first ``b // 2`` examples and of the others."""
    also: Any
    """What was asked besides, stacked [b, ...]."""


def sums_by_slices(
    plan: Plan,
    shared: Any,
    batch: Any,
    weights: Float[Array, " b"],
    size: int | None,
    *,
    precision: Any = None,
    halves: bool = False,
    also: Callable[[Array, Any], Any] | None = None,
) -> Pass:
    """Losses, norms and the weighted sum of the gradients of a batch, ``size`` examples at a time.

    Of the batch no more than a slice is copied.

    Args:
        plan: of the gradients, as `plan.make_plan` made it of ``shared`` and ``batch``.
        shared: the arguments of the loss but the example.
        batch: examples with a leading axis b.
        weights: of each example.
        size: of a slice, which becomes smaller where as many slices then do; None, or b and more, takes all at once.
        precision: of matrix products.
        halves: sum the gradients of each half of the batch by itself; b is then at least 2.
        also: ``(losses, gradients) -> tree``, asked of each slice: numbers of single examples, such as sketches.
    """

    def of_slice(examples: Any, own: Array, cut: int | None = None) -> tuple[Any, Any]:
        value, grads = plan.run(shared, examples, joint=True)
        besides = None if also is None else also(value[0], grads)
        rows = (value, lazy.norms(grads, precision=precision), besides)
        if cut is None:
            return rows, lazy.weighted_sums(grads, own, precision=precision)
        if placement.split_axis(grads) is None:
            parts = (lazy.first(grads, cut), own[:cut]), (lazy.last(grads, own.shape[0] - cut), own[cut:])
        else:  # an axis that lies on several devices is not to be cut
            is_first = jnp.arange(own.shape[0], dtype=jnp.int32) < cut
            zero = jnp.zeros_like(own)
            parts = (grads, jnp.where(is_first, own, zero)), (grads, jnp.where(is_first, zero, own))
        return rows, tuple(lazy.weighted_sums(part, mine, precision=precision) for part, mine in parts)

    b = weights.shape[0]
    if size is None or size >= b:
        rows, sums = of_slice(batch, weights, b // 2 if halves else None)
    else:
        zeros = [jnp.zeros(leaf.param.shape, wide(leaf.param.dtype)) for leaf in plan.leaves]
        slices = slices_of(b, size, [b // 2] if halves else [])
        rows, sums = rows_and_sums(of_slice, batch, weights, slices, jax.tree.unflatten(plan.grads_tree, zeros))
        sums = tuple(sums) if halves else sums[0]
    value, norms, besides = rows
    return Pass(value, norms, sums, besides)


def favored_size(loss_fn: Callable[..., Any], shared: Any, batch: Any) -> int | None:
    """How many examples of a batch to differentiate at a time; None: all of them.

    Args:
        loss_fn: ``(*shared, example) -> scalar``.
        shared: the arguments of the loss but the example, or their shapes; the first of them is differentiated.
        batch: examples with a leading axis b, or their shapes.
    """
    if costs.machine().written is None:
        return None
    return make_plan(loss_fn, 0, False, shared, batch).examples_at_a_time(shared, batch)


def weighted_gradient(
    loss_fn: Callable[..., Any], shared: Any, batch: Any, weights: Float[Array, " b"], size: int | None
) -> tuple[Float[Array, " b"], Any]:
    """Losses and the weighted sum of the gradients, by the ordinary gradient of the weighted sum of the losses.

    Args:
        loss_fn: ``(*shared, example) -> scalar``.
        shared: the arguments of the loss but the example; the first of them is differentiated.
        batch: examples with a leading axis b.
        weights: of each example; of size about 1, since backward passes in float16 begin with them.
        size: of a slice; None, or b and more, takes all at once.

    Returns:
        The losses [b], and ``Σ_b weights[b] · g_b``, a tree like the parameters: of all at once in their dtypes, of
        slices in float32 or wider. Of an integer the sum is a zero.
    """
    params, *others = shared

    def total(params: Any, others: Any, examples: Any, own: Array) -> tuple[Array, Array]:
        losses = jax.vmap(loss_fn, in_axes=(None,) * len(shared) + (0,))(params, *others, examples)
        return jnp.sum(own * losses.astype(own.dtype)), losses

    def of_slice(examples: Any, own: Array) -> tuple[Array, Any]:
        gradient, losses = jax.grad(total, has_aux=True, allow_int=True)(params, others, examples, own)
        return losses, jax.tree.map(_zero_if_integer, params, gradient)

    whole = relaid(of_slice)  # a step may be taken inside a loop or a condition
    b = weights.shape[0]
    if size is None or size >= b:
        return whole(batch, weights)
    zeros = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), wide(jnp.result_type(x))), params)
    losses, sums = rows_and_sums(whole, batch, weights, slices_of(b, size), zeros)
    return losses, sums[0]


def mean_gradient(loss_fn: Callable[..., Any], shared: Sequence[Any], batch: Any) -> Any:
    """The ordinary gradient of a batch's mean loss, by slices where that is faster.

    Args:
        loss_fn: ``(*shared, example) -> scalar``.
        shared: the arguments of the loss but the example; the first of them is differentiated.
        batch: examples with a leading axis b.

    Returns:
        A tree like the first argument, in its dtypes.
    """
    b = jax.tree.leaves(batch)[0].shape[0]
    _, sums = weighted_gradient(loss_fn, shared, batch, jnp.ones(b, jnp.float32), favored_size(loss_fn, shared, batch))
    return jax.tree.map(lambda p, x: (x.astype(wide(x.dtype)) / b).astype(p.dtype), shared[0], sums)


def _zero_if_integer(param: Array, gradient: Array) -> Array:
    """Of an integer a zero of its own type, as `isgd_jax.per_example_grads` has it."""
    return jnp.zeros_like(param) if gradient.dtype == jax.dtypes.float0 else gradient
