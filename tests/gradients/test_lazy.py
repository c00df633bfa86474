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
