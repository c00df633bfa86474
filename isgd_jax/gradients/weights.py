"""The weights of drawn gradients in an estimate."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float


def draw_weights(
    probs: Float[Array, " m"], mask: Bool[Array, " m"] | None, wanted: Float[Array, " m"] | float
) -> Float[Array, " m"]:
    """The weight ``wanted / probs`` [m] of each draw, 0 where masked; ``wanted`` is 1/N for the mean of all."""
    if mask is None:
        return wanted / probs
    return jnp.where(mask, wanted / jnp.where(mask, probs, 1.0), 0.0)
