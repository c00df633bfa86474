"""Importance sampling in an own loop: in the background, monitored, saved whole."""

import functools
import tempfile

import isgd_jax as isgd
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits

digits = load_digits()
data = {"x": (digits.data / 16.0).astype(np.float32), "y": digits.target}
N, BATCH, STEPS = len(data["y"]), 64, 300


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


graph, params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)


def loss_fn(params, example):
    logits = nnx.merge(graph, params)(example["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


def mean_loss(params, batch):
    return jax.vmap(loss_fn, (None, 0))(params, batch).mean()


tx = optax.chain(isgd.importance_weighting(N), optax.adamw(1e-3))
opt_state = tx.init(params)
sampler = isgd.importance_sampler(N, batch_size=BATCH)
state = sampler.init()
engine = isgd.engines.local(isgd.scorers.grad_norm(loss_fn), data)
refresher = isgd.refresher(engine, sampler, every=50)


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def train_step(params, opt_state, state, data, key):
    draw = sampler.sample(key, state)
    batch = jax.tree.map(lambda x: x[draw.indices], data)
    _, grads = isgd.per_example_value_and_grad(loss_fn)(params, batch)
    weights = {"probs": draw.probs, "target": draw.target}
    updates, opt_state = tx.update(grads, opt_state, params, **weights)
    state = sampler.observe(state, draw, grads)
    return optax.apply_updates(params, updates), opt_state, state


key, on_device = jax.random.key(0), jax.device_put(data)
for step in range(STEPS):
    state = refresher(step, params, state)
    carry = (params, opt_state, state)
    params, opt_state, state = train_step(*carry, on_device, key)
engine.close()
print(sampler.report(state))
with ocp.StandardCheckpointer() as saver:
    saver.save(tempfile.mkdtemp() + "/all", (params, opt_state, state))
print("loss", float(mean_loss(params, data)))
