"""The monitor for nothing: what proposals are worth, from the batches that training draws anyway.

Guarantees:

* each estimate is unbiased for its mean over the window, under every sampler;
* IDEAL is the square of a mean, estimated over pairs of different steps (a U-statistic): those are drawn apart even
  where the draws of one step depend on each other. Steps of one key are spread evenly instead: the estimate is then low
  by at most the variance of one step's mean norm over the number of steps less one;
* the bands count a step as one sample, so they hold for stratified and other dependent draws; they are for the value
  now, and widen when the steps of the window differ by more than chance: the parameters move. Steps of one key are
  somewhat less than samples: bands of DRAWN then held the truth in 0.88 to 0.95 of the keys, where steps with keys of
  their own had 0.90 to 0.98 (`experiments/benchmarks/watching.py coverage`);
* a measurement that is not finite is left out.

UNIFORM, STALE and IDEAL are traces of the covariance of ONE draw. DRAWN is the same of a batch drawn in two halves,
times its size: what the sampler really does. Ordered dependent draws have it below STALE, and can have it below IDEAL.
(Whole batches have a little less still: 5 % with 128 strata in place of twice 64.)

Source: Kutsuna (2025) for the estimates from draws; the pairs of steps and the bands are ours.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from isgd_jax.variance import rolling, second_moments
from isgd_jax.variance.rolling import Band, Window

__all__ = ["STRETCHES", "Monitor", "Report", "create", "observe", "report"]


class Monitor(NamedTuple):
    """The last steps: moments and their noise; ‖mean gradient‖² where it was measured; DRAWN likewise."""

    steps: Window
    squares: Window
    batches: Window


class Report(NamedTuple):
    """Tr Cov of one draw under three proposals, of the draws as made, ‖mean gradient‖², and the moments' ratio."""

    uniform: Band
    stale: Band
    ideal: Band
    drawn: Band
    mean_grad_norm_sq: Band
    ratio: Band
    """STALE/UNIFORM of second moments: above 1 the proposal hurts."""


STRETCHES = 16
"""How far the monitor looks back to see how fast values move, in windows."""


def create(size: int = 64, squares: int | None = None) -> Monitor:
    """A monitor over the last ``size`` steps, and over so many measurements of ‖mean gradient‖² (as many, if None).

    It keeps 7 numbers of 16 times as many steps: the older ones do not enter the values, they tell how fast values
    move.

    Args:
        size: steps that a value is the mean of, at least 2.
        squares: measurements of ‖mean gradient‖² and of DRAWN that theirs is the mean of. Where every fourth step
            measures them, a quarter of ``size`` spans the same time.

    Raises:
        ValueError: a window is shorter than 2.
    """
    squares = squares or size
    return Monitor(rolling.create(STRETCHES * size, 7), rolling.create(squares, 1), rolling.create(squares, 1))


