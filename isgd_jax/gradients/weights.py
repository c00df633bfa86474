"""The weights of drawn gradients in an estimate."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from isgd_jax.errors import ArgumentError, Wrong, check_array, first_wrong

__all__ = ["check_example_weights", "draw_weights", "first_not_finite", "is_probability"]


MOST = 1.0 + 1e-3
"""No probability is larger; the rest is for roundings."""


def is_probability(probs: Float[Array, " m"]) -> Bool[Array, " m"]:
    """Which of these can be the probability of something that was drawn: above 0 and at most 1."""
    return (probs > 0.0) & (probs <= MOST)


def draw_weights(
    probs: Float[Array, " m"], mask: Bool[Array, " m"] | None, wanted: Float[Array, " m"] | float
) -> Float[Array, " m"]:
    """The weight ``wanted / probs`` [m] of each draw, 0 where masked.

    >>> draw_weights(jnp.array([0.25, 0.5, 0.0]), jnp.array([True, True, False]), 1 / 2).tolist()
    [2.0, 1.0, 0.0]

    Args:
        probs: of the draws [m]. One that is no probability gives NaN: a step that cannot be right shows.
        mask: false on padding [m], or None.
        wanted: the factor of each gradient in what is estimated [m], or 1/N for the mean of all.
    """
    used = probs if mask is None else jnp.where(mask, probs, 1.0)
    weights = jnp.where(is_probability(used), wanted / used, jnp.nan)
    return weights if mask is None else jnp.where(mask, weights, 0.0)


def first_not_finite(example_weights: Any) -> Wrong | None:
    """The first example weight that is no finite float32, as it will be used; None where values cannot be seen."""

    def is_finite(values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.isfinite(values.astype(np.float32))

    return first_wrong(is_finite, example_weights)


def check_example_weights(weights: Any, num_examples: int) -> None:
    """Refuse weights of another number of examples, or that are no numbers, where their values can be seen.

    Args:
        weights: a_n [n], or None, which passes.
        num_examples: n.

    Raises:
        TypeError: they are no array, or a masked one.
        ValueError: there is not one finite number an example.
    """
    if weights is None:
        return
    check_array("example_weights", weights)
    if weights.shape != (num_examples,):
        raise ArgumentError(f"example_weights must have shape ({num_examples},), got {weights.shape}")
    wrong = first_not_finite(weights)
    if wrong is not None:
        raise ArgumentError(f"example_weights must be finite, got {wrong.value} at {wrong.at}")
