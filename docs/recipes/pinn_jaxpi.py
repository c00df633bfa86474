"""A physics-informed network in jaxpi's manner: a fixed grid of initial values, drawn
residuals, and weights of the two by their gradients (Wang et al. 2023, algorithm 1)."""

import functools
import pickle
import sys
from pathlib import Path

import isgd_jax as isgd
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

NU, GRID = 0.01 / jnp.pi, jnp.linspace(-1.0, 1.0, 128)
LOW, HIGH = jnp.array([0.0, -1.0]), jnp.array([1.0, 1.0])  # of t and x
tx = optax.adam(optax.exponential_decay(3e-3, 1000, 0.9))


net = nn.Sequential([nn.Dense(32), jnp.tanh, nn.Dense(32), jnp.tanh, nn.Dense(1)])


def u(params, t, x):  # periodic in x
    waves = jnp.sin(jnp.pi * x), jnp.cos(jnp.pi * x)
    return net.apply(params, jnp.stack([t, *waves]))[0]


def residual(params, point):
    """The square of u_t + u u_x - nu u_xx, Burgers' equation."""
    u_t, u_x = (jax.grad(u, axis)(params, *point) for axis in (1, 2))
    u_xx = jax.grad(jax.grad(u, 2), 2)(params, *point)
    return (u_t + u(params, *point) * u_x - NU * u_xx) ** 2


def initial(params):
    values = jax.vmap(u, (None, None, 0))(params, 0.0, GRID)
    return jnp.mean((values + jnp.sin(jnp.pi * GRID)) ** 2)


def draw_points(key, count):
    return jax.random.uniform(key, (count, 2), minval=LOW, maxval=HIGH)


pool = isgd.pool_sampler(draw_points, num_points=4096, batch_size=128)
refresh = jax.jit(pool.refresh, donate_argnums=0)


@functools.partial(jax.jit, donate_argnums=0)
def train_step(run, key):
    params, opt_state, weights, state = run
    draw = pool.sample(key, state)
    grads = isgd.per_example_grads(residual)(params, tuple(pool.take(state, draw).T))
    mean = isgd.weighted_mean(grads, draw.target / draw.probs)
    terms = jax.grad(initial)(params), mean
    norms = jnp.stack([optax.tree.norm(term) for term in terms])
    weights = 0.9 * weights + 0.1 * norms.sum() / norms
    gradient = jax.tree.map(lambda a, b: weights[0] * a + weights[1] * b, *terms)
    updates, opt_state = tx.update(gradient, opt_state)
    params = optax.apply_updates(params, updates)
    return params, opt_state, weights, pool.observe(state, draw, grads)


def train(folder, num_steps):
    params = net.init(jax.random.key(0), GRID[:3])
    run = params, tx.init(params), jnp.ones(2), pool.init(jax.random.key(1))
    file = Path(folder) / "all"
    if file.exists():
        run = pickle.loads(file.read_bytes())
    for step in range(int(run[3].sampler.clock.step), num_steps):
        if step % 20 == 0:
            run = (*run[:3], refresh(run[3]))
        run = train_step(run, jax.random.key(2))
    file.write_bytes(pickle.dumps(jax.device_get(run)))
    print(f"step {num_steps}, weights {run[2]}\n{pool.report(run[3])}")
    return run


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
