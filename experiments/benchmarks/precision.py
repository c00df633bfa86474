"""How exact per-example norms are at each precision of matrix products, and what each costs on an accelerator.

Accelerators multiply float32 in fewer bits by default: an NVIDIA card by TF32, a TPU by bfloat16. The backward pass of
a loss is computed so whoever asks for it; what is chosen here is how norms and the mean are contracted from it.

Claims     At the program's own precision norms are as exact as those of `vmap(grad)`; they cost an ordinary gradient.
Command    python experiments/benchmarks/precision.py [--models vit gpt] [--batch 128] [--processes 3]
           [--ways scorer "norms, default"]
           python experiments/benchmarks/precision.py --models gpt2 --batch 16    of the size of GPT-2's smallest
Time       a minute or two a model on an accelerator, most of it to compile; a CPU has one precision, and no choice
Result     An NVIDIA H100, JAX 0.11.2, batch 128, one process. Errors, the largest of 128 norms and the update's in L2,
           against gradients in full float32. Contracted at the highest precision norms and update came out with the
           same errors: what there is to lose is lost in the backward pass.

                                MLP       CNN       ResNet    ViT
           vmap(grad)           2.6e-3    2.5e-2    1.4e-3    3.9e-4
           norms, default       2.6e-3    2.5e-2    1.4e-3    3.9e-4
           norms, highest       2.6e-3    2.5e-2    1.4e-3    3.9e-4
           ordinary update      2.4e-2    8.1e-3    3.4e-3    6.2e-4
           update, default      2.4e-2    8.1e-3    3.4e-3    6.3e-4

           Times over one ordinary gradient (0.23, 0.36, 2.65 and 3.1 ms; GPT at batch 32, 1.44 ms), as long as forms
           were chosen as for a CPU, and with `costs.ACCELERATOR`; of MLP, CNN and ResNet by this command, of ViT and
           GPT by a profile of the same functions.

                                         MLP    CNN    ResNet  ViT    GPT
           as for a CPU
             norms                       0.81   1.80   5.75    1.95
             update and norms            1.23   1.87   5.90    3.02
             vmap(grad), norms           7.11   3.22   5.33    1.50
           as for an accelerator
             norms                       0.78   0.83   1.20    1.11   1.11
             update and norms            1.61   0.98   1.39    1.51   1.73
             vmap(grad), norms           6.72   3.29   7.23    1.51   1.26

           (With XLA_PYTHON_CLIENT_PREALLOCATE=false, which makes what is allocated dearer: the MLP's update and norms
           are 1.23 ordinary gradients by their kernels.) With memory preallocated and the model traced once, batch
           128, one process:

                                         ResNet  ViT    GPT
             scorer                      1.16    0.90   1.06
             update and norms            1.35    1.26   1.28
             vmap(grad), norms           5.02    1.32   1.37

           (ordinary gradients of 2.66, 3.79 and 3.85 ms; errors as above, of the GPT 2e-4 for norms and 1e-3 for both
           updates). By their kernels, whose time a profile adds up, the ViT's norms are 1.11 and update and norms
           1.35 ordinary gradients, in 560 and 681 kernels for 438; the GPT's 1.06 and 1.32, in 457 and 564 for 360. A
           CPU has 0.5 to 1.1 for norms: the card waits for memory and for kernels to start rather than for products.

           A GPT of GPT-2's smallest size, 1,024 tokens, batch 8, one process, an ordinary gradient of 36.9 ms:

                                         norms   update and norms
             ours                        1.08    1.35
             table formed once for both          1.20
             vmap(grad)                  1.00    1.10

           `vmap(grad)` writes each product in bfloat16, as the model has it; ours wrote float32 then, 4 GB more to read
           for each use. It is bfloat16 now too, which has not been timed. The scorer took 1.43 in slices of one, in a
           seventh of the memory; it takes as many at once as twice the device's memory bounds now.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from norms import json_of

MODELS = ("mlp", "cnn", "resnet", "vit", "gpt")
LARGE = ("gpt2",)
PRECISIONS = ("default", "highest")
CALLS, ROUNDS = 10, 9
"""Calls that are dispatched one behind the other, and how often each way is timed."""


def measure(name: str, size: int, only: Sequence[str] | None) -> dict[str, Any]:
    """One process's figures: for each way its time in ordinary gradients, and its errors."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from norm_models import make

    import isgd_jax as isgd

    loss_fn, params, batch = make(name, size)
    weights = jnp.linspace(0.5, 1.5, size)

    def mean_loss(params, batch):
        return jnp.mean(weights * jax.vmap(loss_fn, in_axes=(None, 0))(params, batch))

    def both(precision):
        def asked(params, batch):
            grads = isgd.per_example_grads(loss_fn)(params, batch)
            mean = isgd.weighted_mean(grads, weights, precision=precision)
            return isgd.norms(grads, precision=precision), mean

        return asked

    def norms(precision):
        return lambda params, batch: isgd.norms(isgd.per_example_grads(loss_fn)(params, batch), precision=precision)

    def stacked(params, batch):
        grads = jax.vmap(jax.grad(loss_fn), (None, 0))(params, batch)
        return jnp.sqrt(sum(jnp.sum(jnp.square(x), range(1, x.ndim)) for x in jax.tree.leaves(grads))), grads

    def stacked_norms(params, batch):
        return stacked(params, batch)[0]

    def stacked_both(params, batch):
        found, grads = stacked(params, batch)
        return found, jax.tree.map(lambda x: jnp.mean(weights.reshape(-1, *[1] * (x.ndim - 1)) * x, 0), grads)

    ways = {"ordinary": jax.grad(mean_loss), "vmap(grad), norms": stacked_norms}
    ways |= {"vmap(grad), update and norms": stacked_both, "scorer": isgd.scorers.grad_norm(loss_fn)}
    for precision in PRECISIONS:
        ways[f"norms, {precision}"] = norms(precision)
        ways[f"update and norms, {precision}"] = both(precision)
    ways = {label: way for label, way in ways.items() if not only or label in ("ordinary", *only)}
    with jax.default_matmul_precision("highest"):
        in_float32 = make(name, size, exact=True)[0]
        one = jax.jit(lambda params, example: jax.grad(in_float32)(params, example))
        true_norms, true_mean = np.zeros(size), jax.tree.map(lambda x: np.zeros(x.shape), params)
        for place, weight in enumerate(np.asarray(weights)):  # one by one, which needs the least memory
            grad = jax.device_get(one(params, jax.tree.map(lambda x, place=place: x[place], batch)))
            leaves = jax.tree.leaves(grad)
            true_norms[place] = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in leaves))
            true_mean = jax.tree.map(lambda a, g, weight=weight: a + weight / size * g, true_mean, grad)
    programs = {label: jax.jit(way).lower(params, batch).compile() for label, way in ways.items()}
    seconds: dict[str, list[float]] = {label: [] for label in programs}
    for label, program in programs.items():
        for _ in range(ROUNDS + 1):
            began = time.perf_counter()
            jax.block_until_ready([program(params, batch) for _ in range(CALLS)])
            seconds[label].append((time.perf_counter() - began) / CALLS)
    base, rows = statistics.median(seconds["ordinary"][1:]), {}
    for label, program in programs.items():
        found = jax.device_get(program(params, batch))
        row = {"seconds": statistics.median(seconds[label][1:]), "memory": memory(program)}
        row["ratio"] = row["seconds"] / base
        has_norms, has_mean = label != "ordinary", label == "ordinary" or "update" in label
        found_norms, found_mean = found if has_norms and has_mean else (found, found)
        if has_norms:
            row["error of norms"] = float(np.max(np.abs(found_norms - true_norms) / true_norms))
        if has_mean:
            pairs = list(zip(jax.tree.leaves(found_mean), jax.tree.leaves(true_mean), strict=True))
            off = sum(np.sum(np.square(a.astype(np.float64) - b)) for a, b in pairs)
            row["error of update"] = float(
                np.sqrt(off / sum(np.sum(np.square(b.astype(np.float64))) for _, b in pairs))
            )
        rows[label] = row
    return {"model": name, "batch": size, "device": jax.devices()[0].device_kind, "ways": rows}