# Inline: traced once for each set of shapes, and written out in the program of whoever calls it.
@partial(jax.jit, inline=True)
def observe(
    monitor: Monitor,
    weights: Float[Array, " m"],
    norms: Float[Array, " m"],
    mean_grad_norm_sq: Float[Array, ""] | None,
    mask: Bool[Array, " m"] | None = None,
    *,
    batch_grad_norm_sq: Float[Array, ""] | None = None,
    is_measured: Bool[Array, ""] | None = None,
    proposal_weights: Float[Array, " m"] | None = None,
) -> Monitor:
    """Add a step: what its draws tell of the second moments, and of ‖mean gradient‖² where it was measured.

    Args:
        monitor: what was seen so far.
        weights: 1/(N probs) [m] of the draws.
        norms: fresh norms [m], times N |a_n| where the target is weighted.
        mean_grad_norm_sq: an unbiased estimate of ‖mean gradient‖²: for independent draws
            `second_moments.mean_grad_norm_sq`; for dependent ones the inner product of two half-batches that were drawn
            independently. None where no step will ever have one; then the report holds second moments.
        mask: false on padding [m]; None where there is none.
        batch_grad_norm_sq: the squared norm of the weighted mean gradient of that very batch, for DRAWN: E‖batch mean‖²
            is ‖mean gradient‖² + DRAWN/m.
        is_measured: whether this step measured the two squares. None says yes, where they are given.
        proposal_weights: 1/(N q) [m] of one draw by the law in use, finite on padding too; None where they are
            ``weights``, which are less by the share of empty places where the number of draws is random (poisson).

    Raises:
        ValueError: there are fewer than 2 draws, too few for pairs.
    """
    used = jnp.ones(norms.shape, bool) if mask is None else mask
    found = second_moments.from_draws(weights, norms, used, proposal_weights=proposal_weights)
    weighted = jnp.where(used, weights * norms, 0.0)
    second = weighted * jnp.where(used, norms, 0.0)
    stale = jnp.square(weighted) if proposal_weights is None else second * proposal_weights
    noise = (_noise(second, second), _noise(stale, stale), _noise(weighted, weighted), _noise(second, stale))
    steps = rolling.push(monitor.steps, found.uniform, found.stale, jnp.mean(weighted), *noise)
    squares, batches = monitor.squares, monitor.batches
    if mean_grad_norm_sq is not None:
        squares = rolling.push(squares, mean_grad_norm_sq, when=is_measured)
        if batch_grad_norm_sq is not None:
            excess = norms.shape[0] * (batch_grad_norm_sq - mean_grad_norm_sq)
            batches = rolling.push(batches, excess, when=is_measured)
    return Monitor(steps, squares, batches)


def _noise(a: Float[Array, " m"], b: Float[Array, " m"]) -> Float[Array, ""]:
    """The covariance of two batch means, from differences of neighbouring draws.

    Right for independent draws; neighbouring strata differ little in their means, so nearly right for stratified ones.
    """
    return jnp.mean(jnp.diff(a) * jnp.diff(b)) / (2 * a.shape[0])


def _squared_mean(values: Float[Array, " w"], mean: Float[Array, ""], used: Bool[Array, " w"]) -> Float[Array, ""]:
    """The square of what a mean estimates, over pairs of different steps; of a single step its own square."""
    count = jnp.sum(used, dtype=jnp.int32).astype(jnp.float32)
    many = jnp.maximum(count, 2.0)
    own = jnp.sum(jnp.where(used, jnp.square(values), 0.0)) / many
    return jnp.where(count < 2.0, jnp.square(mean), (many * jnp.square(mean) - own) / (many - 1.0))


def report(monitor: Monitor) -> Report:
    """What the windows say, with 95 % bands.

    Nothing seen is 0 with an infinite band. After one step IDEAL is the square of its mean norm. Before the second
    measurement of ‖mean gradient‖² the bands of the variances are infinite; before the first, their values are second
    moments. Estimates are unbiased, so near convergence DRAWN, say, may come out below 0.

    Args:
        monitor: as `observe` left it.

    Returns:
        The variances of one draw, in squares of the unit of the gradients; divide by m for those of a batch.
    """
    steps = monitor.steps
    second, stale, mean_norm, noise_second, noise_stale, noise_norm, noise_both = steps.values.T
    recent = rolling.latest(steps, steps.values.shape[0] // STRETCHES)
    mean, square = rolling.means(steps, recent), rolling.band_of_series(monitor.squares)
    ideal = _squared_mean(mean_norm, mean[2], recent)
    slope = 2.0 * mean[2]
    ratio, scale = rolling.ratio_of_means(steps, stale, second, recent)
    noise_ratio = jnp.square(scale) * (noise_stale - 2.0 * ratio * noise_both + jnp.square(ratio) * noise_second)

    def band(value: Array, influence: Array, noise: Array, level: Array) -> Band:
        return rolling.band(steps, value, influence, noise, recent, level)

    return Report(
        uniform=rolling.less(band(mean[0], second, noise_second, second), square),
        stale=rolling.less(band(mean[1], stale, noise_stale, stale), square),
        ideal=rolling.less(band(ideal, slope * mean_norm, jnp.square(slope) * noise_norm, mean_norm), square),
        drawn=rolling.band_of_series(monitor.batches),
        mean_grad_norm_sq=square,
        ratio=band(ratio, (stale - ratio * second) * scale, noise_ratio, second),
    )
