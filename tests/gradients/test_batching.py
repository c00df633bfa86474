"""Scoring a few examples at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problems import images, mlp, mlp_loss

from isgd_jax.engines import scorers
from isgd_jax.gradients import costs


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_scores_are_the_same_for_any_size(key, size):
    params, batch = mlp(key, [12, 16, 5]), images(key, 7, 4, 12)
    expected = oracle.norms(mlp_loss, params, batch)
    scores = jax.jit(scorers.grad_norm(mlp_loss, microbatch_size=size))(params, batch)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.slow
def test_by_default_memory_stays_bounded_however_large_the_batch(
    key: jax.Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention over 64 tokens, 16,384 sequences: by XLA's count 1.8 GiB at once (1.3 on a GPU)."""
    monkeypatch.setattr(costs, "machine", lambda: costs.CPU)

    def loss_fn(params, tokens):
        x = params["embed"][tokens]
        mixed = jax.nn.softmax(x @ params["q"] @ x.T) @ x
        return jnp.sum(jnp.sin(mixed @ params["out"]))

    one, two, three = jax.random.split(key, 3)
    params = {
        "embed": jax.random.normal(one, (50, 32)),
        "q": jax.random.normal(two, (32, 32)),
        "out": jax.random.normal(three, (32, 32)),
    }
    many = jax.ShapeDtypeStruct((16_384, 64), jnp.int32)

    def temporary(scorer):
        return jax.jit(scorer).lower(params, many).compile().memory_analysis().temp_size_in_bytes

    assert temporary(scorers.grad_norm(loss_fn, microbatch_size=None)) > 2 * costs.CPU.scored
    assert temporary(scorers.grad_norm(loss_fn)) < costs.CPU.scored


def test_small_batches_are_scored_at_once_by_default(key: jax.Array) -> None:
    params, batch = mlp(key, [12, 16, 5]), images(key, 256, 4, 12)
    whole, default = (
        str(jax.make_jaxpr(scorers.grad_norm(mlp_loss, microbatch_size=size))(params, batch)) for size in (None, "auto")
    )
    assert default == whole


@pytest.mark.slow
@pytest.mark.devices(8)
def test_a_batch_that_is_split_over_devices_stays_split_in_its_slices(key: jax.Array) -> None:
    params, batch = mlp(key, [12, 16, 5]), images(key, 64, 4, 12)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    score = jax.jit(scorers.grad_norm(mlp_loss, microbatch_size=16))
    np.testing.assert_allclose(score(params, placed), score(params, batch), rtol=1e-5)
    assert "all-gather" not in score.lower(params, placed).compile().as_text()


@pytest.mark.parametrize("size", [0, -1, 1.5, "all"])
def test_other_sizes_are_refused(size):
    with pytest.raises((ValueError, TypeError)):
        scorers.grad_norm(mlp_loss, microbatch_size=size)
