"""How exact per-example norms are: forty-eight models, in every type, against one float64 gradient an example.

Claims     the error of a norm is at most four times that of `vmap(grad)` in the same type, or 1e-6 of the norm in
           float32 and 4e-3 in bfloat16 and float16; in float64 at most 1e-11.
Command    python experiments/benchmarks/exactness.py [--models linen nnx] [--types float32] [--seeds 3]
Time       six minutes of one core
Result     the claims hold for all 48 (JAX 0.10.2, two seeds, in 16 bits one; Haiku 0.0.17, which is not installed with
           the rest). The largest of our errors, and of `vmap(grad)`'s, by the type, and the model it was in:

           float64    3.4e-15  3.3e-15  Burgers' equation by nested forward derivatives
           float32    1.9e-06  1.9e-06  a sine network
           bfloat16   6.7e-01  6.7e-01  the same, whose phases bfloat16 does not hold
           float16    1.1e-01  1.1e-01  the same

           Our error is 0.3 to 5.8 times that of `vmap(grad)`; where it is more than 1.9 times, it is below 2.4e-7.

The float64 gradients are those of `jax.grad`, one example at a time, at the very numbers that the narrower type holds:
what is compared is arithmetic alone. An error is the largest, of five examples and all seeds, of the distance of two
norms over the larger one. Parameters are random, biases and scales too; losses are sums of sines or squares of outputs.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import isgd_jax as isgd

EXAMPLES = 5
LIMITS = {"float64": 1e-11, "float32": 1e-6, "bfloat16": 4e-3, "float16": 4e-3}
TIMES = 4.0
NARROW = ("bfloat16", "float16")

Array = jax.Array
Loss = Callable[[Any, Any], Array]


class Model(NamedTuple):
    """A loss of one example, parameters and a batch, in float64; and the types it can be asked in."""

    loss_fn: Loss
    params: Any
    batch: Any
    types: tuple[str, ...] = tuple(LIMITS)


MODELS: dict[str, Callable[[np.random.Generator], Model]] = {}


def model(name: str) -> Callable[[Any], Any]:
    """Enter a model under a name, ``library/what it is``."""

    def enter(make: Callable[[np.random.Generator], Model]) -> Any:
        MODELS[name] = make
        return make

    return enter


def numbers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal, over the root of the last but one axis: outputs stay about 1."""
    return rng.normal(size=shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1)


def drawn_like(rng: np.random.Generator, tree: Any) -> Any:
    """A tree of such numbers."""
    return jax.tree.map(
        lambda x: jnp.asarray(numbers(rng, *x.shape)) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def points(rng: np.random.Generator, *shape: int) -> Array:
    """A batch of normal inputs."""
    return jnp.asarray(rng.normal(size=(EXAMPLES, *shape)))


def tokens(rng: np.random.Generator, length: int, size: int) -> Array:
    """A batch of sequences whose tokens repeat."""
    return jnp.asarray(rng.integers(0, size // 2, (EXAMPLES, length)), jnp.int32)


def linen(module: nn.Module, *shape: int, size: int = 0) -> Callable[[np.random.Generator], Model]:
    """A module of Flax Linen on arrays of a shape, or on tokens of a vocabulary of ``size``."""

    def make(rng: np.random.Generator) -> Model:
        batch = tokens(rng, shape[0], size) if size else points(rng, *shape)
        params = drawn_like(rng, jax.eval_shape(module.init, jax.random.key(0), batch[0]))
        return Model(lambda params, x: jnp.sum(jnp.sin(module.apply(params, x))), params, batch)

    return make


class Attention(nn.Module):
    """Causal, ``groups`` query heads to each key, with a residual dense net behind it."""

    groups: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        normed = nn.LayerNorm()(x)
        q = nn.DenseGeneral((2, self.groups, 4))(normed)
        k, v = (nn.DenseGeneral((2, 4))(normed) for _ in range(2))
        scores = jnp.einsum("tgqd,sgd->gqts", q, k)
        seen = jnp.tril(jnp.ones((x.shape[0], x.shape[0]), bool))
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min))
        x = x + nn.DenseGeneral(x.shape[-1], axis=(-3, -2, -1))(jnp.einsum("gqts,sgd->tgqd", weights, v))
        return x + nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(16)(nn.RMSNorm()(x))))


