"""What a step of a physics-informed network costs with draws, refreshes and norms of new points, in plain steps.

The arms of the races (`domains/arms.py`): new points at every step, of a density that is fitted anew each 25 steps.
Burgers' equation with a term inside, one at t = 0 and one at both ends (768, 128 and 128 points), network 2-64x3-1,
Adam. The plain step has as many new uniform points. Blocks of as many steps as lie between two refreshes, each with one
of them, in turn with the plain one of the same derivatives; medians of ratios, in fresh processes.

Target     at most 1.15 plain steps.

Command    python experiments/benchmarks/pinn_step.py [--processes 3]
Time       three minutes

Result     JAX 0.10.2, two cores, nothing else running, three processes, median (range). By two nested `jvp` ours takes
           1.07 (1.06 to 1.09) plain steps, by norms 1.17 (1.16 to 1.17); by nested reverse 1.10 (1.09 to 1.10) and 1.18
           (1.18 to 1.20); by nested forward 1.01 (1.00 to 1.02) and 1.09 (1.09 to 1.10). **Met** by residuals, which
           the races go by. (With four points a box, by two nested `jvp`, 1.07 and 1.11.) Draws from pools of points,
           all new and scored each 100 steps, took 1.33, 1.33 and 1.21 by norms, 1.13, 1.20 and 1.12 by residuals.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))

from domains import arms, problems

ARMS = ("uniform", "ours", "ours_norms")
DERIVATIVES = {"two nested jvp": None, "nested reverse": jax.grad, "nested forward": jax.jacfwd}


def domain(derivative: Any) -> problems.Domain:
    """Burgers' equation with three terms, and a wider network."""
    made = problems.burgers(derivative)
    inside, border = made.terms["inside"], made.terms["border"]

    def start(unit: jax.Array) -> jax.Array:
        return jnp.stack([jnp.zeros(len(unit)), 2 * unit[:, 0] - 1], axis=1)

    def ends(unit: jax.Array) -> jax.Array:
        return jnp.stack([unit[:, 1], jnp.where(unit[:, 0] < 0.5, -1.0, 1.0)], axis=1)

    terms = {
        "inside": inside._replace(batch=768),
        "start": border._replace(batch=128, place=start),
        "ends": border._replace(batch=128, place=ends),
    }
    return made._replace(terms=terms, init=problems.glorot((2, 64, 64, 64, 1)))


def block_of(arm: arms.Arm, tx: Any, key: jax.Array) -> Any:
    """`arms.REFRESH` steps as one program: ``(carry, first step) -> carry``."""

    @functools.partial(jax.jit, donate_argnums=0)
    def block(carry: Any, start: jax.Array) -> Any:
        def step(carry: Any, at: jax.Array) -> tuple[Any, None]:
            params, opt_state, memory = carry
            memory = jax.lax.cond(
                at % arms.REFRESH == 0,
                lambda m: arm.refresh(params, m, jax.random.fold_in(key, at)),
                lambda m: m,
                memory,
            )
            gradient, memory = arm.gradient(params, memory, jax.random.fold_in(key, at), at)
            updates, opt_state = tx.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state, memory), None

        return jax.lax.scan(step, carry, start + jnp.arange(arms.REFRESH))[0]

    return block


def measured(repeats: int = 9) -> dict[str, tuple[float, float]]:
    """For each arm and kind of differentiation, plain steps and milliseconds a step."""
    tx, key = optax.adam(1e-3), jax.random.key(0)
    blocks, carries = {}, {}
    for how, derivative in DERIVATIVES.items():
        problem = domain(derivative)
        for name in ARMS:
            arm = arms.arm(name, problem)
            blocks[name, how] = block_of(arm, tx, key)
            params = problem.init(key)
            carries[name, how] = blocks[name, how](
                (params, tx.init(params), arm.init(jax.random.fold_in(key, 0))), jnp.int32(0)
            )
    seconds: dict[tuple[str, str], list[float]] = {which: [] for which in blocks}
    for at in range(1, repeats + 1):
        for which, block in blocks.items():
            began = time.perf_counter()
            carries[which] = jax.block_until_ready(block(carries[which], jnp.int32(at * arms.REFRESH)))
            seconds[which].append((time.perf_counter() - began) / arms.REFRESH)
    return {
        f"{name}, {how}": (
            float(np.median(np.array(took) / np.array(seconds["uniform", how]))),
            float(np.median(took)) * 1e3,
        )
        for (name, how), took in seconds.items()
    }


def main() -> None:
    """A line an arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=3, help="fresh ones; 0 measures in this one, as JSON")
    processes = parser.parse_args().processes
    if not processes:
        print(json.dumps(measured()))
        return
    command = [sys.executable, __file__, "--processes", "0"]
    runs = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(processes)]
    for name in runs[0]:
        ratios, took = [run[name][0] for run in runs], np.median([run[name][1] for run in runs])
        print(f"{name:26} {np.median(ratios):.2f} plain steps ({min(ratios):.2f} to {max(ratios):.2f}), {took:.2f} ms")


if __name__ == "__main__":
    main()
