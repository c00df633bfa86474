"""Equinox: a model is a tree, and so is the sampler's state; one file holds both."""

import sys
from pathlib import Path

import equinox as eqx
import isgd_jax as isgd
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

digits = load_digits()
data = {"x": (digits.data / 16.0).astype(np.float32), "y": digits.target}
N = len(data["y"])
tx = optax.chain(isgd.importance_weighting(N), optax.adamw(1e-3))
sampler = isgd.importance_sampler(N, batch_size=64)
refresh = jax.jit(sampler.refresh, donate_argnums=0)


def loss_fn(model, example):
    logits = model(example["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


@eqx.filter_jit(donate="all-except-first")
def train_step(inputs, model, opt_state, state):
    data, key = inputs
    params, static = eqx.partition(model, eqx.is_inexact_array)
    draw = sampler.sample(key, state)
    batch = jax.tree.map(lambda x: x[draw.indices], data)
    losses, grads = isgd.per_example_value_and_grad(
        lambda params, example: loss_fn(eqx.combine(params, static), example)
    )(params, batch)
    weights = {"probs": draw.probs, "target": draw.target}
    updates, opt_state = tx.update(grads, opt_state, params, **weights)
    state = sampler.observe(state, draw, grads)
    mean = (draw.target / draw.probs * losses).mean()
    return mean, eqx.apply_updates(model, updates), opt_state, state


def train(folder, num_steps):
    model = eqx.nn.MLP(64, 10, 128, 1, key=jax.random.key(0))
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    everything, file = (model, opt_state, sampler.init()), Path(folder) / "all.eqx"
    if file.exists():
        everything = eqx.tree_deserialise_leaves(file, everything)
    model, opt_state, state = everything
    for step in range(int(state.clock.step), num_steps):
        if step % 20 == 0:
            state = refresh(state)
        inputs = data, jax.random.key(1)
        loss, model, opt_state, state = train_step(inputs, model, opt_state, state)
    eqx.tree_serialise_leaves(file, (model, opt_state, state))
    print(f"step {num_steps}, loss {loss:.3f}\n{sampler.report(state)}")
    return eqx.filter((model, opt_state, state), eqx.is_array)


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
