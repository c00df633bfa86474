"""Flax NNX: `nnx.Optimizer` passes probabilities on; all is saved together."""

import sys
from pathlib import Path

import isgd_jax as isgd
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits

digits = load_digits()
data = {"x": (digits.data / 16.0).astype(np.float32), "y": digits.target}
N = len(data["y"])
sampler = isgd.importance_sampler(N, batch_size=64)
refresh = jax.jit(sampler.refresh, donate_argnums=0)


def make_model(rngs):
    hidden, out = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 10, rngs=rngs)
    return nnx.Sequential(hidden, nnx.relu, out)


@nnx.jit
def train_step(model, optimizer, state, data, key):
    graph, params = nnx.split(model, nnx.Param)

    def loss_fn(params, example):
        logits = nnx.merge(graph, params)(example["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])

    draw = sampler.sample(key, state)
    batch = jax.tree.map(lambda x: x[draw.indices], data)
    losses, grads = isgd.per_example_value_and_grad(loss_fn)(params, batch)
    optimizer.update(model, grads, probs=draw.probs, target=draw.target)
    mean = (draw.target / draw.probs * losses).mean()
    return mean, sampler.observe(state, draw, grads)


def train(folder, num_steps):
    model, state = make_model(nnx.Rngs(0)), sampler.init()
    tx = optax.chain(isgd.importance_weighting(N), optax.adamw(1e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    saver, path = ocp.StandardCheckpointer(), Path(folder).absolute() / "all"
    if path.exists():
        learned, state = saver.restore(path, (nnx.state((model, optimizer)), state))
        nnx.update((model, optimizer), learned)
    for step in range(int(state.clock.step), num_steps):
        if step % 20 == 0:
            state = refresh(state)
        loss, state = train_step(model, optimizer, state, data, jax.random.key(1))
    saver.save(path, (nnx.state((model, optimizer)), state), force=True)
    saver.wait_until_finished()
    print(f"step {num_steps}, loss {loss:.3f}\n{sampler.report(state)}")
    return nnx.to_pure_dict(nnx.state((model, optimizer))), state


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
