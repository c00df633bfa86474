"""Per-example gradients: the definition, `vmap(jax.grad)`, and the same with the last contraction left lazy.

Ours, after the outer products of Goodfellow (arXiv 1510.01799): the gradient of one example with respect to a weight
is a contraction of two small factors, and nobody needs the product. There is no list of layers: the factors are found
in the jaxpr of `jax.grad(loss_fn)`, whatever wrote the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from isgd_jax.gradients.jaxpr import made_varying
from isgd_jax.gradients.leaf import Grads
from isgd_jax.gradients.plan import checked, make_plan
from isgd_jax.types import Batch, Params

__all__ = ["from_batch_loss", "per_example_grads", "per_example_value_and_grad", "stacked_per_example_grads"]


def stacked_per_example_grads(loss_fn: Callable[..., Any]) -> Callable[[Params, Batch], Grads]:
    """The definition and the oracle: ``(params, batch) -> grads``, every leaf an array ``[b, *param.shape]``.

    Args:
        loss_fn: ``(params, example) -> scalar``, the loss of ONE example.

    Returns:
        ``vmap(jax.grad(loss_fn))`` over the examples of a batch; inside `jax.shard_map`, of each device's own.
    """

    def grads(params: Params, batch: Batch) -> Grads:
        one = jax.grad(lambda *args: checked(loss_fn)(*args)[0])
        return jax.vmap(one, in_axes=(None, 0))(made_varying(params, batch), batch)

    return grads


def per_example_grads(
    loss_fn: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False, *, joint: bool = True
) -> Callable[..., Any]:
    """Like `stacked_per_example_grads`, with lazy leaves: ask `norms`, `weighted_mean`, `gram`, `stack`, `inner`.

    The options are those of `per_example_value_and_grad`; with ``has_aux`` the result is ``(grads, aux)``.

    Args:
        loss_fn: ``(params, example) -> scalar``, the loss of ONE example.
        argnums: which arguments to differentiate, as for `jax.grad`; not the last, which is the batch.
        has_aux: ``loss_fn`` returns ``(loss, aux)``.
        joint: choose for norms and a weighted mean together; False for norms alone.

    >>> import jax.numpy as jnp, isgd_jax as isgd
    >>> grads = per_example_grads(lambda w, x: 0.5 * jnp.sum((w - x) ** 2))(jnp.zeros(2), jnp.array([[3.0, 4.0]]))
    >>> print(isgd.norms(grads))
    [5.]
    """
    value_and_grad = per_example_value_and_grad(loss_fn, argnums, has_aux, joint=joint)

    def grads(*args: Any) -> Any:
        value, result = value_and_grad(*args)
        return (result, value[1]) if has_aux else result

    return grads


def per_example_value_and_grad(
    loss_fn: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False, *, joint: bool = True
) -> Callable[..., tuple[Any, Any]]:
    """A function ``(params, batch) -> (losses[b], grads)``, like `jax.value_and_grad` of every example.

    Args:
        loss_fn: ``(params, example) -> scalar``, the loss of ONE example. It may take more arguments: the last is the
            example, all others are the same for the whole batch.
        argnums: which of the arguments to differentiate, as for `jax.value_and_grad`; with a tuple, ``grads`` is one.
        has_aux: ``loss_fn`` returns ``(loss, aux)``, and the result is ``((losses, aux), grads)``, aux stacked over the
            examples.
        joint: choose what is cheapest when norms and a weighted mean are asked together; False when only norms are.

    Returns:
        A function of the same arguments, with a batch in the place of the example: a pytree of arrays with one leading
        axis b. It raises ValueError where the loss is no scalar, or an array of the batch has no such axis, and
        TypeError where the loss is no real number, there is nothing to differentiate, or a random key is among the
        parameters.

    Guarantees:

    * the gradients are those of the definition, to rounding, whatever the model is made of;
    * no ``[b, parameters]`` array is made unless it is asked for, or `explain` says why;
    * the model runs forward and backward once, however much is asked in one jit;
    * integer parameters have zero gradients of their own dtype.

    Source: ours, after Goodfellow (arXiv 1510.01799).
    """

    def value_and_grad(*args: Any) -> tuple[Any, Any]:
        *shared, batch = args
        shared = made_varying(shared, batch)
        plan = make_plan(loss_fn, argnums, has_aux, shared, batch)
        (losses, aux), grads = plan.run(shared, batch, joint)
        return ((losses, aux) if has_aux else losses), grads

    return value_and_grad


def from_batch_loss(batch_loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The loss of ONE example, of a loss written for a batch: ``batch_loss_fn(params, batch)``, a mean or a sum.

    The batch loss is called on a batch of one. It must not mix examples, as batch normalization and losses of pairs
    do: that is not seen, and a batch of one is another loss. The mean over examples must be the loss of their batch.

    Args:
        batch_loss_fn: ``(params, batch) -> scalar``, or with more arguments before the batch; it may return
            ``(loss, aux)``, whose arrays lose their batch axis of one.

    Returns:
        ``(params, example) -> scalar`` as `per_example_grads` takes it.
    """

    def loss_fn(*args: Any) -> Any:
        *shared, example = args
        return jax.tree.map(_only, batch_loss_fn(*shared, jax.tree.map(lambda x: x[None], example)))

    return loss_fn


def _only(x: Any) -> Any:
    """What a batch of one gave: without its batch axis, if it has one."""
    return x[0] if jnp.ndim(x) and jnp.shape(x)[0] == 1 else x
