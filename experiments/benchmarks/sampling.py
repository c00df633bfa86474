"""How fast are draws from a kept law, and does float32 starve anybody?

Claims under test, for a law of log-normal (sigma = 3) scores with a mixture of 0.1:

* at N = 10^7, 128 and 4096 draws are at least 50 times faster than `jax.random.choice(p=)` and NumPy's `choice(p=)`;
* changing 10^4 scores of 10^7 in place is at least 20 times cheaper than building the law again;
* no example that no attainable random value maps to: computed for every example, not drawn;
* counts over 1,000 cells of equal mass agree with float64 (chi-square, at most 999 degrees of freedom: 999 +- 45).

Result (two busy CPU cores; ratios to jax.random.choice and to NumPy): N = 10^7, 128 draws in 0.25 to 0.31 ms, 496 to
632 and 282 to 359 times; 4096 draws in 0.9 to 1.0 ms, 160 to 170 and 118 to 126 times; update of 10^4 scores 58 times
cheaper than a rebuild, and the same bits. N = 10^8: 4096 draws in 2 ms, 578 to 645 and 969 to 1081 times. No example
starved at 10^4, 10^7 and 10^8; chi-square 505 on 548, 1005 on 971, 1033 on 999 degrees. At N = 10^4 there is nothing to
gain: a flat sum of 10^4 numbers costs as little as the descent.

Command: python experiments/benchmarks/sampling.py [--sizes 10000 1000000 10000000 100000000]
Time: about 2 minutes on two CPU cores; 100,000,000 examples take 5 GB.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from isgd_jax.sampling import double_float, samplers
from isgd_jax.sampling.law import Law, at_fractions

SEED, CELLS, CHANGED = 0, 1000, 10_000


def main() -> None:
    """One table a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**4, 10**6, 10**7, 10**8])
    for size in parser.parse_args().sizes:
        masses = log_normal_masses(size)
        law = jax.block_until_ready(jax.jit(samplers.prepare)(jnp.asarray(masses)))
        print(f"\nN = {size:,}: law of {sum(x.nbytes for x in jax.tree.leaves(law)) / size:.1f} bytes an example")
        time_draws(law, masses)
        time_update(law, masses)
        print(f"  examples that no random value reaches: {count_starved(law, masses):,}")
        statistic, degrees = chi_square(law, masses)
        print(f"  chi-square, 4,000,000 draws: {statistic:.0f} on {degrees} +- {np.sqrt(2 * degrees):.0f} degrees")


def log_normal_masses(size: int) -> np.ndarray:
    scores = np.random.default_rng(SEED).lognormal(0.0, 3.0, size)
    return (0.9 * scores / scores.sum() + 0.1 / size).astype(np.float32)


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def time_draws(law: Law, masses: np.ndarray) -> None:
    key, device_masses, size = jax.random.key(SEED), jnp.asarray(masses), len(masses)
    wide = masses.astype(np.float64) / masses.sum(dtype=np.float64)
    generator = np.random.default_rng(SEED)
    for num_draws in (128, 4096):
        flat_choice = jax.jit(lambda key, p, m=num_draws: jax.random.choice(key, size, (m,), p=p))
        flat = median_seconds(partial(flat_choice, key, device_masses), 3)
        by_numpy = median_seconds(partial(generator.choice, size, num_draws, p=wide), 3)
        print(f"  {num_draws} draws: jax.random.choice {flat * 1e3:.2f} ms, numpy choice {by_numpy * 1e3:.2f} ms")
        for sampler in (samplers.independent, samplers.stratified, samplers.systematic):
            ours = median_seconds(partial(jax.jit(partial(sampler, num_draws=num_draws)), key, law), 50)
            print(f"    {sampler.__name__:12} {ours * 1e3:7.3f} ms, {flat / ours:5.0f} x, {by_numpy / ours:5.0f} x")


def time_update(law: Law, masses: np.ndarray) -> None:
    rng = np.random.default_rng(SEED)
    indices = jnp.asarray(rng.choice(len(masses), min(CHANGED, len(masses)), replace=False), jnp.int32)
    values = jnp.asarray(masses)[indices]  # the same values: the law stays what it is for the checks below
    rebuild = median_seconds(partial(jax.jit(samplers.prepare), jnp.asarray(masses)), 5)
    update = jax.jit(samplers.update, donate_argnums=0)
    kept = jax.block_until_ready(update(jax.tree.map(jnp.copy, law), indices, values))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        kept = jax.block_until_ready(update(kept, indices, values))
        seconds.append(time.perf_counter() - start)
    updated = float(np.median(seconds))
    same = all(bool(jnp.array_equal(a, b)) for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(law), strict=True))
    times = f"{updated * 1e3:.2f} ms, rebuild {rebuild * 1e3:.2f} ms, {rebuild / updated:.0f} x"
    print(f"  update of {len(indices):,}: {times}; bit for bit the rebuilt law: {same}")


def count_starved(law: Law, masses: np.ndarray, chunk: int = 10**6) -> int:
    """Aim a 48-bit random value at the middle of every example's share; count those where it does not land."""

    def at(law: Law, unit: double_float.Pair) -> jax.Array:
        return at_fractions(law, unit, jnp.float32(1.0))[0]

    land = jax.jit(at)
    total, before, starved = masses.sum(dtype=np.float64), 0.0, 0
    for start in range(0, len(masses), chunk):
        part = masses[start : start + chunk].astype(np.float64)
        ends = before + np.cumsum(part)
        bits = np.floor((ends - part / 2) / total * 2.0**48)
        high = np.floor(bits / 2.0**24)
        unit = double_float.two_sum(
            jnp.asarray(high * 2.0**-24, jnp.float32), jnp.asarray((bits - high * 2.0**24) * 2.0**-48, jnp.float32)
        )
        starved += int(np.sum(np.asarray(land(law, unit)) != np.arange(start, start + len(part))))
        before = ends[-1]
    return starved


def chi_square(law: Law, masses: np.ndarray, batches: int = 40, num_draws: int = 100_000) -> tuple[float, int]:
    ends = np.cumsum(masses, dtype=np.float64)
    cells = np.minimum((ends / ends[-1] * CELLS).astype(np.int32), CELLS - 1)
    expected = batches * num_draws * np.bincount(cells, masses, CELLS) / ends[-1]
    draw, seen = jax.jit(partial(samplers.independent, num_draws=num_draws)), np.zeros(CELLS)
    for batch in range(batches):
        key = jax.random.fold_in(jax.random.key(SEED), batch)
        seen += np.bincount(cells[np.asarray(draw(key, law).indices)], minlength=CELLS)
    used = expected > 0  # one huge score may fill a cell by itself and leave its neighbours empty
    return float(np.sum((seen - expected)[used] ** 2 / expected[used])), int(used.sum()) - 1


if __name__ == "__main__":
    main()
