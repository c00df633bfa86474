"""Presampling inside a step: score many candidates, learn from few, no table (Katharopoulos & Fleuret 2018).

The gate is theirs: while the scores promise less than they cost, the batch is drawn uniformly from the candidates,
which are then not scored; the scores of what is drawn still tell what scoring would promise.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from isgd_jax import presample, samplers
from isgd_jax.draws import WATCH_EVERY, Choice, Choose
from isgd_jax.typing import Batch, Draw, Key, Params, Sampler, Scorer


def make_choose(
    sampler: Sampler,
    scorer: Scorer,
    *,
    num_draws: int,
    candidates: int,
    mixture: float,
    is_gated: bool,
    score_cost: float = 1.0,
) -> Choose:
    """How a step draws: ``num_draws`` of ``candidates`` times as many that ``sampler`` takes from the law.

    In two halves, each from candidates of its own, so that they are drawn apart. The gradient's mean is that of the
    candidates, and theirs that of the data: unbiased, whatever the scores. The state's ``watch.promise`` is the gate;
    ``score_cost`` is that of a score, in forward passes.
    """

    def choose(key: Key, law: Any, state: Any, data: Batch) -> Choice:
        take, *picks = jax.random.split(key, 3)
        found = sampler(take, law, num_draws=candidates * num_draws)
        pays = presample.pays(state.watch.promise, candidates=candidates, score_cost=score_cost) | (not is_gated)
        cut = num_draws // 2
        parts = []
        for pick, start, size in zip(picks, (0, cut), (cut, num_draws - cut), strict=True):
            part = jax.tree.map(lambda x, s=start, z=size: x[candidates * s : candidates * (s + z)], found)
            parts += [resample(pick, scorer, state.params, data, part, pays, size, mixture)] if size else []
        draw, promise = jax.tree.map(lambda *both: jnp.concatenate(both), *parts) if len(parts) > 1 else parts[0]
        return Choice(draw, draw.probs, state.step % WATCH_EVERY == 0, jnp.mean(promise))

    return choose


def resample(
    key: Key,
    scorer: Scorer,
    params: Params,
    data: Batch,
    found: Draw,
    pays: Array,
    num_draws: int,
    mixture: float,
) -> tuple[Draw, Float[Array, " 1"]]:
    """Draws from the candidates ``found``, by score if that pays, and how much larger a batch their scores promise."""
    count = found.indices.shape[0]

    def scored(at: Array) -> Array:
        scores = scorer(params, jax.tree.map(lambda x: x[at], data))
        return jnp.where(jnp.isfinite(scores), scores, 0.0)

    def by_score() -> tuple[Draw, Array]:
        scores = scored(found.indices)
        return presample.resample(key, scores, num_draws=num_draws, mixture=mixture), presample.speedup(scores)

    def by_chance() -> tuple[Draw, Array]:
        draw = samplers.uniform(key, jnp.ones(count), num_draws=num_draws)
        return draw, presample.speedup(scored(found.indices[draw.indices]))

    draw, promise = jax.lax.cond(pays, by_score, by_chance)
    probs = count * draw.probs * found.probs[draw.indices]  # so that 1/(N probs) is 1/(count draw.probs)
    return Draw(found.indices[draw.indices], probs, draw.mask), promise[None]
