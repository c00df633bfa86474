"""What norms cost where parameters are split over a mesh, against the ordinary gradient on the same mesh.

Claim       update and norms together at most 1.10 times the ordinary sharded gradient's time on 8 devices.
Command     python experiments/benchmarks/sharded.py [--models mlp gpt] [--devices 8] [--processes 3]
Time        six minutes on two cores, on which 8 forced devices of the CPU share the work
Result      three quiet processes, median (range):

                                      norms                 update and norms
            MLP    replicated         0.24 (0.21 to 0.25)   0.66 (0.64 to 0.67)
                   fully sharded      0.60 (0.59 to 0.61)   1.06 (0.99 to 1.06)
            GPT    replicated         0.83 (0.82 to 0.86)   1.15 (1.11 to 1.19)
                   fully sharded      0.93 (0.91 to 0.93)   1.12 (1.10 to 1.15)

            The claim holds for the MLP; the GPT misses it by 0.02 to 0.05.

Every parameter is split along its first axis that the number of devices divides, the batch along its examples (fully
sharded data parallel), or the batch alone (`replicated`). Each figure is a ratio of medians within one process, the
programs in turn; with several processes, the median of their ratios with the range. That no collective is added, and
that the numbers are right, is tested: `tests/gradients/test_sharded_parameters.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from norms import alternate, json_of

MODELS = ("mlp", "gpt")
LAYOUTS = ("replicated", "fully sharded")
BATCH, REPEATS = 32, 7


def measure(name: str, devices: int) -> dict[str, dict[str, float]]:
    """One process's ratios to the ordinary gradient, by layout and way."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec
    from norm_models import make

    import isgd_jax as isgd

    loss_fn, params, batch = make(name, BATCH)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    weights = jnp.linspace(0.5, 1.5, BATCH)

    def parted(x: Any) -> NamedSharding:
        axis = next((i for i, size in enumerate(x.shape) if size % devices == 0 and size), None)
        return NamedSharding(
            mesh, PartitionSpec(*[None] * (axis or 0), "data") if axis is not None else PartitionSpec()
        )

    def ordinary(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: jnp.mean(jax.vmap(loss_fn, in_axes=(None, 0))(p, batch)))(params)

    def norms(params: Any, batch: Any) -> Any:
        return isgd.norms(isgd.per_example_grads(loss_fn)(params, batch))

    def both(params: Any, batch: Any) -> Any:
        grads = isgd.per_example_grads(loss_fn)(params, batch)
        return isgd.weighted_mean(grads, weights), isgd.norms(grads)

    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    found: dict[str, dict[str, float]] = {}
    for layout in LAYOUTS:
        places = jax.tree.map(
            parted if layout == "fully sharded" else lambda _: NamedSharding(mesh, PartitionSpec()), params
        )
        placed = jax.device_put(params, places)
        functions = {"ordinary": ordinary, "norms": norms, "update and norms": both}
        outs = {"ordinary": places, "norms": None, "update and norms": (places, None)}
        programs = {
            label: jax.jit(function, out_shardings=outs[label]).lower(placed, batch).compile()
            for label, function in functions.items()
        }
        times = alternate(programs, placed, batch, REPEATS)
        middle = {label: statistics.median(seconds) for label, seconds in times.items()}
        found[layout] = {label: middle[label] / middle["ordinary"] for label in ("norms", "update and norms")}
        found[layout]["seconds"] = middle["ordinary"]
    return found


def main() -> None:
    """Measure each model in processes of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--one", choices=MODELS, help="one measurement in this process, as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.devices)))
        return
    print(f"{options.devices} devices, batches of {BATCH}; over the ordinary gradient")
    for name in options.models:
        command = [sys.executable, str(Path(__file__)), "--one", name, "--devices", str(options.devices)]
        runs = [json_of(command) for _ in range(options.processes)]
        for layout in LAYOUTS:
            told = [f"{1e3 * statistics.median(run[layout]['seconds'] for run in runs):7.1f} ms"]
            for way in ("norms", "update and norms"):
                ratios = sorted(run[layout][way] for run in runs)
                told.append(f"{way} {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
            print(f"{name:5s} {layout:14s} {'   '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
