"""How well cheaper scores rank examples: Spearman's correlation with the exact gradient norm, as training goes on.

Claim       the last layer alone ranks examples as the whole gradient does; loss, logit bound and normalisation layers
            nearly so, once training has begun; the norm of Adam's step is another thing at the start
Command     python experiments/benchmarks/ranks.py [--steps 0 100 400 1600]
Time        about a minute on two cores
Result      with --steps 1 50 200: last layer 0.998, 0.994, 0.995; normalisation 0.787, 0.989, 0.985; logit bound 0.774,
            0.936, 0.928; loss 0.783, 0.932, 0.922; norm of Adam's step 0.423, 0.923, 0.950
"""

import argparse
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from isgd_jax.engines import scorers


class Net(nn.Module):
    """A small convolutional net with GroupNorm, for 8 x 8 digits."""

    @nn.compact
    def __call__(self, x):
        for width in (16, 32):
            x = nn.relu(nn.GroupNorm(4)(nn.Conv(width, (3, 3))(x)))
        return nn.Dense(10)(nn.relu(nn.LayerNorm()(nn.Dense(64)(x.reshape(-1)))))


def logits_fn(params: Any, example: Any) -> Any:
    return Net().apply(params, example["image"])


def loss_fn(params: Any, example: Any) -> Any:
    return scorers.softmax_cross_entropy(logits_fn(params, example), example)


SCORERS = {
    "loss": scorers.loss(loss_fn),
    "logit bound": scorers.logit_bound(logits_fn),
    "last layer": scorers.grad_norm(loss_fn, select=scorers.under("Dense_1")),
    "last two layers": scorers.grad_norm(loss_fn, select=scorers.under("Dense_0", "Dense_1")),
    "normalisation": scorers.grad_norm(loss_fn, select=scorers.normalisation),
}


def spearman(one: Any, other: Any) -> float:
    ranks = [np.argsort(np.argsort(np.asarray(x))) for x in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def correlations(params: Any, opt_state: Any, data: Any) -> dict[str, float]:
    """Each scorer's correlation with the exact norm, over the whole set."""
    exact = jax.jit(scorers.grad_norm(loss_fn))(params, data)
    found = {label: spearman(exact, jax.jit(score)(params, data)) for label, score in SCORERS.items()}
    scale = jax.tree.map(lambda v: 1 / (jnp.sqrt(v) + 1e-8), optax.tree.get(opt_state, "nu"))
    adam = jax.jit(scorers.preconditioned_norm(loss_fn))((params, scale), data)
    return found | {"norm of Adam's step": spearman(exact, adam)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", type=int, default=(1, 100, 400, 1600))
    args = parser.parse_args()
    digits = load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    data = {"image": jnp.asarray(images), "label": jnp.asarray(digits.target, jnp.int32)}
    size = len(images)
    tx = optax.adam(1e-3)
    params = Net().init(jax.random.key(0), data["image"][0])

    @jax.jit
    def update(params: Any, opt_state: Any, key: Any) -> Any:
        batch = jax.tree.map(lambda x: x[jax.random.randint(key, (64,), 0, size)], data)
        grads = jax.grad(lambda p: jnp.mean(jax.vmap(loss_fn, (None, 0))(p, batch)))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state, columns = tx.init(params), {}
    for step in range(1, max(args.steps) + 1):
        params, opt_state = update(params, opt_state, jax.random.fold_in(jax.random.key(1), step))
        if step in args.steps:
            columns[step] = correlations(params, opt_state, data)
    print(f"{'step':22s}" + "".join(f"{step:>8d}" for step in columns))
    for label in next(iter(columns.values())):
        print(f"{label:22s}" + "".join(f"{column[label]:8.3f}" for column in columns.values()))


if __name__ == "__main__":
    main()
