"""Scoring a few examples at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import images, mlp, mlp_loss

from isgd_jax.engines import scorers


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_scores_are_the_same_for_any_size(key, size):
    params, batch = mlp(key, [12, 16, 5]), images(key, 7, 4, 12)
    expected = scorers.grad_norm(mlp_loss)(params, batch)
    scores = jax.jit(scorers.grad_norm(mlp_loss, microbatch_size=size))(params, batch)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.slow
def test_automatic_size_stays_within_the_memory_of_an_ordinary_gradient(key):
    def loss_fn(w, x):  # 400 x 400 products of masked weights cannot stay in factors
        return jnp.sum(jnp.sin(x @ jnp.where(w > 0, w, 0)))

    w, x = jax.random.normal(key, (400, 400)), jax.random.normal(key, (16, 3, 400))

    def temporary(function):
        return jax.jit(function).lower(w, x).compile().memory_analysis().temp_size_in_bytes

    automatic = scorers.grad_norm(loss_fn, microbatch_size="auto")
    assert temporary(automatic) < temporary(scorers.grad_norm(loss_fn)) / 4  # one at a time is the least there is
    np.testing.assert_allclose(automatic(w, x), scorers.grad_norm(loss_fn)(w, x), rtol=1e-5)


@pytest.mark.parametrize("size", [0, -1, 1.5, "all"])
def test_other_sizes_are_refused(size):
    with pytest.raises((ValueError, TypeError)):
        scorers.grad_norm(mlp_loss, microbatch_size=size)
