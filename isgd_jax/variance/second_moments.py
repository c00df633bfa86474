"""What a proposal costs and gains: Tr Cov of one draw, for UNIFORM, STALE and IDEAL draws.

    UNIFORM  mean(norms²)                      - ‖mean gradient‖²
    STALE    mean(scores) mean(norms²/scores)  - ‖mean gradient‖²
    IDEAL    mean(norms)²                      - ‖mean gradient‖²    the least that independent draws can reach

Divide by the batch size for a batch of independent draws. `moments` looks at every example; `from_draws` estimates the
same second moments from a batch that was drawn for training anyway.

Guarantees:

* ``moments(norms, norms)`` has STALE equal to IDEAL, and IDEAL is at most UNIFORM and at most STALE;
* scores may have any scale: only their ratios count;
* ``from_draws`` is unbiased for UNIFORM and STALE under every sampler (given the law, where the number of draws is
  random), and for IDEAL under independent draws.

Source: the paper, section 3 and its theorem 1; the estimates from draws follow Kutsuna (2025).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from isgd_jax.errors import ArgumentError

__all__ = ["Moments", "from_draws", "mean_grad_norm_sq", "moments", "trace_covariance"]


class Moments(NamedTuple):
    """Second moments of one weighted draw s·g; less ‖mean gradient‖² they are traces of covariances."""

    uniform: Float[Array, ""]
    stale: Float[Array, ""]
    ideal: Float[Array, ""]


def moments(norms: Float[Array, " n"], scores: Float[Array, " n"]) -> Moments:
    """The second moments over all examples: the oracle that estimates from draws are compared with.

    >>> [round(float(x), 2) for x in moments(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0]))]
    [5.0, 5.0, 4.0]

    Args:
        norms: the true norms of the gradients [n].
        scores: what is drawn from [n], scores or probabilities; any scale. A score of 0 beside a norm above 0 makes
            STALE infinite: that example would never be drawn.
    """
    square = jnp.square(norms)
    per_score = jnp.where(norms > 0.0, square / scores, 0.0)  # a norm of zero costs nothing, however rarely drawn
    return Moments(jnp.mean(square), jnp.mean(scores) * jnp.mean(per_score), jnp.square(jnp.mean(norms)))


def trace_covariance(moments: Moments, mean_grad_norm_sq: Float[Array, ""] | float) -> Moments:
    """UNIFORM, STALE and IDEAL as variances of one draw: the second moments less ‖mean gradient‖².

    Args:
        moments: of `moments` or `from_draws`.
        mean_grad_norm_sq: ‖mean gradient‖², exact or estimated. With an estimate a difference may be negative.
    """
    return Moments(*(moment - mean_grad_norm_sq for moment in moments))


def from_draws(
    weights: Float[Array, " m"],
    norms: Float[Array, " m"],
    mask: Bool[Array, " m"] | None = None,
    *,
    proposal_weights: Float[Array, " m"] | None = None,
) -> Moments:
    """Estimates of the second moments from one batch that was drawn for training.

    IDEAL is the square of a mean, so it is estimated over pairs of different draws (a U-statistic). Draws that depend
    on each other, stratified ones say, make it too small by at most STALE / (m - 1).

    Args:
        weights: 1/(N probs) [m], of the probabilities that the draws were really made with.
        norms: fresh norms of the drawn examples [m]. Old ones would estimate old moments.
        mask: false on padding [m], which counts as zero: means are over m places, as ``probs`` are.
        proposal_weights: 1/(N q) [m], of the law that STALE is of. None where it is the one of ``weights``; draws of
            random size (poisson) need it, since a place of theirs is drawn less often than q says.

    Raises:
        ValueError: m is below 2.
    """
    size = _at_least_two(norms.shape[0])
    weighted = weights * norms if mask is None else jnp.where(mask, weights * norms, 0.0)
    norms = norms if mask is None else jnp.where(mask, norms, 0.0)
    total, own = jnp.sum(weighted), jnp.sum(jnp.square(weighted))
    stale = own if proposal_weights is None else jnp.sum(weighted * norms * proposal_weights)
    return Moments(
        uniform=jnp.sum(weighted * norms) / size,
        stale=stale / size,
        ideal=(jnp.square(total) - own) / (size * (size - 1)),
    )


def mean_grad_norm_sq(
    batch_grad_norm_sq: Float[Array, ""], stale: Float[Array, ""], num_draws: int
) -> Float[Array, ""]:
    """‖mean gradient‖² without bias, from the norm of one weighted batch mean of *independent* draws.

    E‖batch mean‖² = ‖mean gradient‖² + (STALE moment - ‖mean gradient‖²) / m, solved for what is wanted: the mean inner
    product over pairs of draws. For dependent draws take the inner product of two half-batches drawn apart.

    Args:
        batch_grad_norm_sq: ‖mean of weight · gradient‖² of the batch.
        stale: the STALE moment of the same batch (`from_draws`). That of another batch is unbiased too, and noisier.
        num_draws: m.

    Returns:
        The estimate; it can be negative, and clipping it would be a bias.

    Raises:
        ValueError: ``num_draws`` is below 2.
    """
    size = _at_least_two(num_draws)
    return (size * batch_grad_norm_sq - stale) / (size - 1)


def _at_least_two(num_draws: int) -> int:
    if num_draws < 2:
        raise ArgumentError(f"an estimate over pairs needs at least 2 draws, got {num_draws}")
    return num_draws
