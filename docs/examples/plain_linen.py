"""A plain Optax loop; `own_loop_linen.py` adds importance sampling to it."""

import functools

import jax
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits

digits = load_digits()
data = {"x": (digits.data / 16.0).astype(np.float32), "y": digits.target}
N, BATCH, STEPS = len(data["y"]), 64, 300


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(128)(x)))


net = Net()
params = net.init(jax.random.key(0), data["x"][0])["params"]


def loss_fn(params, example):
    logits = net.apply({"params": params}, example["x"])
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
