"""Losses, norms and mean in one pass: against the gradients of `vmap(jax.grad)`, whole and in slices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import images, mlp, mlp_loss

from isgd_jax import value_norms_and_mean
from isgd_jax.errors import ArgumentError
from isgd_jax.gradients import costs

WEIGHTS = np.linspace(0.5, 2.0, 7, dtype=np.float32)


@pytest.mark.parametrize("size", [3, None])  # slices of 3, of which the last is filled; all at once
def test_the_numbers_of_the_definition(key: jax.Array, size: int | None) -> None:
    params, batch = mlp(key, [12, 16, 5]), images(key, 7, 4, 12)
    params = {"net": params, "steps": jnp.int32(3)}  # of an integer the mean is a zero of its own dtype

    def loss_fn(params: Any, example: Any) -> Any:
        loss = mlp_loss(params["net"], example) + 0.1 * sum(jnp.sum(jnp.sin(x["w"])) for x in params["net"])
        return loss, {"twice": 2 * loss}

    asked = jax.jit(value_norms_and_mean(loss_fn, has_aux=True, microbatch_size=size))
    (losses, aux), norms, mean = asked(params, batch, WEIGHTS)
    formed = oracle.stacked(lambda net, example: loss_fn({"net": net}, example)[0], params["net"], batch)
    np.testing.assert_allclose(norms, oracle.norms_of(formed), rtol=1e-5)
    expected = WEIGHTS.astype(np.float64) @ oracle.flat(formed) / 7
    np.testing.assert_allclose(oracle.flat(jax.tree.map(lambda x: x[None], mean["net"]))[0], expected, atol=1e-6)
    assert (mean["steps"], mean["steps"].dtype) == (0, jnp.int32)
    plain = [float(loss_fn(params, jax.tree.map(lambda x, i=i: x[i], batch))[0]) for i in range(7)]
    np.testing.assert_allclose(losses, plain, rtol=1e-5)
    np.testing.assert_allclose(aux["twice"], 2 * losses, rtol=1e-6)


@pytest.mark.parametrize(("b", "size"), [(7, None), (7, 2), (9, 3), (8, 4), (7, 6)])
def test_the_average_of_both_halves_is_the_mean_and_each_is_made_of_its_own(
    key: jax.Array, b: int, size: int | None
) -> None:
    params, batch, weights = mlp(key, [12, 16, 5]), images(key, b, 4, 12), jnp.linspace(0.5, 2.0, b)
    asked = value_norms_and_mean(mlp_loss, halves=True, microbatch_size=size)
    losses, norms, (first, second) = jax.jit(asked)(params, batch, weights)
    formed = oracle.stacked(mlp_loss, params, batch)
    weighted = np.asarray(weights, np.float64)[:, None] * oracle.flat(formed) * 2 / b
    for mean, rows in ((first, weighted[: b // 2]), (second, weighted[b // 2 :])):
        found = oracle.flat(jax.tree.map(lambda x: x[None], mean))[0]
        np.testing.assert_allclose(found, np.sum(rows, 0), atol=1e-6)
    np.testing.assert_allclose(norms, oracle.norms_of(formed), rtol=1e-5)
    plain = [float(mlp_loss(params, jax.tree.map(lambda x, i=i: x[i], batch))) for i in range(b)]
    np.testing.assert_allclose(losses, plain, rtol=1e-5)


@pytest.mark.parametrize(("b", "size"), [(7, 4), (7, 2), (3, 2), (9, 8)])
def test_an_example_without_a_gradient_leaves_the_other_half_as_it_is(b: int, size: int) -> None:
    def loss_fn(w: Any, x: Any) -> Any:
        return jnp.sum(w * x)

    asked = jax.jit(value_norms_and_mean(loss_fn, halves=True, microbatch_size=size))
    for at in range(b):
        batch = jnp.arange(1.0, b + 1)[:, None].at[at].set(jnp.nan)
        _, norms, halves = asked(jnp.ones(1), batch, jnp.ones(b))
        parts = np.split(np.asarray(batch), [b // 2])
        np.testing.assert_allclose(halves, [np.sum(part, 0) * 2 / b for part in parts], rtol=1e-6)
        np.testing.assert_array_equal(norms, batch[:, 0])


def test_slices_are_summed_in_float32() -> None:
    asked = value_norms_and_mean(lambda w, x: w * x, microbatch_size=1)
    _, norms, mean = jax.jit(asked)(jnp.bfloat16(1.0), jnp.ones(3000, jnp.bfloat16), jnp.ones(3000))
    assert (float(mean), mean.dtype, norms.shape) == (1.0, jnp.bfloat16, (3000,))


def test_by_default_slices_on_a_cpu_alone_and_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight rows of 100 numbers to 10: of each example 100·8 and 10·8 numbers are held, and 1,000 are parameters."""

    def loops(b: int, platform: str, **options: Any) -> int:
        asked = value_norms_and_mean(lambda w, x: jnp.sum(jnp.tanh(x @ w)), **options)
        args = (jnp.ones((100, 10)), jnp.ones((b, 8, 100)), jnp.ones(b))
        return jax.jit(asked).trace(*args).lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")

    assert loops(64, "cpu") == 0  # a small batch is taken at once
    assert loops(16, "cuda", microbatch_size=4) == loops(16, "cpu", microbatch_size=4) == 1
    monkeypatch.setattr(costs, "CPU", costs.CPU._replace(written=4_000))
    assert (loops(64, "cpu"), loops(64, "cuda")) == (1, 0)
    assert loops(4, "cpu") == 0

    def convolved(kernel: Any, x: Any) -> Any:
        return jnp.sum(jnp.tanh(jax.lax.conv(x[None], kernel, (1, 1), "SAME")))

    args = (jnp.ones((4, 3, 3, 3)), jnp.ones((64, 3, 16, 16)), jnp.ones(64))
    sliced = str(jax.make_jaxpr(value_norms_and_mean(convolved))(*args))
    monkeypatch.setattr(costs, "CPU", costs.CPU._replace(written=16 << 20))
    whole = str(jax.make_jaxpr(value_norms_and_mean(convolved))(*args))
    assert "f32[8,3,16,16] = dynamic_slice" in sliced
    assert "f32[8,3,16,16] = dynamic_slice" not in whole


