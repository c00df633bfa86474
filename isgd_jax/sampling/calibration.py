"""What an old score is worth: E[‖g‖² | old score, age], learnt online from the draws that training makes anyway.

Every drawn example brings a triple (old score, its age, fresh norm). The mean square of fresh norms in a cell of
(octave of the score, octave of the age), each draw weighted by 1/(N probs), is unbiased for all examples of the cell.
The best independent proposal for what is known is its square root. It has no constant to tune, subsumes additive
smoothing, and becomes uniform when scores are worthless.

Guarantees:

* worthless scores give equal predictions, whatever their size;
* a cell that few draws have seen is drawn towards its score's mean over all ages, and that towards an additive
  smoothing of the scores themselves (shrinkage); with no draws at all, predictions are the scores, smoothed;
* predictions lie above ``floor`` of the root mean square: no example is thought worthless on thin evidence;
* the fit forgets with a half-life, as training moves on.

Source: ours.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

__all__ = ["Calibration", "create", "observe", "predict"]

SCORE_BINS, AGE_BINS = 48, 12
LOWEST = -36.0
"""Octave of the lowest score bin; 2^-36 to 2^12 spans what gradients do."""
LARGEST = 1e15
"""No norm or score counts for more: sums of squares stay within float32."""


class Calibration(NamedTuple):
    """Weighted sums over the draws seen, by cell of score and age; they decay. One array: a step then writes once."""

    sums: Float[Array, "s a 4"]

    @property
    def weight(self) -> Float[Array, "s a"]:
        """Of the weights 1/(N probs) alone."""
        return self.sums[..., 0]

    @property
    def weight_sq(self) -> Float[Array, "s a"]:
        """Of their squares."""
        return self.sums[..., 1]

    @property
    def square(self) -> Float[Array, "s a"]:
        """Of ‖g‖²."""
        return self.sums[..., 2]

    @property
    def score_sq(self) -> Float[Array, "s a"]:
        """Of the squares of the old scores."""
        return self.sums[..., 3]


def create() -> Calibration:
    """Nothing seen yet."""
    return Calibration(jnp.zeros((SCORE_BINS, AGE_BINS, 4), jnp.float32))


# Inline: traced once for each set of shapes, and written out in the program of whoever calls it.
@partial(jax.jit, inline=True, static_argnames="half_life")
def observe(
    calibration: Calibration,
    scores: Float[Array, " m"],
    ages: Int[Array, " m"],
    norms: Float[Array, " m"],
    weights: Float[Array, " m"],
    mask: Bool[Array, " m"] | None = None,
    *,
    half_life: float = 200.0,
) -> Calibration:
    """Add the draws of one step.

    Args:
        calibration: what was seen so far.
        scores: old ones [m], as they were at the draw.
        ages: theirs [m], in versions; a negative one is left out.
        norms: fresh ones [m]; one that is not finite is left out.
        weights: 1/(N probs) [m] of the draws.
        mask: false for what was never scored, and for padding.
        half_life: of the fit, in steps.
    """
    sound = (norms <= LARGEST) & (scores <= LARGEST) & jnp.isfinite(weights) & (ages >= 0)  # NaN is not, either
    sound = sound if mask is None else sound & mask
    weights, norms, scores = (jnp.where(sound, x, 0.0) for x in (weights, norms, scores))
    at = _score_bin(scores).astype(jnp.int32), _age_bin(ages)
    squares = weights * jnp.square(norms), weights * jnp.square(scores)
    rows = jnp.stack([weights, jnp.square(weights), *squares], axis=1)
    return Calibration((2.0 ** (-1.0 / half_life) * calibration.sums).at[at].add(rows))


@partial(jax.jit, inline=True, static_argnames=("strength", "floor"))
def predict(
    calibration: Calibration,
    scores: Float[Array, " n"],
    ages: Int[Array, " n"],
    *,
    strength: float = 10.0,
    floor: float = 0.02,
) -> Float[Array, " n"]:
    """sqrt(E[‖g‖² | score, age]) of each example: calibrated scores to make a proposal from.

    Between the middles of octaves of the score the logarithm is interpolated.

    Args:
        calibration: what was seen.
        scores: as the table has them [n].
        ages: theirs [n], in versions.
        strength: how many draws the prior counts for.
        floor: the least prediction, over the root mean square norm.
    """
    table, scores = _log_ratio(calibration, strength), jnp.minimum(scores, LARGEST)
    place = jnp.clip(_score_bin(scores) - 0.5, 0.0, SCORE_BINS - 1.0)
    low = jnp.minimum(jnp.floor(place), SCORE_BINS - 2.0)
    share, at, age = place - low, low.astype(jnp.int32), _age_bin(ages)
    ratio = (1.0 - share) * table[at, age] + share * table[at + 1, age]
    typical = _additive_sq(calibration)
    predicted = jnp.sqrt(jnp.square(scores) + typical) * jnp.exp2(0.5 * ratio)
    seen = jnp.sum(calibration.weight)
    mean_square = jnp.sum(calibration.square) / jnp.where(seen > 0.0, seen, 1.0)
    return jnp.maximum(predicted, floor * jnp.sqrt(mean_square))


def _log_ratio(calibration: Calibration, strength: float) -> Float[Array, "s a"]:
    """log2 of E[‖g‖²] over the prior score² + typical, by cell, shrunk: cell to row, row to all, all to itself."""
    weight, weight_sq, square, score_sq = jnp.moveaxis(calibration.sums, -1, 0)
    prior = score_sq + weight * _additive_sq(calibration)
    everything = _over(jnp.sum(square), jnp.sum(prior), 1.0)
    row_sums = (jnp.sum(part, axis=1, keepdims=True) for part in (weight, weight_sq, square, prior))
    row = _shrunk(*row_sums, towards=everything, strength=strength)
    return jnp.log2(_shrunk(weight, weight_sq, square, prior, towards=row, strength=strength))


def _shrunk(weight: Array, weight_sq: Array, square: Array, prior: Array, *, towards: Array, strength: float) -> Array:
    """square / prior, with ``strength`` draws' worth of ``towards`` added; weight²/weight_sq draws were seen."""
    draws = _over(jnp.square(weight), weight_sq, 0.0)
    own = _over(square, prior, 0.0)
    return jnp.maximum((draws * own + strength * towards) / (draws + strength), 1e-12)


def _additive_sq(calibration: Calibration) -> Float[Array, ""]:
    """A small part of the mean squared score: the additive smoothing of the prior."""
    return 0.01 * _over(jnp.sum(calibration.score_sq), jnp.sum(calibration.weight), 0.0)


def _over(numerator: Array, denominator: Array, otherwise: float) -> Array:
    safe = denominator > 0.0
    return jnp.where(safe, numerator / jnp.where(safe, denominator, 1.0), otherwise)


def _score_bin(scores: Float[Array, " k"]) -> Float[Array, " k"]:
    """The octave of a score, with its fraction; the floor of it is the bin."""
    return jnp.clip(jnp.log2(jnp.maximum(scores, 2.0**LOWEST)) - LOWEST, 0.0, SCORE_BINS - 0.001)


def _age_bin(ages: Int[Array, " k"]) -> Int[Array, " k"]:
    """0; 1; 2 to 3; 4 to 7; ...: bit lengths."""
    return jnp.clip(32 - jax.lax.clz(jnp.maximum(ages, 0)), 0, AGE_BINS - 1)
