"""Random small models, composed of the covered pieces, against the definition."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from oracle import check

TIME, WIDTH = 5, 4


def dense(w, x):
    return jnp.tanh(x @ w["a"])


def dense_with_bias(w, x):
    return x + jnp.sin(x @ w["b"] + w["v"][None])


def tied(w, x):
    return jnp.sin(x @ w["a"]) @ w["a"].T


def heads(w, x):
    """Two heads, a weight of three axes, and its slices."""
    q = jnp.einsum("td,dhk->thk", x, w["b"].reshape(WIDTH, 2, WIDTH // 2))
    mixed = jnp.einsum("ts,shk->thk", jax.nn.softmax(jnp.einsum("thk,shk->ts", q, q)), q)
    return x + mixed.reshape(TIME, WIDTH) @ w["b"][:, ::-1]


def convolution(w, x):
    kernel = w["kernel"]
    return x + lax.conv_general_dilated(x.T[None], kernel, (1,), "SAME")[0].T


def depthwise(w, x):
    kernel = w["kernel"][:, :1]
    return jnp.cos(lax.conv_general_dilated(x.T[None], kernel, (1,), "SAME", feature_group_count=WIDTH)[0].T)


def normalised(w, x):
    centred = x - jnp.mean(x, axis=1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(jnp.square(centred), axis=1, keepdims=True) + 0.1) * w["v"][None]


def recurrence(w, x):
    def step(h, row):
        h = jnp.tanh(h @ w["a"] + row @ w["b"])
        return h, h

    return lax.scan(step, jnp.zeros(WIDTH), x)[1]


def scanned_layers(w, x):
    return lax.scan(lambda h, layer: (h + jnp.sin(h @ layer), None), x, jnp.stack([w["a"], w["b"]]))[0]


def branch(w, x):
    return lax.cond(x[0, 0] > 0, lambda: jnp.sin(x @ w["a"]), lambda: x @ w["b"])


def rows(w, x):
    """Rows of a parameter, by indices of the example's own; some twice, some never."""
    return x + w["a"][jnp.argsort(x[:, 0]) // 2]


PIECES = [
    dense, dense_with_bias, tied, heads, convolution, depthwise, normalised, recurrence, scanned_layers, branch, rows,
]  # fmt: skip
WRAPPERS = [lambda f: f, jax.jit, jax.checkpoint]


@pytest.mark.slow
@hypothesis.settings(max_examples=12, deadline=None, derandomize=True, print_blob=True)
@hypothesis.given(
    pieces=st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(WRAPPERS)), min_size=1, max_size=4),
    decay=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 100),
)
def test_any_composition_agrees_with_the_definition(pieces, decay, seed):
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = {"a": (WIDTH, WIDTH), "b": (WIDTH, WIDTH), "kernel": (WIDTH, WIDTH, 3), "v": (WIDTH,)}
    params = {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=False)}

    def loss_fn(params, x):
        for piece, wrapped in pieces:
            x = wrapped(piece)(params, x)
        return jnp.sum(jnp.sin(x)) + decay * jnp.sum(jnp.square(params["a"]))

    check(loss_fn, params, jax.random.normal(keys[4], (3, TIME, WIDTH)), rtol=1e-4)
