"""What a person wants to know between steps: loss and error on held-out data."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from isgd_jax.task import Task
from isgd_jax.typing import Batch, Params, ScoredChunk

EVAL_BATCH = 1024


class Fit(NamedTuple):
    """How well the model does on a data set."""

    loss: Float[Array, ""]
    """Mean loss."""
    error: Float[Array, ""]
    """Share of examples whose largest output is not the label."""


def make_evaluate(task: Task) -> Callable[[Params, Batch], Fit]:
    """Build ``evaluate(params, data) -> Fit``, jitted; the data passes through in slices."""

    @jax.jit
    def evaluate(params: Params, batch: Batch) -> Fit:
        def one(example: Batch) -> tuple[Array, Array]:
            wrong = jnp.argmax(task.logits_fn(params, example)) != example["label"]
            return task.loss_fn(params, example), wrong

        losses, wrong = jax.lax.map(one, batch, batch_size=EVAL_BATCH)
        return Fit(jnp.mean(losses), jnp.mean(wrong.astype(jnp.float32)))

    return evaluate


def make_measure(task: Task) -> Callable[[Params, Batch], Float[Array, "b 2"]]:
    """Build ``measure(params, batch) -> [b, 2]``, loss and whether it is wrong, for workers to map over a segment."""

    def one(params: Params, example: Batch) -> Array:
        wrong = jnp.argmax(task.logits_fn(params, example)) != example["label"]
        return jnp.stack([task.loss_fn(params, example), wrong.astype(jnp.float32)])

    return jax.vmap(one, in_axes=(None, 0))


class HeldOut:
    """What workers have measured on one segment; loss and error are means over what is known, however old.

    Args:
        num_examples: of the segment.
    """

    def __init__(self, num_examples: int) -> None:
        self._found = np.full((num_examples, 2), np.nan, np.float32)
        self._versions = np.zeros(num_examples, np.int64)

    def record(self, chunk: ScoredChunk) -> None:
        """Write the rows of a chunk."""
        self._found[chunk.ids] = chunk.scores
        self._versions[chunk.ids] = chunk.version

    def fit(self) -> Fit | None:
        """Loss and error; None until every example was measured once."""
        if np.isnan(self._found).any():
            return None
        loss, error = self._found.mean(axis=0, dtype=np.float64)
        return Fit(jnp.float32(loss), jnp.float32(error))

    def mean_age(self, step: int) -> float:
        """Updates made since the measurements, on average."""
        return float(step - self._versions.mean())
