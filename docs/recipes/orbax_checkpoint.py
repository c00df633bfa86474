"""Orbax checkpoints of one's own: saved in the background, the last two kept."""

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
N = len(data["y"])
tx = optax.chain(isgd.importance_weighting(N), optax.adamw(1e-3))
sampler = isgd.importance_sampler(N, batch_size=64)
refresh = jax.jit(sampler.refresh, donate_argnums=0)
options = ocp.CheckpointManagerOptions(save_interval_steps=10, max_to_keep=2)


def loss_fn(params, example):
    logits = jnp.tanh(example["x"] @ params["w"]) @ params["v"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


@functools.partial(jax.jit, donate_argnums=0)
def train_step(run, data, key):
    draw = sampler.sample(key, run["sampler"])
    batch = jax.tree.map(lambda x: x[draw.indices], data)
    grads = isgd.per_example_grads(loss_fn)(run["params"], batch)
    weights = {"probs": draw.probs, "target": draw.target}
    updates, opt_state = tx.update(grads, run["opt"], run["params"], **weights)
    params = optax.apply_updates(run["params"], updates)
    state = sampler.observe(run["sampler"], draw, grads)
    return {"params": params, "opt": opt_state, "sampler": state}


def train(folder, num_steps):
    w, v = jax.random.normal(jax.random.key(0), (2, 64, 64)) / 8
    params = {"w": w, "v": v[:, :10]}
    run = {"params": params, "opt": tx.init(params), "sampler": sampler.init()}
    with ocp.CheckpointManager(Path(folder).absolute(), options=options) as saver:
        start = saver.latest_step() or 0
        if start:
            run = saver.restore(start, args=ocp.args.StandardRestore(run))
        for step in range(start, num_steps):
            if step % 20 == 0:
                run["sampler"] = refresh(run["sampler"])
            run = train_step(run, data, jax.random.key(1))
            saver.save(step + 1, args=ocp.args.StandardSave(run))
        saver.wait_until_finished()
        print(f"went on from step {start} to {num_steps}; kept {saver.all_steps()}")
    loss = jax.vmap(loss_fn, (None, 0))(run["params"], data).mean()
    print(f"loss {loss:.3f}\n{sampler.report(run['sampler'])}")
    return run


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
