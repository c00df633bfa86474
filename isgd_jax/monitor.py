"""The monitor for nothing: UNIFORM, STALE, IDEAL and ‖mean gradient‖² from the batches that training draws anyway.

Guarantees:

* each estimate is unbiased for its mean over the window, under every sampler;
* IDEAL is the square of a mean, estimated over pairs of different steps (a U-statistic): those are drawn apart even
  where the draws of one step depend on each other;
* the bands count a step as one sample, so they hold for stratified and other dependent draws; they are for the value
  now, and widen when the steps of the window differ by more than chance: the parameters move;
* a step with a norm that is not finite is left out.

A window is a compromise between noise and drift, and 95 % is what the bands aim at: while the parameters of a real run
move, they hold the full-data value less often (`experiments/benchmarks/estimators.py monitor` counts how often).

Source: Kutsuna (2025) for the estimates from draws; the pairs of steps and the bands are ours.
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
    return windows.create(size, 8)


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
    used = jnp.ones(norms.shape, bool) if mask is None else mask
    found = variance.from_draws(weights, norms, used)
    weighted = jnp.where(used, weights * norms, 0.0)
    second, stale = weighted * jnp.where(used, norms, 0.0), jnp.square(weighted)
    noise = (_noise(second, second), _noise(stale, stale), _noise(weighted, weighted), _noise(second, stale))
    return windows.push(monitor, found.uniform, found.stale, jnp.mean(weighted), mean_grad_norm_sq, *noise)


def _noise(a: Float[Array, " m"], b: Float[Array, " m"]) -> Float[Array, ""]:
    """The covariance of two batch means, from differences of neighbouring draws.

    Right for independent draws; neighbouring strata differ little in their means, so nearly right for stratified ones.
    """
    return jnp.mean(jnp.diff(a) * jnp.diff(b)) / (2 * a.shape[0])


def report(monitor: Window) -> Report:
    """What the window says, with 95 % bands."""
    second, stale, mean_norm, square, noise_second, noise_stale, noise_norm, noise_both = monitor.values.T
    mean, seen = windows.means(monitor), windows.filled(monitor)
    steps = jnp.maximum(jnp.sum(seen, dtype=jnp.int32).astype(jnp.float32), 2.0)
    own = jnp.sum(jnp.where(seen, jnp.square(mean_norm), 0.0)) / steps
    ideal = (steps * jnp.square(mean[2]) - own) / (steps - 1.0)
    slope = 2.0 * mean[2]
    ratio, scale = windows.ratio_of_means(monitor, stale, second)
    noise_ratio = jnp.square(scale) * (noise_stale - 2.0 * ratio * noise_both + jnp.square(ratio) * noise_second)
    return Report(
        uniform=windows.band(monitor, mean[0] - mean[3], second - square, noise_second),
        stale=windows.band(monitor, mean[1] - mean[3], stale - square, noise_stale),
        ideal=windows.band(monitor, ideal - mean[3], slope * mean_norm - square, jnp.square(slope) * noise_norm),
        mean_grad_norm_sq=windows.band(monitor, mean[3], square),
        ratio=windows.band(monitor, ratio, (stale - ratio * second) * scale, noise_ratio),
    )
