"""Pools of a continuous domain: unbiased for the integral, redrawn in turn, new points scored by their neighbors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_problem import jitted

import isgd_jax as isgd
from isgd_jax.sampling import score_table
from isgd_jax.sampling.pool import grid_cells

N, M = 64, 8


def line(key: jax.Array, count: int) -> jax.Array:
    return jax.random.uniform(key, (count,))


def make(**options: Any) -> isgd.PoolSampler:
    settings: dict[str, Any] = {"num_points": N, "batch_size": M, "monitor": False}
    return isgd.pool_sampler(line, **settings | options)


@pytest.mark.parametrize("sampler", ["stratified", "independent"])
def test_the_estimate_is_unbiased_for_the_integral_with_stale_scores_and_redraws(sampler: Any) -> None:
    """The mean of x² over [0, 1] is 1/3: 3,000 runs of 12 steps with three refreshes, within 4 standard errors.

    Scores x⁴ with noise, up to three steps old. The standard error is a hundredth of what is estimated: a pool of which
    each refresh replaces the least scored would be found out.
    """
    pool = make(sampler=sampler, redraw=0.25, calibrate=False, gate=False)

    def run(key: jax.Array) -> jax.Array:
        start, noise_key = jax.random.split(key)

        def step(state: isgd.PoolState, at: jax.Array) -> tuple[isgd.PoolState, jax.Array]:
            step_key = jax.random.fold_in(noise_key, at)
            draw = pool.sample(step_key, state)
            x = pool.take(state, draw)
            noise = jax.random.uniform(jax.random.fold_in(step_key, 1), x.shape, minval=0.5, maxval=2.0)
            state = pool.observe(state, draw, norms=noise * x**4 + 0.01)
            state = jax.lax.cond(at % 3 == 2, pool.refresh, lambda s: s, state)
            return state, jnp.mean(draw.target / draw.probs * x**2)

        return jnp.mean(jax.lax.scan(step, pool.init(start), jnp.arange(12, dtype=jnp.int32))[1][6:])

    found = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 3_000)), np.float64)
    error = found.std(ddof=1) / len(found) ** 0.5
    assert error < 0.01 / 3
    assert abs(found.mean() - 1 / 3) < 4 * error


@pytest.mark.slow
def test_points_are_redrawn_in_turn_and_all_of_them_in_time() -> None:
    pool = jitted(make(redraw=0.3))  # 20 of 64, so the turn comes round within a refresh
    state, refresh = pool.init(jax.random.key(0)), pool.refresh
    first = np.asarray(state.points)
    for turn in (0, 20, 40, 60):
        before, state = state, refresh(state, jax.random.key(turn))
        redrawn = np.flatnonzero(np.asarray(before.points) != np.asarray(state.points))
        assert set(redrawn) == {(turn + i) % N for i in range(20)}
    assert int(state.turn) == 16
    assert not np.any(np.asarray(state.points) == first)


@pytest.mark.slow
def test_two_refreshes_in_a_row_draw_other_points() -> None:
    pool = jitted(make(redraw=0.5))
    state = pool.refresh(pool.refresh(pool.init(jax.random.key(0))))
    assert len(np.unique(np.asarray(state.points))) == N
    key = jax.random.key(1)
    state = pool.refresh(pool.refresh(pool.init(key), key), key)
    assert len(np.unique(np.asarray(state.points))) == N


@pytest.mark.slow
def test_a_new_point_begins_with_the_mean_score_of_its_cell_or_of_all() -> None:
    """Two cells, left and right of a half; the left has scores, the right none."""
    pool = jitted(make(redraw=0.25, cells=lambda x: (x > 0.5).astype(jnp.int32)))
    state = pool.init(jax.random.key(0))
    left = np.flatnonzero(np.asarray(state.points) <= 0.5)
    left = left[left >= 16]  # the first quarter goes
    scores = jnp.arange(1.0, len(left) + 1.0)
    state = pool.record(state, jnp.asarray(left), scores, version=0)
    after = pool.refresh(state, jax.random.key(1))
    np.testing.assert_allclose(after.sampler.table.scores[:16], np.mean(scores), rtol=1e-6)
    assert set(np.asarray(after.sampler.table.versions[:16]).tolist()) == {0}

    right = int(np.flatnonzero(np.asarray(state.points[16:]) > 0.5)[0]) + 16
    state = pool.record(state, jnp.asarray([right]), jnp.asarray([100.0]), version=0)
    after = pool.refresh(state, jax.random.key(1))
    expected = np.where(np.asarray(after.points[:16]) > 0.5, 100.0, np.mean(scores))
    np.testing.assert_allclose(after.sampler.table.scores[:16], expected, rtol=1e-6)


def test_what_was_known_of_a_point_goes_with_it_and_nothing_is_guessed_from_nothing() -> None:
    pool = jitted(make(redraw=0.5))
    state = pool.record(pool.init(jax.random.key(0)), jnp.asarray([3]), jnp.asarray([9.0]), version=0)
    after = pool.refresh(state)  # the only measured point goes
    assert set(np.asarray(after.sampler.table.versions).tolist()) == {score_table.NEVER}
    assert bool(after.sampler.proposal.is_uniform)


def test_new_points_can_be_scored_by_something_cheap() -> None:
    pool = make(redraw=0.5)
    after = jax.jit(lambda key: pool.refresh(pool.init(key), score=lambda x: 2.0 * x))(jax.random.key(0))
    np.testing.assert_allclose(after.sampler.table.scores[:32], 2.0 * after.points[:32])
    assert set(np.asarray(after.sampler.table.versions[32:]).tolist()) == {score_table.NEVER}


@pytest.mark.slow
def test_terms_with_a_pool_each_train_in_one_program_with_the_state_donated() -> None:
    """u' = 1 on [0, 1] with u(0) = 0 by u = a x + b: interior and boundary, 200 steps, one compilation."""
    inside = make(batch_size=8, redraw=0.2, monitor=True)
    border = isgd.pool_sampler(lambda key, count: jnp.zeros(count), num_points=4, batch_size=2, redraw=0.5)

    def equation(params: Any, x: Any) -> Any:
        return (jax.grad(lambda x: params["a"] * x + params["b"])(x) - 1.0) ** 2

    def at_zero(params: Any, x: Any) -> Any:
        return (params["a"] * x + params["b"]) ** 2

    def step(carry: Any, key: Any) -> Any:
        params, states = carry
        total, after = jax.tree.map(jnp.zeros_like, params), {}
        terms = (("inside", inside, equation), ("border", border, at_zero))
        for i, (name, pool, loss_fn) in enumerate(terms):
            draw = pool.sample(jax.random.fold_in(key, i), states[name])
            grads = isgd.per_example_grads(loss_fn)(params, pool.take(states[name], draw))
            mean = isgd.weighted_mean(grads, draw.target / draw.probs)
            total = jax.tree.map(jnp.add, total, mean)
            after[name] = pool.observe(states[name], draw, grads)
        return (jax.tree.map(lambda p, g: p - 0.1 * g, params, total), after), None

    @jax.jit
    def block(carry: Any, keys: Any) -> Any:
        return jax.lax.scan(step, carry, keys)[0]

    refresh = jax.jit(
        lambda states: {"inside": inside.refresh(states["inside"]), "border": border.refresh(states["border"])}
    )
    keys = jax.random.split(jax.random.key(0))
    carry = (
        {"a": jnp.float32(0.0), "b": jnp.float32(1.0)},
        jax.jit(lambda one, two: {"inside": inside.init(one), "border": border.init(two)})(*keys),
    )
    for i in range(10):
        params, states = block(carry, jax.random.split(jax.random.key(i), 20))
        carry = (params, refresh(states))
    assert block._cache_size() == refresh._cache_size() == 1
    assert abs(float(params["a"]) - 1.0) < 1e-3
    assert abs(float(params["b"])) < 1e-3
    assert int(jax.jit(inside.report)(states["inside"]).num_measured) > 0


