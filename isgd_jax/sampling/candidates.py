"""Importance sampling without a table, for streams: score many candidates cheaply, learn from few.

Take the next B examples of the stream, score them (a cheap score will do: the loss, or `scorers.logit_bound`), draw
b of them, and make one update with ``importance_weighting(B)``:

    draw = presample.resample(key, score(params, candidates), num_draws=b)
    batch = jax.tree.map(lambda x: x[draw.indices], candidates)

Guarantees:

* the mean of the weighted gradient is the mean gradient of the candidates, hence of the stream, whatever the scores;
* ``speedup`` is 1 when all scores are equal, and counts no gain that the scores do not promise.

Source: Katharopoulos & Fleuret, "Not all samples are created equal" (2018), algorithm 1. They ask
whether it is worth it as `is_worth_it` does; our measure of the gain is the ratio of second moments.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from isgd_jax.sampling import proposal, samplers
from isgd_jax.types import Draw, Key


def resample(key: Key, scores: Float[Array, " candidates"], *, num_draws: int, mixture: float = 0.1) -> Draw:
    """Draw among the candidates by score, stratified along the scores; ``indices`` count from the first candidate."""
    probs, _ = proposal.smooth(scores, mixture=mixture)
    return samplers.stratified(key, samplers.prepare(probs, samplers.order_by(scores)), num_draws=num_draws)


def speedup(scores: Float[Array, " candidates"]) -> Float[Array, ""]:
    """How much larger a uniform batch of the same second moment would be: E[w²] / E[w]², 1 + CV² of the scores."""
    relative = scores / jnp.maximum(jnp.max(scores), jnp.finfo(jnp.float32).tiny)
    mean = jnp.mean(relative)
    return jnp.where(mean > 0.0, jnp.mean(jnp.square(relative)) / jnp.square(jnp.where(mean > 0.0, mean, 1.0)), 1.0)


def is_worth_it(
    scores: Float[Array, " candidates"], *, num_draws: int, score_cost: float = 1.0, step_cost: float = 3.0
) -> Bool[Array, ""]:
    """Whether B scores and b steps are cheaper than the larger uniform batch of the same second moment.

    Costs are in forward passes of one example: a score is one, a step about three.
    """
    share = scores.shape[0] / num_draws
    return pays(speedup(scores), candidates=share, score_cost=score_cost, step_cost=step_cost)


def pays(
    promise: Float[Array, ""], *, candidates: int | float, score_cost: float = 1.0, step_cost: float = 3.0
) -> Bool[Array, ""]:
    """`is_worth_it`, for a ``promise`` (`speedup`) known already and so many candidates a draw."""
    return step_cost * promise > candidates * score_cost + step_cost
