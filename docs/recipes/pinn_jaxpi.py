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
KEY = jax.random.key(1)
tx = optax.adam(optax.exponential_decay(3e-3, 1000, 0.9))


net = nn.Sequential([nn.Dense(32), jnp.tanh, nn.Dense(32), jnp.tanh, nn.Dense(1)])


def u(params, t, x):  # periodic in x
    waves = jnp.sin(jnp.pi * x), jnp.cos(jnp.pi * x)
    return net.apply(params, jnp.stack([t, *waves]))[0]


def residual(params, point):
    """u_t + u u_x - nu u_xx at a point: Burgers' equation."""
    u_t, u_x = (jax.grad(u, axis)(params, *point) for axis in (1, 2))
    u_xx = jax.grad(jax.grad(u, 2), 2)(params, *point)
    return u_t + u(params, *point) * u_x - NU * u_xx


def initial(params):
    values = jax.vmap(u, (None, None, 0))(params, 0.0, GRID)
    return jnp.mean((values + jnp.sin(jnp.pi * GRID)) ** 2)


domain = isgd.domain_sampler(lambda x: LOW + x * (HIGH - LOW), dims=2, batch_size=128)


def residual_sizes(params, points):
    return jnp.abs(jax.vmap(residual, (None, 0))(params, tuple(points.T)))


@jax.jit
def refresh(params, state):
    return domain.refresh(KEY, state, functools.partial(residual_sizes, params))


@functools.partial(jax.jit, donate_argnums=0)
def train_step(run, state, step):
    params, opt_state, weights = run
    draw = domain.sample(KEY, state, step)

    def inside(params):
        return jnp.mean(draw.weights * residual_sizes(params, draw.points) ** 2)

    terms = jax.grad(initial)(params), jax.grad(inside)(params)
    norms = jnp.stack([optax.tree.norm(term) for term in terms])
    weights = 0.9 * weights + 0.1 * norms.sum() / norms
    gradient = jax.tree.map(lambda a, b: weights[0] * a + weights[1] * b, *terms)
    updates, opt_state = tx.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, weights


def train(folder, num_steps):
    params = net.init(jax.random.key(0), GRID[:3])
    run, state, first = (params, tx.init(params), jnp.ones(2)), domain.init(), 0
    file = Path(folder) / "all"
    if file.exists():
        run, state, first = pickle.loads(file.read_bytes())
    for step in range(first, num_steps):
        if step % 20 == 0:
            state = refresh(run[0], state)
        run = train_step(run, state, step)
    file.write_bytes(pickle.dumps(jax.device_get((run, state, num_steps))))
    print(f"step {num_steps}\n{domain.report(state)}")
    return run, state


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