@pytest.mark.slow
def test_the_share_that_is_redrawn_is_the_share_that_was_asked_for() -> None:
    for share, count in ((0.07, 7), (0.55, 55), (0.301, 31), (1.0, 100)):
        pool = isgd.pool_sampler(line, num_points=100, batch_size=M, redraw=share)
        assert int(jax.jit(lambda key, pool=pool: pool.refresh(pool.init(key)).turn)(jax.random.key(0))) == count % 100


@pytest.mark.slow
def test_points_of_the_callers_own_survive_a_donated_state_and_keys_are_no_coordinates() -> None:
    grid, keys = jnp.linspace(0.0, 1.0, N), jax.random.split(jax.random.key(0), N)
    pool = isgd.pool_sampler(
        lambda key, count: {"x": grid[:count], "again": grid[:count], "key": keys[:count]}, num_points=N, batch_size=M
    )
    state = jax.jit(pool.refresh, donate_argnums=0)(pool.init(jax.random.key(0)))
    assert not grid.is_deleted()
    np.testing.assert_array_equal(state.points["x"], state.points["again"])


@pytest.mark.slow
def test_scores_distrusted_by_the_clock_are_no_hindrance_to_a_redraw() -> None:
    pool = jitted(make(max_age_seconds=5.0))
    state = pool.init(jax.random.key(0))
    draw = pool.sample(jax.random.key(1), state)
    state = pool.refresh(pool.observe(state, draw, norms=jnp.ones(M), seconds=3.0))
    assert float(jnp.max(state.sampler.table.seconds)) == 3.0


def test_cells_of_the_grid_hold_neighbors_and_their_numbers_are_below_n() -> None:
    points = {
        "x": jax.random.uniform(jax.random.key(0), (2_000, 2)),
        "t": jax.random.uniform(jax.random.key(1), (2_000,)),
    }
    at = np.asarray(jax.jit(grid_cells)(points))
    assert at.min() >= 0
    assert at.max() < 2_000
    coordinates = np.column_stack([np.asarray(points["x"]), np.asarray(points["t"])])
    spread = max(np.ptp(coordinates[at == cell], axis=0).max() for cell in np.unique(at))
    assert spread <= 1 / 3 + 1e-6  # (2000 / 32)^(1/3) = 3.9: three cells along each axis
    assert np.all(np.asarray(grid_cells(jnp.zeros((40, 3)))) == 0)
    wide = np.asarray(grid_cells(jax.random.uniform(jax.random.key(2), (100, 50))))
    assert wide.max() < 100


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"redraw": 1.5}, "redraw is the share of the pool"),
        ({"num_points": 0}, "num_examples must be 1 or more, got 0"),
        ({"example_weights": np.ones(N)}, "example_weights belong to given examples"),
        ({"order": np.arange(N)}, "it orders given examples"),
    ],
)
def test_what_fits_no_pool_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make(**options)


def test_points_of_another_number_are_refused() -> None:
    pool = isgd.pool_sampler(lambda key, count: jnp.zeros(count + 1), num_points=N, batch_size=M)
    with pytest.raises(ValueError, match=r"draw_points\(key, 64\) must return arrays with leading axis 64"):
        pool.init(jax.random.key(0))
