"""Every layer of Flax Linen that has parameters, against the definition; and that its weights stay factors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import check

from isgd_jax.gradients.leaf import Factored, is_factored

pytestmark = pytest.mark.slow

slow = pytest.mark.slow


class Block(nn.Module):
    """A residual layer, in the form that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(x.shape[-1])(jnp.tanh(nn.LayerNorm()(x))), None


class Layers(nn.Module):
    """Three residual layers whose parameters are stacked."""

    block: type = Block

    @nn.compact
    def __call__(self, x):
        return nn.scan(self.block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)[0]


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(Block)()(nn.remat(Block)()(x)[0])[0]


class Tied(nn.Module):
    """A language model whose embedding is its last layer too."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 4)
        return nn.log_softmax(embed.attend(nn.Dense(4)(embed(tokens))))


class Attention(nn.Module):
    """Causal attention; with ``groups``, so many query heads share a key."""

    groups: int = 1

    @nn.compact
    def __call__(self, x):
        q = nn.DenseGeneral((2, self.groups, 3))(x)
        k, v = (nn.DenseGeneral((2, 3))(x) for _ in range(2))
        scores = jnp.einsum("tgqd,sgd->gqts", q, k)
        seen = jnp.tril(jnp.ones((x.shape[0], x.shape[0]), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min))
        mixed = jnp.einsum("gqts,sgd->tgqd", weights, v)
        return nn.DenseGeneral(x.shape[-1], axis=(-3, -2, -1))(mixed)


CASES = [
    pytest.param(nn.Dense(5), (4,), id="Dense"),
    pytest.param(nn.Dense(5), (7, 4), id="Dense on a sequence"),
    pytest.param(nn.DenseGeneral((2, 5), axis=(-2, -1)), (6, 2, 4), id="DenseGeneral"),
    pytest.param(
        nn.DenseGeneral(5, axis=-1, batch_dims=(0,)), (6, 2, 4), id="DenseGeneral, a weight a row", marks=slow
    ),
    pytest.param(nn.Einsum((2, 4, 5), "thd,hdk->thk"), (6, 2, 4), id="Einsum", marks=slow),
    pytest.param(nn.Conv(5, (3,)), (8, 4), id="Conv 1-D", marks=slow),
    pytest.param(nn.Conv(5, (3, 3)), (8, 8, 4), id="Conv 2-D"),
    pytest.param(nn.Conv(5, (3, 3)), (6, 6, 70), id="Conv 2-D, wide", marks=slow),
    pytest.param(nn.Conv(5, (3, 2, 3)), (5, 6, 5, 2), id="Conv 3-D", marks=slow),
    pytest.param(nn.Conv(5, (3, 3), strides=2), (9, 8, 4), id="Conv, strides"),
    pytest.param(
        nn.Conv(5, (3, 3), kernel_dilation=(2, 1), padding="VALID"), (9, 8, 4), id="Conv, dilation", marks=slow
    ),
    pytest.param(
        nn.Conv(5, (3, 3), input_dilation=2, padding=((2, 1), (1, 1))), (5, 5, 4), id="Conv, input dilation", marks=slow
    ),
    pytest.param(nn.Conv(6, (3, 3), feature_group_count=2), (8, 8, 4), id="Conv, groups"),
    pytest.param(nn.Conv(8, (3, 3), feature_group_count=4), (8, 8, 4), id="Conv, depthwise", marks=slow),
    pytest.param(nn.Conv(5, (1, 1)), (8, 8, 4), id="Conv, 1 x 1", marks=slow),
    pytest.param(nn.Conv(5, (3, 3), padding="CIRCULAR"), (8, 8, 4), id="Conv, circular", marks=slow),
    pytest.param(nn.ConvTranspose(5, (3, 3), strides=(2, 2)), (5, 5, 4), id="ConvTranspose", marks=slow),
    pytest.param(nn.ConvLocal(5, (3,)), (8, 4), id="ConvLocal", marks=slow),
    pytest.param(nn.MultiHeadDotProductAttention(2), (6, 8), id="MultiHeadDotProductAttention", marks=slow),
    pytest.param(Attention(), (6, 4), id="causal attention", marks=slow),
    pytest.param(Attention(groups=2), (6, 4), id="grouped-query attention", marks=slow),
    pytest.param(nn.RNN(nn.SimpleCell(5)), (6, 4), id="RNN"),
    pytest.param(nn.RNN(nn.OptimizedLSTMCell(5)), (6, 4), id="LSTM", marks=slow),
    pytest.param(nn.RNN(nn.GRUCell(5), reverse=True), (6, 4), id="GRU", marks=slow),
    pytest.param(Layers(), (6, 4), id="scan over layers"),
    pytest.param(Layers(nn.remat(Block, prevent_cse=False)), (6, 4), id="scan over remat layers", marks=slow),
    pytest.param(Remat(), (6, 4), id="remat", marks=slow),
]

FORMED = [
    pytest.param(nn.LayerNorm(), (6, 4), id="LayerNorm"),
    pytest.param(nn.RMSNorm(), (6, 4), id="RMSNorm", marks=slow),
    pytest.param(nn.GroupNorm(2), (6, 6, 4), id="GroupNorm", marks=slow),
]

TOKENS = [
    pytest.param(nn.Embed(11, 4), id="Embed"),
    pytest.param(Tied(), id="tied Embed"),
    pytest.param(nn.Sequential([nn.Embed(11, 4), nn.RNN(nn.SimpleCell(3))]), id="Embed, then RNN", marks=slow),
]


def loss_and_params(model, example, key):
    """The sum of sines of the outputs, and random parameters: biases and scales too, of which none is zero or one."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, key, example)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / np.sqrt(x.shape[-1]), x.dtype), shapes)
    return lambda params, example: jnp.sum(jnp.sin(model.apply(params, example))), params


@pytest.mark.parametrize(("model", "shape"), [*CASES, *FORMED])
def test_layers(model, shape, key):
    with jax.numpy_rank_promotion("allow"):  # Flax's own
        batch = jnp.asarray(np.random.default_rng(1).normal(size=(3, *shape)), jnp.float32)
        loss_fn, params = loss_and_params(model, batch[0], key)
        grads = check(loss_fn, params, batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads, is_leaf=is_factored):
        name = jax.tree_util.keystr(path)
        assert is_factored(leaf) or "kernel" not in name, name


@pytest.mark.parametrize("model", TOKENS)
def test_tokens(model, key):
    with jax.numpy_rank_promotion("allow"):
        batch = jnp.asarray(
            np.random.default_rng(1).integers(0, 5, (3, 9)), jnp.int32
        )  # of eleven, so that they repeat
        loss_fn, params = loss_and_params(model, batch[0], key)
        grads = check(loss_fn, params, batch)
    embeddings = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads, is_leaf=is_factored)
        if "embedding" in jax.tree_util.keystr(path)
    ]
    assert all(isinstance(leaf, Factored) for leaf in embeddings)