class Residual(nn.Module):
    """Two convolutions around which the input goes."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.relu(nn.GroupNorm(2)(nn.Conv(8, (3, 3), use_bias=False)(x)))
        y = nn.GroupNorm(2)(nn.Conv(8, (3, 3), strides=2, use_bias=False)(y))
        return nn.relu(y + nn.Conv(8, (1, 1), strides=2)(x)).mean((0, 1))


class Layer(nn.Module):
    """A residual layer, in the form that `flax.linen.scan` wants."""

    @nn.compact
    def __call__(self, x: Array, _: Any = None) -> tuple[Array, None]:
        return x + nn.Dense(x.shape[-1])(jnp.tanh(nn.LayerNorm()(x))), None


class Stacked(nn.Module):
    """Three of them, by a loop over their stacked parameters."""

    layer: Any = Layer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scanned = nn.scan(self.layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned()(x, None)[0]


class Recurrent(nn.Module):
    """A cell along a sequence, from zeros of the sequence's type."""

    cell: Any
    parts: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        zero = jnp.zeros(self.cell.features, x.dtype)
        return nn.RNN(self.cell)(x, initial_carry=zero if self.parts == 1 else (zero,) * self.parts)


class Tied(nn.Module):
    """A language model whose embedding is its last layer too."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        embed = nn.Embed(11, 6)
        return nn.log_softmax(embed.attend(nn.Dense(6)(embed(x))))


def conv(*args: Any, **options: Any) -> nn.Module:
    """A convolution between two nonlinear layers."""
    return nn.Sequential([nn.Dense(4), jnp.tanh, nn.Conv(*args, **options), jnp.tanh, nn.Dense(3)])


MODELS |= {
    "linen/dense net": linen(nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(16), nn.relu, nn.Dense(5)]), 8),
    "linen/dense net on a sequence": linen(nn.Sequential([nn.Dense(16), jnp.tanh, nn.Dense(5)]), 7, 8),
    "linen/a weight for each row": linen(nn.DenseGeneral(5, axis=-1, batch_dims=(0,)), 6, 2, 4),
    "linen/einsum": linen(nn.Einsum((2, 4, 5), "thd,hdk->thk"), 6, 2, 4),
    "linen/convolution 1-D": linen(conv(5, (3,)), 9, 4),
    "linen/convolution 2-D, strides": linen(conv(5, (3, 3), strides=2), 9, 8, 4),
    "linen/convolution, dilated": linen(conv(5, (3, 3), kernel_dilation=2), 9, 8, 4),
    "linen/convolution, groups": linen(conv(6, (3, 3), feature_group_count=2), 7, 7, 4),
    "linen/convolution, depthwise": linen(conv(8, (3, 3), feature_group_count=4), 7, 7, 4),
    "linen/convolution, transposed": linen(nn.ConvTranspose(5, (3, 3), strides=(2, 2)), 5, 5, 4),
    "linen/residual block": linen(Residual(), 8, 8, 3),
    "linen/causal attention": linen(Attention(), 6, 8),
    "linen/grouped-query attention": linen(Attention(2), 6, 8),
    "linen/LSTM": linen(Recurrent(nn.OptimizedLSTMCell(5), parts=2), 6, 4),
    "linen/GRU": linen(Recurrent(nn.GRUCell(5)), 6, 4),
    "linen/loop over layers": linen(Stacked(), 6, 4),
    "linen/loop over recomputed layers": linen(Stacked(nn.remat(Layer, prevent_cse=False)), 6, 4),
    "linen/tied embedding": linen(Tied(), 9, size=11),
}


def modules(
    make: Callable[[], Any], *shape: int, size: int = 0, types: tuple[str, ...] = tuple(LIMITS)
) -> Callable[[np.random.Generator], Model]:
    """A module of Flax NNX, split into parameters and the rest."""

    def made(rng: np.random.Generator) -> Model:
        batch = tokens(rng, shape[0], size) if size else points(rng, *shape)
        graph, params, rest = nnx.split(make(), nnx.Param, ...)

        def loss_fn(params: Any, x: Array) -> Array:
            return jnp.sum(jnp.sin(nnx.merge(graph, params, rest)(x)))

        return Model(loss_fn, drawn_like(rng, params), batch, types)

    return made


def rngs() -> nnx.Rngs:
    """Of first parameters that are replaced."""
    return nnx.Rngs(0)


class Transformed(nnx.Module):
    """Tokens, attention, a dense net. JAX has no such attention in float16 on CPUs."""

    def __init__(self) -> None:
        self.table = nnx.Param(jnp.zeros((12, 8)))  # `nnx.Embed` computes in the type that it was made with
        self.attention = nnx.MultiHeadAttention(2, 8, rngs=rngs(), decode=False)
        self.norm = nnx.LayerNorm(8, rngs=rngs())
        self.out = nnx.Linear(8, 12, rngs=rngs())

    def __call__(self, x: Array) -> Array:
        x = self.table[...][x]
        return nnx.log_softmax(self.out(self.norm(x + self.attention(x))))


MODELS |= {
    "nnx/dense net": modules(
        lambda: nnx.Sequential(nnx.Linear(6, 12, rngs=rngs()), nnx.gelu, nnx.Linear(12, 4, rngs=rngs())), 6
    ),
    "nnx/convolutions": modules(
        lambda: nnx.Sequential(nnx.Conv(3, 6, (3, 3), rngs=rngs()), nnx.relu, nnx.Conv(6, 4, (2, 2), rngs=rngs())),
        6,
        6,
        3,
    ),
    "nnx/low-rank update": modules(lambda: nnx.LoRALinear(6, 5, lora_rank=2, rngs=rngs()), 7, 6),
    "nnx/einsum": modules(lambda: nnx.Einsum("td,dhk->thk", (6, 2, 3), (2, 3), rngs=rngs()), 5, 6),
    "nnx/convolution and group norm": modules(
        lambda: nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=rngs()), nnx.GroupNorm(8, 2, rngs=rngs()), nnx.silu), 6, 6, 3
    ),
    "nnx/transformer": modules(Transformed, 7, size=12, types=("float64", "float32", "bfloat16")),
}


def equinox(make: Callable[[Array], Any], *shape: int, size: int = 0) -> Callable[[np.random.Generator], Model]:
    """A module of Equinox; its arrays are the parameters."""

    def made(rng: np.random.Generator) -> Model:
        batch = tokens(rng, shape[0], size) if size else points(rng, *shape)
        params, static = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)
        return Model(lambda p, x: jnp.sum(jnp.sin(eqx.combine(p, static)(x))), drawn_like(rng, params), batch)

    return made


class Scanned(eqx.Module):
    """A recurrent cell along a sequence."""

    cell: Any

    def __call__(self, x: Array) -> Array:
        zero = jnp.zeros(self.cell.hidden_size, x.dtype)
        return jax.lax.scan(lambda h, row: (self.cell(row, h), None), zero, x)[0]


class Attended(eqx.Module):
    """Attention of a sequence to itself."""

    attention: Any
    norm: Any

    def __call__(self, x: Array) -> Array:
        y = jax.vmap(self.norm)(x)
        return self.attention(y, y, y)


MODELS |= {
    "equinox/dense net": equinox(lambda key: eqx.nn.MLP(6, 4, 12, 2, activation=jnp.tanh, key=key), 6),
    "equinox/convolution": equinox(lambda key: eqx.nn.Conv2d(3, 5, 3, key=key), 3, 7, 7),
    "equinox/GRU": equinox(lambda key: Scanned(eqx.nn.GRUCell(4, 5, key=key)), 6, 4),
    "equinox/attention": equinox(
        lambda key: Attended(eqx.nn.MultiheadAttention(2, 8, key=key), eqx.nn.LayerNorm(8)), 6, 8
    ),
    "equinox/layer norm": equinox(
        lambda key: eqx.nn.Sequential([eqx.nn.Linear(6, 8, key=key), eqx.nn.LayerNorm(8)]), 6
    ),
}


def haiku() -> dict[str, Callable[[np.random.Generator], Model]]:
    """Models of Haiku, which is no longer developed and no part of the set-up: none where it is not installed."""
    try:
        import haiku as hk
    except ImportError:
        return {}

    def of(forward: Callable[[Array], Array], *shape: int) -> Callable[[np.random.Generator], Model]:
        def make(rng: np.random.Generator) -> Model:
            network, batch = hk.without_apply_rng(hk.transform(forward)), points(rng, *shape)
            params = drawn_like(rng, jax.eval_shape(network.init, jax.random.key(0), batch[0]))
            return Model(lambda params, x: jnp.sum(jnp.sin(network.apply(params, x))), params, batch)

        return make

    def convolved(x: Array) -> Array:
        return hk.Linear(4)(hk.Flatten()(jax.nn.relu(hk.Conv2D(6, 3)(x[None]))))[0]

    def attended(x: Array) -> Array:
        x = x + hk.MultiHeadAttention(2, 4, model_size=8, w_init=hk.initializers.VarianceScaling())(x, x, x)
        return hk.Linear(5)(hk.LayerNorm(-1, True, True)(x))

    def remembered(x: Array) -> Array:
        core = hk.GRU(5)
        return hk.Linear(3)(hk.dynamic_unroll(core, x, core.initial_state(None))[0])

    return {
        "haiku/dense net": of(lambda x: hk.nets.MLP([12, 12, 4], activation=jnp.tanh)(x), 6),
        "haiku/convolutions": of(convolved, 7, 7, 3),
        "haiku/attention": of(attended, 6, 8),
        "haiku/GRU": of(remembered, 6, 4),
    }


MODELS |= haiku()


def net(widths: Sequence[int]) -> Callable[[np.random.Generator], Any]:
    """Weights and biases of a dense net."""

    def make(rng: np.random.Generator) -> Any:
        pairs = list(itertools.pairwise(widths))
        return [(jnp.asarray(numbers(rng, i, o)), jnp.asarray(0.1 * rng.normal(size=o))) for i, o in pairs]

    return make


def applied(params: Any, x: Array, activation: Callable[[Array], Array] = jnp.tanh) -> Array:
    """The net's output."""
    for w, b in params[:-1]:
        x = activation(x @ w + b)
    w, b = params[-1]
    return x @ w + b


