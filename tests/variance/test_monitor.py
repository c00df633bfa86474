"""Windows, the monitor and the gate: estimates from drawn batches against what all the data say."""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax.sampling import proposal, samplers
from isgd_jax.types import Draw
from isgd_jax.variance import gate, monitor, rolling, second_moments

N, DRAWS = 500, 32


@pytest.fixture(scope="module")
def grads() -> jax.Array:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(N, 3)) * rng.lognormal(0, 0.7, (N, 1)) + 0.3, jnp.float32)


@pytest.fixture(scope="module")
def probs(grads: jax.Array) -> jax.Array:
    noise = jnp.asarray(np.random.default_rng(1).lognormal(0, 0.5, N), jnp.float32)
    return proposal.smooth(jnp.linalg.norm(grads, axis=1) * noise, mixture=0.1)[0]


@cache
def watched(sampler: Callable, steps: int, runs: int) -> Callable[[jax.Array, jax.Array], monitor.Report]:
    """Reports of ``runs`` windows of ``steps`` steps each; ‖mean gradient‖² by two half-batches drawn apart."""

    def step(
        probs: jax.Array, grads: jax.Array, watch: monitor.Monitor, key: jax.Array
    ) -> tuple[monitor.Monitor, None]:
        halves = [sampler(k, samplers.prepare(probs), num_draws=DRAWS // 2) for k in jax.random.split(key)]
        means = [jnp.mean(grads[d.indices] / (N * d.probs)[:, None], axis=0) for d in halves]
        draw = jax.tree.map(lambda *parts: jnp.concatenate(parts), *halves)
        norms = jnp.linalg.norm(grads[draw.indices], axis=1)
        square = jnp.vdot(*means, precision="highest")
        return monitor.observe(watch, 1 / (N * draw.probs), norms, square, draw.mask), None

    def run(probs: jax.Array, grads: jax.Array, key: jax.Array) -> monitor.Report:
        keys = jax.random.split(key, steps)
        return monitor.report(jax.lax.scan(partial(step, probs, grads), monitor.create(steps), keys)[0])

    keys = jax.random.split(jax.random.key(0), runs)
    return jax.jit(lambda probs, grads: jax.vmap(partial(run, probs, grads))(keys))


@pytest.mark.parametrize("sampler", [samplers.independent, samplers.stratified])
def test_estimates_are_unbiased_and_bands_cover(grads: jax.Array, probs: jax.Array, sampler: Callable) -> None:
    # 600 windows of 40 steps: each mean within 4 standard errors; bands for the value now cover in 92 % at least.
    found = watched(sampler, 40, 600)(probs, grads)
    norms, square = jnp.linalg.norm(grads, axis=1), float(jnp.sum(jnp.square(jnp.mean(grads, axis=0))))
    moments = second_moments.moments(norms, probs)
    truth = {
        **second_moments.trace_covariance(moments, square)._asdict(),
        "mean_grad_norm_sq": square,
        "ratio": float(moments.stale / moments.uniform),
    }
    for name, true in truth.items():
        band = getattr(found, name)
        values = np.asarray(band.value, np.float64)
        allowed = 4 * values.std() / np.sqrt(600) + (0.01 * float(true) if name == "ratio" else 0.0)
        assert abs(values.mean() - float(true)) < allowed, name
        covered = np.mean((np.asarray(band.low) < float(true)) & (float(true) < np.asarray(band.high)))
        assert covered >= 0.92, (name, covered)


observe, report = jax.jit(monitor.observe), jax.jit(monitor.report)


def test_a_step_that_is_not_finite_is_left_out() -> None:
    watch = observe(monitor.create(4), jnp.ones(3), jnp.asarray([1.0, jnp.nan, 2.0]), jnp.float32(0))
    assert int(watch.steps.seen) == 0
    watch = observe(watch, jnp.ones(3), jnp.ones(3), jnp.float32(0))
    assert float(report(watch).uniform.value) == 1.0


def test_ideal_of_one_step_is_the_square_of_its_mean_norm() -> None:
    """All norms alike: UNIFORM and IDEAL are the same, whatever was measured so far."""
    watch = monitor.create(8)
    for _ in range(3):
        watch = observe(watch, jnp.ones(4), jnp.ones(4), jnp.float32(0.5))
        found = report(watch)
        assert float(found.ideal.value) == float(found.uniform.value) == 0.5


def test_one_step_knows_no_error() -> None:
    watch = rolling.push(rolling.create(4, 1), jnp.float32(3.0))
    band = rolling.band(watch, rolling.means(watch)[0], watch.values[:, 0])
    assert (float(band.value), float(band.low), float(band.high)) == (3.0, -np.inf, np.inf)
    with pytest.raises(ValueError, match="at least 2 steps"):
        rolling.create(1, 1)


def test_a_window_forgets() -> None:
    window = rolling.create(3, 1)
    for value in range(10):
        window = rolling.push(window, jnp.float32(value))
    assert float(rolling.means(window)[0]) == 8.0


@jax.jit
def judged(scores: jax.Array, norms: jax.Array, key: jax.Array) -> tuple[gate.Gate, jax.Array]:
    """A gate after 100 steps, and whether it was open before each; it draws by what it decides."""
    proposed = proposal.smooth(scores, mixture=0.3)[0]

    def step(state: gate.Gate, key: jax.Array) -> tuple[gate.Gate, jax.Array]:
        law = jnp.where(state.is_open, proposed, 1 / N)
        draw: Draw = samplers.independent(key, law, num_draws=DRAWS)
        weights, hypothetical = 1 / (N * draw.probs), 1 / (N * proposed[draw.indices])
        after, _ = gate.observe(state, weights, hypothetical, norms[draw.indices])
        return after, state.is_open

    return jax.lax.scan(step, gate.create(), jax.random.split(key, 100))


@pytest.mark.slow
def test_the_gate_shuts_on_scores_that_hurt_and_stays_open_on_scores_that_help(grads: jax.Array) -> None:
    norms = jnp.linalg.norm(grads, axis=1)
    harmful, opened = judged(1.0 / norms, norms, jax.random.key(0))
    assert not bool(harmful.is_open)
    assert int(jnp.sum(opened)) <= 2000 // DRAWS  # within the first 2,000 draws
    helpful, opened = judged(norms, norms, jax.random.key(0))
    assert bool(helpful.is_open)
    assert bool(jnp.all(opened))


@pytest.mark.slow
def test_a_shut_gate_opens_again_when_scores_help(grads: jax.Array) -> None:
    norms = jnp.linalg.norm(grads, axis=1)
    shut = gate.create()._replace(is_open=jnp.asarray(False))
    hypothetical, look = 1 / (N * proposal.smooth(norms, mixture=0.1)[0]), jax.jit(gate.observe)
    for step in range(20):
        draw = samplers.uniform(jax.random.key(step), norms, num_draws=DRAWS)
        shut, verdict = look(shut, jnp.ones(DRAWS), hypothetical[draw.indices], norms[draw.indices])
        if bool(verdict.switched):
            break
    assert bool(shut.is_open)
    assert float(verdict.ratio.high) < 0.95


@pytest.mark.slow
def test_what_shut_the_gate_is_not_held_against_it_for_long(grads: jax.Array) -> None:
    """64 steps of harm fill its window; new scores help; eight looks later, or few more, it is open."""
    norms = jnp.linalg.norm(grads, axis=1)
    harmful, _ = judged(1.0 / norms, norms, jax.random.key(0))
    assert not bool(harmful.is_open)
    assert int(harmful.window.seen) >= 64
    hypothetical, state, looks = (
        1 / (N * proposal.smooth(norms, mixture=0.1)[0]),
        harmful._replace(looks=jnp.int32(0)),
        0,
    )
    look = jax.jit(gate.observe)
    while not bool(state.is_open):
        draw = samplers.uniform(jax.random.key(looks), norms, num_draws=DRAWS)
        state, _ = look(state, jnp.ones(DRAWS), hypothetical[draw.indices], norms[draw.indices])
        looks += 1
    assert 8 <= looks <= 12
    assert int(state.looks) == 0


@pytest.mark.slow
def test_the_reason_of_the_gate_names_the_numbers() -> None:
    band = gate.Band(jnp.float32(1.5), jnp.float32(1.2), jnp.float32(1.8))
    assert gate.reason(False, band) == "STALE/UNIFORM is 1.50 [1.20, 1.80]: the scores do harm, draws are uniform"


@pytest.mark.slow
def test_bands_widen_when_the_parameters_move() -> None:
    # The same noise of draws, on norms that stand still and on norms that fall by a half within the window.
    rng = np.random.default_rng(0)

    def half_width(start: float) -> float:
        watch = monitor.create(40)
        for scale in np.linspace(start, 1.0, 40):
            norms = jnp.asarray(scale * rng.lognormal(0, 0.1, DRAWS), jnp.float32)
            watch = observe(watch, jnp.ones(DRAWS), norms, jnp.float32(0.0))
        found = report(watch).uniform
        assert float(found.low) < np.exp(2 * 0.1**2) < float(found.high)  # the mean square now
        return float(found.high - found.value)

    assert half_width(2.0) > 5 * half_width(1.0)
