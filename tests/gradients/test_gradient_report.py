"""The report of what becomes of each parameter."""

import jax
import jax.numpy as jnp

from isgd_jax.gradients.report import explain


def loss_fn(params, x):
    hidden = jnp.tanh(x @ params["dense"] + params["bias"][None])
    return jnp.sum(hidden * jnp.where(params["mask"] > 0, params["mask"], 0)) + jnp.sum(params["decay"] ** 2)


def report():
    params = {"bias": jnp.ones(5), "dense": jnp.ones((4, 5)), "mask": jnp.ones((6, 5)), "decay": jnp.ones(3)}
    return explain(loss_fn, {**params, "unused": jnp.ones(2)}, jnp.ones((7, 6, 4)))


def test_every_parameter_is_told_how_and_why():
    told = {leaf.path: (leaf.how, leaf.why) for leaf in report().leaves}
    assert told["dense"] == ("factored, product of 6 rows", "")
    assert told["mask"] == ("formed", "select_n")
    assert told["bias"][0] == "formed"
    assert told["decay"][0] == "the same for all examples"
    assert told["unused"] == ("zero", "")


def test_bytes_are_those_of_the_whole_batch():
    dense = next(leaf for leaf in report().leaves if leaf.path == "dense")
    assert dense.held_bytes == 7 * 6 * (4 + 5) * 4
    assert dense.stacked_bytes == 7 * 4 * 5 * 4


def test_it_prints_a_line_a_parameter_and_a_total():
    lines = str(report()).splitlines()
    assert lines[0].split() == ["parameter", "gradients", "because", "bytes", "stacked"]
    assert len(lines) == 1 + 5 + 1
    assert lines[-1].startswith("all")


def test_nothing_is_computed():
    abstract = jax.ShapeDtypeStruct((40_000, 50_000), jnp.float32), jax.ShapeDtypeStruct((7, 6, 40_000), jnp.float32)
    told = explain(lambda w, x: jnp.sum(jnp.sin(x @ w)), *abstract)
    assert told.leaves[0].how == "factored, Gram of 6 rows"
