"""The monitor for nothing: UNIFORM, STALE, IDEAL and ‖mean gradient‖² from the batches that training draws anyway.

Guarantees:

* each estimate is unbiased for its mean over the window, under every sampler;
* IDEAL is the square of a mean, estimated over pairs of different steps (a U-statistic): those are drawn apart even
  where the draws of one step depend on each other;
* the bands count a step as one sample, so they hold for stratified and other dependent draws;
* a step with a norm that is not finite is left out.

While a window lasts the parameters move: a window is a compromise between noise and drift. Source: METHOD, "The
estimator"; Kutsuna (2025) for the estimates from draws; the pairs of steps and the bands are ours.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from isgd_jax import variance, windows
from isgd_jax.windows import Band, Window


class Report(NamedTuple):
    """Tr Cov of one draw under three proposals, ‖mean gradient‖², and the ratio STALE/UNIFORM of second moments."""

    uniform: Band
    stale: Band
    ideal: Band
    mean_grad_norm_sq: Band
    ratio: Band


def create(size: int = 64) -> Window:
    """A monitor over the last ``size`` steps."""
    return windows.create(size, 4)


def observe(
    monitor: Window,
    weights: Float[Array, " m"],
    norms: Float[Array, " m"],
    mean_grad_norm_sq: Float[Array, ""],
    mask: Bool[Array, " m"] | None = None,
) -> Window:
    """Add a step: weights 1/(N probs) and fresh norms of its draws, and an unbiased estimate of ‖mean gradient‖².

    The latter is `variance.mean_grad_norm_sq` for independent draws; for dependent ones take the inner product of two
    half-batches drawn apart.
    """
    found = variance.from_draws(weights, norms, mask)
    weighted = weights * norms if mask is None else jnp.where(mask, weights * norms, 0.0)
    return windows.push(monitor, found.uniform, found.stale, jnp.mean(weighted), mean_grad_norm_sq)


def report(monitor: Window) -> Report:
    """What the window says, with 95 % bands."""
    second, stale, mean_norm, square = monitor.values.T
    mean = windows.means(monitor)
    seen = windows.filled(monitor)
    steps = jnp.maximum(jnp.sum(seen, dtype=jnp.int32).astype(jnp.float32), 2.0)
    own = jnp.sum(jnp.where(seen, jnp.square(mean_norm), 0.0)) / steps
    ideal = (steps * jnp.square(mean[2]) - own) / (steps - 1.0)
    return Report(
        uniform=windows.band(monitor, mean[0] - mean[3], second - square),
        stale=windows.band(monitor, mean[1] - mean[3], stale - square),
        ideal=windows.band(monitor, ideal - mean[3], 2.0 * mean[2] * mean_norm - square),
        mean_grad_norm_sq=windows.band(monitor, mean[3], square),
        ratio=windows.ratio(monitor, stale, second),
    )
