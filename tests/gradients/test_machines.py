"""What is chosen for an accelerator: other forms than on a CPU, the same numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import isgd_jax as isgd
from isgd_jax.engines import scorers
from isgd_jax.gradients import costs
from isgd_jax.gradients.leaf import how_squared, is_factored

T, WIDTH = 8, 24


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "machine", lambda: costs.ACCELERATOR)


def loss_fn(params: Any, example: Any) -> jax.Array:
    """Looked up, convolved, multiplied in two places: every kind of factor."""
    x = params["table"][example["tokens"]]
    image = jax.lax.conv_general_dilated(
        x[None, :, None], params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jnp.tanh(image[0, :, 0] @ params["dense"] + params["bias"][None])
    return jnp.sum(jnp.square(x @ params["dense"].T - example["y"][None]))


def problem(key: jax.Array, b: int) -> tuple[Any, Any]:
    keys = jax.random.split(key, 6)
    params = {
        "table": jax.random.normal(keys[0], (11, WIDTH)),
        "kernel": 0.1 * jax.random.normal(keys[1], (3, 1, WIDTH, WIDTH)),
        "dense": 0.2 * jax.random.normal(keys[2], (WIDTH, 96)),
        "bias": jnp.zeros(96),
    }
    tokens, y = jax.random.randint(keys[3], (b, T), 0, 11), jax.random.normal(keys[4], (b, WIDTH))
    return params, {"tokens": tokens, "y": y}


def test_an_accelerators_choices_change_no_number(key: jax.Array, accelerator: None) -> None:
    params, batch = problem(key, 6)
    oracle.check(loss_fn, params, batch)
    expected = oracle.norms(loss_fn, params, batch)
    score = jax.jit(scorers.grad_norm(loss_fn))
    np.testing.assert_allclose(score(params, batch), expected, rtol=1e-5)
    _, norms, _ = jax.jit(isgd.value_norms_and_mean(loss_fn))(params, batch, jnp.ones(6))
    np.testing.assert_allclose(norms, expected, rtol=1e-5)


def jaxpr_of_norms(params: Any, batch: Any) -> str:
    return str(jax.make_jaxpr(lambda p, b: isgd.norms(isgd.per_example_grads(loss_fn)(p, b)))(params, batch))


def test_an_accelerator_is_not_made_to_wait_for_slices_nor_for_each_parameter(
    key: jax.Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of 256 examples are 256·3·24·24 numbers, 1.7 MiB: small slices on a CPU whose cache holds 64 KiB."""
    params, batch = jax.eval_shape(lambda k: problem(k, 256), key)
    small = costs.CPU._replace(cache=1 << 16, part=1 << 14, windows=1 << 14)
    monkeypatch.setattr(costs, "machine", lambda: small)
    on_cpu = jaxpr_of_norms(params, batch)
    monkeypatch.setattr(costs, "machine", lambda: costs.ACCELERATOR)
    on_accelerator = jaxpr_of_norms(params, batch)
    assert on_cpu.count("scan[") > 0 == on_accelerator.count("scan[")
    assert on_accelerator.count("cond[") <= 1


def test_one_condition_guards_all_parameters_where_gram_sums_cancel(key: jax.Array, accelerator: None) -> None:
    """Rows that hardly differ times slopes that sum to zero, in one of two parameters, for one of three examples."""
    left = 1 + 1e-3 * jax.random.normal(key, (3, 32, 128))
    right = jax.random.normal(jax.random.fold_in(key, 1), (3, 32, 256))
    right = right.at[1].add(-jnp.mean(right[1], axis=0)[None])

    def two(params: Any, x: Any) -> jax.Array:
        slopes = jnp.sum((x["left"] @ params[0]) * x["right"]) + jnp.sum((x["right"] @ params[1]) * x["left"])
        return slopes + jnp.sum(params[2] * x["left"][0])

    params, batch = [jnp.zeros((128, 256)), jnp.zeros((256, 128)), jnp.zeros(128)], {"left": left, "right": right}
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, batch))
        expected = oracle.norms(two, *wide)
    ask = lambda p, b: isgd.norms(isgd.per_example_grads(two)(p, b))  # noqa: E731
    assert str(jax.make_jaxpr(ask)(params, batch)).count("cond[") == 1
    np.testing.assert_allclose(jax.jit(ask)(params, batch), expected, rtol=2e-5)
    leaves = jax.tree.leaves(isgd.per_example_grads(two)(params, batch), is_leaf=is_factored)
    assert [how_squared(leaf) for leaf in leaves if is_factored(leaf)].count("Gram") == 2


