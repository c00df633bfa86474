import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax import reweight
from isgd_jax.sampling import candidates


@pytest.fixture(scope="module")
def grads() -> jax.Array:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(64, 3)) * rng.lognormal(0, 1, (64, 1)), jnp.float32)


@pytest.mark.parametrize("kind", ["norms", "worthless", "zeros"])
def test_the_mean_is_that_of_the_candidates(grads: jax.Array, kind: str) -> None:
    # Within 4 standard errors of 10,000 batches, in each of 3 coordinates.
    norms = jnp.linalg.norm(grads, axis=1)
    scores = {"norms": norms, "worthless": 1.0 / norms, "zeros": jnp.zeros(64)}[kind]
    tx = reweight.importance_weighting(64)

    def one(key: jax.Array) -> jax.Array:
        draw = candidates.resample(key, scores, num_draws=8)
        return tx.update(grads[draw.indices], tx.init(None), probs=draw.probs)[0]

    found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 10_000)), np.float64)
    error = found.std(axis=0) / 100
    assert np.all(np.abs(found.mean(axis=0) - np.asarray(jnp.mean(grads, axis=0))) < 4 * error)


def test_equal_scores_promise_nothing() -> None:
    assert float(candidates.speedup(jnp.full(10, 3.0))) == pytest.approx(1.0)
    assert float(candidates.speedup(jnp.zeros(10))) == 1.0
    assert not bool(candidates.pays(jnp.float32(1.0), candidates=5))


def test_speedup_by_hand() -> None:
    assert float(candidates.speedup(jnp.asarray([1.0, 3.0]))) == pytest.approx(5.0 / 4.0)
    one_in_ten = candidates.speedup(jnp.zeros(640).at[::10].set(1.0))  # 10: 10 * 3 * 128 > 640 + 3 * 128
    assert float(one_in_ten) == pytest.approx(10.0)
    assert bool(candidates.pays(one_in_ten, candidates=5))
    tiny, huge = (candidates.speedup(jnp.asarray(np.float32([scale, 3 * scale]))) for scale in (1e-40, 1e38))
    assert [float(tiny), float(huge)] == [pytest.approx(1.25, rel=1e-5)] * 2  # 1e-40 has 17 bits


@pytest.mark.slow
def test_a_score_that_is_none_says_nothing() -> None:
    bad = jnp.asarray([1.0, -2.0, jnp.nan, 3.0, jnp.inf])
    assert float(candidates.speedup(bad)) == pytest.approx(5.0 / 4.0)
    with pytest.warns(UserWarning, match="3 of 5 scores are negative or not finite, the first at 1"):
        draw = candidates.resample(jax.random.key(0), bad, num_draws=200)
    share = np.bincount(np.asarray(draw.indices), minlength=5) / 200
    np.testing.assert_allclose(share, 0.9 * np.asarray([1.0, 2.0, 2.0, 3.0, 2.0]) / 10 + 0.02, atol=0.011)