def plain(
    name: str, params: Callable[[np.random.Generator], Any], *shape: int, types: tuple[str, ...] = tuple(LIMITS)
) -> Callable[[Loss], Loss]:
    """Enter a loss of plain functions, on normal inputs of a shape."""

    def enter(loss_fn: Loss) -> Loss:
        MODELS[f"plain/{name}"] = lambda rng: Model(loss_fn, params(rng), points(rng, *shape), types)
        return loss_fn

    return enter


def weights(*shapes: tuple[int, ...]) -> Callable[[np.random.Generator], Any]:
    """Arrays of these shapes."""
    return lambda rng: [jnp.asarray(numbers(rng, *shape)) for shape in shapes]


WIDE = ("float64", "float32")
"""Of models with complex numbers, which have no narrower parts."""


@plain("logistic regression", weights((6,)), 6)
def logistic(params: Any, x: Array) -> Array:
    return jax.nn.softplus(-x @ params[0])


@plain("sine network", net((2, 16, 16, 1)), 2)
def siren(params: Any, x: Array) -> Array:
    return jnp.sum(jnp.square(applied(params, x, lambda z: jnp.sin(5 * z))))


def burgers(params: Any, x: Array, nested: Callable[..., Any]) -> Array:
    def u(t: Array, x: Array) -> Array:
        return applied(params, jnp.stack([t, x]))[0]

    u_x = nested(u, 1)
    return jnp.square(nested(u, 0)(*x) + u(*x) * u_x(*x) - 0.01 * nested(u_x, 1)(*x))


