"""Models of other libraries: Flax NNX and Equinox, unmodified."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import check

import isgd_jax as isgd
from isgd_jax.gradients.leaf import is_factored


class Net(nnx.Module):
    """A small convolutional net; NNX layers want a batch axis."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)
        self.dense = nnx.Linear(3 * 36, 4, rngs=rngs)

    def __call__(self, x):
        hidden = nnx.relu(self.norm(self.conv(x)))
        return self.dense(hidden.reshape(hidden.shape[0], -1))


def nnx_loss():
    graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)

    def batch_loss(params, batch):
        return jnp.mean(jnp.sin(nnx.merge(graph, params)(batch)))

    return isgd.from_batch_loss(batch_loss), params


@pytest.mark.slow
def test_nnx_with_a_loss_written_for_a_batch(key):
    loss_fn, params = nnx_loss()
    with jax.numpy_rank_promotion("allow"):
        grads = check(loss_fn, params, jax.random.normal(key, (3, 6, 6, 2)))  # an nnx.State of lazy leaves
    assert sum(map(is_factored, jax.tree.leaves(grads, is_leaf=is_factored))) == 2


@pytest.mark.slow
def test_equinox(key):
    model = eqx.nn.MLP(4, 3, width_size=5, depth=2, key=key)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(params, x):
        return jnp.sum(jnp.sin(eqx.combine(params, static)(x)))

    grads = check(loss_fn, params, jax.random.normal(key, (3, 4)))
    assert sum(map(is_factored, jax.tree.leaves(grads, is_leaf=is_factored))) == 3


def test_frozen_parameters_are_arguments_that_are_not_differentiated(key):
    def loss_fn(frozen, params, x):
        return jnp.sum(jnp.sin(x @ frozen @ params)), x[0, 0]

    frozen, params, x = jnp.ones((4, 4)), jnp.ones((4, 2)), jax.random.normal(key, (3, 6, 4))
    (losses, aux), grads = isgd.per_example_value_and_grad(loss_fn, argnums=1, has_aux=True)(frozen, params, x)
    expected = jax.vmap(lambda x: jax.value_and_grad(loss_fn, argnums=1, has_aux=True)(frozen, params, x))(x)
    np.testing.assert_allclose(losses, expected[0][0], rtol=1e-5)
    np.testing.assert_array_equal(aux, x[:, 0, 0])
    np.testing.assert_allclose(isgd.stack(grads), expected[1], rtol=1e-4)


@pytest.mark.slow
def test_several_arguments_can_be_differentiated(key):
    def loss_fn(a, b, x):
        return jnp.sum(jnp.sin(x @ a) * b)

    a, b, x = jnp.ones((4, 2)), jnp.float32(2), jax.random.normal(key, (3, 4))
    grads = isgd.per_example_grads(loss_fn, argnums=(0, 1))(a, b, x)
    expected = jax.vmap(lambda x: jax.grad(loss_fn, argnums=(0, 1))(a, b, x))(x)
    np.testing.assert_allclose(isgd.norms(grads), isgd.norms(expected), rtol=1e-5)
    assert isinstance(grads, tuple)
