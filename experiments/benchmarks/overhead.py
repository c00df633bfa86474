"""What the estimator costs beside the gradients: a step with it over the plain step, per-example norms aside.

    python experiments/benchmarks/overhead.py steps --processes 3      # of three lengths, in a scan and from Python
    python experiments/benchmarks/overhead.py refresh --processes 3    # a new proposal, a new order, sketches, by N
    python experiments/benchmarks/overhead.py fit --processes 3        # the two steps of `fit`, by model and batch

In ``steps`` both have the same per-example gradients and the same reweighted update; the plain one draws uniform
indices. So the difference is the draw, the table, calibration, uniform fraction, gate and monitor. Everything is
donated. Medians of ``--repeats`` rounds, the two taken in turn. Run it alone on the machine: ``--processes`` runs it so
many times, each in a process of its own, and prints the median of all with the least and the largest.

Targets: at most 60 us a step in a scan and 150 us from Python, for N = 10^3 to 10^6, without growth; a refresh without
a new order at N = 10^6 at most 40 ms.

Result (JAX 0.10.2, two CPU cores with nothing else on them, medians of three processes), microseconds more than the
plain step at N = 10^3 and 10^6:

===================  ============  =============
plain step           in a scan     from Python
===================  ============  =============
0.1 ms (0.3 Python)  44, 69        84, 132
0.5 ms (0.7 Python)  82, 121       115, 140
8 to 9 ms            690, 730      230, 410
===================  ============  =============

So from Python the target is met below 1 ms; in a scan it is **missed** but for the smallest step and table: N costs 25
to 40 us, cache misses of the tree that draws are made on and of the table; and the monitor's two products of gradients
read every parameter, which is 8 % of the largest step. A refresh at N = 10^6: without an order 9 ms, target met; with
the last one 13, sorted by score 312, by labels and score 425, by clusters of 16 numbers 550 and of 128 numbers 930 ms.
A state has 18 bytes an example, an order 8 more, clusters of 16 numbers 73.

``fit`` (JAX 0.10.2, the same, 15 rounds; networks of `norm_models.py`): milliseconds of a plain step written by hand,
and its steps in ratio to that, medians of three processes with the least and the largest:

========  =====  ====  =================  =================
model     batch  ms    rests              learns
========  =====  ====  =================  =================
MLP       32     59    1.00 (0.97, 1.00)  1.04 (1.03, 1.04)
MLP       128    86    1.01 (1.01, 1.02)  1.05 (1.04, 1.07)
CNN       32     20    1.00 (0.96, 1.03)  1.15 (1.05, 1.18)
CNN       128    119   0.60 (0.60, 0.60)  0.65 (0.62, 0.67)
ResNet    32     286   0.72 (0.71, 0.72)  0.97 (0.95, 0.98)
ResNet    128    1418  0.56 (0.55, 0.57)  0.75 (0.75, 0.77)
ViT       32     313   0.92 (0.91, 0.92)  1.03 (1.02, 1.03)
ViT       128    1244  0.81 (0.79, 0.83)  0.90 (0.89, 0.91)
GPT       32     494   0.86 (0.86, 0.86)  0.85 (0.85, 0.86)
GPT       128    1540  0.97 (0.96, 0.97)  0.94 (0.94, 0.95)
========  =====  ====  =================  =================

What learns draws, differentiates one by one, and knows norms, scores, gate and monitor at its end; what rests takes the
ordinary gradient. Both are below a plain step where slices of the batch stay in the cache.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from norm_models import make

import isgd_jax as isgd
from isgd_jax.training.train_step import TrainState, beside
from isgd_jax.training.train_step import make_steps as steps_of_fit

MODELS = ("mlp", "cnn", "resnet", "vit", "gpt")
BATCHES = (32, 128)
BATCH = 32
SIZES = (1_000, 10_000, 100_000, 1_000_000)
WIDTHS = {"0.05 ms": (16, 16), "1 ms": (256, 3), "20 ms": (1024, 5)}
"""Width and number of hidden layers of an MLP whose plain step takes about as long, on one core of 2026."""
FEATURES = 32


def problem(width: int, depth: int, num_examples: int) -> tuple[Any, Any, Any]:
    """Parameters, data and loss of a regression."""
    key = jax.random.key(0)
    sizes = [FEATURES, *[width] * depth, 1]
    keys = jax.random.split(key, len(sizes))
    params = [
        {"w": jax.random.normal(k, (a, b)) / np.sqrt(a), "b": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes, sizes[1:], strict=False)
    ]
    rng = np.random.default_rng(0)
    data = {
        "x": jnp.asarray(rng.normal(size=(num_examples, FEATURES)).astype(np.float32)),
        "y": jnp.asarray(rng.standard_t(3, size=num_examples).astype(np.float32)),
    }

    def loss_fn(params: Any, example: Any) -> jax.Array:
        hidden = example["x"]
        for layer in params[:-1]:
            hidden = jax.nn.tanh(hidden @ layer["w"] + layer["b"])
        out = hidden @ params[-1]["w"] + params[-1]["b"]
        return 0.5 * (out[0] - example["y"]) ** 2

    return params, data, loss_fn


def make_steps(loss_fn: Any, num_examples: int, sampler: Any) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """``step(carry, data, key) -> carry``: plain, and with the estimator; and the optimizer."""
    tx = optax.chain(isgd.importance_weighting(num_examples), optax.sgd(1e-4))

    def update(params: Any, opt_state: Any, batch: Any, probs: Any, target: Any) -> tuple[Any, Any, Any]:
        _, grads = isgd.per_example_value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, probs=probs, target=target)
        return optax.apply_updates(params, updates), opt_state, grads

    def plain(carry: Any, data: Any, key: Any) -> Any:
        params, opt_state, count, total = carry
        key = jax.random.fold_in(key, count)
        indices = jax.random.randint(key, (BATCH,), 0, num_examples)
        batch = jax.tree.map(lambda x: x[indices], data)
        share = jnp.full(BATCH, 1.0 / num_examples, jnp.float32)
        params, opt_state, grads = update(params, opt_state, batch, share, share)
        return params, opt_state, count + 1, total + jnp.sum(isgd.norms(grads))  # norms aside: both steps have them

    def sampled(carry: Any, data: Any, key: Any) -> Any:
        params, opt_state, state = carry
        draw = sampler.sample(jax.random.fold_in(key, state.clock.step), state)
        batch = jax.tree.map(lambda x: x[draw.indices], data)
        params, opt_state, grads = update(params, opt_state, batch, draw.probs, draw.target)
        return params, opt_state, sampler.observe(state, draw, grads)

    return plain, sampled, tx


def seconds_a_step(
    step: Callable[..., Any], carry: Any, data: Any, *, in_scan: bool, steps: int
) -> Callable[[], float]:
    """What times ``steps`` steps: in one program, or one call each."""
    key = jax.random.key(1)
    if in_scan:

        @functools.partial(jax.jit, donate_argnums=0)
        def run(carry: Any, data: Any, key: Any) -> Any:
            return jax.lax.fori_loop(0, steps, lambda _, inner: step(inner, data, key), carry)

    else:
        one = jax.jit(step, donate_argnums=0)

        def run(carry: Any, data: Any, key: Any) -> Any:
            for _ in range(steps):
                carry = one(carry, data, key)
            return carry

    kept = [jax.block_until_ready(run(jax.tree.map(jnp.copy, carry), data, key))]

    def timed() -> float:
        began = time.perf_counter()
        kept[0] = jax.block_until_ready(run(kept[0], data, key))
        return (time.perf_counter() - began) / steps

    return timed


def steps(repeats: int, sizes: tuple[int, ...]) -> Iterator[tuple[tuple[Any, ...], tuple[float, ...]]]:
    """A row for each step, place and size: its name, and microseconds a step, plain, with the estimator, more."""
    for name, (width, depth) in WIDTHS.items():
        for in_scan in (True, False):
            for size in sizes:
                params, data, loss_fn = problem(width, depth, size)
                sampler = isgd.importance_sampler(size, batch_size=BATCH)
                state = jax.jit(sampler.refresh, donate_argnums=0)(sampler.init())
                plain, sampled, tx = make_steps(loss_fn, size, sampler)
                first = (params, tx.init(params), jnp.int32(0), jnp.float32(0))
                second = (params, tx.init(params), state)
                count = 400 if name == "0.05 ms" else 100 if name == "1 ms" else 8
                timers = [
                    seconds_a_step(step, carry, data, in_scan=in_scan, steps=count)
                    for step, carry in ((plain, first), (sampled, second))
                ]
                found = np.array([[timer() for timer in timers] for _ in range(repeats)]) * 1e6
                before, after = np.median(found, axis=0)
                more = np.median(found[:, 1] - found[:, 0])
                yield (name, "scan" if in_scan else "Python", size), (float(before), float(after), float(more))


class _Rows:
    """Sketches of ``dims`` numbers an example; their values do not matter here."""

    def __init__(self, dims: int) -> None:
        self.dims = dims

    def of_grads(self, grads: Any) -> jax.Array:
        raise NotImplementedError("nothing is observed in this benchmark")


def refresh(repeats: int, sizes: tuple[int, ...]) -> Iterator[tuple[tuple[Any, ...], tuple[float, ...]]]:
    """A row for each size and order: milliseconds, nanoseconds and bytes an example beyond those without an order."""
    for size in sizes:
        if size < 10_000:
            continue
        labels = jnp.asarray(np.random.default_rng(1).integers(10, size=size))
        old = {"order": "score", "order_every": 2**30}
        arms: dict[str, dict[str, Any]] = {
            "none": {"order": "index"}, "the last one": old, "score": {}, "labels and score": {"order": labels}
        }  # fmt: skip
        arms |= {f"clusters, {dims} numbers": {"order": _Rows(dims)} for dims in (16, 128)}
        without: tuple[float, float] | None = None
        for name, options in arms.items():
            milliseconds, held = _refreshed(size, name, options, repeats)
            without = without or (milliseconds, held)
            more = 1e6 * (milliseconds - without[0]) / size, held - without[1]
            yield (size, name), (milliseconds, *more, held)


def _refreshed(size: int, name: str, options: dict[str, Any], repeats: int) -> tuple[float, float]:
    """The median milliseconds of a refresh, and the bytes of the state, an example."""
    sampler = isgd.importance_sampler(size, batch_size=BATCH, **options)
    state = sampler.init()
    scores = jnp.asarray(np.random.default_rng(2).lognormal(size=size).astype(np.float32))
    sketches = None
    if "clusters" in name:
        sketches = jax.random.normal(jax.random.key(3), (size, options["order"].dims))
    record = jax.jit(sampler.record, donate_argnums=0)
    state = record(state, jnp.arange(size), scores, version=0, sketches=sketches)
    del sketches
    run = jax.jit(sampler.refresh, donate_argnums=0)
    state = jax.block_until_ready(run(state))
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        state = jax.block_until_ready(run(state))
        found.append(1e3 * (time.perf_counter() - began))
    return float(np.median(found)), sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / size


def fit_steps(
    repeats: int, sizes: tuple[int, ...], models: tuple[str, ...] = MODELS
) -> Iterator[tuple[tuple[Any, ...], tuple[float, ...]]]:
    """A row for each model and batch: milliseconds of a plain step, and those of `fit` in ratio to it.

    The plain step is what one writes by hand: uniform indices, `jax.grad` of the batch's mean loss, SGD with
    momentum. One step of `fit` rests (an ordinary gradient, nothing learnt), the other learns from each example.
    """
    for name in models:
        for batch_size in sizes:
            yield (name, batch_size), _fit_step(name, batch_size, repeats)


def _fit_step(name: str, batch_size: int, repeats: int) -> tuple[float, float, float]:
    size = 4 * batch_size
    loss_fn, params, data = make(name, size)
    problem = isgd.Problem(loss_fn, params, data)
    sampler, epochs = (
        isgd.importance_sampler(size, batch_size=batch_size),
        isgd.shuffled_epochs(size, batch_size=batch_size),
    )
    own = optax.sgd(1e-4, momentum=0.9)
    tx = optax.chain(isgd.importance_weighting(size), own)
    steps = steps_of_fit(problem, sampler, tx, plain=epochs)
    assert steps.rest is not None
    key, now = jax.random.key(0), jnp.float32(0.0)

    @functools.partial(jax.jit, donate_argnums=0)
    def plain(carry: Any, data: Any, key: Any) -> Any:
        params, opt_state, count = carry
        batch = jax.tree.map(
            lambda x: x[jax.random.randint(jax.random.fold_in(key, count), (batch_size,), 0, size)], data
        )

        def mean_loss(params: Any) -> jax.Array:
            return jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(params, batch))

        gradient = jax.grad(mean_loss)(params)
        updates, opt_state = own.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, count + 1

    def by_hand(carry: Any) -> Any:
        return plain(carry, data, key)

    def rest(state: TrainState) -> TrainState:
        return steps.rest(state, None, data, key, now)[0]

    def learn(state: TrainState) -> TrainState:
        return beside(steps.step)(state, None, data, key, now)[0]

    state = TrainState(params, tx.init(params), sampler.init(), None, epochs.init())
    kept = [(params, own.init(params), jnp.int32(0)), state, state]
    kept = [jax.tree.map(jnp.copy, carry) for carry in kept]
    found: list[list[float]] = []
    for _ in range(1 + repeats):
        row = []
        for at, step in enumerate((by_hand, rest, learn)):
            began = time.perf_counter()
            kept[at] = jax.block_until_ready(step(kept[at]))
            row.append(1e3 * (time.perf_counter() - began))
        found.append(row)
    middle = np.median(np.asarray(found[1:]), axis=0)
    return float(middle[0]), float(middle[1] / middle[0]), float(middle[2] / middle[0])


WHAT = {
    "steps": (steps, ("step", "from", "N"), ("plain us", "with us", "more us")),
    "fit": (fit_steps, ("model", "batch"), ("plain ms", "rests, ratio", "learns, ratio")),
    "refresh": (refresh, ("N", "order"), ("ms", "more ns/example", "more bytes/ex.", "bytes/example")),
}
"""What is measured, the names of a row, and its numbers."""


def printed(row: tuple[Any, ...]) -> str:
    """A row of a table: names, and numbers with their ranges."""
    cells = [f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row]
    return " ".join(f"{cell:>22}" for cell in cells)


def measured_apart(arguments: argparse.Namespace) -> dict[tuple[Any, ...], list[tuple[float, ...]]]:
    """The numbers of each row, from processes one after the other."""
    rows: dict[tuple[Any, ...], list[tuple[float, ...]]] = {}
    command = [sys.executable, __file__, arguments.what, "--repeats", str(arguments.repeats), "--lines"]
    command += ["--sizes", *map(str, arguments.sizes), "--models", *arguments.models]
    for _ in range(arguments.processes):
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        for names, numbers in map(json.loads, run.stdout.splitlines()):
            rows.setdefault(tuple(names), []).append(tuple(numbers))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(WHAT))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--processes", type=int, default=1, help="run in so many fresh processes; medians with ranges")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of examples, N; of `fit` batches (32 128)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="of `fit`")
    parser.add_argument("--lines", action="store_true", help="print one JSON line a row, for other programs")
    arguments = parser.parse_args()
    measure, names, numbers = WHAT[arguments.what]
    arguments.sizes = arguments.sizes or (BATCHES if arguments.what == "fit" else SIZES)
    given = {"models": tuple(arguments.models)} if arguments.what == "fit" else {}
    if not arguments.lines:
        print(printed((*names, *numbers)), flush=True)
    if arguments.processes > 1:
        for row, found in measured_apart(arguments).items():
            middle, low, high = np.median(found, axis=0), np.min(found, axis=0), np.max(found, axis=0)
            cells = [f"{m:.2f} [{a:.2f}, {b:.2f}]" for m, a, b in zip(middle, low, high, strict=True)]
            print(printed((*row, *cells)), flush=True)
        return
    for row, values in measure(arguments.repeats, tuple(arguments.sizes), **given):
        if arguments.lines:
            print(json.dumps([row, values]), flush=True)
        else:
            print(printed((*row, *(f"{value:.2f}" for value in values))), flush=True)


if __name__ == "__main__":
    main()
