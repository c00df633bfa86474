import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax.sampling import calibration, proposal, samplers, score_table
from isgd_jax.sampling.calibration import Calibration
from isgd_jax.variance import second_moments

N = 4000


def norms_of(seed: int, sigma: float = 1.5) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).lognormal(0, sigma, N), jnp.float32)


@jax.jit
def learnt(scores: jax.Array, ages: jax.Array, norms: jax.Array) -> Calibration:
    """A calibration after 200 steps of 128 draws from the raw scores with a mixture of 0.3."""
    law = samplers.prepare(proposal.smooth(scores, mixture=0.3)[0])

    def step(fit: Calibration, key: jax.Array) -> tuple[Calibration, None]:
        draw = samplers.independent(key, law, num_draws=128)
        at = draw.indices
        return calibration.observe(fit, scores[at], ages[at], norms[at], 1 / (N * draw.probs)), None

    return jax.lax.scan(step, calibration.create(), jax.random.split(jax.random.key(0), 200))[0]


def second_moment(norms: jax.Array, scores: jax.Array) -> float:
    return float(second_moments.moments(norms, proposal.smooth(scores, mixture=0.1)[0]).stale)


@pytest.mark.slow
def test_worthless_scores_give_equal_predictions() -> None:
    scores, norms, ages = norms_of(0), norms_of(1, 0.5), jnp.full(N, 100, jnp.int32)
    predicted = np.asarray(calibration.predict(learnt(scores, ages, norms), scores, ages))
    usual = np.quantile(predicted, [0.02, 0.98])  # the scores themselves spread over a factor of 450 there
    assert usual[1] / usual[0] < 1.6
    assert second_moment(norms, jnp.asarray(predicted)) < 1.05 * second_moment(norms, jnp.ones(N))


@pytest.mark.slow
def test_right_scores_are_kept() -> None:
    norms, ages = norms_of(0), jnp.zeros(N, jnp.int32)
    predicted = calibration.predict(learnt(norms, ages, norms), norms, ages)
    assert second_moment(norms, predicted) < 1.03 * second_moment(norms, norms)


@pytest.mark.slow
def test_jumps_are_learnt() -> None:
    # 5 % of the examples have jumped to large norms since they were scored.
    rng = np.random.default_rng(2)
    scores, ages = norms_of(0), jnp.full(N, 200, jnp.int32)
    jumped = rng.random(N) < 0.05
    norms = jnp.where(jumped, 10.0 * jnp.asarray(rng.lognormal(0, 0.3, N), jnp.float32), scores)
    predicted = calibration.predict(learnt(scores, ages, norms), scores, ages)
    found = second_moment(norms, predicted)
    best_additive = min(second_moment(norms, scores + c) for c in (0.1, 0.3, 1.0, 3.0, 10.0))
    assert found < 0.8 * second_moment(norms, scores)
    assert found < 0.9 * second_moment(norms, jnp.ones(N))
    assert found < 1.05 * best_additive


@pytest.mark.slow
def test_ages_are_told_apart() -> None:
    # Fresh scores are right, old ones worthless: only the fresh keep their differences.
    scores, ages = norms_of(0), jnp.asarray(np.arange(N) % 2 * 500, jnp.int32)
    norms = jnp.where(ages == 0, scores, norms_of(1))
    predicted = np.log(np.asarray(calibration.predict(learnt(scores, ages, norms), scores, ages)))
    spread = [np.std(predicted[np.asarray(ages) == age]) for age in (0, 500)]
    assert spread[0] > 2.5 * spread[1]


def test_without_draws_predictions_are_the_scores() -> None:
    scores = norms_of(0)
    predicted = calibration.predict(calibration.create(), scores, jnp.zeros(N, jnp.int32))
    np.testing.assert_allclose(predicted, scores, rtol=1e-5)


@pytest.mark.slow
def test_predictions_have_a_floor() -> None:
    scores, ages = jnp.where(jnp.arange(N) < N // 2, 0.0, 1.0), jnp.zeros(N, jnp.int32)
    predicted = calibration.predict(learnt(scores, ages, scores), scores, ages)
    root_mean_square = float(jnp.sqrt(jnp.mean(jnp.square(scores))))
    assert float(jnp.min(predicted)) > 0.019 * root_mean_square


@pytest.mark.slow
def test_the_fit_forgets() -> None:
    fit = calibration.observe(calibration.create(), jnp.ones(4), jnp.zeros(4, jnp.int32), jnp.ones(4), jnp.ones(4))
    later = fit
    for _ in range(10):
        later = calibration.observe(
            later, jnp.ones(0), jnp.zeros(0, jnp.int32), jnp.ones(0), jnp.ones(0), half_life=10.0
        )
    np.testing.assert_allclose(later.weight, fit.weight / 2, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unsound_norms_and_masked_draws_are_left_out(bad: float) -> None:
    fit = calibration.observe(
        calibration.create(),
        jnp.ones(3),
        jnp.zeros(3, jnp.int32),
        jnp.asarray([bad, 1.0, 1.0]),
        jnp.ones(3),
        jnp.asarray([True, True, False]),
    )
    assert float(jnp.sum(fit.weight)) == 1.0


def test_a_calibrated_proposal_is_a_proposal() -> None:
    scores = score_table.create(N)._replace(scores=norms_of(0), versions=jnp.arange(N, dtype=jnp.int32) - 1)
    fit = learnt(norms_of(0), jnp.zeros(N, jnp.int32), norms_of(1))
    made = jax.jit(lambda t, c: proposal.propose(t, version=N, calibration=c, max_age=1000))(scores, fit)
    assert float(jnp.min(made.probs)) >= 0.1 / N
    np.testing.assert_allclose(np.sum(np.asarray(made.probs), dtype=np.float64), 1.0, rtol=1e-5)


@pytest.mark.slow
def test_the_horizon_looks_ahead() -> None:
    # Right when fresh, worthless at age 500: a law to be frozen for that long had better know at age 0.
    ages = jnp.asarray(np.arange(N) % 2 * 500, jnp.int32)
    fit = learnt(norms_of(0), ages, jnp.where(ages == 0, norms_of(0), norms_of(1)))
    scores = score_table.create(N)._replace(scores=norms_of(0), versions=jnp.zeros(N, jnp.int32))
    now, ahead = (proposal.propose(scores, version=0, calibration=fit, horizon=h).probs for h in (0, 500))
    old = proposal.propose(scores, version=500, calibration=fit).probs
    np.testing.assert_allclose(ahead, old, rtol=1e-6)
    assert float(jnp.std(ahead)) < 0.5 * float(jnp.std(now))
