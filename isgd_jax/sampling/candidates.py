"""Importance sampling without a table, for streams: score many candidates cheaply, learn from few.

Take the next B examples of the stream, score them (a cheap score will do: the loss, or `scorers.logit_bound`), draw
b of them, and make one update with ``importance_weighting(B)``:

    draw = candidates.resample(key, score(params, found), num_draws=b)
    batch = jax.tree.map(lambda x: x[draw.indices], found)

Guarantees:

* the mean of the weighted gradient is the mean gradient of the candidates, hence of the stream, whatever the scores;
* a score that is negative or not finite is none: it counts as the mean of the others;
* ``speedup`` is 1 when all scores are equal, and counts no gain that the scores do not promise.

Source: Katharopoulos & Fleuret, "Not all samples are created equal" (2018), algorithm 1. They ask
whether it is worth it as `pays` does; our measure of the gain is the ratio of second moments.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from isgd_jax.sampling import double_float, proposal, samplers
from isgd_jax.types import Draw, Key

__all__ = ["pays", "resample", "speedup"]


def resample(
    key: Key, scores: Float[Array, " candidates"], *, num_draws: int, mixture: float = 0.1, spread: float = 1.0
) -> Draw:
    """Draw among the candidates by score, stratified along the scores.

    Args:
        key: of this draw alone.
        scores: one number [B] for each candidate, of at least 0.
        num_draws: b, at least 1.
        mixture: share of uniform draws; no weight 1/(B probs) is larger than one over it.
        spread: over how many candidates draws are spread at least, 1 to B: none has a probability above one over it.

    Returns:
        The draw; ``indices`` count from the first candidate.

    Raises:
        ValueError: a number is out of range.
    """
    probs, _ = proposal.smooth(scores, mixture=mixture)
    law = samplers.prepare(probs, samplers.order_by(probs))
    if spread != 1.0:
        law = samplers.capped(law, num_draws=spread)
    return samplers.stratified(key, law, num_draws=num_draws)


def speedup(scores: Float[Array, " candidates"]) -> Float[Array, ""]:
    """How much larger a uniform batch of the same second moment would be: E[w²] / E[w]², 1 + CV² of the scores.

    Args:
        scores: one number [B] for each candidate; those that are negative or not finite are left out.

    Returns:
        1 to B. Of a few scores in place of all it is too low, since no more than their number can be seen: then it
        errs towards plain draws.
    """
    known = jnp.isfinite(scores) & (scores >= 0.0)
    values = double_float.in_range(jnp.where(known, scores, 0.0).astype(jnp.float32))[0]
    largest = jnp.max(values)
    relative = values / jnp.where(largest > 0.0, largest, 1.0)
    count = jnp.maximum(jnp.sum(known, dtype=jnp.int32).astype(jnp.float32), 1.0)
    mean, square = jnp.sum(relative) / count, jnp.sum(jnp.square(relative)) / count
    return jnp.where(mean > 0.0, square / jnp.square(jnp.where(mean > 0.0, mean, 1.0)), 1.0)


def pays(
    promise: Float[Array, ""], *, candidates: int | float, score_cost: float = 1.0, step_cost: float = 3.0
) -> Bool[Array, ""]:
    """Whether scoring and a step are cheaper than the larger uniform batch of the same second moment.

    Args:
        promise: the larger batch, over the present one: a `speedup`.
        candidates: scored for each draw.
        score_cost: of one score, in forward passes of one example.
        step_cost: of one example of a step, in forward passes: about three.
    """
    return step_cost * promise > candidates * score_cost + step_cost
