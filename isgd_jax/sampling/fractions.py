"""Which share of uniform draws a proposal needs, chosen from the draws that training makes anyway.

A share lambda that is too small lets a few underrated examples rule the variance; one too large gives the gain away.
For every share of a grid, a batch drawn from any law tells without bias what second moment that share would have given:
the mean of s ‖g‖² / ((1 - lambda) r + lambda), with r the score over the mean score. The best share is the cheapest.

Guarantees:

* what is compared is unbiased, whichever share was drawn with;
* all shares are judged by the same draws, by their differences: noise that they have in common cancels;
* without evidence the share is ``CAUTIOUS``; it is left only for one better by a standard error;
* the evidence decays with a half-life, as training moves on.

Source: ours.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

__all__ = ["CAUTIOUS", "GRID", "Mixtures", "choose", "create", "observe", "relative_scores"]

GRID = (0.2, 0.3, 0.5)
"""The shares that are chosen from. Less would have a little less variance, but weights above 5 make rates diverge that
plain SGD stands (`experiments/benchmarks/largest_weight.py`; Needell, Ward & Srebro 2014 mix in one half)."""

CAUTIOUS = 0.3
"""The share that stale scores of unknown worth get: the best of all scores 200 updates old, measured."""

LARGEST = 1e18
"""A step with a larger moment teaches nothing: its square would leave float32, and the sums never come back."""

ROUNDED = 1e-5
"""Moments that differ by no more, relatively, are alike: roundings would choose, and otherwise on each kind of mesh."""


class Mixtures(NamedTuple):
    """Decayed sums over steps, for each share of `GRID`: of its moment less the cautious share's, and of the square."""

    steps: Float[Array, ""]
    excess: Float[Array, " k"]
    square: Float[Array, " k"]


def create() -> Mixtures:
    """Nothing seen yet."""
    return Mixtures(jnp.float32(0), *(jnp.zeros(len(GRID), jnp.float32) for _ in range(2)))


# Inline: traced once for each set of shapes, and written out in the program of whoever calls it.
@partial(jax.jit, inline=True, static_argnames="half_life")
def observe(
    mixtures: Mixtures,
    weights: Float[Array, " m"],
    norms: Float[Array, " m"],
    relative: Float[Array, " m"],
    mask: Bool[Array, " m"],
    *,
    half_life: float = 100.0,
    costs: Float[Array, " k"] | None = None,
) -> Mixtures:
    """Add the draws of a step; one with a moment that is not finite teaches nothing.

    Args:
        mixtures: what was seen so far.
        weights: 1/(N probs) [m] of the draws.
        norms: fresh ones [m], times ``N |a_n|`` where the target is weighted.
        relative: scores over their mean [m], as they were when the proposal was made (`relative_scores`).
        mask: false for padding.
        half_life: of the evidence, in steps.
        costs: what a draw costs under each share of `GRID`, where draws differ in it: moments count times cost.
    """
    moments = jnp.where(mask, weights * jnp.square(norms), 0.0)
    shares = jnp.asarray(GRID, jnp.float32)[:, None]
    found = jnp.mean(moments[None] / ((1.0 - shares) * relative[None] + shares), axis=1)
    found = found if costs is None else found * costs
    sound = jnp.all(found <= LARGEST)  # NaN is not, either
    found = jnp.where(sound, found, 0.0)
    cautious = found[GRID.index(CAUTIOUS)]
    excess = jnp.where(jnp.abs(found - cautious) > ROUNDED * cautious, found - cautious, 0.0)
    rows = Mixtures(sound.astype(jnp.float32), excess, jnp.square(excess))
    keep = jnp.where(sound, 2.0 ** (-1.0 / half_life), 1.0)
    return jax.tree.map(lambda kept, row: keep * kept + row, mixtures, rows)


@partial(jax.jit, inline=True, static_argnames="min_steps")
def choose(mixtures: Mixtures, *, min_steps: float = 20.0) -> Float[Array, ""]:
    """The share whose moment, a standard error of its difference from the cautious one added, is the least.

    Where none is less than that of the cautious share, it is this one.

    Args:
        mixtures: what was seen.
        min_steps: evidence, in decayed steps, before which it is `CAUTIOUS`.
    """
    steps = jnp.maximum(mixtures.steps, 1.0)
    mean = mixtures.excess / steps
    spread = jnp.maximum(mixtures.square / steps - jnp.square(mean), 0.0)
    most = mean + jnp.sqrt(spread / steps)  # of the cautious share 0
    is_better = (mixtures.steps >= min_steps) & (jnp.min(most) < 0.0)
    return jnp.where(is_better, jnp.asarray(GRID, jnp.float32)[jnp.argmin(most)], CAUTIOUS)


def relative_scores(proposal_weights: Float[Array, " m"], mixture: Float[Array, ""]) -> Float[Array, " m"]:
    """Scores over their mean [m], from the weights that a proposal gives: the inverse of the mixture.

    Args:
        proposal_weights: 1/(N q) [m].
        mixture: the uniform share of that proposal. At 1 nothing can be told of the scores.
    """
    return jnp.maximum((1.0 / proposal_weights - mixture) / jnp.maximum(1.0 - mixture, 1e-6), 0.0)
