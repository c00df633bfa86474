"""What a person wants to know between steps: loss and error on held-out data, and the variance of three proposals."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from isgd_jax import samplers, variance
from isgd_jax.factoring import factored
from isgd_jax.gradients import per_example_grads
from isgd_jax.task import Task
from isgd_jax.typing import Batch, Key, LossFn, Params, ScoredChunk

EVAL_BATCH = 1024
PROBE_BATCH = 128


class Fit(NamedTuple):
    """How well the model does on a data set."""

    loss: Float[Array, ""]
    """Mean loss."""
    error: Float[Array, ""]
    """Share of examples whose largest output is not the label; NaN where there are no classes."""


def make_evaluate(task: Task) -> Callable[[Params, Batch], Fit]:
    """Build ``evaluate(params, data) -> Fit``, jitted; the data passes through in slices."""

    @jax.jit
    def evaluate(params: Params, batch: Batch) -> Fit:
        def one(example: Batch) -> tuple[Array, Array]:
            return task.loss_fn(params, example), _is_wrong(task, params, example)

        losses, wrong = jax.lax.map(one, batch, batch_size=EVAL_BATCH)
        return Fit(jnp.mean(losses), jnp.mean(wrong))

    return evaluate


def make_measure(task: Task) -> Callable[[Params, Batch], Float[Array, "b 2"]]:
    """Build ``measure(params, batch) -> [b, 2]``, loss and whether it is wrong, for workers to map over a segment."""

    def one(params: Params, example: Batch) -> Array:
        return jnp.stack([task.loss_fn(params, example), _is_wrong(task, params, example)])

    return jax.vmap(one, in_axes=(None, 0))


def _is_wrong(task: Task, params: Params, example: Batch) -> Float[Array, ""]:
    if task.num_classes is None:
        return jnp.float32(jnp.nan)
    return (jnp.argmax(task.logits_fn(params, example)) != example["label"]).astype(jnp.float32)


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
        if np.isnan(self._found[:, 0]).any():
            return None
        loss, error = self._found.mean(axis=0, dtype=np.float64)
        return Fit(jnp.float32(loss), jnp.float32(error))

    def mean_age(self, step: int) -> float:
        """Updates made since the measurements, on average."""
        return float(step - self._versions.mean())


Probe = Callable[[Params, samplers.Law, Batch, Key], variance.Moments]


def make_probe(loss_fn: LossFn, *, probe_size: int) -> Probe:
    """Build ``probe(params, law, data, key) -> Moments``: Tr Cov of one draw for uniform, stale and ideal proposals.

    ``probe_size`` independent draws from the law in use serve all three (importance-weighted, `variance.from_draws`),
    so rare large gradients are seen. The squared norm of the mean gradient is the inner product of two halves.

    Guarantees:
        * Each of the three is estimated without bias, whatever the law and the sampler of the training steps.
        * Memory is that of a batch of 128 and two gradients.
    """
    slices, width = _slices(probe_size // 2)

    @jax.jit
    def probe(params: Params, law: samplers.Law, batch: Batch, key: Key) -> variance.Moments:
        num_examples = law.masses.shape[0]
        draw = samplers.independent(key, law, num_draws=probe_size)
        weights = 1.0 / (num_examples * draw.probs)

        def add_slice(total: Params, drawn: tuple[Array, Array]) -> tuple[Params, Array]:
            indices, weight = drawn
            grads = per_example_grads(loss_fn)(params, jax.tree.map(lambda x: x[indices], batch))
            mean = factored.weighted_mean(grads, weight)
            return jax.tree.map(lambda t, g: t + g / slices, total, mean), factored.norms(grads)

        def half(indices: Array, weight: Array) -> tuple[Params, Array]:
            shape = (slices, width)
            zeros = jax.tree.map(jnp.zeros_like, params)
            return jax.lax.scan(add_slice, zeros, (indices.reshape(shape), weight.reshape(shape)))

        cut = probe_size // 2
        first, norms = half(draw.indices[:cut], weights[:cut])
        second, more_norms = half(draw.indices[cut:], weights[cut:])
        moments = variance.from_draws(weights, jnp.concatenate([norms.reshape(-1), more_norms.reshape(-1)]))
        return variance.trace_covariance(moments, optax.tree.vdot(first, second))

    return probe


def _slices(count: int) -> tuple[int, int]:
    """Equal slices of at most PROBE_BATCH: their number and their width."""
    width = max(w for w in range(1, min(count, PROBE_BATCH) + 1) if count % w == 0)
    return count // width, width
