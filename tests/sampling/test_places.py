"""Quasi-random points are uniform, leave no gaps, and go on."""

import jax
import numpy as np
import pytest
from sampling_problem import unchecked

import isgd_jax as isgd


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
    with unchecked(), pytest.raises(TypeError, match=r"first must be a whole number, got 1\.5"):
        isgd.quasi_random(jax.random.key(0), 5, 2, first=1.5)
    with unchecked(), pytest.raises(ValueError, match="first must be one whole number, got an array of shape"):
        isgd.quasi_random(jax.random.key(0), 5, 2, first=jax.numpy.arange(5))


def test_parts_of_a_sequence_are_the_sequence() -> None:
    whole = np.asarray(isgd.quasi_random(jax.random.key(0), 12, 3))
    parts = [isgd.quasi_random(jax.random.key(0), 4, 3, first=first) for first in (0, 4, 8)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    late = isgd.quasi_random(jax.random.key(0), 12, 3, first=2**32 * 5)
    np.testing.assert_array_equal(late, whole)  # it repeats itself after 2^32 points
    near = isgd.quasi_random(jax.random.key(0), 4, 3, first=2**31 - 2)
    traced = jax.jit(lambda first: isgd.quasi_random(jax.random.key(0), 4, 3, first=first))(2**31 - 2)
    np.testing.assert_array_equal(near, traced)