def test_the_machine_is_that_of_the_default_device() -> None:
    assert (costs.machine() is costs.CPU) == (jax.default_backend() == "cpu")
    with jax.default_device(jax.devices("cpu")[1]):
        assert costs.machine() is costs.CPU
    with jax.default_device("cpu"):
        assert costs.machine() is costs.CPU


def test_only_a_cpu_is_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(costs, "_memory", lambda platform: None)
    assert costs.machine() is costs.ACCELERATOR
    with jax.default_device(jax.devices("cpu")[0]):
        assert costs.machine() is costs.CPU


def layer(params: Any, example: Any, preferred: Any = None) -> jax.Array:
    """A layer in bfloat16 under parameters in float32, as models are trained; long sequences: products are formed."""
    x, weights = example.astype(jnp.bfloat16), params.astype(jnp.bfloat16)
    return jnp.mean(jnp.tanh(jnp.matmul(x, weights, preferred_element_type=preferred)).astype(jnp.float32) ** 2)


def test_products_that_the_program_rounds_to_bfloat16_are_kept_so_and_are_as_exact(
    key: jax.Array, accelerator: None
) -> None:
    params = jax.random.normal(key, (16, 32)) / 4
    batch = jax.random.normal(jax.random.fold_in(key, 1), (5, 256, 16))
    one_pass = isgd.value_norms_and_mean(layer)
    text = str(jax.make_jaxpr(one_pass)(params, batch, jnp.ones(5)))
    assert "bf16[5,1,16,32] = dot_general" in text
    _, norms, mean = jax.jit(one_pass)(params, batch, jnp.ones(5))
    assert mean.dtype == norms.dtype == jnp.float32
    with jax.enable_x64(True):  # by the roundings of the layer itself, all else exact
        stacked = np.asarray(isgd.stacked_per_example_grads(layer)(params, batch), np.float64)
    np.testing.assert_allclose(norms, np.sqrt(np.sum(stacked**2, axis=(1, 2))), rtol=4e-3)
    np.testing.assert_allclose(mean, stacked.mean(0), atol=4e-3 * np.abs(stacked.mean(0)).max())
    in_float32 = str(jax.make_jaxpr(isgd.per_example_grads(lambda p, x: layer(p, x, jnp.float32)))(params, batch))
    assert "f32[5,1,16,32] = dot_general" in in_float32


def test_a_table_that_is_read_and_multiplied_is_formed_once_for_both(key: jax.Array, accelerator: None) -> None:
    """An embedding tied to the last layer, of long sequences: its product serves norms and mean."""

    def tied(table: jax.Array, tokens: jax.Array) -> jax.Array:
        logits = jnp.tanh(table[tokens]) @ table.T
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[::-1, None], 1))

    table, tokens = jax.random.normal(key, (40, 8)), jax.random.randint(key, (3, 512), 0, 40)
    one_pass = isgd.value_norms_and_mean(tied)
    products = [line for line in str(jax.make_jaxpr(one_pass)(table, tokens, jnp.ones(3))).splitlines()
                if "dot_general" in line and "512" not in line.split("=")[0]]  # fmt: skip
    assert len(products) == 1, products
    _, norms, mean = jax.jit(one_pass)(table, tokens, jnp.ones(3))
    oracle.check(tied, table, tokens)
    np.testing.assert_allclose(norms, oracle.norms(tied, table, tokens), rtol=1e-5)
    np.testing.assert_allclose(
        mean, jax.grad(lambda t: jnp.mean(jax.vmap(tied, (None, 0))(t, tokens)))(table), atol=1e-6
    )


def test_an_accelerator_takes_as_much_at_once_as_its_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for memory, scored, cache in ((60 << 30, 120 << 30, 60 << 26), (8 << 30, 16 << 30, 1 << 30)):
        monkeypatch.setattr(costs, "_memory", lambda platform, memory=memory: memory)
        assert (costs.machine().scored, costs.machine().cache) == (scored, cache)
