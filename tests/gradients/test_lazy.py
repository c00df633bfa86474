"""The free functions on plain stacked arrays and on factors made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import isgd_jax as isgd
from isgd_jax.gradients.leaf import Factored
from isgd_jax.gradients.terms import Outer


def test_plain_stacked_arrays_are_leaves_too():
    grads = {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]]), "b": jnp.array([4.0, 0.0])}
    np.testing.assert_allclose(isgd.norms(grads), [5, 1])
    np.testing.assert_allclose(isgd.gram(grads), [[25, 0], [0, 1]])
    np.testing.assert_allclose(isgd.inner(grads, {"w": jnp.array([1.0, 2.0]), "b": jnp.float32(1)}), [7, 2])
    mean = isgd.weighted_mean(grads, jnp.array([2.0, 4.0]))
    np.testing.assert_allclose(mean["w"], [3, 2])
    np.testing.assert_allclose(mean["b"], 4)
    assert isgd.stack(grads)["w"] is grads["w"]


@pytest.mark.slow
def test_an_outer_is_laid_out_as_its_axes_say(key):
    left, right = jax.random.normal(key, (2, 3, 4, 5)), jax.random.normal(key, (2, 3, 4, 6))
    leaf = Factored((Outer(left, right, ((2, "o"), (3, "k"), (5, "i"), (3, "o"))),), (6, 5, 3), jnp.float32)
    expected = jnp.einsum("bkti,bktpq->bpkiq", left, right.reshape(2, 3, 4, 2, 3)).reshape(2, 6, 5, 3)
    np.testing.assert_allclose(isgd.stack(leaf), expected, rtol=1e-5)
    np.testing.assert_allclose(isgd.norms(leaf), jnp.linalg.norm(expected.reshape(2, -1), axis=1), rtol=1e-6)


def test_weights_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        isgd.weighted_mean(jnp.ones((2, 4)), jnp.ones(3))


def test_a_tree_without_leaves_is_refused():
    with pytest.raises(ValueError, match="no leaves"):
        isgd.norms({})


@pytest.mark.parametrize(("x", "slope", "scale"), [(1e-35, 1.0, 1.0), (1e-35, 1.0, 1e34), (1e35, 1e-30, 1.0)])
def test_scaled_norms_of_one_row_are_right_near_the_ends_of_float32(x, slope, scale):
    grads = isgd.per_example_grads(lambda p, e: slope * jnp.sum(e @ p))(jnp.zeros((3, 2)), jnp.full((2, 3), x))
    found = jax.jit(isgd.gradients.lazy.scaled_norms)(grads, jnp.full((3, 2), scale))
    np.testing.assert_allclose(found, [np.sqrt(6.0) * x * slope * scale] * 2, rtol=1e-6)


def test_scaled_norms_weigh_groups_of_one_row_by_their_sizes(key):
    """Two matrices side by side, of which one example sees the second 1e-5 times as large."""
    x = jax.random.normal(key, (3, 2, 4)) * jnp.array([1.0, 1e-5])[None, :, None]
    scale = jax.random.uniform(jax.random.fold_in(key, 1), (2, 4, 5))
    grads = isgd.per_example_grads(lambda p, e: jnp.sum(jnp.sin(jnp.einsum("ki,kio->ko", e, p))))(
        jnp.zeros_like(scale), x
    )
    formed = np.asarray(isgd.stack(grads) * scale[None], np.float64)
    np.testing.assert_allclose(
        isgd.gradients.lazy.scaled_norms(grads, scale), np.sqrt(np.sum(formed**2, axis=(1, 2, 3))), rtol=1e-6
    )
