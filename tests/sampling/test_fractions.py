"""The share of uniform draws chosen from draws, against what all the data say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax.sampling import fractions, proposal, samplers

N, DRAWS, STEPS = 400, 32, 400


def learnt(norms: jax.Array, scores: jax.Array, drawn_with: float) -> fractions.Mixtures:
    """What 400 steps of draws with one share teach about all of them."""
    probs = proposal.smooth(scores, mixture=drawn_with)[0]

    def step(state: fractions.Mixtures, key: jax.Array) -> tuple[fractions.Mixtures, None]:
        draw = samplers.independent(key, probs, num_draws=DRAWS)
        weights = 1 / (N * draw.probs)
        relative = fractions.relative_scores(weights, jnp.float32(drawn_with))
        return fractions.observe(state, weights, norms[draw.indices], relative, draw.mask, half_life=1e6), None

    return jax.jit(lambda key: jax.lax.scan(step, fractions.create(), jax.random.split(key, STEPS))[0])(
        jax.random.key(0)
    )


def truth(norms: jax.Array, scores: jax.Array) -> np.ndarray:
    """Second moments of all shares, from all the data."""
    return np.array([np.mean(norms**2 / (N * proposal.smooth(scores, mixture=m)[0])) for m in fractions.GRID])


def problem() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).lognormal(0, 1, N), jnp.float32)


@pytest.mark.slow
def test_differences_of_shares_are_those_of_all_the_data() -> None:
    # Each within 5 standard errors, drawn with a share that is none of the best.
    norms = problem()
    scores = norms * jnp.asarray(np.random.default_rng(1).lognormal(0, 1, N), jnp.float32)
    found, true = learnt(norms, scores, 0.5), truth(norms, scores)
    mean = np.asarray(found.excess / found.steps)
    spread = np.sqrt(np.maximum(np.asarray(found.square / found.steps) - mean**2, 0) / STEPS)
    expected = true - true[fractions.GRID.index(fractions.CAUTIOUS)]
    assert np.all(np.abs(mean - expected) <= 5 * spread + 1e-6)


@pytest.mark.slow
def test_fresh_scores_need_little_and_worthless_ones_much() -> None:
    norms = problem()
    assert float(fractions.choose(learnt(norms, norms, 0.3))) == np.float32(min(fractions.GRID))
    worthless = jnp.asarray(np.random.default_rng(2).lognormal(0, 1.5, N), jnp.float32)
    assert float(fractions.choose(learnt(norms, worthless, 0.3))) == np.float32(max(fractions.GRID))


def test_nothing_seen_is_cautious() -> None:
    assert float(fractions.choose(fractions.create())) == np.float32(fractions.CAUTIOUS)
    broken = fractions.observe(
        fractions.create(), jnp.ones(2), jnp.asarray([jnp.nan, 1.0]), jnp.ones(2), jnp.ones(2, bool)
    )
    assert float(broken.steps) == 0


def test_relative_scores_by_hand() -> None:
    # q = 0.8 r/N + 0.2/N: weights 1/(N q) of r = 0, 1, 3
    relative = jnp.asarray([0.0, 1.0, 3.0])
    np.testing.assert_allclose(
        fractions.relative_scores(1 / (0.8 * relative + 0.2), jnp.float32(0.2)), relative, atol=1e-6
    )


def test_what_roundings_differ_by_is_no_evidence() -> None:
    """Where all scores are alike every share has the same moment, and the cautious share stays."""
    known = fractions.create()
    for step in range(40):
        norms = jax.random.uniform(jax.random.key(step), (8,)) + 0.5
        alike = jnp.ones(8) * (1.0 + 3e-7 * (step % 3 - 1))
        known = fractions.observe(known, jnp.ones(8), norms, alike, jnp.ones(8, bool))
    np.testing.assert_array_equal(known.excess, 0.0)
    assert float(fractions.choose(known)) == pytest.approx(fractions.CAUTIOUS)