plain("Burgers, nested reverse", net((2, 12, 12, 1)), 2)(partial(burgers, nested=jax.grad))
plain("Burgers, nested forward", net((2, 12, 12, 1)), 2)(partial(burgers, nested=jax.jacfwd))


@plain("score matching", net((4, 12, 4)), 4)
def score_matching(params: Any, x: Array) -> Array:
    slopes = jax.jacfwd(lambda x: applied(params, x))(x)
    return jnp.trace(slopes) + 0.5 * jnp.sum(jnp.square(applied(params, x)))


@plain("energy with a penalty on its slope", net((4, 12, 1)), 4)
def energy(params: Any, x: Array) -> Array:
    value, slope = jax.value_and_grad(lambda x: applied(params, x)[0])(x)
    return jnp.square(value) + jnp.square(jnp.sum(jnp.square(slope)) - 1)


@plain("weight used twice", weights((5, 5)), 5)
def twice(params: Any, x: Array) -> Array:
    return jnp.sum(jnp.sin(jnp.tanh(x @ params[0]) @ params[0].T))


@plain("unrolled recurrence", weights((5, 5), (3, 5)), 6, 3)
def unrolled(params: Any, x: Array) -> Array:
    h = jnp.zeros(5, x.dtype)
    for row in x:
        h = jnp.tanh(h @ params[0] + row @ params[1])
    return jnp.sum(jnp.square(h))


