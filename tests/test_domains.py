"""The races on continuous domains: arms are what they say they are, and a race tells what came out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from domains import arms, problems, race

STEPS = 400


def toy() -> problems.Domain:
    """A line fitted to x^2 on [0, 1]: cheap to compile, and hard at the ends."""

    def value(params, point):
        return params[0] + params[1] * point[0]

    def residual(params, point):
        return value(params, point) - jnp.square(point[0])

    def error(params):
        return jnp.max(jnp.abs(params - jnp.array([-1 / 6, 1.0])))

    grid = np.linspace(0, 1, 5)[:, None]
    term = problems.Term(residual, lambda unit: unit, 1, 1.0, 16, 64)
    return problems.Domain(
        "toy", {"inside": term}, lambda key: jnp.zeros(2), value, error, (0.5, 0.05), grid[:, 0] ** 2, grid
    )


@pytest.fixture(autouse=True)
def _toy_is_a_problem(monkeypatch):
    made = toy()
    monkeypatch.setattr(problems, "domain", lambda name: made)
    race.programs.cache_clear()
    yield
    race.programs.cache_clear()


def mean_gradient(arm: arms.Arm, key):
    """The mean of many steps' gradients at one place, points and scores renewed as in a race."""
    params = jnp.array([0.3, -0.2])

    def step(memory, at):
        own = jax.random.fold_in(key, at)
        memory = jax.lax.cond(at % arms.REFRESH == 0, lambda: arm.refresh(params, memory, own), lambda: memory)
        gradient, memory = arm.gradient(params, memory, own, at)
        return memory, gradient

    @jax.jit
    def run(key):
        return jax.lax.scan(step, arm.init(key), jnp.arange(STEPS))[1]

    rows = np.asarray(run(key))
    return np.mean(rows, 0), np.std(rows, 0) / np.sqrt(STEPS)


@pytest.mark.parametrize("name", ["uniform", "ours", "ours_norms"])
def test_unbiased_arms_are(name):
    domain = problems.domain("toy")
    points = jnp.linspace(0, 1, 4001)[:, None]
    loss_fn = jax.vmap(problems.loss_of(domain.terms["inside"]), (None, 0))
    truth = np.asarray(jax.jit(jax.grad(lambda p: jnp.mean(loss_fn(p, points))))(jnp.array([0.3, -0.2])))
    found, noise = mean_gradient(arms.arm(name, domain), jax.random.key(1))
    assert np.all(np.abs(found - truth) < 5 * noise + 1e-3)


@pytest.mark.slow
def test_sobol_points_of_a_batch_are_spread():
    arm = arms.arm("sobol", problems.domain("toy"))
    memory = arm.init(jax.random.key(0))
    points, _ = arm.points(None, memory, jax.random.key(0), "inside", jnp.int32(3))
    assert len(np.unique(np.floor(np.asarray(points)[:, 0] * 16))) == 16  # one in each sixteenth


@pytest.mark.slow
def test_hard_points_stay_and_are_added():
    domain, params, key = problems.domain("toy"), jnp.zeros(2), jax.random.key(0)
    r3 = arms.arm("r3", domain)
    points = r3.init(key)["inside"]
    sizes = r3.size_of_residual(params, domain.terms["inside"], points)
    after = r3.learn({"inside": points}, "inside", points, sizes, key)["inside"]
    stayed = np.asarray((after == points).all(axis=1))
    np.testing.assert_array_equal(stayed, sizes > sizes.mean())
    for name, more in (("rad", 1.2), ("rar_d", 1.5)):  # |r| = x^2: its mean over drawn points rises
        arm = arms.arm(name, domain)
        drawn = arm.chosen(params, domain.terms["inside"], key, 500)
        assert np.mean(np.square(drawn)) > more / 3
    added, points = arm.refresh(params, arm.init(key), key)
    assert added == 1
    assert points["inside"].shape == (2 * 64, 1)


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # Optax's Adam needs it
def test_a_race_tunes_runs_resumes_and_tells(tmp_path, capsys):
    grid = race.Grid((0.1, 0.3), (1,), (0.02,))
    started = race.Race("toy", ("uniform", "ours"), grid, 2, tmp_path)
    started.race()
    told = capsys.readouterr().out
    assert "toy: error 0.5" in told
    assert "uniform" in told
    assert "2 of 2" in told
    cells = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")}
    assert started.planned() < race.Race("toy", ("uniform", "ours"), grid, 2, tmp_path / "other").planned()
    race.Race("toy", ("uniform", "ours"), grid, 2, tmp_path).race()
    assert capsys.readouterr().out == told
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")} == cells


def test_fastest_is_said_only_where_the_interval_is_under_one():
    def times(*values):
        return np.array(values)

    slow, fast = times(10.0, 11.0, 12.0), times(5.0, 5.4, 6.1)
    assert "fastest" in race.verdict({"uniform": slow, "ours": fast})
    # The rival with the lower median is well behind, the other near: a tie.
    two = {"low median": times(8.0, 8.4, math.inf), "near": times(5.5, 9.0, 9.0), "ours": fast}
    assert race.verdict(two).startswith("ours over near, the nearest rival")
    assert race.verdict(two).endswith("a tie")
    assert "slower" in race.verdict({"uniform": fast, "ours": slow})
    assert "a tie" in race.verdict({"uniform": times(4.0, 12.0, 8.0), "ours": times(6.0, 8.0, 9.0)})
    assert "no rival" in race.verdict({"uniform": times(math.inf, math.inf, 3.0), "ours": fast})
    record = {"curve": [(10, 1.0, 0.5), (20, 2.0, 0.04), (30, 3.0, 0.2)]}
    assert race.arrival(record, 0.05) == 2.0
    assert race.arrival(record, 0.01) == math.inf
    assert race.arrival_by_price(record, 0.05, 0.2) == 4.0
    assert race.error_at(record, 2.5) == 0.04
    assert race.error_at_price(record, 4.0, 0.2) == 0.04
    assert race.error_at_price(record, 1.0, 0.2) == math.inf
