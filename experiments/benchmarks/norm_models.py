"""The fixed models of `norms.py`: each a loss of one example, parameters, and a batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
    """The paper's network, 3072-2048x4-10."""

    @nn.compact
    def __call__(self, x):
        for _ in range(4):
            x = nn.relu(nn.Dense(2048)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """In the manner of LeNet, on 28 x 28."""

    @nn.compact
    def __call__(self, x):
        for width in (32, 64):
            x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), strides=(2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(256)(x.reshape(-1))))


class Residual(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, self.width, use_bias=False)
        y = nn.relu(nn.GroupNorm(8)(conv((3, 3), strides=self.stride)(x)))
        y = nn.GroupNorm(8)(conv((3, 3))(y))
        if x.shape != y.shape:
            x = nn.GroupNorm(8)(conv((1, 1), strides=self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Fourteen layers, CIFAR size, widths 32 to 128, GroupNorm."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(8)(nn.Conv(32, (3, 3), use_bias=False)(x)))
        for width, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
            x = Residual(width, stride)(x)
        return nn.Dense(self.num_classes)(x.mean((0, 1)))


class Block(nn.Module):
    """Attention and a dense net, normalised first."""

    causal: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        width, norm = x.shape[-1], partial(nn.LayerNorm, dtype=self.dtype)
        dense, general = partial(nn.Dense, dtype=self.dtype), partial(nn.DenseGeneral, dtype=self.dtype)
        normed = norm()(x)
        q, k, v = (general((width // 64, 64))(normed) for _ in range(3))
        mask = nn.make_causal_mask(jnp.ones(x.shape[0])) if self.causal else None
        mixed = nn.dot_product_attention(q, k, v, mask=mask)
        x = x + general(width, axis=(-2, -1))(mixed)
        return x + dense(width)(nn.gelu(dense(4 * width)(norm()(x))))


class ViT(nn.Module):
    """64 tokens, width 192, 6 layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(192, (4, 4), strides=4)(x).reshape(64, 192)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape)
        for _ in range(6):
            x = Block()(x)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(0))


class GPT(nn.Module):
    """64 tokens of 4096 or more, width 256, 4 layers, the embedding tied to the last layer."""

    vocabulary: int = 4096
    length: int = 64
    width: int = 256
    layers: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)
        place = self.param("position", nn.initializers.normal(0.02), (self.length, self.width))
        x = embed(tokens) + place.astype(self.dtype)
        for _ in range(self.layers):
            x = Block(causal=True, dtype=self.dtype)(x)
        return embed.attend(nn.LayerNorm(dtype=self.dtype)(x))


class LSTM(nn.Module):
    """64 steps of 32 numbers, 128 cells; the last state is classified."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.RNN(nn.OptimizedLSTMCell(128))(x[None])[0, -1])


class Tanh(nn.Module):
    """2-64x3-1, as for physics-informed networks."""

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = jnp.tanh(nn.Dense(64)(x))
        return nn.Dense(1)(x)[0]


class Siren(nn.Module):
    """2-256x3-3, sines (Sitzmann et al. 2020): the color at a place of a picture."""

    @nn.compact
    def __call__(self, x):
        for scale in (1.0, 6.0**0.5 / 30, 6.0**0.5 / 30):
            x = jnp.sin(30 * nn.Dense(256, kernel_init=nn.initializers.uniform(scale / 8))(x))
        return nn.Dense(3)(x)


MODELS = {
    "mlp": (MLP(), (3072,)),
    "cnn": (CNN(), (28, 28, 1)),
    "resnet": (ResNet(), (32, 32, 3)),
    "vit": (ViT(), (32, 32, 3)),
    "gpt": (GPT(), 4096),
    "gpt32k": (GPT(32_768), 32_768),
    "gpt2": (GPT(50_257, 1_024, 768, 12, jnp.bfloat16), 50_257),
    "lstm": (LSTM(), (64, 32)),
}

FIELDS = ("pinn-reverse", "pinn-forward", "siren")
"""Models of points: a batch is 1,024 of them."""

POINTS, RANK = 1024, 8


def make(name: str, size: int, *, exact: bool = False) -> tuple[Callable[[Any, Any], Any], Any, Any]:
    """``(loss_fn, params, batch)``: random weights, random data of the right shape; all in float32 if ``exact``."""
    if name in FIELDS:
        return _field(name, size)
    if name == "lora":
        return _adapted(*make("gpt", size))
    if name == "layers":
        return _layers(size)
    model, shape = MODELS[name]
    if exact and isinstance(model, GPT):
        model = model.clone(dtype=jnp.float32)
    inputs, labels = jax.random.split(jax.random.key(0))
    if isinstance(shape, int):
        tokens = jax.random.randint(inputs, (size, model.length + 1), 0, shape)
        batch = {"x": tokens[:, :-1], "y": tokens[:, 1:]}
    else:
        batch = {"x": jax.random.normal(inputs, (size, *shape)), "y": jax.random.randint(labels, (size,), 0, 10)}

    def loss_fn(params: Any, example: Any) -> Any:
        logits = nn.log_softmax(model.apply(params, example["x"]).astype(jnp.float32))
        return -jnp.mean(jnp.take_along_axis(logits, example["y"][..., None], axis=-1))

    return loss_fn, jax.jit(model.init)(jax.random.key(1), batch["x"][0]), batch


def _field(name: str, size: int) -> tuple[Callable[[Any, Any], Any], Any, Any]:
    """Burgers' residual by nested reverse or by nested forward differentiation; or a picture by sines."""
    points = jax.random.uniform(jax.random.key(0), (size, 2), minval=-1.0)
    model = Siren() if name == "siren" else Tanh()
    params = jax.jit(model.init)(jax.random.key(1), points[0])
    if name == "siren":
        batch = {"x": points, "y": jax.random.uniform(jax.random.key(2), (size, 3))}
        return lambda params, example: jnp.sum((model.apply(params, example["x"]) - example["y"]) ** 2), params, batch
    derivative = jax.grad if name == "pinn-reverse" else jax.jacfwd

    def loss_fn(params: Any, point: Any) -> Any:
        def u(t: Any, x: Any) -> Any:
            return model.apply(params, jnp.stack([t, x]))

        u_x = derivative(u, 1)
        return (derivative(u, 0)(*point) + u(*point) * u_x(*point) - 0.0032 * derivative(u_x, 1)(*point)) ** 2

    return loss_fn, params, points


def _layers(size: int) -> tuple[Callable[[Any, Any], Any], Any, Any]:
    """A transformer of the GPT's sizes in plain JAX: all layers in one array, taken one by one in a loop of Python."""
    layers, width, length, heads, words = 4, 256, 64, 4, 4096
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    keys = jax.random.split(jax.random.key(1), len(shapes) + 2)
    params = {
        name: jax.random.normal(key, (layers, *shape)) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    params["embed"] = 0.02 * jax.random.normal(keys[-2], (words, width))
    tokens = jax.random.randint(keys[-1], (size, length + 1), 0, words)

    def normed(x: Any) -> Any:
        return (x - jnp.mean(x, -1, keepdims=True)) * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-6)

    def loss_fn(params: Any, tokens: Any) -> Any:
        x = params["embed"][tokens[:-1]]
        for layer in range(layers):
            own = {name: params[name][layer] for name in shapes}
            parts = (normed(x) @ kernel for kernel in jnp.split(own["qkv"], 3, axis=1))
            mixed = nn.dot_product_attention(
                *(part.reshape(length, heads, -1) for part in parts), mask=nn.make_causal_mask(jnp.ones(length))
            )
            x = x + mixed.reshape(length, width) @ own["out"]
            x = x + nn.gelu(normed(x) @ own["up"]) @ own["down"]
        logits = nn.log_softmax(normed(x) @ params["embed"].T)
        return -jnp.mean(jnp.take_along_axis(logits, tokens[1:, None], axis=-1))

    return loss_fn, params, tokens


def _adapted(loss_fn: Any, frozen: Any, batch: Any) -> tuple[Callable[[Any, Any], Any], Any, Any]:
    """LoRA (Hu et al. 2021): products of rank 8 beside the kernels of queries and values, all else frozen."""
    kernels = [f"Block_{layer}/DenseGeneral_{which}" for layer in range(4) for which in (0, 2)]
    flat = {name: frozen["params"][name.split("/")[0]][name.split("/")[1]]["kernel"] for name in kernels}
    keys = jax.random.split(jax.random.key(2), len(kernels))
    adapters = {
        name: {"a": jax.random.normal(key, (256, RANK)) / 16, "b": jax.random.normal(key, (RANK, 256)) / 100}
        for name, key in zip(kernels, keys, strict=True)
    }

    def adapted(adapters: Any, example: Any) -> Any:
        inner = {block: dict(layers) for block, layers in frozen["params"].items() if block.startswith("Block")}
        for name, kernel in flat.items():
            block, layer = name.split("/")
            more = (adapters[name]["a"] @ adapters[name]["b"]).reshape(kernel.shape)
            inner[block][layer] = inner[block][layer] | {"kernel": kernel + more}
        return loss_fn({"params": frozen["params"] | inner}, example)

    return adapted, adapters, batch
