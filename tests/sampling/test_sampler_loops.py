"""The same 30 steps in Flax Linen, Flax NNX, Equinox and plain functions: losses fall, and one kind of state."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import isgd_jax as isgd
from isgd_jax.sampling.state import SamplerState

N, M, STEPS = 48, 8, 30
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(N, 3)), jnp.float32)
DATA = {"x": X, "y": jnp.sin(X).sum(axis=1)}

pytestmark = [
    # Optax's Adam and the models' own layers promote types: it is the sampler that must not.
    pytest.mark.slow,
]


def _square(value: jax.Array, example: Any) -> jax.Array:
    return 0.5 * jnp.square(value[0] - example["y"])


def functions() -> tuple[Any, Callable[..., Any]]:
    own = {"w": 0.5 * jax.random.normal(jax.random.key(0), (3, 8)), "v": jnp.full((8, 1), 0.1)}
    return own, lambda own, example: _square(jnp.tanh(example["x"] @ own["w"]) @ own["v"], example)


def linen() -> tuple[Any, Callable[..., Any]]:
    model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(1)])
    return model.init(jax.random.key(0), X[0]), lambda own, example: _square(model.apply(own, example["x"]), example)


def equinox() -> tuple[Any, Callable[..., Any]]:
    own, static = eqx.partition(eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0)), eqx.is_array)
    return own, lambda own, example: _square(eqx.combine(own, static)(example["x"]), example)


def nnx_split() -> tuple[Any, Callable[..., Any]]:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 1, rngs=rngs))
    graph, own = nnx.split(model, nnx.Param)
    return own, lambda own, example: _square(nnx.merge(graph, own)(example["x"]), example)


@pytest.mark.parametrize("library", [functions, linen, equinox, nnx_split])
def test_the_loop_of_the_documentation(library: Callable[[], tuple[Any, Callable[..., Any]]]) -> None:
    own, loss_fn = library()
    sampler = isgd.importance_sampler(N, batch_size=M)
    tx = optax.chain(isgd.importance_weighting(N), optax.adamw(0.02))

    @jax.jit
    def step(own: Any, opt_state: Any, state: Any, data: Any, key: Any) -> Any:
        draw = sampler.sample(key, state)
        batch = jax.tree.map(lambda x: x[draw.indices], data)
        _, grads = isgd.per_example_value_and_grad(loss_fn)(own, batch)
        with jax.numpy_dtype_promotion("standard"):  # Optax's own
            updates, opt_state = tx.update(grads, opt_state, own, probs=draw.probs, target=draw.target)
        return optax.apply_updates(own, updates), opt_state, sampler.observe(state, draw, grads)

    def loss(own: Any) -> float:
        return float(jnp.mean(jax.vmap(loss_fn, (None, 0))(own, DATA)))

    state, refresh = sampler.init(), jax.jit(sampler.refresh)
    kind, before, opt_state = jax.tree.map(jax.typeof, state), loss(own), tx.init(own)
    for at in range(STEPS):
        if at % 10 == 0:
            state = refresh(state)
        own, opt_state, state = step(own, opt_state, state, DATA, jax.random.fold_in(jax.random.key(1), at))
    assert loss(own) < 0.7 * before
    assert isinstance(state, SamplerState)
    assert jax.tree.map(jax.typeof, state) == kind
    assert float(sampler.report(state).scores.known_share) > 0.9


def test_an_nnx_optimizer_takes_the_draw_s_numbers() -> None:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 1, rngs=rngs))
    tx = optax.chain(isgd.importance_weighting(N), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    sampler = isgd.importance_sampler(N, batch_size=M)

    @nnx.jit
    def step(model: Any, optimizer: Any, state: Any, data: Any, key: Any) -> Any:
        draw = sampler.sample(key, state)
        graph, own = nnx.split(model, nnx.Param)

        def loss_fn(own: Any, example: Any) -> jax.Array:
            return _square(nnx.merge(graph, own)(example["x"]), example)

        grads = isgd.per_example_grads(loss_fn)(own, jax.tree.map(lambda x: x[draw.indices], data))
        optimizer.update(model, grads, probs=draw.probs, target=draw.target)
        return sampler.observe(state, draw, grads)

    def loss() -> float:
        return float(jnp.mean(jnp.square(model(X)[:, 0] - DATA["y"])))

    state, before = sampler.init(), loss()
    for at in range(STEPS):
        state = sampler.refresh(state) if at % 10 == 0 else state
        state = step(model, optimizer, state, DATA, jax.random.key(at))
    assert loss() < 0.8 * before
    assert int(state.version) == STEPS
