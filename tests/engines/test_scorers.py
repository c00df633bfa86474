"""Scorers against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import images, mlp, mlp_loss

import isgd_jax as isgd
from isgd_jax.engines import scorers


@pytest.mark.slow
def test_grad_norm_is_the_norm_of_the_definition(key):
    params, batch = mlp(key, [12, 16, 5]), images(key, 6, 12)
    expected = isgd.norms(isgd.stacked_per_example_grads(mlp_loss)(params, batch))
    np.testing.assert_allclose(scorers.grad_norm(mlp_loss)(params, batch), expected, rtol=1e-6)


def test_grad_norm_without_parameters_is_zero():
    score = scorers.grad_norm(lambda params, example: jnp.sum(example))
    np.testing.assert_array_equal(score({}, jnp.ones((3, 2))), np.zeros(3))


def test_loss_is_the_loss(key):
    params, batch = mlp(key, [12, 16, 5]), images(key, 6, 12)
    expected = [mlp_loss(params, jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(6)]
    np.testing.assert_allclose(scorers.loss(mlp_loss)(params, batch), jnp.stack(expected), rtol=1e-6)


def test_logit_bound_is_the_distance_from_the_prediction_to_the_label(key):
    weights = jax.random.normal(key, (12, 5))
    batch = {"image": jax.random.normal(key, (6, 12)), "label": jnp.arange(6) % 5}
    score = scorers.logit_bound(lambda params, example: example["image"] @ params)
    errors = jax.nn.softmax(batch["image"] @ weights) - jax.nn.one_hot(batch["label"], 5)
    np.testing.assert_allclose(score(weights, batch), jnp.linalg.norm(errors, axis=1), rtol=1e-5)


def test_logit_bound_takes_any_loss_of_the_logits():
    score = scorers.logit_bound(
        lambda params, example: params * example["x"], lambda out, example: jnp.sum(jnp.square(out - example["y"]))
    )
    batch = {"x": jnp.ones((2, 3)), "y": jnp.array([[0.0, 0, 0], [1, 1, 1]])}
    np.testing.assert_allclose(score(jnp.float32(1), batch), [2 * np.sqrt(3), 0], rtol=1e-6)


def test_a_chosen_subtree_counts_alone(key):
    params, batch = mlp(key, [12, 16, 16, 5]), images(key, 6, 12)
    stacked = isgd.stacked_per_example_grads(mlp_loss)(params, batch)
    last = scorers.grad_norm(mlp_loss, select=scorers.under("2"))
    np.testing.assert_allclose(last(params, batch), isgd.norms(stacked[2]), rtol=1e-5)


def test_a_choice_of_nothing_is_refused_with_the_names_there_are(key):
    with pytest.raises(ValueError, match="'b', 'w'"):
        scorers.grad_norm(mlp_loss, select=scorers.under("Dense_7"))(mlp(key, [12, 5]), images(key, 6, 12))


@pytest.mark.parametrize("name", ["LayerNorm_0", "GroupNorm_1", "ln_f", "norm"])
def test_normalisation_layers_are_known_by_name(name):
    assert scorers.normalisation(("params", name, "scale"))
    assert not scorers.normalisation(("params", "Dense_0", "kernel"))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(12,), (3, 12)], ids=["one row", "rows"])
def test_preconditioned_norm_is_the_norm_of_the_scaled_gradient(key, shape):
    params, batch = mlp(key, [12, 16, 5]), images(key, 6, *shape)
    scale = jax.tree.map(lambda x: 1 + jax.random.uniform(key, x.shape), params)
    stacked = isgd.stacked_per_example_grads(mlp_loss)(params, batch)
    expected = isgd.norms(jax.tree.map(lambda g, s: g * s[None], stacked, scale))
    np.testing.assert_allclose(scorers.preconditioned_norm(mlp_loss)((params, scale), batch), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("microbatch_size", [None, 4, "auto"])
def test_norms_and_sketches_come_from_one_backward_pass(key, microbatch_size):
    params, batch = mlp(key, [12, 16, 5]), images(key, 6, 12)
    sketch = isgd.last_layer_sketch(mlp_loss, params, jax.tree.map(lambda x: x[0], batch), dims=16)
    both = jax.jit(scorers.grad_norm(mlp_loss, sketch=sketch, microbatch_size=microbatch_size))
    norms, sketches = both(params, batch)
    np.testing.assert_allclose(norms, jax.jit(scorers.grad_norm(mlp_loss))(params, batch), rtol=1e-6)
    np.testing.assert_allclose(sketches, sketch.of_batch(params, batch), rtol=1e-4, atol=1e-5)
    assert sketches.shape == (6, sketch.dims)


def test_a_sketch_adds_no_second_backward_pass(key):
    """The softmax is evaluated as often as without it."""
    params, batch = mlp(key, [12, 16, 5]), images(key, 6, 12)
    sketch = isgd.last_layer_sketch(mlp_loss, params, jax.tree.map(lambda x: x[0], batch), dims=16)
    count = {}
    for name, given in (("norms", None), ("both", sketch)):
        text = str(jax.make_jaxpr(scorers.grad_norm(mlp_loss, sketch=given))(params, batch))
        count[name] = text.count(" = exp ")
    assert count["both"] == count["norms"] > 0


def test_a_sketch_of_chosen_parameters_is_refused(key):
    params, batch = mlp(key, [12, 16, 5]), images(key, 6, 12)
    sketch = isgd.last_layer_sketch(mlp_loss, params, jax.tree.map(lambda x: x[0], batch))
    with pytest.raises(ValueError, match="either sketch= or select="):
        scorers.grad_norm(mlp_loss, sketch=sketch, select=scorers.under("2"))
