import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax import calibration, rescoring, table

N = 64


def taught() -> calibration.Calibration:
    """Scores near 1 stay what they were; scores near 16 are worth nothing certain once they are old."""
    rng, fit = np.random.default_rng(0), calibration.create()
    for _ in range(200):
        scores = jnp.asarray(np.repeat([1.0, 16.0], 32), jnp.float32)
        ages = jnp.asarray(rng.choice([1, 100], N), jnp.int32)
        wild = scores * jnp.where((scores > 4) & (ages > 10), jnp.asarray(rng.lognormal(0, 1.5, N), jnp.float32), 1.0)
        fit = calibration.observe(fit, scores, ages, wild, jnp.ones(N))
    return fit


def scored(scores: np.ndarray, versions: np.ndarray) -> table.ScoreTable:
    return table.ScoreTable(jnp.asarray(scores, jnp.float32), jnp.asarray(versions, jnp.int32), jnp.zeros(N))


@pytest.mark.slow
def test_spread_is_learnt_by_score_and_age() -> None:
    found = calibration.spread(taught(), jnp.asarray([1.0, 1.0, 16.0, 16.0]), jnp.asarray([1, 100, 1, 100]))
    expected = 1 - np.exp(-0.5 * 1.5**2)  # of a log-normal: 1 - E/sqrt(E of the square)
    np.testing.assert_allclose(found, [0, 0, 0, expected], atol=0.1)


def test_what_has_lost_most_comes_first() -> None:
    scores, versions = np.repeat([1.0, 16.0], 32), np.tile([99, 0], 32)
    found = np.asarray(rescoring.lost(scored(scores, versions), taught(), 100, horizon=1))
    assert set(np.argsort(-found)[:16]) == {i for i in range(32, N) if i % 2}


def test_never_scored_comes_before_all() -> None:
    versions = np.zeros(N)
    versions[7] = table.NEVER
    found = np.asarray(rescoring.lost(scored(np.full(N, 16.0), versions), taught(), 100, horizon=1))
    assert np.isinf(found[7])
    assert np.isfinite(np.delete(found, 7)).all()
    assert rescoring.worst_chunks(found, chunk_size=5, count=3)[0] == 1


def test_age_alone_brings_an_example_round() -> None:
    versions = np.full(N, 90)
    versions[3] = 0
    found = rescoring.lost(scored(np.ones(N), versions), calibration.create(), 100, horizon=1)
    assert int(jnp.argmax(found)) == 3


def test_chunks_by_hand() -> None:
    assert rescoring.worst_chunks(np.array([1.0, 1, 5, 0, 3, 3, 4]), chunk_size=2, count=3) == [2, 1, 3]