@plain("differential equation, Runge and Kutta", net((3, 8, 3)), 3)
def flow(params: Any, x: Array) -> Array:
    def step(x: Array, _: Any) -> tuple[Array, None]:
        a = applied(params, x)
        b = applied(params, x + 0.1 * a)
        return x + 0.1 * (a + b), None

    return jnp.sum(jnp.sin(jax.lax.scan(step, x, None, length=5)[0]))


@plain("mixture of experts", weights((4, 3), (3, 4, 6), (3, 6, 2)), 4)
def experts(params: Any, x: Array) -> Array:
    gates = jax.nn.softmax(x @ params[0])
    hidden = jax.nn.gelu(jnp.einsum("d,edh->eh", x, params[1]))
    return jnp.sum(jnp.sin(jnp.einsum("e,eh,eho->o", gates, hidden, params[2])))


@plain("weights made by another net", weights((3, 8), (8, 20)), 8)
def hypernetwork(params: Any, x: Array) -> Array:
    made = (jnp.tanh(x[:3] @ params[0]) @ params[1]).reshape(5, 4)
    return jnp.sum(jnp.sin(x[3:] @ made))


@plain("rotary attention", weights((8, 8), (8, 8), (8, 8)), 6, 8)
def rotary(params: Any, x: Array) -> Array:
    angles = jnp.arange(6)[:, None] / 10 ** jnp.arange(4)[None]
    cos, sin = (f(angles).astype(x.dtype) for f in (jnp.cos, jnp.sin))

    def turned(y: Array) -> Array:
        return jnp.concatenate([y[:, :4] * cos - y[:, 4:] * sin, y[:, :4] * sin + y[:, 4:] * cos], axis=1)

    weights = jax.nn.softmax(turned(x @ params[0]) @ turned(x @ params[1]).T)
    return jnp.sum(jnp.sin(weights @ (x @ params[2])))


@plain("Fourier layer, real weights", weights((5, 4)), 8, types=WIDE)
def spectral(params: Any, x: Array) -> Array:
    modes = jnp.fft.rfft(x)
    return jnp.sum(jnp.square(jnp.abs(modes @ params[0])) ** 0.75)


@plain("Fourier neural operator", weights((2, 3, 3), (3, 3)), 8, 3, types=WIDE)
def operator(params: Any, x: Array) -> Array:
    modes = jnp.fft.rfft(x, axis=0)
    kept = jnp.einsum("kd,kde->ke", modes[:2], jax.lax.complex(params[0], params[0][::-1]))
    return jnp.sum(jnp.sin(jnp.fft.irfft(jnp.pad(kept, ((0, 3), (0, 0))), n=8, axis=0) + x @ params[1]))


def complex_weights(rng: np.random.Generator) -> Any:
    return [jnp.asarray(numbers(rng, 4, 4) + 1j * numbers(rng, 4, 4)), jnp.asarray(numbers(rng, 4, 3))]


