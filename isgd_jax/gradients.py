"""Per-example gradients: the definition, `vmap(jax.grad)`, and the same with the last contraction left lazy.

Ours, after the outer-product form of Goodfellow (arXiv 1510.01799): the gradient of one example with respect to a weight
is a contraction of two small factors, and nobody needs the product. No list of layers: the factors are found in the
jaxpr of `jax.grad(loss_fn)`, whatever wrote the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from isgd_jax._jaxpr import Program, program, run
from isgd_jax.cuts import Canonical, Whole, canonical, cut
from isgd_jax.factored import Factored, Grads, Outer
from isgd_jax.typing import Batch, LossFn, Params


def stacked_per_example_grads(loss_fn: LossFn) -> Callable[[Params, Batch], Grads]:
    """The definition and the oracle: a function ``(params, batch) -> grads``, every leaf an array ``[b, *param.shape]``."""
    return jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))


def per_example_grads(loss_fn: LossFn) -> Callable[[Params, Batch], Grads]:
    """Like `stacked_per_example_grads`, with lazy leaves: ask them with `norms`, `weighted_mean`, `gram`, `stack`, `inner`."""
    value_and_grad = per_example_value_and_grad(loss_fn)

    def grads(params: Params, batch: Batch) -> Grads:
        return value_and_grad(params, batch)[1]

    return grads


def per_example_value_and_grad(loss_fn: LossFn) -> Callable[[Params, Batch], tuple[Any, Grads]]:
    """The losses ``[b]`` and the lazy gradients of a batch, from one forward and one backward pass."""

    def value_and_grad(params: Params, batch: Batch) -> tuple[Any, Grads]:
        traced = _trace(loss_fn, params, batch)
        (value, *outputs), leaves = traced.outputs, jax.tree.leaves(params)
        plans = [_plan(node) for node in outputs]
        wanted = [x for plan in plans for x in _nodes(plan)]

        def one(flat_params: list[Any], example: list[Any]) -> list[Any]:
            return run(traced.inputs, [*flat_params, *example], [value, *wanted])

        losses, *factors = jax.vmap(one, in_axes=(None, 0))(leaves, jax.tree.leaves(batch))
        arrays = iter(factors)
        grads = [_assemble(plan, arrays, p) for plan, p in zip(plans, leaves, strict=True)]
        return losses, jax.tree.unflatten(jax.tree.structure(params), grads)

    return value_and_grad


def _trace(loss_fn: LossFn, params: Params, batch: Batch) -> Program:
    """The program of value and gradients of ONE example; its inputs are the leaves of parameters and example."""

    def one(params: Params, example: Any) -> list[Any]:
        value, grads = jax.value_and_grad(loss_fn)(params, example)
        return [value, *jax.tree.leaves(grads)]

    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)), batch)
    return program(jax.make_jaxpr(one)(params, example))


def _plan(node: Any) -> list[Canonical] | Whole:
    terms = cut(node)
    return terms if isinstance(terms, Whole) else [canonical(term) for term in terms]


def _nodes(plan: list[Canonical] | Whole) -> list[Any]:
    return [plan.value] if isinstance(plan, Whole) else [x for term in plan for x in (term.left, term.right)]


def _assemble(plan: list[Canonical] | Whole, arrays: Any, param: Any) -> Any:
    if isinstance(plan, Whole):
        return next(arrays)
    return Factored(tuple(Outer(next(arrays), next(arrays), term.axes) for term in plan), param.shape, param.dtype)