def memory(program: Any) -> float:
    """Bytes that a compiled program needs besides its arguments."""
    known = program.memory_analysis()
    return float(known.temp_size_in_bytes + known.output_size_in_bytes)


def told(runs: list[dict[str, Any]]) -> str:
    """A table of one model."""
    first = runs[0]
    lines = [
        f"\n{first['model']}, batch {first['batch']}, {first['device']}; errors: the largest of norms, L2 of update"
    ]
    for label, row in first["ways"].items():
        ratios = sorted(run["ways"][label]["ratio"] for run in runs)
        errors = "  ".join(
            f"{row[which]:.1e}" if which in row else " " * 7 for which in ("error of norms", "error of update")
        )
        spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if len(runs) > 1 else ""
        needs = f"{1e3 * row['seconds']:8.3f} ms  {row['memory'] / 2**30:6.2f} GiB"
        lines.append(f"  {label:28} {statistics.median(ratios):5.2f}{spread}  {needs}  {errors}")
    return "\n".join(lines)


def main() -> None:
    """A table a model, each in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS + LARGE, default=MODELS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--ways", nargs="+", help="only these, as the table names them; by default all")
    parser.add_argument("--one", choices=MODELS + LARGE, help="measure it in this process, as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.batch, args.ways)))
        return
    for name in args.models:
        command = [sys.executable, __file__, "--one", name, "--batch", str(args.batch)]
        command += ["--ways", *args.ways] if args.ways else []
        print(told([json_of(command) for _ in range(args.processes)]), flush=True)


if __name__ == "__main__":
    main()
