"""Recipes: lazy gradients, reweighted, in the optimisers people use; each against the same with stacked gradients."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import isgd_jax as isgd

N, M = 50, 6
PROBS = jnp.linspace(0.01, 0.05, M)


def loss_fn(params, example):
    hidden = jnp.tanh(example["x"] @ params["w"] + params["b"])
    return jnp.sum(jnp.square(hidden @ params["v"] - example["y"]))


def problem(key):
    keys = jax.random.split(key, 4)
    params = {"w": jax.random.normal(keys[0], (4, 5)), "b": jnp.zeros(5), "v": jax.random.normal(keys[1], (5, 2))}
    return params, {"x": jax.random.normal(keys[2], (M, 4)), "y": jax.random.normal(keys[3], (M, 2))}


def mask_of(params):
    return jax.tree.map(lambda x: x.ndim > 1, params)


def labels_of(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)


MASK = {"w": True, "b": False, "v": True}
LABELS = {"w": "matrix", "b": "vector", "v": "matrix"}


def reweighted(*rest):
    return optax.chain(isgd.importance_weighting(N), *rest)


@optax.inject_hyperparams
def injected(learning_rate):
    return reweighted(optax.sgd(learning_rate))


OPTIMISERS = {
    "sgd": reweighted(optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "clipping": reweighted(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    "adam": reweighted(optax.adam(0.1)),
    "decoupled weight decay": reweighted(optax.adamw(0.1, weight_decay=0.1)),
    "inject_hyperparams outside": injected(learning_rate=0.1),
    "inject_hyperparams inside": reweighted(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)),
    "masked": reweighted(optax.masked(optax.add_decayed_weights(0.1), mask_of), optax.sgd(0.1)),
    "masked outside": optax.masked(isgd.importance_weighting(N), MASK),  # a tree: a function would see lazy leaves
    "multi_transform": reweighted(
        optax.multi_transform({"matrix": optax.sgd(0.1), "vector": optax.adam(0.1)}, labels_of)
    ),
    "multi_transform outside": optax.multi_transform(
        {"matrix": reweighted(optax.sgd(0.1)), "vector": reweighted(optax.sgd(0.2))}, LABELS
    ),
    "MultiSteps inside": reweighted(optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation()),
    "apply_if_finite inside": reweighted(optax.apply_if_finite(optax.sgd(0.1), 3)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMISERS)
def test_lazy_gradients_update_as_stacked_ones_do(name, key):
    tx, (params, batch) = OPTIMISERS[name], problem(key)
    if name == "masked outside":  # what the mask leaves out stays per example
        tx = optax.chain(tx, optax.stateless(lambda g, _: {**g, "b": jnp.mean(g["b"], axis=0)}))

    def steps(grads_fn, params):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads_fn(loss_fn)(params, batch), state, params, probs=PROBS)
            params = optax.apply_updates(params, updates)
        return params

    with jax.numpy_dtype_promotion("standard"):  # Optax's own
        lazy = jax.jit(lambda p: steps(isgd.per_example_grads, p))(params)
        stacked = jax.jit(lambda p: steps(isgd.stacked_per_example_grads, p))(params)
    chex.assert_trees_all_close(lazy, stacked, rtol=1e-4, atol=1e-5)
    assert not np.allclose(lazy["w"], params["w"])


@pytest.mark.parametrize("wrapper", ["MultiSteps", "apply_if_finite"])
def test_the_reweighting_stands_outside_wrappers_that_look_at_gradients(wrapper, key):
    """The trap: these see per-example gradients, and fail; not silently."""
    wrapped = {
        "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
        "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    }[wrapper](reweighted(optax.sgd(0.1)))
    params, batch = problem(key)
    grads = isgd.per_example_grads(loss_fn)(params, batch)
    with pytest.raises((TypeError, ValueError)):
        jax.block_until_ready(wrapped.update(grads, wrapped.init(params), params, probs=PROBS))


def test_flax_train_state_drops_probs_so_update_by_hand(key):
    params, batch = problem(key)
    state = TrainState.create(apply_fn=nn.Dense(1).apply, params=params, tx=reweighted(optax.sgd(0.1)))

    @jax.jit
    def step(state, batch, probs):
        grads = isgd.per_example_grads(loss_fn)(state.params, batch)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, probs=probs)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    expected = expected_sgd(params, batch)
    chex.assert_trees_all_close(step(state, batch, PROBS).params, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="probs"):
        state.apply_gradients(grads=isgd.per_example_grads(loss_fn)(params, batch))


def test_nnx_optimizer_takes_probs(key):
    batch = {"x": jax.random.normal(key, (M, 4)), "y": jnp.ones((M, 2))}
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, reweighted(optax.sgd(0.1)), wrt=nnx.Param)
    graph, params = nnx.split(model, nnx.Param)

    def nnx_loss(params, example):
        return jnp.sum(jnp.square(nnx.merge(graph, params)(example["x"]) - example["y"]))

    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    grads = isgd.per_example_grads(nnx_loss)(params, batch)
    mean = isgd.weighted_mean(isgd.stacked_per_example_grads(nnx_loss)(params, batch), 1 / (N * PROBS))
    optimizer.update(model, grads, probs=PROBS)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, before, nnx.to_pure_dict(mean))
    chex.assert_trees_all_close(nnx.to_pure_dict(nnx.state(model, nnx.Param)), expected, rtol=1e-4, atol=1e-5)


def expected_sgd(params, batch):
    stacked = isgd.stacked_per_example_grads(loss_fn)(params, batch)
    weights = 1 / (N * PROBS)
    return jax.tree.map(lambda p, g: p - 0.1 * jnp.tensordot(weights, g, 1) / M, params, stacked)
