"""Grain: its sources and transformations give the drawn examples, fetched ahead."""

import sys
from pathlib import Path

import grain
import isgd_jax as isgd
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

digits = load_digits()
rows = [{"x": x, "y": y} for x, y in zip(digits.data, digits.target, strict=True)]
N, BUFFER = len(rows), 4
source = grain.MapDataset.source(rows).map(lambda r: r | {"x": np.float32(r["x"] / 16)})
sampler = isgd.importance_sampler(N, batch_size=64)
tx = optax.chain(isgd.importance_weighting(N), optax.adamw(1e-3))


class Drawn:
    """Pairs of what was drawn and its examples, for Grain's prefetching iterator."""

    def __init__(self, draws):
        self.draws = draws

    def __next__(self):
        drawn = next(self.draws)
        examples = [source[int(i)] for i in drawn.indices]
        return drawn, jax.tree.map(lambda *x: np.stack(x), *examples)

    def get_state(self):
        return {}  # draws also learn: `train` saves them


def loss_fn(params, example):
    logits = example["x"] @ params
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])


@jax.jit
def train_step(params, opt_state, drawn, batch):
    grads = isgd.per_example_grads(loss_fn)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params, probs=drawn.probs)
    return optax.apply_updates(params, updates), opt_state, isgd.norms(grads)


def train(folder, num_steps):
    params = jnp.zeros((64, 10))
    opt_state = tx.init(params)
    draws = isgd.loaders.index_sampler(sampler, key=jax.random.key(1), ahead=BUFFER + 2)
    saver, path = ocp.StandardCheckpointer(), Path(folder).absolute() / "all"
    if path.exists():
        *now, saved = saver.restore(path, (params, opt_state, draws.state_dict()))
        params, opt_state = now
        draws.load_state_dict(saved)
    fetched = grain.experimental.ThreadPrefetchDatasetIterator(Drawn(draws), BUFFER)
    for drawn, batch in fetched:
        params, opt_state, norms = train_step(params, opt_state, drawn, batch)
        draws.observe(drawn, norms=norms)
        if drawn.step + 1 == num_steps:
            break
    fetched.close()
    everything = params, opt_state, draws.state_dict()
    saver.save(path, everything, force=True)
    saver.wait_until_finished()
    print(f"step {num_steps}, mean norm {norms.mean():.3f}\n{draws.report()}")
    return everything


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
