"""Lazy per-example gradients against the definition and against answers worked by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from oracle import check
from problems import images, mlp, mlp_loss

import isgd_jax as isgd
from isgd_jax.gradients.leaf import Factored


def linear_loss(params, example):
    """Half the squared residual of a linear model: the gradient is r·(x, 1), its norm |r|·sqrt(‖x‖² + 1)."""
    residual = jnp.dot(example["x"], params["w"]) + params["b"] - example["y"]
    return 0.5 * jnp.square(residual)


def test_linear_model_has_the_norms_of_the_closed_form(key):
    x = jax.random.normal(key, (9, 4))
    params, batch = {"w": jnp.arange(4.0), "b": jnp.float32(0.5)}, {"x": x, "y": jnp.arange(9.0)}
    residual = x @ params["w"] + params["b"] - batch["y"]
    expected = jnp.abs(residual) * jnp.sqrt(jnp.sum(jnp.square(x), axis=1) + 1)
    np.testing.assert_allclose(isgd.norms(isgd.per_example_grads(linear_loss)(params, batch)), expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(7, 12), (7, 3, 12), (7, 40, 12)], ids=["once", "short sequence", "long sequence"])
def test_dense_layers_agree_with_the_definition(key, shape):
    grads = check(mlp_loss, mlp(key, [12, 16, 16, 5]), images(key, *shape))
    assert all(isinstance(layer["w"], Factored) for layer in grads)


@pytest.mark.slow
def test_losses_are_those_of_the_loss_function(key):
    params, batch = mlp(key, [12, 16, 5]), images(key, 6, 12)
    losses = jax.jit(lambda p, x: isgd.per_example_value_and_grad(mlp_loss)(p, x)[0])(params, batch)
    np.testing.assert_allclose(losses, jax.jit(jax.vmap(mlp_loss, in_axes=(None, 0)))(params, batch), rtol=1e-6)


def test_weights_of_one_give_the_gradient_of_the_mean_loss(key):
    params, batch = mlp(key, [12, 16, 5]), images(key, 6, 12)

    def mean_loss(params):
        return jnp.mean(jax.vmap(mlp_loss, in_axes=(None, 0))(params, batch))

    @jax.jit
    def both(params):
        return isgd.weighted_mean(isgd.per_example_grads(mlp_loss)(params, batch), jnp.ones(6)), jax.grad(mean_loss)(
            params
        )

    chex.assert_trees_all_close(*both(params), atol=1e-6)


def test_the_tree_has_the_structure_of_the_parameters_and_passes_through_jit_and_optax(key):
    params, batch = mlp(key, [12, 16, 5]), images(key, 6, 12)
    grads = jax.jit(isgd.per_example_grads(mlp_loss))(params, batch)
    assert jax.tree.structure(grads, is_leaf=lambda x: isinstance(x, Factored)) == jax.tree.structure(params)
    assert all(x.shape[0] == 6 for x in jax.tree.leaves(grads))
    seen = []
    mask = [{"w": True, "b": False}, {"w": False, "b": True}]
    tx = optax.masked(optax.stateless(lambda g, _: seen.append(g) or g), mask)
    tx.update(grads, tx.init(params), params)
    assert isinstance(seen[0][0]["w"], Factored)
    assert isinstance(seen[0][1]["w"], optax.MaskedNode)


@pytest.mark.slow
def test_no_gradient_is_formed_for_the_norms_of_a_dense_net(key):
    params, batch = mlp(key, [64, 256, 256, 10]), images(key, 4, 64)
    jaxpr = jax.make_jaxpr(lambda p, x: isgd.norms(isgd.per_example_grads(mlp_loss)(p, x)))(params, batch)
    assert max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars) <= 256 * 256


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(7, 12), (7, 3, 12), (7, 40, 12)], ids=["once", "short sequence", "long sequence"])
def test_norms_and_mean_together_are_those_of_the_definition(key, shape):
    params, batch = mlp(key, [12, 16, 5]), images(key, *shape)
    weights = jnp.linspace(0.5, 2, 7)

    @jax.jit
    def asked(params, batch):
        both = isgd.per_example_grads(mlp_loss, joint=True), isgd.stacked_per_example_grads(mlp_loss)
        return [(isgd.norms(g), isgd.weighted_mean(g, weights)) for g in (make(params, batch) for make in both)]

    (norms, mean), (expected, expected_mean) = asked(params, batch)
    np.testing.assert_allclose(norms, expected, rtol=1e-5)
    chex.assert_trees_all_close(mean, expected_mean, atol=1e-5)


def test_the_model_is_differentiated_once_however_much_is_asked(key):
    calls = []

    def counted(params, example):
        calls.append(1)
        return mlp_loss(params, example)

    @jax.jit
    def ask(params, batch):
        losses, grads = isgd.per_example_value_and_grad(counted)(params, batch)
        return losses, isgd.norms(grads), isgd.weighted_mean(grads, jnp.ones(4)), isgd.gram(grads)

    ask(mlp(key, [12, 16, 5]), images(key, 4, 12))
    assert len(calls) == 1


def test_a_loss_that_is_not_a_scalar_is_refused_with_advice(key):
    with pytest.raises(ValueError, match=r"scalar loss of ONE example, got shape \(12,\).*from_batch_loss"):
        isgd.per_example_grads(lambda params, example: example["x"] * params)(jnp.float32(1), images(key, 4, 12))


def test_a_loss_that_returns_more_than_an_array_is_refused_with_advice(key):
    with pytest.raises(TypeError, match=r"scalar loss of ONE example, got a tuple: .* say has_aux=True; .* metrics="):
        isgd.per_example_grads(lambda w, x: (w * x, x))(jnp.float32(1), jnp.ones(3))
    with pytest.raises(TypeError, match=r"scalar loss of ONE example, got None"):
        isgd.per_example_grads(lambda w, x: None)(jnp.float32(1), jnp.ones(3))


WRONG_LOSSES = {
    "a str": "0.5", "a dict": {"loss": 0.5}, "a set": {0.5}, "a builtin": abs, "array of <U1": np.array("a"),
    "int32": 3, "bool": True, "complex64": 1j,
}  # fmt: skip


@pytest.mark.parametrize("named", WRONG_LOSSES)
def test_a_loss_that_is_no_real_number_is_refused_in_a_sentence(named):
    def loss(w, x):
        return WRONG_LOSSES[named]

    gradients = [isgd.stacked_per_example_grads, isgd.per_example_grads]
    numbers = ("int32", "bool", "complex64")
    for function in gradients if named in numbers else [*gradients, isgd.scorers.loss]:
        with pytest.raises(TypeError, match=r"^loss_fn must return .* got .*" + named):
            function(loss)(jnp.float32(1), jnp.ones(3))


@pytest.mark.parametrize("value", [None, 0.5, {"loss": 0.5}, (0.5, 1.0, 2.0)])
def test_where_a_pair_was_promised_what_is_none_is_refused_in_a_sentence(value):
    with pytest.raises(TypeError, match=r"^loss_fn must return a pair \(loss, aux\) with has_aux=True, got "):
        isgd.per_example_grads(lambda w, x: value, has_aux=True)(jnp.float32(1), jnp.ones(3))


def test_negative_argnums_count_back_from_the_batch():
    a, b, x = jnp.ones((5, 4), jnp.bfloat16), jnp.full((4, 5), 0.5), jnp.ones((3, 4))

    def loss(a, b, x):
        return jnp.sum(jnp.sin(x @ b @ a.astype(jnp.float32)))

    for last, same in ((-2, 1), (-3, 0), ((-3, -2), (0, 1))):
        found, wanted = (isgd.per_example_grads(loss, argnums)(a, b, x) for argnums in (last, same))
        chex.assert_trees_all_equal(isgd.weighted_mean(found, jnp.ones(3)), isgd.weighted_mean(wanted, jnp.ones(3)))
    for argnums in (-1, 2, -4):
        with pytest.raises(ValueError, match=f"argnums must name arguments before the batch, 0 to 1, .* got {argnums}"):
            isgd.per_example_grads(loss, argnums)(a, b, x)


def test_a_part_of_a_loss_in_64_bits_is_refused_where_the_process_has_none():
    def loss(w, x):
        with jax.enable_x64(True):
            return jnp.sum(jnp.sin(x.astype(jnp.float64) * w.astype(jnp.float64))).astype(jnp.float32)

    with pytest.raises(TypeError, match=r"computes in float64, by jax.enable_x64 within it"):
        isgd.per_example_grads(loss)(jnp.ones(4), jnp.ones((3, 4)))


def test_parameters_of_eight_bits_and_integers_of_four_stand_beside_others():
    def loss(w, x):
        return jnp.sum(jnp.sin(x @ (w["a"].astype(jnp.float32) + w["q"].astype(jnp.float32))))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4)), jnp.float32)
    w = {"a": jnp.full((4, 5), 0.5, jnp.float8_e4m3fn), "q": jnp.ones((4, 5), jnp.int4)}
    grads = isgd.per_example_grads(loss)(w, x)
    mean = isgd.weighted_mean(grads, jnp.ones(3))
    exact = jax.vmap(jax.grad(lambda a, x: jnp.sum(jnp.sin(x @ (a + 1)))), (None, 0))(jnp.full((4, 5), 0.5), x)
    np.testing.assert_allclose(np.float32(mean["a"]), exact.mean(0), atol=0.2 * np.abs(exact).max())
    assert mean["a"].dtype == jnp.float8_e4m3fn


def test_integers_alone_and_batches_of_no_example_are_refused():
    def loss(params, example):
        return jnp.sum(params["w"] * example.astype(params["w"].dtype)).astype(jnp.float32)

    with pytest.raises(TypeError, match="an array of real or complex numbers to differentiate, got int32 alone"):
        isgd.per_example_grads(loss)({"w": jnp.ones(3, jnp.int32)}, jnp.ones((2, 3)))
    with pytest.raises(TypeError, match=r"got a random key at \['rng'\]: split off what is not trained"):
        isgd.per_example_grads(loss)({"w": jnp.ones(3), "rng": jax.random.key(0)}, jnp.ones((2, 3)))
    for grads in (isgd.per_example_grads(loss), isgd.per_example_value_and_grad(loss)):
        with pytest.raises(ValueError, match=r"a batch needs at least one example, got an array of shape \(0, 3\)"):
            grads({"w": jnp.ones(3), "k": jnp.int32(1)}, jnp.ones((0, 3)))


def test_a_loss_written_for_a_batch_is_adapted(key):
    params, batch = mlp(key, [12, 16, 5]), images(key, 6, 12)

    def batch_loss(params, batch):
        return jnp.mean(jax.vmap(mlp_loss, in_axes=(None, 0))(params, batch))

    found = jax.jit(lambda p, x: isgd.norms(isgd.per_example_grads(isgd.from_batch_loss(batch_loss))(p, x)))(
        params, batch
    )
    np.testing.assert_allclose(found, oracle.norms(mlp_loss, params, batch), rtol=1e-5)


def test_a_loss_may_close_over_traced_numbers_of_every_shape():
    """A temperature or a step of the program around it: a scalar, used where scalars are compared, a row, and both."""
    batch = jnp.arange(12.0).reshape(4, 3) + 1

    def asked(scalar, row):
        def loss_fn(params, x):
            w, v = params
            product = jnp.sum(scalar * w * x) + jnp.sum((w * x + scalar) ** 2 / scalar) + jnp.vdot(row, w * x)
            return product + jnp.vdot(row, v)  # whose gradient is the row itself

        params = (jnp.full(3, 0.5), jnp.ones(3))
        norms = isgd.norms(isgd.per_example_grads(loss_fn)(params, batch))
        return norms, jnp.hstack(jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch))

    norms, grads = jax.jit(asked)(jnp.float32(2.0), jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(norms, jnp.linalg.norm(grads, axis=1), rtol=1e-6)
