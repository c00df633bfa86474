"""Points in space: the Hilbert curve is one, and quasi-random points are uniform and leave no gaps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import isgd_jax as isgd
from isgd_jax.sampling.places import along_hilbert_curve, coordinates


@pytest.mark.parametrize(("dims", "along"), [(1, 1024), (2, 32), (3, 8)])
def test_cells_in_turn_share_a_side_and_each_has_a_number_of_its_own(dims: int, along: int) -> None:
    """On a full grid the curve passes each cell once, and goes by one cell, in one direction, at a time."""
    ticks = np.arange(along)
    grid = np.stack(np.meshgrid(*[ticks] * dims, indexing="ij"), axis=-1).reshape(-1, dims)
    codes = np.asarray(along_hilbert_curve(jnp.asarray(grid, jnp.float32)))
    assert len(set(codes.tolist())) == len(grid)
    steps = np.abs(np.diff(grid[np.argsort(codes)], axis=0)).sum(axis=1)
    np.testing.assert_array_equal(steps, 1)


@pytest.mark.slow
def test_points_with_one_place_many_coordinates_and_none() -> None:
    assert along_hilbert_curve(jnp.ones((3, 2))).tolist() == [0, 0, 0]  # a box without size
    many = along_hilbert_curve(jax.random.normal(jax.random.key(0), (5, 40)))
    assert many.dtype == jnp.int32
    assert int(many.min()) >= 0
    assert coordinates(jax.random.split(jax.random.key(0), 4)) is None
    both = coordinates({"x": jnp.zeros((4, 2, 2)), "y": jnp.ones(4, jnp.int32)})
    assert both is not None
    assert both.shape == (4, 5)


def test_quasi_random_points_are_uniform_each_and_evenly_spread_together() -> None:
    """Over 4,000 starts the last of 500 points has mean 1/2 and variance 1/12, within 4 standard errors; the mean of
    x y over 500 points has less than a tenth of the variance that independent points have."""
    keys = jax.random.split(jax.random.key(3), 4_000)
    points = np.asarray(jax.vmap(lambda key: isgd.quasi_random(key, 500, 2))(keys), np.float64)
    last = points[:, -1]
    assert np.all(np.abs(last.mean(axis=0) - 0.5) < 4 * np.sqrt(1 / 12 / 4_000))
    assert np.all(np.abs(last.var(axis=0) - 1 / 12) < 4 * np.sqrt(1 / 180 / 4_000))
    products = points.prod(axis=-1).mean(axis=-1)
    independent = (1 / 9 - 1 / 16) / 500
    assert abs(products.mean() - 0.25) < 4 * np.sqrt(independent / 10 / 4_000)
    assert products.var() < independent / 10
    assert points.min() >= 0.0
    assert points.max() < 1.0


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="dims"):
        isgd.quasi_random(jax.random.key(0), 5, 0)
    with pytest.raises(ValueError, match="count"):
        isgd.quasi_random(jax.random.key(0), 0, 2)


@pytest.mark.slow
def test_draws_from_a_pool_along_the_curve_have_less_variance_than_by_score() -> None:
    """Of f(x, y) = x + y with equal scores, 64 draws: strata of space leave below a tenth of the variance; the mean is
    the pool's within 4 standard errors, at first and after points were redrawn."""

    def made(order: str) -> tuple[float, float, float]:
        pool = isgd.pool_sampler(
            lambda key, count: isgd.quasi_random(key, count, 2), num_points=512, batch_size=64, redraw=0.5,
            order=order, monitor=False, gate=False, calibrate=False,
        )  # fmt: skip
        state = pool.init(jax.random.key(0))
        state = jax.jit(lambda s: pool.refresh(s, score=lambda at: jnp.ones(len(at))))(state)

        def estimate(key: jax.Array) -> jax.Array:
            draw = pool.sample(key, state)
            return jnp.sum(draw.target / draw.probs * jnp.sum(pool.take(state, draw), axis=1)) / 64

        found = np.asarray(jax.jit(jax.vmap(estimate))(jax.random.split(jax.random.key(1), 500)), np.float64)
        return found.mean(), found.var(), float(jnp.mean(jnp.sum(state.points, axis=1)))

    mean, by_place, truth = made("place")
    assert abs(mean - truth) < 4 * np.sqrt(by_place / 500) + 1e-6
    assert by_place < made("index")[1] / 10
