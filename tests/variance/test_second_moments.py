import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax.variance import second_moments


@pytest.fixture
def norms() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).lognormal(0, 1, 400), jnp.float32)


def test_by_hand() -> None:
    found = second_moments.moments(jnp.asarray([1.0, 3.0]), jnp.asarray([1.0, 1.0]))
    assert [float(x) for x in found] == [5.0, 5.0, 4.0]
    traces = second_moments.trace_covariance(
        second_moments.moments(jnp.asarray([1.0, 3.0]), jnp.asarray([1.0, 2.0])), 3.0
    )
    np.testing.assert_allclose([float(x) for x in traces], [2.0, 1.5 * 2.75 - 3.0, 1.0], rtol=1e-6)


def test_stale_with_the_norms_as_scores_is_ideal(norms: jax.Array) -> None:
    found = second_moments.moments(norms, norms)
    np.testing.assert_allclose(found.stale, found.ideal, rtol=1e-6)


def test_ideal_is_least_and_scores_may_have_any_scale(norms: jax.Array) -> None:
    scores = jnp.asarray(np.random.default_rng(1).lognormal(0, 1, 400), jnp.float32)
    found = second_moments.moments(norms, scores)
    assert float(found.ideal) <= min(float(found.uniform), float(found.stale))
    np.testing.assert_allclose(second_moments.moments(norms, 1000.0 * scores).stale, found.stale, rtol=1e-5)


def test_uniform_scores_are_uniform(norms: jax.Array) -> None:
    found = second_moments.moments(norms, jnp.full(400, 7.0))
    np.testing.assert_allclose(found.stale, found.uniform, rtol=1e-6)


def test_zero_norms_cost_nothing_even_with_zero_scores() -> None:
    found = second_moments.moments(jnp.asarray([0.0, 2.0]), jnp.asarray([0.0, 1.0]))
    np.testing.assert_allclose([float(x) for x in found], [2.0, 1.0, 1.0])


def test_from_draws_is_unbiased_by_enumeration() -> None:
    # All 27 outcomes of three independent draws from three examples, each with its probability.
    norms, probs = np.array([1.0, 2.0, 5.0]), np.array([0.5, 0.3, 0.2])
    outcomes = np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3)
    chance = probs[outcomes].prod(axis=1)
    weights = jnp.asarray(1.0 / (3 * probs[outcomes]), jnp.float32)
    found = jax.vmap(second_moments.from_draws)(weights, jnp.asarray(norms[outcomes], jnp.float32))
    truth = second_moments.moments(jnp.asarray(norms, jnp.float32), jnp.asarray(probs, jnp.float32))
    for name in truth._fields:
        mean = float(chance @ np.asarray(getattr(found, name), np.float64))
        np.testing.assert_allclose(mean, float(getattr(truth, name)), rtol=1e-5, err_msg=name)


def test_mean_grad_norm_sq_is_unbiased_by_enumeration() -> None:
    grads, probs = np.array([[1.0, 0.0], [-1.0, 2.0], [3.0, 1.0]]), np.array([0.5, 0.3, 0.2])
    outcomes = np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3)
    chance = probs[outcomes].prod(axis=1)
    weights = 1.0 / (3 * probs[outcomes])
    batch = (weights[..., None] * grads[outcomes]).mean(axis=1)
    norms = np.linalg.norm(grads, axis=1)[outcomes]
    stale = jax.vmap(second_moments.from_draws)(
        jnp.asarray(weights, jnp.float32), jnp.asarray(norms, jnp.float32)
    ).stale
    found = second_moments.mean_grad_norm_sq(jnp.asarray((batch**2).sum(axis=1), jnp.float32)[0], stale[0], 3)
    assert found.shape == ()
    all_found = (3 * (batch**2).sum(axis=1) - np.asarray(stale, np.float64)) / 2
    np.testing.assert_allclose(chance @ all_found, (grads.mean(axis=0) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(float(found), all_found[0], rtol=1e-5)


def test_masked_draws_count_as_nothing() -> None:
    weights, norms = jnp.asarray([1.0, 2.0, jnp.inf]), jnp.asarray([3.0, 1.0, jnp.nan])
    masked = second_moments.from_draws(weights, norms, jnp.asarray([True, True, False]))
    np.testing.assert_allclose(masked.stale, (9.0 + 4.0) / 3, rtol=1e-6)


def test_one_draw_is_no_pair() -> None:
    with pytest.raises(ValueError, match="at least 2 draws"):
        second_moments.from_draws(jnp.ones(1), jnp.ones(1))
