"""Norms of all examples and their mean gradient: against one `jax.grad` an example, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import linear_loss, linear_problem, mlp_loss

from isgd_jax.gradients.all_examples import norms_and_mean_gradient

SIZE = 37


def net(dtype: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Parameters and host data; the same numbers in every dtype."""
    rng = np.random.default_rng(0)
    sizes = ((6, 5), (5, 3))
    weights = [{"w": rng.normal(size=size).astype(np.float32), "b": np.zeros(size[1])} for size in sizes]
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), weights)
    x = rng.normal(size=(SIZE, 2, 6)).astype(np.float32).astype(dtype)
    return params, {"x": x, "y": rng.integers(0, 3, SIZE).astype(np.int32)}


def one_by_one() -> tuple[np.ndarray, Any]:
    """The definition, in float64: a gradient of each example, alone."""
    with jax.enable_x64(True):
        params, data = net(np.float64)
        grads = [jax.grad(mlp_loss)(params, jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), data)) for i in range(SIZE)]
        norms = [np.sqrt(sum(np.sum(np.square(np.asarray(x))) for x in jax.tree.leaves(g))) for g in grads]
        mean = jax.tree.map(lambda *every: np.mean(np.stack(every), axis=0), *grads)
        return np.array(norms), jax.tree.map(np.asarray, mean)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("batch_size", [8, 256])
def test_the_definition_one_gradient_an_example(where: str, batch_size: int) -> None:
    norms, mean = one_by_one()
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 2e-5)):
        with jax.enable_x64(dtype == np.float64):
            params, data = net(dtype)
            data = jax.tree.map(jnp.asarray, data) if where == "device" else data
            found, found_mean = norms_and_mean_gradient(mlp_loss, params, data, batch_size=batch_size)
            assert found.dtype == dtype
            np.testing.assert_allclose(found, norms, rtol=tolerance)
            largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(mean))
            for ours, theirs in zip(jax.tree.leaves(found_mean), jax.tree.leaves(mean), strict=True):
                np.testing.assert_allclose(ours, theirs, atol=tolerance * largest)


def test_by_the_closed_form_inside_jit() -> None:
    """Squared error of a linear model: the gradient of an example is its residual times (x, 1)."""
    params, data = linear_problem(SIZE)
    norms, mean = jax.jit(lambda p, d: norms_and_mean_gradient(linear_loss, p, d, batch_size=10))(params, data)
    x, y = np.asarray(data["x"], np.float64), np.asarray(data["y"], np.float64)
    residual = x @ np.asarray(params["w"], np.float64) - y
    np.testing.assert_allclose(norms, np.abs(residual) * np.sqrt((x**2).sum(1) + 1), rtol=1e-4)
    np.testing.assert_allclose(mean["w"], (residual[:, None] * x).mean(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(mean["b"], residual.mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_low_precision_is_summed_in_float32_and_rounded_nowhere(batch_size: int) -> None:
    """Each gradient is x itself. In bfloat16 a sum would stand still at 256, and means of batches of 64, each rounded
    to it, would be wrong in the fourth digit."""
    x = jnp.asarray(1.0 + np.random.default_rng(0).random(3000), jnp.bfloat16)
    exact = np.mean(np.asarray(x, np.float64))
    for data in (x, np.asarray(x)):
        norms, mean = norms_and_mean_gradient(lambda w, x: w * x, jnp.bfloat16(1.0), data, batch_size=batch_size)
        assert (mean.dtype, norms.shape) == (jnp.float32, (3000,))
        assert abs(float(mean) - exact) < 2e-6 * exact


def test_asking_again_compiles_nothing() -> None:
    params, data = linear_problem(SIZE)
    traced = []

    def loss_fn(params: Any, example: Any) -> jax.Array:
        traced.append(1)
        return linear_loss(params, example)

    norms_and_mean_gradient(loss_fn, params, data)
    before = len(traced)
    norms_and_mean_gradient(loss_fn, jax.tree.map(lambda x: x + 1, params), data)
    assert len(traced) == before


@pytest.mark.parametrize("shape", [(0,), (4,)])
def test_what_is_not_there_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one example and a positive batch_size"):
        norms_and_mean_gradient(lambda w, x: w * x, jnp.float32(1.0), jnp.ones(shape), batch_size=0)
