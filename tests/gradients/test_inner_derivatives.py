"""Losses that differentiate the model inside: physics-informed networks, score matching, Laplacians, to fourth order.

The reference is one `jax.grad` an example in float64, of the same loss.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import jet

import isgd_jax as isgd
from isgd_jax.gradients.leaf import is_factored

B, WIDTHS = 4, (2, 8, 8, 1)


def network(params, x):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return (x @ params[-1]["w"] + params[-1]["b"])[0]


def make_params(dtype):
    random = np.random.default_rng(0)

    def layer(i, o):
        w, b = random.normal(size=(i, o)) / np.sqrt(i), random.normal(size=o)
        return {"w": jnp.asarray(w.astype(np.float32), dtype), "b": jnp.asarray(b.astype(np.float32), dtype)}

    return [layer(i, o) for i, o in itertools.pairwise(WIDTHS)]


def along(params, x, axis):
    """The network as a function of one coordinate."""
    return lambda s: network(params, x.at[axis].set(s))


def nested_reverse(order):
    def loss_fn(params, x):
        function = along(params, x, 0)
        for _ in range(order):
            function = jax.grad(function)
        return jnp.square(function(x[0]) + jnp.sin(network(params, x)))

    return loss_fn


def forward_over_reverse(params, x):
    """Burgers' residual: u_t + u u_x - nu u_xx, with one Hessian-vector product."""
    first = jax.grad(network, 1)
    direction = jnp.zeros_like(x).at[0].set(1)
    slopes, seconds = jax.jvp(lambda x: first(params, x), (x,), (direction,))
    return jnp.square(slopes[1] + network(params, x) * slopes[0] - 0.1 * seconds[0])


def burgers(derivative):
    def loss_fn(params, point):
        def u(t, x):
            return network(params, jnp.stack([t, x]))

        u_x = derivative(u, 1)
        return jnp.square(derivative(u, 0)(*point) + u(*point) * u_x(*point) - 0.1 * derivative(u_x, 1)(*point))

    return loss_fn


def forward_over_forward(order):
    def loss_fn(params, x):
        function = along(params, x, 0)
        for _ in range(order):
            function = jax.jacfwd(function)
        return jnp.square(function(x[0]))

    return loss_fn


def laplacian(params, x):
    return jnp.square(jnp.trace(jax.hessian(network, 1)(params, x)) + network(params, x))


def biharmonic(params, x):
    """Fourth order: the Laplacian of the Laplacian."""

    def of(function):
        return lambda x: jnp.trace(jax.jacfwd(jax.jacrev(function))(x))

    return jnp.square(of(of(lambda x: network(params, x)))(x))


def taylor(params, x):
    """Derivatives along a line to fourth order, in Taylor mode."""
    one = jnp.zeros_like(x).at[0].set(1)
    zero = jnp.zeros_like(x)
    _, terms = jet.jet(lambda x: network(params, x), (x,), ((one, zero, zero, zero),))
    return jnp.square(terms[1]) + jnp.square(terms[3])


def score_matching(params, x):
    """Hyvärinen's objective: half the squared gradient and the Laplacian of an energy."""
    slope = jax.grad(network, 1)(params, x)
    return 0.5 * jnp.sum(jnp.square(slope)) + jnp.trace(jax.hessian(network, 1)(params, x))


LOSSES = {
    **{f"nested reverse, order {n}": nested_reverse(n) for n in (1, 2, 3, 4)},
    "Burgers, nested reverse": burgers(jax.grad),
    "Burgers, forward over forward": burgers(jax.jacfwd),
    "forward over reverse": forward_over_reverse,
    "forward over forward, order 2": forward_over_forward(2),
    "forward over forward, order 4": forward_over_forward(4),
    "Laplacian": laplacian,
    "biharmonic": biharmonic,
    "Taylor mode, order 4": taylor,
    "score matching": score_matching,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_inner_derivatives_are_exact(name):
    loss_fn = LOSSES[name]
    x = np.random.default_rng(1).normal(size=(B, 2))
    with jax.enable_x64(True):
        grad = jax.jit(jax.grad(loss_fn))
        rows = [grad(make_params(jnp.float64), jnp.asarray(row)) for row in x.astype(np.float32).astype(np.float64)]
        wide = make_params(jnp.float64)
        found64 = jax.jit(lambda p, x: isgd.norms(isgd.per_example_grads(loss_fn, joint=False)(p, x)))(
            wide, jnp.asarray(x.astype(np.float32), jnp.float64)
        )
    right = np.stack([np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(row)]) for row in rows])
    norms = np.linalg.norm(right, axis=1)
    np.testing.assert_allclose(found64, norms, rtol=1e-11)

    def asked(params, batch):
        grads = isgd.per_example_grads(loss_fn)(params, batch)
        return isgd.norms(grads), isgd.weighted_mean(grads, jnp.ones(B))

    params, batch = make_params(jnp.float32), jnp.asarray(x, jnp.float32)
    found, mean = jax.jit(asked)(params, batch)
    stacked = jax.jit(isgd.stacked_per_example_grads(loss_fn))(params, batch)
    theirs = np.concatenate([np.asarray(leaf, np.float64).reshape(B, -1) for leaf in jax.tree.leaves(stacked)], axis=1)
    allowed = max(4 * np.max(np.abs(np.linalg.norm(theirs, axis=1) / norms - 1)), 2e-6)
    np.testing.assert_allclose(found, norms, rtol=allowed)
    flat = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(mean)])
    off = max(4 * np.max(np.abs(theirs.mean(0) - right.mean(0))), 2e-6 * np.max(np.abs(right)))
    np.testing.assert_allclose(flat, right.mean(0), atol=off, rtol=0)


@pytest.mark.parametrize("name", ["Burgers, nested reverse", "Burgers, forward over forward", "forward over reverse"])
def test_a_weight_has_as_many_rows_as_the_loss_has_derivatives(name):
    """u, u_t, u_x and u_xx pass through a weight once; that they are computed many times makes no more rows."""
    params, batch = make_params(jnp.float32), jnp.ones((B, 2))
    grads = jax.eval_shape(isgd.per_example_grads(LOSSES[name], joint=False), params, batch)
    leaf = grads[1]["w"]
    assert is_factored(leaf)
    assert [term.right.shape[2] for term in leaf.terms] == [4]


def equations(jaxpr):
    inner = (getattr(value, "jaxpr", value) for eqn in jaxpr.eqns for value in eqn.params.values())
    return len(jaxpr.eqns) + sum(equations(value) for value in inner if hasattr(value, "eqns"))


def test_the_program_of_an_unrolled_loop_grows_as_its_length():
    def count(uses):
        def loss_fn(weight, x):
            state = jnp.zeros(32)
            for t in range(uses):
                state = jnp.tanh(state @ weight + x[t])
            return jnp.sum(state)

        shapes = jax.ShapeDtypeStruct((32, 32), jnp.float32), jax.ShapeDtypeStruct((2, uses, 32), jnp.float32)
        return equations(jax.make_jaxpr(isgd.scorers.grad_norm(loss_fn))(*shapes).jaxpr)

    ten, twenty = count(10), count(20)
    assert twenty < 2.2 * ten
    assert twenty < 2 * 263, "twice the equations of vmap(grad)"
