"""A regression that every sampler can learn in a second, and the loop that a user would write around it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import isgd_jax as isgd

NUM_EXAMPLES, BATCH, REFRESH_EVERY = 24, 8, 8


QUICK = ("stratified",)
NAMES = (
    *("stratified", "systematic", "independent", "without_replacement", "poisson"),
    *("epochs", "uniform", "fixed", "presampling"),
)
KINDS = tuple(name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES)
"""One sampler of each kind: each has its own programs to compile, so one is quick and the others slow."""


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """As users call it: tests check the types of arguments by a hook, which users do not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def jitted(sampler: Any) -> Any:
    """The same sampler, each of its functions compiled whole.

    Called outside jit, each operation is compiled for itself, and a `lax.cond` anew at each call: for a test that calls
    a function once or twice this costs several times as much.
    """
    whole = ("init", "sample", "record", "refresh", "report", "candidates", "resample")
    found = {name: jax.jit(getattr(sampler, name)) for name in whole if getattr(sampler, name, None) is not None}
    return sampler._replace(**found, observe=jax.jit(sampler.observe, static_argnames="axis_name"))


class Trained(NamedTuple):
    """What a loop leaves: parameters, the sampler's state, and the indices drawn at each step."""

    params: Any
    state: isgd.SamplerState
    indices: np.ndarray


def loss_fn(params: Any, example: Any) -> jax.Array:
    """Squared error of a small network."""
    hidden = jnp.tanh(example["x"] @ params["w1"] + params["b1"])
    return 0.5 * jnp.sum(jnp.square(hidden @ params["w2"] - example["y"]))


def data(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Inputs [n, 3] and targets [n, 2], a few of them far off."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(NUM_EXAMPLES, 3)), rng.standard_t(3, size=(NUM_EXAMPLES, 2))
    y = x[:, :2] + 0.2 * noise
    return {"x": jnp.asarray(x, dtype), "y": jnp.asarray(y, dtype)}


def params(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Parameters before training."""
    rng = np.random.default_rng(1)
    shapes = {"w1": (3, 4), "b1": (4,), "w2": (4, 2)}
    return {name: jnp.asarray(0.5 * rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def sketch(dims: int = 8) -> Any:
    """How an order by clusters sees the examples."""
    return isgd.last_layer_sketch(loss_fn, params(), jax.tree.map(lambda x: x[0], data()), dims=dims)


@functools.cache
def samplers() -> dict[str, isgd.BatchSampler]:
    """One of each kind, which between them use most options."""
    n, m = NUM_EXAMPLES, BATCH
    signs = np.linspace(-0.2, 2.0, n).astype(np.float32) / n
    groups = isgd.Groups(
        np.arange(n) % 3, shares=lambda step: (step % jnp.array([2, 3, 5], jnp.int32)).astype(jnp.float32) + 0.5
    )
    return {
        "stratified": isgd.importance_sampler(n, batch_size=m, max_age=12),
        "systematic": isgd.importance_sampler(
            n, batch_size=m, sampler="systematic", order="index", costs=np.arange(1.0, n + 1), groups=groups
        ),
        "independent": isgd.importance_sampler(
            n, batch_size=m, sampler="independent", order=np.arange(n) % 3, example_weights=signs
        ),
        "without_replacement": isgd.importance_sampler(
            n, batch_size=m, sampler="without_replacement", order=sketch(), score_memory=0.2
        ),
        "poisson": isgd.importance_sampler(n, batch_size=m, sampler="poisson", order_every=2, additive=0.1),
        "epochs": isgd.shuffled_epochs(n, batch_size=m),
        "uniform": isgd.uniform_draws(n, batch_size=m),
        "fixed": isgd.fixed(np.arange(n), batch_size=m),
        "presampling": isgd.presampling(n, batch_size=m, scorer=losses),
    }


def losses(params: Any, batch: Any) -> jax.Array:
    """The losses of a batch: a scorer."""
    return jax.vmap(loss_fn, (None, 0))(params, batch)


def make_step(sampler: isgd.BatchSampler, tx: Any, *, gather: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The step of the documentation: draw, gradients, weighted update, observe."""
    gather = gather or (lambda data, indices: jax.tree.map(lambda x: x[indices], data))

    def step(params: Any, opt_state: Any, state: Any, data: Any, key: Any) -> Any:
        draw = sampler.sample(key, state, params=params, data=data)
        values, grads = isgd.per_example_value_and_grad(loss_fn)(params, gather(data, draw.indices))
        updates, opt_state = tx.update(grads, opt_state, params, probs=draw.probs, mask=draw.mask, target=draw.target)
        state = sampler.observe(state, draw, grads)
        del values
        return optax.apply_updates(params, updates), opt_state, state, draw.indices

    return step


def full_loss(params: Any) -> float:
    """The mean loss of all examples."""
    return float(jnp.mean(losses(params, data(jax.tree.leaves(params)[0].dtype)).astype(jnp.float32)))


def optimizer(num_examples: int = NUM_EXAMPLES) -> Any:
    """Plain SGD: Optax's Adam itself promotes types, which these tests forbid."""
    return optax.chain(isgd.importance_weighting(num_examples), optax.sgd(0.05))


@functools.cache
def programs(kind: str) -> tuple[Any, Any]:
    """The step and the refresh of a kind, donated, compiled once for all tests."""
    sampler = samplers()[kind]
    step = jax.jit(make_step(sampler, optimizer()), donate_argnums=(0, 1, 2))
    return step, jax.jit(sampler.refresh, donate_argnums=0)


def train(
    kind: str,
    *,
    steps: int = 24,
    begin: Any = None,
    start: int = 0,
    place: Callable[..., Any] = lambda tree: tree,
    made: tuple[Any, Any] | None = None,
) -> Trained:
    """The loop, each call donated, with a refresh every 8 steps; ``begin`` is (parameters, state) to go on from."""
    step, refresh = made or programs(kind)
    sizes = step._cache_size(), refresh._cache_size()
    own, state = (params(), samplers()[kind].init()) if begin is None else jax.tree.map(jnp.copy, begin)
    own, state, examples = (place(tree) for tree in (own, state, data(own["w1"].dtype)))
    opt_state, key, seen = optimizer().init(own), jax.random.key(3), []
    for at in range(start, start + steps):
        if at % REFRESH_EVERY == 0:
            state = refresh(state)
        own, opt_state, state, indices = step(own, opt_state, state, examples, jax.random.fold_in(key, at))
        seen.append(np.asarray(indices))
    assert step._cache_size() <= sizes[0] + 1, "one compilation"
    assert refresh._cache_size() <= sizes[1] + 1, "one compilation"
    return Trained(own, state, np.stack(seen))


def unlike(one: Any, other: Any, *, rtol: float = 1e-6) -> list[str]:
    """The leaves of two trees that differ: numbers by more than ``rtol`` of the largest, all else at all."""
    found = []
    pairs = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True)
    for (path, a), b in pairs:
        a, b = np.asarray(a), np.asarray(b)
        is_number = np.issubdtype(a.dtype, np.floating)
        scale = float(np.max(np.abs(a), initial=0.0)) if is_number else 0.0
        same = a.shape == b.shape and (
            np.allclose(a, b, rtol=0, atol=rtol * scale) if is_number else np.array_equal(a, b)
        )
        if not same:
            found.append(jax.tree_util.keystr(path))
    return found
