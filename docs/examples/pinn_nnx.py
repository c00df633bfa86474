"""Burgers' equation by a network: points drawn where residuals are large."""

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
    """The residual u_t + u u_x - nu u_xx at a point inside."""
    t, x = point
    u_t, u_x = jax.grad(u, 1), jax.grad(u, 2)
    u_xx = jax.grad(u_x, 2)(params, t, x)
    return u_t(params, t, x) + u(params, t, x) * u_x(params, t, x) - NU * u_xx


def condition(params, point):
    """What is missing from the initial and boundary values."""
    t, x = point
    wanted = jnp.where(t == 0.0, -jnp.sin(jnp.pi * x), 0.0)
    return u(params, t, x) - wanted


def place_inside(unit):
    return unit * jnp.array([1.0, 2.0]) - jnp.array([0.0, 1.0])


def place_border(unit):
    """A half of the points at t = 0, a half at x = -1 or 1."""
    which, where = unit.T
    t = jnp.where(which < 0.5, 0.0, where)
    x = jnp.where(which < 0.5, 2.0 * where - 1.0, jnp.where(which < 0.75, -1.0, 1.0))
    return jnp.stack([t, x], axis=1)


terms = {"inside": (equation, place_inside), "border": (condition, place_border)}
domains = {
    name: isgd.domain_sampler(place, dims=2, batch_size=BATCH[name])
    for name, (_, place) in terms.items()
}
states = {name: domain.init() for name, domain in domains.items()}
tx = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))
opt_state = tx.init(params)


def residuals(params, name, points):
    return jax.vmap(terms[name][0], (None, 0))(params, tuple(points.T))


def sizes(params, name, points):
    return jnp.abs(residuals(params, name, points))


@jax.jit
def refresh(params, states):
    after = {}
    for i, (name, state) in enumerate(states.items()):
        score = functools.partial(sizes, params, name)
        after[name] = domains[name].refresh(jax.random.key(i), state, score)
    return after


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, opt_state, states, step):
    draws = {
        name: domains[name].sample(jax.random.key(i), state, step)
        for i, (name, state) in enumerate(states.items())
    }

    def loss(params):  # each term's integral, whatever was drawn
        means = [
            jnp.mean(draw.weights * residuals(params, name, draw.points) ** 2)
            for name, draw in draws.items()
        ]
        return sum(means)

    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


for step in range(STEPS):
    if step % 50 == 0:
        states = refresh(params, states)
    params, opt_state = train_step(params, opt_state, states, step)

fresh = place_inside(isgd.quasi_random(jax.random.key(10), 4096, 2))
print("loss", float(jnp.mean(residuals(params, "inside", fresh) ** 2)))
print(domains["inside"].report(states["inside"]))
