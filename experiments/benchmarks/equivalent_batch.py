"""Is a batch of draws worth the plain batch that the report says?

With r = UNIFORM/DRAWN, as the monitor measures it, a batch of M draws has the variance of a plain batch of r M. Whether
it trains as that batch does is another question: a loss feels variance along some directions more than along others,
and Adam scales them. So three plain batches, r M / 1.5, r M and 1.5 r M, train at the same rate for as many steps.

Claim      The drawn run's final train loss lies between those of the outer two in at least 4 of 5 seeds.

Setting    scikit-learn's digits, MLP 64-128x2-10, M = 16, 2,000 steps at a constant rate; plain batches are independent
           uniform draws. r is the median of what the report says over the last half of the drawn runs, all seeds
           together; losses are of all examples, the mean of 20 looks in the last fifth of the steps.

Command    python experiments/benchmarks/equivalent_batch.py [--seeds 5] [--steps 2000]

Result     Refuted, in both directions (one core, the other at work; two minutes):

               SGD: 16 draws are worth 167 by variance; between the outer two in 0 of 5
                 final train loss: drawn 0.0129; plain batches of 111: 0.0139, 167: 0.0137, 250: 0.0136
                 the plain batch of the same loss: 808 (392 to 1938)
               Adam: 16 draws are worth 147 by variance; between the outer two in 0 of 5
                 final train loss: drawn 0.0022; plain batches of 98: 0.0009, 147: 0.0007, 221: 0.0005
                 the plain batch of the same loss: 31 (24 to 41)

           With SGD at this rate the batch hardly matters beyond 100, and draws are ahead of all three: 808 says no more
           than that. Adam divides by the root of the mean square of what it is given, so that draws of the same
           variance train otherwise: they are worth twice their number there, not nine times.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import isgd_jax as isgd

DRAWS, LOOKS, REFRESH = 16, 100, 20
OPTIMIZERS = {"SGD": lambda: optax.sgd(0.1), "Adam": lambda: optax.adam(1e-3)}


def data() -> tuple[jax.Array, jax.Array]:
    """Images [n, 64] from 0 to 1, and labels [n]."""
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels, jnp.int32)


def init(key: jax.Array, widths: tuple[int, ...] = (64, 128, 128, 10)) -> Any:
    """He's normal weights."""
    keys = jax.random.split(key, len(widths) - 1)
    pairs = zip(keys, widths[:-1], widths[1:], strict=True)
    return [(jax.random.normal(k, (i, o)) * np.sqrt(2 / i), jnp.zeros(o)) for k, i, o in pairs]


def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Of one example."""
    x, label = example
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    w, b = params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(x @ w + b, label)


@functools.cache
def runner(optimizer: str, batch: int | None, steps: int) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """``key -> (train losses [LOOKS], equivalent batches [LOOKS])`` of a run; a batch of None is drawn."""
    examples, tx = data(), OPTIMIZERS[optimizer]()
    size = len(examples[1])
    sampler = isgd.importance_sampler(size, batch_size=DRAWS)

    def plain(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        at = jax.random.randint(key, (batch or 1,), 0, size)
        taken = jax.tree.map(lambda x: x[at], examples)
        return jax.grad(lambda p: jnp.mean(jax.vmap(loss_fn, (None, 0))(p, taken)))(params), state

    def drawn(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        draw = sampler.sample(key, state)
        grads = isgd.per_example_grads(loss_fn)(params, jax.tree.map(lambda x: x[draw.indices], examples))
        return isgd.weighted_mean(grads, draw.target / draw.probs), sampler.observe(state, draw, grads)

    gradient = drawn if batch is None else plain

    def run(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(carry: Any, at: jax.Array) -> tuple[Any, None]:
            params, opt_state, state = carry
            if batch is None:
                state = jax.lax.cond(at % REFRESH == 0, sampler.refresh, lambda s: s, state)
            mean, state = gradient(params, state, jax.random.fold_in(key, at))
            updates, opt_state = tx.update(mean, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state, state), None

        def look(carry: Any, at: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            count = steps // LOOKS
            carry, _ = jax.lax.scan(step, carry, at * count + jnp.arange(count, dtype=jnp.int32))
            loss = jnp.mean(jax.vmap(loss_fn, (None, 0))(carry[0], examples))
            worth = sampler.report(carry[2]).equivalent_batch if batch is None else jnp.float32(0)
            return carry, (loss, worth)

        params = init(jax.random.fold_in(key, steps))
        start = params, tx.init(params), sampler.init(key) if batch is None else ()
        return jax.lax.scan(look, start, jnp.arange(LOOKS, dtype=jnp.int32))[1]

    return jax.jit(run)


def final(losses: jax.Array) -> float:
    """The mean of the last fifth."""
    return float(jnp.mean(losses[-LOOKS // 5 :]))


def interpolated(loss: float, batches: list[int], losses: list[float]) -> float:
    """The plain batch of this loss, by a line through logarithms (least squares)."""
    slope, level = np.polyfit(np.log(batches), np.log(losses), 1)
    return float(np.exp((np.log(loss) - level) / slope))


def compared(optimizer: str, seeds: int, steps: int) -> list[str]:
    """What came out, in lines of text."""
    keys = [jax.random.key(seed) for seed in range(seeds)]
    runs = [runner(optimizer, None, steps)(key) for key in keys]
    worth = float(np.median([np.asarray(found[LOOKS // 2 :]) for _, found in runs]))
    batches = [max(1, round(worth * factor)) for factor in (1 / 1.5, 1.0, 1.5)]
    drawn = [final(losses) for losses, _ in runs]
    plain = [[final(runner(optimizer, batch, steps)(key)[0]) for batch in batches] for key in keys]
    inside = sum(min(row[0], row[2]) <= loss <= max(row[0], row[2]) for loss, row in zip(drawn, plain, strict=True))
    same = [interpolated(loss, batches, row) for loss, row in zip(drawn, plain, strict=True)]
    medians = ", ".join(f"{batch}: {np.median(row):.4f}" for batch, row in zip(batches, np.array(plain).T, strict=True))
    return [
        f"{optimizer}: {DRAWS} draws are worth {worth:.0f} by variance; between the outer two in {inside} of {seeds}",
        f"  final train loss: drawn {np.median(drawn):.4f}; plain batches of {medians}",
        f"  the plain batch of the same loss: {np.median(same):.0f} ({min(same):.0f} to {max(same):.0f})",
    ]


def main() -> None:
    """Three lines an optimizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2_000, help=f"a multiple of {LOOKS}")
    options = parser.parse_args()
    for optimizer in OPTIMIZERS:
        print("\n".join(compared(optimizer, options.seeds, options.steps)), flush=True)


if __name__ == "__main__":
    main()
