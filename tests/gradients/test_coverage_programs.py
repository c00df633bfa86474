"""What user's programs do with parameters, against the definition: reuse, slices, loops, branches, custom rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from oracle import check

import isgd_jax as isgd
from isgd_jax.gradients.leaf import is_factored

slow = pytest.mark.slow
KEY = jax.random.key(1)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def siamese(w, x):
    return jnp.sum(jnp.sin(x["a"] @ w) * jnp.cos(x["b"] @ w))


def with_its_transpose(w, x):
    return jnp.sum(jnp.sin(jnp.tanh(x @ w) @ w.T))


def decayed(w, x):
    return jnp.sum(jnp.sin(x @ w)) + 0.5 * jnp.sum(jnp.square(w))


def scaled(w, x):
    return jnp.sum(jnp.sin(x @ (-w * 0.3 / 2)))


def masked(w, x):
    return jnp.sum(jnp.sin(x @ jnp.where(w > 0, w, 0)))


def branching(w, x):
    return jnp.sum(lax.cond(x[0, 0] > 0, lambda: jnp.sin(x @ w), lambda: jnp.cos(x) @ w * 2))


def switching(w, x):
    pick = jnp.argmax(x[0, :3])
    return jnp.sum(lax.switch(pick, [lambda: jnp.sin(x @ w), lambda: jnp.cos(x @ w) @ w.T, lambda: x @ w]))


def sliced(w, x):
    return jnp.sum(jnp.sin(x @ w[:, :2])) + jnp.sum(jnp.cos(x[:, :2] @ w[:2]))


def concatenated(w, x):
    return jnp.sum(jnp.sin(x @ jnp.concatenate([w["a"], w["b"]], axis=1)))


def layer_by_layer(w, x):
    for layer in range(3):
        x = jnp.tanh(x @ w[layer])
    return jnp.sum(x)


def taken_apart(w, x):
    for layer in jnp.unstack(w, axis=1):
        x = jnp.tanh(x @ layer)
    return jnp.sum(x)


def most_layers_twice(w, x):
    for layer in (0, 2, 0, 2):
        x = jnp.tanh(x @ w[layer])
    return jnp.sum(x)


def stacked_and_scanned(w, x):
    return jnp.sum(lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, jnp.stack(w))[0])


def split_in_three(w, x):
    queries, keys, values = (x @ kernel for kernel in jnp.split(w, 3, axis=1))
    return jnp.sum(jax.nn.softmax(queries @ keys.T) @ values)


def one_layer_of_many(w, x):
    return jnp.sum(jnp.tanh(x @ w[1]))


def gathered(w, x):
    return jnp.sum(jnp.sin(x["x"] @ w[x["i"]]))


def low_rank(w, x):
    return jnp.sum(jnp.sin(x @ (w["w"] + w["a"] @ w["b"])))


def recurrent(w, x):
    return jnp.sum(lax.fori_loop(0, 3, lambda _, h: jnp.sin(h @ w @ w.T), x))


def checkpointed(w, x):
    return jnp.sum(jax.checkpoint(lambda h: jnp.sin(jnp.sin(h @ w) @ w.T))(x))


def jitted(w, x):
    layer = jax.jit(lambda h: jnp.sin(h @ w))  # called twice: one inner jaxpr, two uses
    return jnp.sum(layer(jnp.sum(layer(x)) * x))


def mapped(w, x):
    return jnp.sum(jax.vmap(lambda row: jnp.sin(row @ w))(x))


def by_hand(w, x):
    return jnp.sum(jnp.sin(jnp.sum(x[0][:, None] * w, axis=0)))


def dropped_out(w, x):
    keep = jax.random.bernoulli(x["key"], 0.5, (6, 5))
    return jnp.sum(jnp.where(keep, jnp.sin(x["x"] @ w), 0))


@jax.custom_jvp
def softsign(x):
    return x / (1 + jnp.abs(x))


softsign.defjvps(lambda t, _, x: t / jnp.square(1 + jnp.abs(x)))


@jax.custom_vjp
def dense(w, x):
    return x @ w


dense.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))

W, X = normal(4, 5), normal(3, 6, 4)


def with_a_mutable_array(w, x):
    held = jax.new_ref(jnp.zeros(5))
    held[...] = x[0] @ w
    held[...] = held[...] + jnp.sin(x[1] @ w)
    return jnp.sum(jnp.cos(held[...]))


def with_a_mutable_array_of_data(w, x):
    held = jax.new_ref(jnp.zeros((2, 4)))
    held[...] = lax.stop_gradient(x) * 2
    return jnp.sum(jnp.sin(lax.stop_gradient(held[...]) @ w))


def with_a_mutable_array_in_a_loop(w, x):
    held = jax.new_ref(jnp.zeros(5))

    def add(_, row):
        held[...] = jnp.sin(held[...] + row @ w)
        return None, None

    lax.scan(add, None, x)
    return jnp.sum(held[...])


FACTORED = [
    pytest.param(siamese, W, {"a": normal(3, 4), "b": normal(3, 4) + 1}, id="siamese"),
    pytest.param(with_its_transpose, W, X, id="with its transpose"),
    pytest.param(decayed, W, X, id="weight decay in the loss"),
    pytest.param(decayed, W, normal(3, 4), id="weight decay in the loss, one row", marks=slow),
    pytest.param(scaled, W, X, id="scaled", marks=slow),
    pytest.param(branching, W, normal(5, 6, 4), id="cond"),
    pytest.param(switching, normal(4, 4), normal(5, 6, 4), id="switch", marks=slow),
    pytest.param(sliced, W, X, id="slices"),
    pytest.param(concatenated, {"a": W, "b": W[:, :3]}, X, id="concatenated", marks=slow),
    pytest.param(layer_by_layer, normal(3, 4, 4), X, id="layers by index"),
    pytest.param(taken_apart, normal(4, 3, 4), X, id="layers by unstack", marks=slow),
    pytest.param(most_layers_twice, normal(3, 4, 4), X, id="layers by index, some twice", marks=slow),
    pytest.param(stacked_and_scanned, [normal(4, 4), normal(4, 4) / 2], X, id="layers stacked", marks=slow),
    pytest.param(split_in_three, normal(4, 15), X, id="split"),
    pytest.param(low_rank, {"w": W, "a": normal(4, 2), "b": normal(2, 5)}, X, id="low-rank update", marks=slow),
    pytest.param(recurrent, W, X, id="fori_loop"),
    pytest.param(checkpointed, W, X, id="checkpoint"),
    pytest.param(jitted, W, X, id="jit", marks=slow),
    pytest.param(mapped, W, X, id="vmap inside", marks=slow),
    pytest.param(dropped_out, W, {"x": X, "key": jax.random.split(KEY, 3)}, id="dropout, key in the example"),
    pytest.param(lambda w, x: jnp.sum(softsign(x @ w)), W, X, id="custom_jvp", marks=slow),
    pytest.param(lambda w, x: jnp.sum(jnp.sin(dense(w, x))), W, X, id="custom_vjp", marks=slow),
]
FORMED = [
    pytest.param(with_a_mutable_array, normal(4, 5), normal(3, 2, 4), id="a mutable array"),
    pytest.param(with_a_mutable_array_of_data, normal(4, 5), normal(3, 2, 4), id="one of data", marks=slow),
    pytest.param(with_a_mutable_array_in_a_loop, normal(4, 5), normal(3, 2, 4), id="one in a loop", marks=slow),
    pytest.param(masked, W, X, id="masked", marks=slow),
    pytest.param(by_hand, W, X, id="by hand", marks=slow),
    pytest.param(one_layer_of_many, normal(3, 4, 4), X, id="one layer of many", marks=slow),
    pytest.param(gathered, normal(6, 4, 5), {"x": normal(3, 4), "i": jnp.array([1, 0, 5])}, id="chosen by index"),
    pytest.param(
        lambda w, i: jnp.sum(jnp.sin(w[i])), normal(9), jnp.array([[1, 1, 2]]), id="scalars by index", marks=slow
    ),
    pytest.param(lambda w, x: jnp.sum(jnp.sin(x * w)), jnp.float32(2), X, id="a scalar", marks=slow),
]


@pytest.mark.slow
@pytest.mark.parametrize(("loss_fn", "params", "batch"), FACTORED)
def test_factored(loss_fn, params, batch):
    grads = check(loss_fn, params, batch)
    assert all(is_factored(leaf) for leaf in jax.tree.leaves(grads, is_leaf=is_factored))


@pytest.mark.parametrize(("loss_fn", "params", "batch"), FORMED)
def test_formed(loss_fn, params, batch):
    check(loss_fn, params, batch)


def test_what_a_loss_prints_is_printed_once_an_example():
    heard = []

    def told(w, x):
        def step(total, row):
            jax.debug.callback(heard.append, row[0])
            return total + jnp.sum(jnp.sin(row @ w)), None

        jax.debug.callback(heard.append, x[0, 0])
        return lax.scan(step, 0.0, x)[0]

    x = normal(3, 2, 4)
    jax.block_until_ready(jax.jit(lambda w, x: isgd.norms(isgd.per_example_grads(told)(w, x)))(normal(4, 5), x))
    jax.effects_barrier()
    assert sorted(map(float, heard)) == sorted(np.concatenate([x[:, :, 0].ravel(), x[:, 0, 0]]).tolist())


def test_a_loss_may_close_over_a_random_key():
    def noisy(w, x):
        return jnp.sum(jnp.sin(x @ w) * jax.random.bernoulli(KEY, 0.5, (2, 5)).astype(jnp.float32))

    check(noisy, normal(4, 5), normal(3, 2, 4))


@pytest.mark.slow
def test_a_weight_that_is_used_five_hundred_times_is_no_deep_recursion():
    def unrolled(w, x):
        for _ in range(500):
            x = x + 0.01 * jnp.tanh(x @ w)
        return jnp.sum(x)

    grads = jax.eval_shape(isgd.per_example_grads(unrolled, joint=False), normal(4, 4), normal(2, 1, 4))
    assert is_factored(grads)


@pytest.mark.slow
def test_parameters_without_effect_and_only_in_the_regulariser():
    def loss_fn(params, x):
        return jnp.sum(jnp.sin(x * params["scalar"])) + jnp.sum(jnp.sin(params["decayed"]))

    grads = check(loss_fn, {"scalar": jnp.float32(2), "decayed": W, "unused": W, "none": None}, X)
    np.testing.assert_array_equal(isgd.norms(grads["unused"]), np.zeros(3))


@pytest.mark.slow
def test_integer_parameters_have_zero_gradients_of_their_own_type():
    params = {"w": W, "steps": jnp.arange(3)}
    grads = isgd.per_example_grads(lambda p, x: jnp.sum(x @ p["w"]) * p["steps"][1].astype(jnp.float32))(params, X)
    mean = isgd.weighted_mean(grads, jnp.ones(3))
    np.testing.assert_array_equal(mean["steps"], jnp.zeros(3, jnp.int32))
    assert optax.apply_updates(params, mean)["steps"].dtype == jnp.int32
    np.testing.assert_allclose(isgd.norms(grads), isgd.norms(grads["w"]), rtol=1e-6)


def test_reverse_mode_through_while_is_refused():
    def loss_fn(w, x):
        return jnp.sum(lax.while_loop(lambda h: jnp.sum(h) < 9, lambda h: h + h @ w, x))

    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        isgd.per_example_grads(loss_fn)(normal(4, 4), X)


def test_the_optimisation_barrier_of_checkpoint_survives():
    jaxpr = jax.make_jaxpr(isgd.per_example_grads(checkpointed))(W, X)
    assert "optimization_barrier" in str(jaxpr)


def test_recomputed_values_are_recomputed():
    text = str(jax.make_jaxpr(isgd.per_example_grads(checkpointed))(W, X))
    plain = str(jax.make_jaxpr(isgd.per_example_grads(with_its_transpose))(W, X))
    assert text.count("dot_general") > plain.count("dot_general")


def doubled(w, x):
    for _ in range(14):
        w = w + w
    return jnp.sum(jnp.sin(x @ w * 2.0**-14))


def made_symmetric(w, x):
    for _ in range(10):
        w = (w + w.T) / 2
    return jnp.sum(jnp.sin(x @ w))


@pytest.mark.parametrize("loss_fn", [doubled, made_symmetric])
def test_a_product_that_is_added_along_many_ways_is_added_as_the_program_does(loss_fn):
    """There are 2^14 ways through fourteen sums: terms, were they all taken apart."""
    w = normal(4, 4)
    equations = len(jax.make_jaxpr(isgd.per_example_grads(loss_fn))(w, X).eqns)
    assert equations < 3 * len(jax.make_jaxpr(jax.vmap(jax.grad(loss_fn), (None, 0)))(w, X).eqns)
    check(loss_fn, w, X)
