"""What a person wants to know between steps: loss and error on held-out data."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isgd_jax.app.task import Task
from isgd_jax.gradients.captured import CapturingJit
from isgd_jax.gradients.jaxpr import relaid
from isgd_jax.types import Batch, Params

__all__ = ["EVAL_BATCH", "Fit", "make_evaluate"]

EVAL_BATCH = 1024


class Fit(NamedTuple):
    """How well the model does on a data set."""

    loss: Float[Array, ""]
    """Mean loss."""
    error: Float[Array, ""]
    """Share of examples whose largest output is not the label; NaN where there are no classes."""


def make_evaluate(task: Task) -> Callable[[Params, Batch], Fit]:
    """Build ``evaluate(params, data) -> Fit``, jitted; the data passes through in slices.

    Args:
        task: its loss, and its logits where it has classes.

    Returns:
        A function that compiles once for each number of examples.
    """

    def evaluate(params: Params, batch: Batch) -> Fit:
        def one(example: Batch) -> tuple[Array, Array]:
            return task.loss_fn(params, example), _is_wrong(task, params, example)

        losses, wrong = jax.lax.map(relaid(one), batch, batch_size=EVAL_BATCH)
        return Fit(jnp.mean(losses), jnp.mean(wrong))

    return CapturingJit(evaluate)


def _is_wrong(task: Task, params: Params, example: Batch) -> Float[Array, ""]:
    if task.num_classes is None:
        return jnp.float32(jnp.nan)
    return (jnp.argmax(task.logits_fn(params, example)) != example["label"]).astype(jnp.float32)