@plain("complex recurrence", complex_weights, 5, 4, types=WIDE)
def complex_recurrence(params: Any, x: Array) -> Array:
    h = jnp.zeros(4, params[0].dtype)
    for row in x:
        h = (h + row.astype(h.dtype)) @ params[0]
        h = h / (1 + jnp.abs(h)).astype(h.dtype)
    return jnp.sum(jnp.sin(jnp.real(h) @ params[1] + jnp.imag(h) @ params[1]))


def cast(tree: Any, dtype: str) -> Any:
    """Floating leaves in a type; complex ones in the complex type of that width."""
    with_complex = {"float32": jnp.complex64, "float64": jnp.complex128}

    def one(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            return x.astype(with_complex[dtype])
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)


class Errors(NamedTuple):
    """Of one model in one type."""

    ours: float
    vmapped: float

    def holds(self, dtype: str) -> bool:
        """Whether the claim does."""
        return self.ours <= (LIMITS[dtype] if dtype == "float64" else max(TIMES * self.vmapped, LIMITS[dtype]))


class Norms:
    """Of the gradients of a loss, in three ways, each compiled once a type."""

    def __init__(self, loss_fn: Loss) -> None:
        self._gradient = jax.jit(jax.grad(loss_fn))
        self.ours = jax.jit(lambda params, batch: isgd.norms(isgd.per_example_grads(loss_fn)(params, batch)))

        def vmapped(params: Any, batch: Any) -> Array:
            # The squares are summed in float64: what is told is the error of the gradients.
            leaves = jax.tree.leaves(jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch))
            wide = [jnp.abs(x.astype(jnp.result_type(x, jnp.float64))) for x in leaves]
            return jnp.sqrt(sum(jnp.sum(jnp.square(x).reshape(EXAMPLES, -1), 1) for x in wide))

        self.vmapped = jax.jit(vmapped)

    def expected(self, params: Any, batch: Any) -> np.ndarray:
        """Of float64 gradients, one example at a time."""
        found = []
        for at in range(EXAMPLES):
            example = jax.tree.map(lambda x, at=at: x[at], batch)
            leaves = jax.tree.leaves(self._gradient(cast(params, "float64"), cast(example, "float64")))
            found.append(np.sqrt(sum(float(np.sum(np.abs(np.asarray(leaf)) ** 2)) for leaf in leaves)))
        return np.array(found)

    def errors(self, params: Any, batch: Any) -> Errors:
        """The largest of the batch."""
        expected = self.expected(params, batch)
        found = [np.asarray(way(params, batch), np.float64) for way in (self.ours, self.vmapped)]
        return Errors(
            *(float(np.max(np.abs(x - expected) / np.maximum(np.maximum(x, expected), 1e-300))) for x in found)
        )


def main() -> int:
    """A line a model; 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[""], help="those whose name holds one of these words")
    parser.add_argument("--types", nargs="+", choices=tuple(LIMITS), default=tuple(LIMITS))
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    names = [name for name in MODELS if any(word in name for word in args.models)]
    print(f"{'':46}" + "".join(f"{dtype + ': ours, vmap(grad)':30}" for dtype in args.types))
    missed = []
    for name in names:
        made = [MODELS[name](np.random.default_rng(seed)) for seed in range(args.seeds)]
        cells, norms = [], Norms(made[0].loss_fn)
        for dtype in args.types:
            if dtype not in made[0].types:
                cells.append(f"{'-':30}")
                continue
            each = [norms.errors(cast(one.params, dtype), cast(one.batch, dtype)) for one in made]
            worst = Errors(max(e.ours for e in each), max(e.vmapped for e in each))
            holds = worst.holds(dtype)
            missed += [] if holds else [f"{name}, {dtype}"]
            cells.append(f"{worst.ours:.1e}  {worst.vmapped:.1e}{'' if holds else '  missed':12}")
        print(f"{name:46}" + "".join(cells), flush=True)
    print(f"\n{len(names)} models; the claims hold but for: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
