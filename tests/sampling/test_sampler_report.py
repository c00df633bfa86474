"""What a state tells: each number against brute force over all examples, and the table that is printed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import isgd_jax as isgd

N, M, STEPS = 200, 8, 400
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(N, 3)) * RNG.lognormal(0.0, 1.0, N)[:, None] + 0.6
NORMS, MEAN = np.linalg.norm(VECTORS, axis=1), VECTORS.mean(axis=0)


@pytest.fixture(scope="module")
def watched() -> Any:
    """A sampler with exact scores that stay, after 400 steps of gradients that stay."""
    sampler = isgd.fixed(NORMS, batch_size=M, uniform_fraction=0.2, sampler="independent")
    table = jnp.asarray(VECTORS, jnp.float32)

    def step(state: Any, key: Any) -> Any:
        draw = sampler.sample(key, state)
        return sampler.observe(state, draw, {"w": table[draw.indices]}), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    return sampler, jax.jit(lambda state: jax.lax.scan(step, state, keys)[0])(sampler.init())


@pytest.mark.slow
def test_variances_against_all_examples(watched: Any) -> None:
    sampler, state = watched
    found, square = sampler.report(state).variance, MEAN @ MEAN
    probs = 0.8 * NORMS / NORMS.sum() + 0.2 / N
    truths = {
        "uniform": np.mean(NORMS**2) - square,
        "stale": np.sum(NORMS**2 / probs) / N**2 - square,
        "ideal": NORMS.mean() ** 2 - square,
        "drawn": np.sum(NORMS**2 / probs) / N**2 - square,  # independent draws: that of one
        "mean_grad_norm_sq": square,
    }
    for name, truth in truths.items():
        value, low, high = (float(x) for x in getattr(found, name))
        assert low < value < high
        assert abs(value - truth) < 2.0 * (high - low) / 2, (name, value, truth)  # twice a 95 % band: four errors
    assert float(found.uniform.value) == pytest.approx(truths["uniform"], rel=0.25)
    assert float(found.stale.value) == pytest.approx(truths["stale"], rel=0.25)


def test_what_batches_are_worth_follows_from_the_variances(watched: Any) -> None:
    sampler, state = watched
    report = sampler.report(state)
    found = report.variance
    np.testing.assert_allclose(report.equivalent_batch, M * found.uniform.value / found.drawn.value, rtol=1e-6)
    np.testing.assert_allclose(report.noise_scale, found.uniform.value / found.mean_grad_norm_sq.value, rtol=1e-6)
    assert int(report.num_measured) == STEPS // 4


def test_the_share_of_the_top_percent_is_that_of_the_proposal(watched: Any) -> None:
    sampler, state = watched
    probs = np.sort(0.8 * NORMS / NORMS.sum() + 0.2 / N)
    assert float(sampler.report(state).top_share) == pytest.approx(probs[-2:].sum(), rel=1e-5)


@pytest.mark.slow
def test_shares_and_ages_of_scores() -> None:
    sampler = isgd.importance_sampler(N, batch_size=M, max_age=4)
    state = sampler.record(sampler.init(), np.arange(40), np.ones(40, np.float32), version=1)
    state = sampler.record(state, np.arange(40, 100), np.ones(60, np.float32), version=5)
    state = sampler.refresh(state._replace(clock=state.clock._replace(version=jnp.int32(7))))
    report = sampler.report(state)
    assert float(report.scores.known_share) == pytest.approx(0.5)
    assert float(report.scores.trusted_share) == pytest.approx(0.3)
    assert float(report.scores.mean_age) == pytest.approx((40 * 6 + 60 * 2) / 100)
    assert (int(report.version), bool(report.gate_is_open)) == (7, True)
    text = str(report)
    for said in ("examples scored", "50.0 %", "30.0 %", "3.6 updates", "open"):
        assert said in text


@pytest.mark.slow
def test_before_anything_is_known_it_says_so_and_nothing_is_nan() -> None:
    for sampler in (
        isgd.importance_sampler(N, batch_size=M),
        isgd.importance_sampler(N, batch_size=M, monitor=False),
        isgd.shuffled_epochs(N, batch_size=M),
    ):
        report = sampler.report(sampler.init())
        assert (float(report.equivalent_batch), float(report.noise_scale), float(report.scores.mean_age)) == (
            0.0,
            0.0,
            0.0,
        )
        assert float(report.top_share) == pytest.approx(0.01, rel=1e-5)
        assert not any(np.any(np.isnan(x)) for x in jax.tree.leaves(report))
        assert ("second moments" in str(report)) == (report.variance is not None)


def test_the_table_is_two_columns_of_at_most_100(watched: Any) -> None:
    sampler, state = watched
    huge = state._replace(clock=state.clock._replace(version=jnp.int32(2**31 - 1)), quarantined=jnp.int32(2**31 - 1))
    for one in (state, huge, sampler.init()):
        lines = str(sampler.report(one)).splitlines()
        assert max(map(len, lines)) <= 100
        start = {len(line) - len(line[line.index("  ") :].lstrip()) for line in lines}
        assert len(start) == 1, "all values begin in one column"


def test_the_report_is_arrays_inside_jit_too(watched: Any) -> None:
    sampler, state = watched
    inside, outside = jax.jit(sampler.report)(state), sampler.report(state)
    for one, other in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