def test_how_many_at_a_time() -> None:
    """Of 16 MiB, or twice the parameters; eight at least; a number that divides the batch, where one is near. In loops
    as many as write, at a turn, what the parameters hold."""
    asked = [(128, 1, 8), (97, 1, 8), (128, 6, 33), (16, 50, 1), (1, 100, 1), (32, 0, 1)]
    found = [costs.examples_at_a_time(b, written << 20, params << 20) for b, written, params in asked]
    assert found == [16, 16, 8, 8, None, None]
    assert costs.examples_at_a_time(512, 1 << 20, 300 << 20, most=64 << 20) == 64  # parameters are large
    looped = [(128, 1 << 20, 1 << 10), (128, 1 << 20, 330 << 10), (128, 4 << 20, 4 << 20), (128, 32 << 20, 5 << 20)]
    found = [costs.examples_at_a_time(b, written, params, turn=written // 64) for b, written, params in looped]
    assert found == [16, 16, 64, 8]


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.devices(2)
def test_over_a_mesh_each_device_has_its_examples_at_once(
    key: jax.Array, monkeypatch: pytest.MonkeyPatch, types: AxisType
) -> None:
    monkeypatch.setattr(costs, "CPU", costs.CPU._replace(written=1))
    params, batch = [{"w": jnp.ones((12, 5))}], images(key, 8, 4, 12)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(types,), devices=jax.devices()[:2])
    placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))

    def loss_fn(params: Any, example: Any) -> Any:
        return jnp.sum(jnp.sin(example["x"] @ params[0]["w"]))

    with jax.set_mesh(mesh):
        default, whole = (
            str(jax.make_jaxpr(value_norms_and_mean(loss_fn, microbatch_size=size))(params, placed, jnp.ones(8)))
            for size in ("auto", None)
        )
        assert default == whole
        with pytest.raises(ArgumentError, match="mesh of several devices"):
            value_norms_and_mean(loss_fn, microbatch_size=4)(params, placed, jnp.ones(8))


def test_what_is_asked_wrongly_is_refused() -> None:
    with pytest.raises(ArgumentError, match="positive integer"):
        value_norms_and_mean(lambda w, x: w * x, microbatch_size=0)
    with pytest.raises(ArgumentError, match=r"weights of 3 examples must have shape \(3,\), got \(2,\)"):
        value_norms_and_mean(lambda w, x: w * x)(jnp.float32(1.0), jnp.ones(3), jnp.ones(2))
    with pytest.raises(ArgumentError, match="at least 2"):
        value_norms_and_mean(lambda w, x: w * x, halves=True)(jnp.float32(1.0), jnp.ones(1), jnp.ones(1))
