"""Optax `MultiSteps`: four batches an update; the reweighting stands outside."""

import functools
import sys
from pathlib import Path

import isgd_jax as isgd
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

digits = load_digits()
data = {"x": (digits.data / 16.0).astype(np.float32), "y": digits.target}
N, PER_UPDATE = len(data["y"]), 4
inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))
tx = optax.chain(
    isgd.importance_weighting(N),  # sees per-example gradients, and gives their mean
    optax.MultiSteps(inner, PER_UPDATE).gradient_transformation(),
)
sampler = isgd.importance_sampler(N, batch_size=32, steps_per_update=PER_UPDATE)
refresh = jax.jit(sampler.refresh, donate_argnums=0)


def loss_fn(params, example):
    logits = jnp.tanh(example["x"] @ params["w"]) @ params["v"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def train_step(params, opt_state, state, data, key):
    draw = sampler.sample(key, state)
    batch = jax.tree.map(lambda x: x[draw.indices], data)
    losses, grads = isgd.per_example_value_and_grad(loss_fn)(params, batch)
    weights = {"probs": draw.probs, "target": draw.target}
    updates, opt_state = tx.update(grads, opt_state, params, **weights)
    state = sampler.observe(state, draw, grads)
    mean = (draw.target / draw.probs * losses).mean()
    return mean, optax.apply_updates(params, updates), opt_state, state


def train(folder, num_steps):
    w, v = jax.random.normal(jax.random.key(0), (2, 64, 64)) / 8
    params = {"w": w, "v": v[:, :10]}
    everything = (params, tx.init(params), sampler.init())
    saver, path = ocp.StandardCheckpointer(), Path(folder).absolute() / "all"
    if path.exists():  # also in the middle of an update
        everything = saver.restore(path, everything)
    for step in range(int(everything[2].clock.step), num_steps):
        if step % 20 == 0:
            everything = (*everything[:2], refresh(everything[2]))
        loss, *everything = train_step(*everything, data, jax.random.key(1))
    saver.save(path, tuple(everything), force=True)
    saver.wait_until_finished()
    updates = int(everything[2].clock.version)
    print(f"step {num_steps}, {updates} updates, loss {loss:.3f}")
    return everything


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
