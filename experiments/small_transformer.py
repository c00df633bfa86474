"""A small transformer for images: every row of pixels is a token. ``--model small_transformer:factory``."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

WIDTH, HEADS, BLOCKS = 32, 4, 2


class Transformer(nn.Module):
    """Pre-norm blocks of attention and a two-layer perceptron; the mean token is classified."""

    num_classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        rows = x.reshape(x.shape[0], -1)
        place = self.param("place", nn.initializers.normal(0.02), (rows.shape[0], WIDTH))
        tokens = nn.Dense(WIDTH)(rows) + place
        for _ in range(BLOCKS):
            normed = nn.LayerNorm()(tokens)
            tokens = tokens + nn.MultiHeadDotProductAttention(HEADS)(normed, normed)
            tokens = tokens + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(tokens))))
        return nn.Dense(self.num_classes)(jnp.mean(nn.LayerNorm()(tokens), axis=0))


def factory(num_classes: int) -> Transformer:
    """What the command line asks for."""
    return Transformer(num_classes)
