"""What draws for a loader cost beside NumPy's and torch's own, where weights change at every step.

    python experiments/benchmarks/loaders.py --processes 3      # torch's rows where it is installed

Of each way, for N examples: 256 draws; 256 late scores written; both, so that the next 256 draws know the scores; and
bytes an example that it keeps. Medians of ``--repeats`` rounds. Run it alone on the machine: ``--processes`` runs it so
many times, each in a process of its own, and prints the median of all with the least and the largest.

    index_sampler   `isgd.loaders.index_sampler` without order, groups and sketches: `next`, `observe` and `record`.
                    Its draws know late scores at the next refresh, so that it has no "both"
    tree            `isgd.samplers.update` and `independent`: the tree of sums alone, its draws know each score at once
    numpy           a cumulative sum that is kept, and made again for new scores; `searchsorted`
    torch           `torch.utils.data.WeightedRandomSampler`, made again for new scores

Targets, at N = 10^7: index_sampler's draws at most 1 ms, its record at most 1 ms, at most 24 bytes an example; the
tree's both at least 50 times as fast as torch's.

Result (JAX 0.10.2, torch 2.13 for CPUs, one core of a quiet machine, `taskset -c 0`, three processes of five rounds):

==========  ================  ====================  =======================  =====================  ====================
N           way               draws ms              record ms                both ms                times over torch
==========  ================  ====================  =======================  =====================  ====================
10^7        index_sampler     0.63 [0.58, 0.70]     0.16 [0.12, 0.20]        -                      -
10^7        tree              0.13 [0.13, 0.15]     0.43 [0.42, 0.43]        0.53 [0.51, 0.56]      101 [92, 103]
10^7        numpy             0.40 [0.37, 0.41]     34 [33, 35]              35 [34, 36]            1.5 [1.4, 1.6]
10^7        torch             51 [49, 57]           0.004 [0.004, 0.018]     51 [49, 58]            1
10^6        index_sampler     0.61 [0.57, 0.72]     0.15 [0.08, 0.16]        -                      -
10^6        tree              0.10 [0.10, 0.12]     0.31 [0.30, 0.39]        0.40 [0.40, 0.45]      3.3 [3.2, 3.6]
10^6        numpy             0.08 [0.07, 0.09]     3.4 [3.4, 3.5]           3.5 [3.4, 3.8]         0.39 [0.37, 0.40]
10^6        torch             1.3 [1.3, 1.4]        0.004 [0.003, 0.004]     1.4 [1.3, 1.5]         1
==========  ================  ====================  =======================  =====================  ====================

At 10^7 index_sampler keeps 18.1 bytes an example, the tree 6.1, numpy 16, torch 8: all targets are met. (On a machine
under other load index_sampler's draws took 1.23 ms and the tree was 55 times as fast.) Below 10^6 examples the tree
buys no time: at 10^5 torch takes 0.18 ms for both, the tree 0.32, numpy 0.39; at 10^4 numpy and torch are ahead by far.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import isgd_jax as isgd

DRAWS = 256
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
Way = tuple[Callable[[], Any], Callable[[], Any] | None, Callable[[], Any] | None, float]
"""What draws, what writes scores, what does both, and bytes an example."""


def index_sampler(scores: np.ndarray, late: Iterator[tuple[np.ndarray, np.ndarray]]) -> Way:
    size = len(scores)
    sampler = isgd.importance_sampler(size, batch_size=DRAWS, order="index")
    draws = isgd.loaders.index_sampler(sampler, key=jax.random.key(0), ahead=1, refresh_every=2**30)
    draws.record(np.arange(size), scores)
    held = sum(leaf.nbytes for leaf in draws.state_dict()["state"]) / size

    def draw() -> np.ndarray:
        batch = next(draws)
        draws.observe(batch)
        return batch.indices

    def record() -> None:
        draws.record(*next(late))
        draw()  # which waits for the record

    return draw, record, None, held


def tree(scores: np.ndarray, late: Iterator[tuple[np.ndarray, np.ndarray]]) -> Way:
    kept = [isgd.samplers.prepare(jnp.asarray(scores))]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(kept)) / len(scores)
    steps = iter(range(2**30))

    def drawn(step: Any, law: Any) -> jax.Array:
        return isgd.samplers.independent(jax.random.fold_in(jax.random.key(0), step), law, num_draws=DRAWS).indices

    def changed(law: Any, ids: Any, new: Any, step: Any) -> tuple[Any, jax.Array]:
        law = isgd.samplers.update(law, ids, new)
        return law, drawn(step, law)

    sample, change = jax.jit(drawn), jax.jit(isgd.samplers.update, donate_argnums=0)
    in_one = jax.jit(changed, donate_argnums=0)

    def draw() -> np.ndarray:
        return np.asarray(sample(next(steps), kept[0]))

    def record() -> None:
        kept[0] = jax.block_until_ready(change(kept[0], *next(late)))

    def both() -> np.ndarray:
        kept[0], indices = in_one(kept[0], *next(late), next(steps))
        return np.asarray(indices)

    return draw, record, both, held


def numpy(scores: np.ndarray, late: Iterator[tuple[np.ndarray, np.ndarray]]) -> Way:
    weights, rng = scores.astype(np.float64), np.random.default_rng(0)
    sums = np.cumsum(weights)

    def draw() -> np.ndarray:
        return np.searchsorted(sums, rng.random(DRAWS) * sums[-1], side="right")

    def record() -> None:
        ids, new = next(late)
        weights[ids] = new
        np.cumsum(weights, out=sums)

    return draw, record, lambda: (record(), draw()), (weights.nbytes + sums.nbytes) / len(scores)


def torch(scores: np.ndarray, late: Iterator[tuple[np.ndarray, np.ndarray]]) -> Way:
    from torch import from_numpy
    from torch.utils.data import WeightedRandomSampler

    weights = scores.astype(np.float64)

    def draw() -> list[int]:
        return list(WeightedRandomSampler(from_numpy(weights), DRAWS))

    def record() -> None:
        ids, new = next(late)
        weights[ids] = new

    return draw, record, lambda: (record(), draw()), weights.nbytes / len(scores)


def late_scores(size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(1)
    while True:
        yield rng.choice(size, DRAWS).astype(np.int32), rng.lognormal(size=DRAWS).astype(np.float32)


def milliseconds(calls: list[Callable[[], Any]], repeats: int) -> list[float]:
    """The medians of so many rounds, in which each has its turn, long enough for the clock."""
    rounds = []
    for _ in range(repeats):
        rounds.append([])
        for call in calls:
            began, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - began < 0.01:
                call()
                count += 1
            rounds[-1].append(1e3 * (time.perf_counter() - began) / count)
    return np.median(rounds, axis=0).tolist()


def rows(repeats: int, sizes: list[int]) -> Iterator[tuple[tuple[int, str], tuple[float | None, ...]]]:
    """A row for each size and way: milliseconds of draws, record and both, and bytes an example."""
    ways = [index_sampler, tree, numpy, *([torch] if find_spec("torch") else [])]
    for size in sizes:
        scores, late = np.random.default_rng(2).lognormal(size=size).astype(np.float32), late_scores(size)
        for way in ways:
            *calls, held = way(scores, late)
            calls = [call for call in calls if call is not None]
            for call in calls:
                call()  # compiles
            making, drawn, recorded, *both = milliseconds([functools.partial(next, late), *calls], repeats)
            recorded -= making + (0.0 if both else drawn)
            yield (size, way.__name__), (drawn, recorded, both[0] - making if both else None, held)


def printed(names: tuple[Any, ...], cells: list[str]) -> str:
    shown = [f"{name:,}" if isinstance(name, int) else name for name in names]
    return " ".join(f"{cell:>14}" for cell in shown) + " ".join(f"{cell:>24}" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--processes", type=int, default=1, help="run in so many fresh processes; medians with ranges")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of examples, N")
    parser.add_argument("--lines", action="store_true", help="print one JSON line a row, for other programs")
    arguments = parser.parse_args()
    if arguments.lines:
        for row in rows(arguments.repeats, arguments.sizes):
            print(json.dumps(row), flush=True)
        return
    command = [sys.executable, __file__, "--lines", "--repeats", str(arguments.repeats), "--sizes"]
    found: dict[tuple[Any, ...], list[list[float | None]]] = {}
    for _ in range(arguments.processes):
        run = subprocess.run([*command, *map(str, arguments.sizes)], check=True, stdout=subprocess.PIPE, text=True)
        for names, numbers in map(json.loads, run.stdout.splitlines()):
            found.setdefault(tuple(names), []).append(numbers)
    print(printed(("N", "way"), ["draws ms", "record ms", "both ms", "bytes/example", "times as fast as torch"]))
    for (size, way), numbers in found.items():
        columns = list(zip(*numbers, strict=True))
        cells = ["-" if None in column else told(column) for column in columns]
        peers = found.get((size, "torch"))
        faster = [theirs[2] / own[2] for theirs, own in zip(peers or [], numbers, strict=False) if own[2]]
        print(printed((size, way), [*cells, told(faster) if faster else "-"]))


def told(numbers: Any) -> str:
    return f"{np.median(numbers):.3g} [{min(numbers):.3g}, {max(numbers):.3g}]"


if __name__ == "__main__":
    main()
