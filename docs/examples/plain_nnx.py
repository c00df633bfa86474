"""A plain Optax loop; `own_loop_nnx.py` adds importance sampling to it."""

import functools

import jax
import numpy as np
import optax
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


tx = optax.adamw(1e-3)
opt_state = tx.init(params)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, opt_state, data, key):
    indices = jax.random.randint(key, (BATCH,), 0, N)
    batch = jax.tree.map(lambda x: x[indices], data)
    grads = jax.grad(mean_loss)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


key, data = jax.random.key(0), jax.device_put(data)
for step in range(STEPS):
    step_key = jax.random.fold_in(key, step)
    params, opt_state = train_step(params, opt_state, data, step_key)
print("loss", float(mean_loss(params, data)))
