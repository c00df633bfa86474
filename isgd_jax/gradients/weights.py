"""The weights of drawn gradients in an estimate."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

__all__ = ["draw_weights", "is_probability"]


MOST = 1.0 + 1e-3
"""No probability is larger; the rest is for roundings."""


def is_probability(probs: Float[Array, " m"]) -> Bool[Array, " m"]:
    """Which of these can be the probability of something that was drawn: above 0 and at most 1."""
    return (probs > 0.0) & (probs <= MOST)


def draw_weights(
    probs: Float[Array, " m"], mask: Bool[Array, " m"] | None, wanted: Float[Array, " m"] | float
) -> Float[Array, " m"]:
    """The weight ``wanted / probs`` [m] of each draw, 0 where masked; ``wanted`` is 1/N for the mean of all.

    NaN where ``probs`` is no probability: a step that cannot be right shows. The update and the monitor both take their
    weights from here, so XLA computes the mean gradient of a step once.
    """
    used = probs if mask is None else jnp.where(mask, probs, 1.0)
    weights = jnp.where(is_probability(used), wanted / used, jnp.nan)
    return weights if mask is None else jnp.where(mask, weights, 0.0)
