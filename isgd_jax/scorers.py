"""Scorers: ``(params, batch) -> scores[b]``, how much each example is worth drawing.

The best score is the norm of the example's gradient (Alain et al., arXiv 1511.06481). The others are cheaper and rank
examples alike, more or less.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from isgd_jax import factored
from isgd_jax.gradients import per_example_grads
from isgd_jax.typing import Batch, Example, LossFn, Params, Scorer, Scores


def grad_norm(loss_fn: LossFn) -> Scorer:
    """The exact norm of each example's gradient, for less than one gradient of the batch where the model is dense."""

    def score(params: Params, batch: Batch) -> Scores:
        if not jax.tree.leaves(params):
            return jnp.zeros(jax.tree.leaves(batch)[0].shape[0])
        return factored.norms(per_example_grads(loss_fn)(params, batch))

    return score


def loss(loss_fn: LossFn) -> Scorer:
    """The loss of each example (which must not be negative): one forward pass."""

    def score(params: Params, batch: Batch) -> Scores:
        return jax.vmap(loss_fn, in_axes=(None, 0))(params, batch)

    return score


def softmax_cross_entropy(logits: Float[Array, " c"], example: Example) -> Float[Array, ""]:
    """The loss that classifiers have: ``example["label"]`` is the index of the right class."""
    return -jax.nn.log_softmax(logits)[example["label"]]


def logit_bound(
    logits_fn: Callable[[Params, Example], Any],
    loss_of_logits: Callable[[Any, Example], Float[Array, ""]] = softmax_cross_entropy,
) -> Scorer:
    """The norm of the loss's gradient with respect to the logits: one forward pass.

    Up to a constant of the network, an upper bound on the norm of the whole gradient (Katharopoulos & Fleuret,
    arXiv 1803.00942, equation 20).
    """

    def one(params: Params, example: Example) -> Float[Array, ""]:
        slopes = jax.grad(loss_of_logits)(logits_fn(params, example), example)
        return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(slopes)))

    def score(params: Params, batch: Batch) -> Scores:
        return jax.vmap(one, in_axes=(None, 0))(params, batch)

    return score
