"""Burgers' equation by a network: points drawn where gradients are large."""

import functools

import isgd_jax as isgd
import jax
import jax.numpy as jnp
import optax
from flax import nnx

NU, STEPS, BATCH = 0.01 / jnp.pi, 400, {"inside": 192, "border": 64}


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(2, 32, rngs=rngs)
        self.second = nnx.Linear(32, 32, rngs=rngs)
        self.third = nnx.Linear(32, 32, rngs=rngs)
        self.out = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        for layer in (self.first, self.second, self.third):
            x = jnp.tanh(layer(x))
        return self.out(x)[0]


graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)


def u(params, t, x):
    return nnx.merge(graph, params)(jnp.stack([t, x]))


def equation(params, point):
    """The square of u_t + u u_x - nu u_xx at a point inside."""
    t, x = point
    u_t, u_x = jax.grad(u, 1), jax.grad(u, 2)
    u_xx = jax.grad(u_x, 2)(params, t, x)
    residual = u_t(params, t, x) + u(params, t, x) * u_x(params, t, x) - NU * u_xx
    return residual**2


def condition(params, point):
    """The square of what is missing from the initial and boundary values."""
    t, x = point
    wanted = jnp.where(t == 0.0, -jnp.sin(jnp.pi * x), 0.0)
    return (u(params, t, x) - wanted) ** 2


def draw_inside(key, count):
    unit = isgd.quasi_random(key, count, 2)
    return unit * jnp.array([1.0, 2.0]) - jnp.array([0.0, 1.0])


def draw_border(key, count):
    """A half of the points at t = 0, a half at x = -1 or 1."""
    which, where = isgd.quasi_random(key, count, 2).T
    t = jnp.where(which < 0.5, 0.0, where)
    x = jnp.where(which < 0.5, 2.0 * where - 1.0, jnp.where(which < 0.75, -1.0, 1.0))
    return jnp.stack([t, x], axis=1)


terms = {
    "inside": (equation, draw_inside, 8192),
    "border": (condition, draw_border, 2048),
}
pools = {
    name: isgd.pool_sampler(draw, num_points=size, batch_size=BATCH[name], redraw=0.1)
    for name, (_, draw, size) in terms.items()
}
states = {
    name: jax.jit(pool.init)(jax.random.key(i))
    for i, (name, pool) in enumerate(pools.items())
}
tx = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))
opt_state = tx.init(params)
refresh = jax.jit(
    lambda states: {name: pools[name].refresh(state) for name, state in states.items()}
)


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def train_step(params, opt_state, states, key):
    gradient, states = jax.tree.map(jnp.zeros_like, params), dict(states)
    for i, (name, pool) in enumerate(pools.items()):
        draw = pool.sample(jax.random.fold_in(key, i), states[name])
        points = pool.take(states[name], draw)
        grads = isgd.per_example_grads(terms[name][0])(params, tuple(points.T))
        mean = isgd.weighted_mean(grads, draw.target / draw.probs)
        gradient = jax.tree.map(jnp.add, gradient, mean)
        states[name] = pool.observe(states[name], draw, grads)
    updates, opt_state = tx.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, states


for step in range(STEPS):
    if step % 50 == 0:
        states = refresh(states)
    params, opt_state, states = train_step(params, opt_state, states, jax.random.key(9))

fresh = draw_inside(jax.random.key(10), 4096)
print("loss", float(jnp.mean(jax.vmap(equation, (None, 0))(params, tuple(fresh.T)))))
print(pools["inside"].report(states["inside"]))
