"""Scores from eight devices against scores from one."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from problems import images, mlp, mlp_loss

import isgd_jax as isgd
from isgd_jax.engines import scorers

pytestmark = pytest.mark.devices(8)

score = scorers.grad_norm(mlp_loss)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 8, 21])
def test_scores_are_those_of_the_wrapped_scorer_for_any_batch_size(key, size):
    params, batch = mlp(key, [12, 16, 5]), images(key, size, 12)
    np.testing.assert_allclose(isgd.sharded(score)(params, batch), jax.jit(score)(params, batch), rtol=1e-6)


@pytest.mark.slow
def test_scores_are_those_of_the_definition_and_not_summed_over_devices(key):
    params, batch = mlp(key, [12, 16, 5]), images(key, 16, 12)
    expected = oracle.norms(mlp_loss, params, batch)
    np.testing.assert_allclose(isgd.sharded(score)(params, batch), expected, rtol=1e-5)


def test_scores_come_home(key):
    params, batch = mlp(key, [12, 16, 5]), images(key, 8, 12)
    for device in (None, jax.devices()[3]):
        here = (params, batch) if device is None else jax.device_put((params, batch), device)
        expected, scores = jax.jit(score)(*here), isgd.sharded(score)(*here)
        assert scores.sharding == expected.sharding
        assert scores.committed == expected.committed
        assert (scores.dtype, scores.shape) == (expected.dtype, expected.shape)


def test_parameters_are_copied_to_the_devices_once(key, monkeypatch):
    params, batch = mlp(key, [12, 16, 5]), images(key, 8, 12)
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.P()))
    put, copied = jax.device_put, []
    monkeypatch.setattr(jax, "device_put", lambda x, *to, **how: copied.append(x) or put(x, *to, **how))
    many = isgd.sharded(score)
    for arguments, expected in ((params, 4), (params, 0), (replicated, 0), (jax.tree.map(jnp.copy, params), 4)):
        copied.clear()
        many(arguments, batch)
        assert sum(x.ndim <= 2 for x in copied if isinstance(x, jax.Array)) == expected


def test_a_changed_numpy_parameter_is_seen(key):
    params, batch = jax.tree.map(np.array, mlp(key, [12, 16, 5])), images(key, 8, 12)
    many = isgd.sharded(score)
    before = many(params, batch)
    params[0]["w"] *= 2
    assert not np.allclose(before, many(params, batch))


def test_batches_of_numpy_arrays_and_keys(key):
    def noisy(params, batch):
        return jax.vmap(lambda k, x: jnp.abs(jax.random.normal(k)) + params * x)(batch["key"], batch["x"])

    batch = {"key": jax.random.split(key, 11), "x": np.arange(11, dtype=np.float32)}
    np.testing.assert_allclose(isgd.sharded(noisy)(jnp.float32(2), batch), noisy(jnp.float32(2), batch), rtol=1e-6)


@pytest.mark.slow
def test_one_device_is_enough(key):
    params, batch = mlp(key, [12, 16, 5]), images(key, 5, 12)
    one = isgd.sharded(score, devices=jax.devices()[:1])
    np.testing.assert_allclose(one(params, batch), jax.jit(score)(params, batch), rtol=1e-6)


def test_tracers_are_refused(key):
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(isgd.sharded(score))(mlp(key, [12, 16, 5]), images(key, 8, 12))


def test_sketches_come_home_with_the_scores(key):
    def sketching(params, batch):
        return score(params, batch), jnp.asarray(batch["x"]) * 2

    params, batch = mlp(key, [12, 16, 5]), images(key, 21, 12)
    norms, sketches = isgd.sharded(sketching)(params, batch)
    np.testing.assert_allclose(norms, jax.jit(score)(params, batch), rtol=1e-6)
    np.testing.assert_array_equal(sketches, 2 * batch["x"])
    assert sketches.devices() == norms.devices() == {jax.devices()[0]}
