"""The promise of the library: whatever the scores, the mean of the estimate is the full gradient.

A linear model with squared loss is the oracle: gradients in closed form, norms |r| sqrt(|x|² + 1).
"""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax import importance_sampler, reweight
from isgd_jax.sampling import proposal, samplers, score_table
from isgd_jax.sampling.state import SamplerState
from isgd_jax.variance import second_moments

N, DIM, DRAWS, REPEATS = 300, 4, 16, 20_000

SAMPLERS = [
    samplers.independent,
    samplers.stratified,
    samplers.systematic,
    samplers.without_replacement,
    samplers.poisson,
]
SCORES = ["uniform", "fresh", "stale", "adversarial", "half scored"]


@cache
def gradients() -> np.ndarray:
    """The gradients [N, DIM + 1] of a linear model on data with a few hard examples."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, DIM))
    residual = rng.normal(size=N) * rng.lognormal(0, 1, N)
    return (residual[:, None] * np.concatenate([x, np.ones((N, 1))], axis=1)).astype(np.float32)


@pytest.fixture(scope="module")
def grads() -> np.ndarray:
    return gradients()


def scores_of(kind: str, norms: np.ndarray) -> jax.Array:
    rng = np.random.default_rng(1)
    return jnp.asarray(
        {
            "uniform": np.ones(N),
            "fresh": norms,
            "stale": norms * rng.lognormal(0, 1, N),
            "adversarial": 1.0 / norms,
            "half scored": np.where(np.arange(N) % 2, norms, 0.0),
        }[kind],
        jnp.float32,
    )


@cache
def law_of(kind: str) -> jax.Array:
    """The proposal from such scores of the gradients, some of them not known."""
    norms = np.linalg.norm(gradients(), axis=1)
    scored = np.arange(N) if kind != "half scored" else np.arange(1, N, 2)
    ids = jnp.asarray(scored, jnp.int32)
    known, _ = score_table.record(score_table.create(N), ids, scores_of(kind, norms)[ids], version=5)
    return proposed(known).probs


@jax.jit
def proposed(known: score_table.ScoreTable) -> proposal.Proposal:
    return proposal.propose(known, version=7, mixture=0.1)


@jax.jit
def sorted_by(probs: jax.Array, key: jax.Array) -> samplers.Law:
    return samplers.prepare(probs, samplers.order_by(key))


@cache
def estimator(sampler: Callable) -> Callable[[samplers.Law, jax.Array], jax.Array]:
    tx = reweight.importance_weighting(N)

    @jax.jit
    def estimate(law: samplers.Law, grads: jax.Array) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            draw = sampler(key, law, num_draws=DRAWS)
            return tx.update(grads[draw.indices], tx.init(None), probs=draw.probs, mask=draw.mask)[0]

        return jax.lax.map(one, jax.random.split(jax.random.key(2), REPEATS), batch_size=5000)

    return estimate


def estimates(sampler: Callable, probs: jax.Array, grads: np.ndarray, key: np.ndarray | None = None) -> np.ndarray:
    """REPEATS batch gradients [REPEATS, DIM + 1], each through the sampler and the Optax transformation.

    The line is sorted by ``key``, or left as it is.
    """
    law = sorted_by(probs, jnp.asarray(np.arange(N, dtype=np.float32) if key is None else key))
    return np.asarray(estimator(sampler)(law, jnp.asarray(grads)), np.float64)


@cache
def estimates_for(sampler: Callable, kind: str, *, is_sorted: bool = False) -> np.ndarray:
    """`estimates` for one kind of scores, made once; the line is sorted by the last coordinate, or left as it is."""
    grads = gradients()
    return estimates(sampler, law_of(kind), grads, grads[:, -1] if is_sorted else None)


@pytest.mark.parametrize("kind", SCORES)
def test_enumeration(grads: np.ndarray, kind: str) -> None:
    # The sum over all examples of q_i g_i / (N q_i), through the transformation, one draw each.
    probs = law_of(kind)
    tx = reweight.importance_weighting(N)
    each = jax.vmap(lambda g, q: tx.update(g[None], tx.init(None), probs=q[None])[0])(jnp.asarray(grads), probs)
    mean = np.asarray(probs, np.float64) @ np.asarray(each, np.float64)
    np.testing.assert_allclose(mean, grads.mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_mean_is_the_full_gradient(grads: np.ndarray, sampler: Callable, kind: str) -> None:
    # Within 4 standard errors in each of 5 coordinates; P(a coordinate fails by chance) = 6e-5.
    found = estimates_for(sampler, kind)
    standard_error = found.std(axis=0, ddof=1) / np.sqrt(REPEATS)
    assert np.all(np.abs(found.mean(axis=0) - grads.mean(axis=0)) < 4 * standard_error)


@pytest.mark.parametrize("kind", SCORES)
def test_the_variance_of_independent_draws_is_the_stale_formula(grads: np.ndarray, kind: str) -> None:
    norms = np.linalg.norm(grads, axis=1)
    probs = law_of(kind)
    moments = second_moments.moments(jnp.asarray(norms), probs)
    traces = second_moments.trace_covariance(moments, float((grads.mean(axis=0) ** 2).sum()))
    measured = DRAWS * estimates_for(samplers.independent, kind).var(axis=0, ddof=1).sum()
    np.testing.assert_allclose(measured, float(traces.stale), rtol=0.05)


@pytest.mark.parametrize("kind", SCORES)
def test_stratified_draws_never_vary_more(grads: np.ndarray, kind: str) -> None:
    norms = np.linalg.norm(grads, axis=1)
    probs = law_of(kind)
    stale = float(second_moments.moments(jnp.asarray(norms), probs).stale) - (grads.mean(axis=0) ** 2).sum()
    for is_sorted in (False, True):
        measured = DRAWS * estimates_for(samplers.stratified, kind, is_sorted=is_sorted).var(axis=0, ddof=1).sum()
        assert measured < 1.03 * stale  # 3 % for the error of a variance over 20,000 repeats


def test_an_order_by_gradient_goes_under_the_independent_minimum(grads: np.ndarray) -> None:
    norms = np.linalg.norm(grads, axis=1)
    ideal = norms.mean() ** 2 - (grads.mean(axis=0) ** 2).sum()
    probs = proposal.smooth(jnp.asarray(norms), mixture=0.1)[0]
    measured = DRAWS * estimates(samplers.stratified, probs, grads, grads[:, -1]).var(axis=0, ddof=1).sum()
    assert measured < 0.8 * ideal


def test_of_one_key_and_a_proposal_that_learns_from_its_own_draws_the_mean_is_the_full_gradient() -> None:
    """The key decides what is seen and so what the next proposal is: its draws are to know nothing of that."""
    each = jnp.asarray(gradients()[:10, -1])
    sampler = importance_sampler(10, batch_size=2)

    @jax.jit
    def estimates(key: jax.Array) -> jax.Array:
        def step(state: SamplerState, at: jax.Array) -> tuple[SamplerState, jax.Array]:
            state = jax.lax.cond(at % 4 == 0, sampler.refresh, lambda state: state, state)
            draw = sampler.sample(key, state)
            seen = each[draw.indices]
            return sampler.observe(state, draw, norms=jnp.abs(seen)), jnp.mean(draw.target / draw.probs * seen)

        return jax.lax.scan(step, sampler.init(), jnp.arange(24))[1]

    found = np.asarray(jax.lax.map(estimates, jax.random.split(jax.random.key(0), REPEATS), batch_size=500))
    off = (found.mean(0) - float(each.mean())) / (found.std(0) / np.sqrt(REPEATS))
    assert np.abs(off).max() < 5.0
    assert np.mean(off**2) < 2.0  # one at most, where draws of different steps have the same mean


def test_without_the_fallback_score_the_estimate_would_be_biased(grads: np.ndarray) -> None:
    # The mistake the fallback score is there for: at probability zero, the gradients of the untrusted would be missing.
    probs = law_of("half scored")
    assert float(jnp.min(probs)) > 0.0
    trusted_part = grads[1::2].sum(axis=0) / N
    assert np.abs(trusted_part - grads.mean(axis=0)).max() > 0.1


@pytest.mark.parametrize("mixture", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("kind", ["adversarial", "stale"])
def test_no_score_costs_more_than_the_mixture_allows(grads: np.ndarray, kind: str, mixture: float) -> None:
    # Every weight is at most 1/mixture, so the second moment is at most 1/mixture of UNIFORM's, whatever the scores.
    norms = np.linalg.norm(grads, axis=1)
    scores = scores_of(kind, norms)
    for worst in (scores, jnp.zeros(N).at[np.argmin(norms)].set(1e30)):
        moments = second_moments.moments(jnp.asarray(norms), proposal.smooth(worst, mixture=mixture)[0])
        assert float(moments.stale) <= float(moments.uniform) / mixture * (1 + 1e-5)
