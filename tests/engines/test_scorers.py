"""Scorers against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from problems import images, mlp, mlp_loss
from sampling_problem import unchecked

import isgd_jax as isgd
from isgd_jax.engines import scorers


@pytest.mark.slow
def test_grad_norm_is_the_norm_of_the_definition(key):
    params, batch = mlp(key, [12, 16, 5]), images(key, 6, 12)
    expected = oracle.norms(mlp_loss, params, batch)
    np.testing.assert_allclose(jax.jit(scorers.grad_norm(mlp_loss))(params, batch), expected, rtol=1e-6)


def test_grad_norm_without_parameters_is_zero():
    score = scorers.grad_norm(lambda params, example: jnp.sum(example))
    np.testing.assert_array_equal(score({}, jnp.ones((3, 2))), np.zeros(3))


def test_loss_is_the_loss(key):
    params, batch = mlp(key, [12, 16, 5]), images(key, 6, 12)
    loss = jax.jit(mlp_loss)
    expected = [loss(params, jax.tree.map(lambda x, i=i: np.asarray(x)[i], batch)) for i in range(6)]
    np.testing.assert_allclose(jax.jit(scorers.loss(mlp_loss))(params, batch), np.stack(expected), rtol=1e-6)


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


@pytest.mark.parametrize(("dtype", "size"), [("float16", 1e-4), ("float32", 1e-25), ("complex64", 1 + 2j)])
def test_logit_bound_is_the_norm_in_every_type_however_small_it_is(dtype, size):
    slopes = (size * np.array([[3, 4], [0, 1]])).astype(dtype)
    score = scorers.logit_bound(lambda w, x: w * jnp.ones_like(x), lambda out, x: jnp.real(jnp.sum(out * x)))
    np.testing.assert_allclose(score(jnp.ones((), dtype), slopes), np.abs(size) * np.array([5, 1]), rtol=1e-3)


def test_a_chosen_subtree_counts_alone(key):
    params, batch = mlp(key, [12, 16, 16, 5]), images(key, 6, 12)
    last = scorers.grad_norm(mlp_loss, select=scorers.under("2"))
    expected = oracle.norms_of(oracle.stacked(mlp_loss, params, batch)[2])
    np.testing.assert_allclose(jax.jit(last)(params, batch), expected, rtol=1e-5)


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
    scale = jax.tree.map(lambda x: np.random.default_rng(x.size).uniform(1, 2, x.shape).astype(np.float32), params)
    stacked = oracle.stacked(mlp_loss, params, batch)
    expected = oracle.norms_of(jax.tree.map(lambda g, s: np.asarray(g) * s, stacked, scale))
    found = jax.jit(scorers.preconditioned_norm(mlp_loss))((params, scale), batch)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("microbatch_size", [None, 4, "auto"])
def test_norms_and_sketches_come_from_one_backward_pass(key, microbatch_size):
    params, batch = mlp(key, [12, 16, 5]), images(key, 6, 12)
    sketch = isgd.last_layer_sketch(mlp_loss, params, jax.tree.map(lambda x: x[0], batch), dims=16)
    both = jax.jit(scorers.grad_norm(mlp_loss, sketch=sketch, microbatch_size=microbatch_size))
    norms, sketches = both(params, batch)
    np.testing.assert_allclose(norms, jax.jit(scorers.grad_norm(mlp_loss))(params, batch), rtol=1e-6)
    np.testing.assert_allclose(sketches, jax.jit(sketch.of_batch)(params, batch), rtol=1e-4, atol=1e-5)
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


def test_whole_numbers_among_the_parameters_are_passed_over_by_the_sketch(key):
    """A count beside the weights was differentiated, which JAX refuses; all else takes it."""
    params, batch = mlp(key, [12, 5]), images(key, 6, 12)
    example = jax.tree.map(lambda x: x[0], batch)
    counted = {"steps": jnp.zeros((3, 3), jnp.int32), "net": params}
    sketch = isgd.last_layer_sketch(lambda p, e: mlp_loss(p["net"], e), counted, example, dims=16)
    plain = isgd.last_layer_sketch(mlp_loss, params, example, dims=16)
    np.testing.assert_array_equal(sketch.of_batch(counted, batch), plain.of_batch(params, batch))
    with pytest.raises(ValueError, match="params must have a floating-point or complex array to learn, got none"):
        isgd.last_layer_sketch(lambda p, e: jnp.float32(0.0), {"steps": counted["steps"]}, example)


def _rows(loss_fn, params, batch):
    """One `jax.grad` an example, flat, in float64."""
    grad = jax.jit(jax.grad(loss_fn))
    batch = jax.tree.map(np.asarray, batch)
    examples = [jax.tree.map(lambda x, i=i: x[i], batch) for i in range(len(jax.tree.leaves(batch)[0]))]
    return np.stack([np.concatenate([np.ravel(x) for x in jax.tree.leaves(grad(params, e))]) for e in examples])


@pytest.mark.parametrize("negative", ["zero", "absolute", "keep"])
def test_validation_product_is_that_of_one_gradient_an_example(key, negative):
    params, batch = mlp(key, [6, 4]), images(key, 8, 6, num_classes=4)
    direction = jax.tree.map(lambda x: jax.random.normal(jax.random.fold_in(key, 1), x.shape), params)
    products = _rows(mlp_loss, params, batch) @ np.concatenate([np.ravel(x) for x in jax.tree.leaves(direction)])
    expected = {"zero": np.maximum(products, 0), "absolute": np.abs(products), "keep": products}[negative]
    assert products.min() < 0 < products.max()
    found = jax.jit(scorers.validation_product(mlp_loss, negative=negative))((params, direction), batch)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_excess_loss_is_the_difference_and_draws_by_scores_of_zero_stay_unbiased(key):
    params, batch = mlp(key, [6, 4]), images(key, 8, 6, num_classes=4)
    other = jax.tree.map(lambda x: 0.5 * x, params)
    losses = jax.jit(jax.vmap(mlp_loss, (None, 0)))
    mine, theirs = losses(params, batch), losses(other, batch)
    kept = jax.jit(scorers.excess_loss(mlp_loss, negative="keep"))((params, other), batch)
    np.testing.assert_allclose(kept, mine - theirs, rtol=1e-5, atol=1e-6)
    against = scorers.excess_loss(mlp_loss, reference_loss_fn=lambda p, e: 2.0 + 0.0 * e["x"][0])
    scores = jax.jit(against)((params, None), batch)
    np.testing.assert_allclose(scores, np.maximum(mine - 2.0, 0.0), rtol=1e-5, atol=1e-6)
    assert float(scores.min()) == 0.0 < float(scores.max())
    sampler = isgd.fixed(scores, batch_size=4, sampler="systematic")
    draws = jax.jit(jax.vmap(sampler.sample, (0, None)))(jax.random.split(key, 4_000), sampler.init())
    counted = np.bincount(np.ravel(draws.indices), weights=np.ravel(draws.target / draws.probs), minlength=8)
    np.testing.assert_allclose(counted / 16_000, np.full(8, 1 / 8), rtol=0.2)  # five standard errors of the rarest


@pytest.mark.slow
def test_token_norms_are_those_of_one_gradient_a_token(key):
    keys = jax.random.split(key, 3)
    params = {"embed": jax.random.normal(keys[0], (7, 5)), "out": jax.random.normal(keys[1], (5, 7))}
    batch = {"tokens": jax.random.randint(keys[2], (3, 5), 0, 7)}

    def losses_fn(params, example):
        hidden = jnp.cumsum(jnp.tanh(params["embed"][example["tokens"][:-1]]), axis=0)
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["out"], example["tokens"][1:])

    masks = jnp.concatenate([jnp.eye(4), jnp.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.0]])])
    pairs = {"tokens": jnp.repeat(batch["tokens"], 6, axis=0), "mask": jnp.tile(masks, (3, 1))}
    expected = np.linalg.norm(_rows(lambda p, e: jnp.sum(e["mask"] * losses_fn(p, e)), params, pairs), axis=1)
    found = jax.jit(scorers.token_norms(losses_fn, masks))(params, batch)
    np.testing.assert_allclose(found, expected.reshape(3, 6), rtol=1e-4)
    np.testing.assert_allclose(jax.jit(scorers.token_norms(losses_fn))(params, batch), found[:, :4], rtol=1e-4)


def test_selection_scores_refuse_what_they_do_not_know(key):
    with unchecked(), pytest.raises(ValueError, match="negative must be one of 'zero', 'absolute', 'keep', got 'no'"):
        scorers.excess_loss(mlp_loss, negative="no")
    with unchecked(), pytest.raises(ValueError, match=r"masks be \[k, t\]; got \(\) and none"):
        scorers.token_norms(mlp_loss)(mlp(key, [6, 4]), images(key, 8, 6, num_classes=4))
