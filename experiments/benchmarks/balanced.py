"""Are balanced draws better than strata along the cells' line?

The cube method (Deville & Tillé 2004) draws a sample whose weighted sum of some numbers of each example is that of all
examples; the local pivotal method (Grafström, Lundström & Schelin 2012) draws few neighbours together. Both keep each
example's chance of being drawn. Here the numbers are the principal components of sketches of the gradients, the chances
q ∝ ‖g‖ with a mixture of 0.03, and the batch 128 of the first 10,000 examples of Fashion-MNIST (both methods walk
through all examples for one batch, in Python).

Claim under test: one of them has a lower M * MSE than stratified draws by cells.

Command: python experiments/benchmarks/balanced.py [--data-dir DIR] [--folder DIR] [--batches 30]
Time: about six minutes on one core.

Result (30 batches a line): by no more than 3 %.

    step 500: IDEAL 176.1
      systematic by cells            0.555 +- 0.012 IDEAL
      cube, 8 components             0.630 +- 0.017 IDEAL
      cube, 32 components            0.560 +- 0.011 IDEAL
      cube, 64 components            0.559 +- 0.011 IDEAL
      local pivotal, 16 components   0.560 +- 0.012 IDEAL

    step 4000: IDEAL 100.6
      systematic by cells            0.657 +- 0.015 IDEAL
      cube, 8 components             0.712 +- 0.021 IDEAL
      cube, 32 components            0.659 +- 0.011 IDEAL
      cube, 64 components            0.635 +- 0.015 IDEAL
      local pivotal, 16 components   0.659 +- 0.015 IDEAL

    step 12000: IDEAL 31.1
      systematic by cells            0.680 +- 0.010 IDEAL
      cube, 8 components             0.715 +- 0.015 IDEAL
      cube, 32 components            0.663 +- 0.011 IDEAL
      cube, 64 components            0.658 +- 0.014 IDEAL
      local pivotal, 16 components   0.664 +- 0.016 IDEAL

Sixty-four balanced sums are up to 3 % better than systematic draws along the cells' line, nearest neighbours as good;
the line costs O(M log N) a batch in place of a walk through all examples. They stay out of the library.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from estimation import M, Problem, Truth, full_truth, load, sliced, squared, take, uniform_checkpoints, weighted_grad
from estimators import by_cells, sketch_of
from scipy.spatial import KDTree

from isgd_jax.sampling import proposal, samplers

SIZE, MIXTURE, SHORT = 10_000, 0.03, 1e-9
Draws = Callable[[np.random.Generator], np.ndarray]


def main() -> None:
    """A line for each method at each checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/estimators"))
    parser.add_argument("--batches", type=int, default=30)
    parser.add_argument("--data-dir", default=None)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    whole = load(options.data_dir, None)
    problem = whole._replace(train=jax.tree.map(lambda x: x[:SIZE], whole.train), size=SIZE)
    for step, params in uniform_checkpoints(whole, options.folder):
        print_step(problem, step, full_truth(problem, params), options.batches)


def print_step(problem: Problem, step: int, truth: Truth, batches: int) -> None:
    ideal = float(np.mean(truth.norms)) ** 2 - truth.square
    norms = jnp.asarray(truth.norms)
    order = by_cells(problem, truth.params, norms)
    law = samplers.capped(samplers.prepare(proposal.smooth(norms, mixture=MIXTURE)[0], order), num_draws=M)
    chances = M * np.asarray(samplers.probabilities(law), np.float64)
    sketches = sliced(sketch_of(problem.loss_fn), truth.params, problem).astype(np.float64)
    gradients = sketches * truth.norms[:, None]

    def systematic(rng: np.random.Generator) -> np.ndarray:
        return np.asarray(samplers.systematic(jax.random.key(rng.integers(2**31)), law, num_draws=M).indices)

    methods: dict[str, Draws] = {"systematic by cells": systematic}
    for dims in (8, 32, 64):
        parts = components(gradients / chances[:, None], chances, dims)
        methods[f"cube, {dims} components"] = lambda rng, parts=parts: cube(rng, chances, parts * chances[:, None])
    directions = components(sketches, chances, 16)
    methods["local pivotal, 16 components"] = lambda rng: local_pivotal(rng, chances, directions)
    print(f"\nstep {step}: IDEAL {ideal:.1f}", flush=True)
    for name, draws in methods.items():
        rng, found = np.random.default_rng(0), []
        for _ in range(batches):
            at = draws(rng)
            weights = jnp.asarray(1.0 / (problem.size * chances[at]), jnp.float32)
            grads = weighted_grad(problem.loss_fn, truth.params, take(problem.train, jnp.asarray(at)), weights)
            found.append(M * float(squared(jax.tree.map(jnp.subtract, grads, truth.mean_grad))))
        half = 1.96 * np.std(found, ddof=1) / np.sqrt(batches)
        print(f"  {name:30} {np.mean(found) / ideal:.3f} +- {half / ideal:.3f} IDEAL", flush=True)


def components(rows: np.ndarray, weights: np.ndarray, dims: int) -> np.ndarray:
    """The rows in the directions in which their weighted squares are largest."""
    _, directions = np.linalg.eigh((rows * weights[:, None]).T @ rows)
    return rows @ directions[:, -dims:]


def cube(rng: np.random.Generator, chances: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """The cube method's fast flight (Chauvet & Tillé 2006); what is left at the end is decided by pivots.

    ``sums`` [n, d] is what a sample's total is to keep: of each example its numbers times its chance.
    """
    order, left = rng.permutation(len(chances)), chances.copy()
    constraints = np.concatenate([chances[:, None], sums], axis=1) / chances[:, None]  # per unit of chance
    width = constraints.shape[1] + 1
    open_, following = list(order[:width]), width
    while len(open_) == width:
        at = np.array(open_)
        # One more unknown than equations: the last is set to 1, the others solve for it.
        rows = constraints[at].T
        direction = np.append(solved(rows[:, :-1], -rows[:, -1]), 1.0)
        up, down = room(left[at], direction), room(left[at], -direction)
        move = up if rng.random() < down / (up + down) else -down
        left[at] = np.clip(left[at] + move * direction, 0.0, 1.0)
        open_ = [i for i in open_ if SHORT < left[i] < 1.0 - SHORT]
        while len(open_) < width and following < len(order):
            open_.append(order[following])
            following += 1
    return pivots(rng, left, open_)


def room(left: np.ndarray, direction: np.ndarray) -> float:
    """How far chances can move in a direction before one of them is 0 or 1."""
    far = np.where(direction > 0, 1.0 - left, left) / np.maximum(np.abs(direction), 1e-300)
    return far[direction != 0].min()


def solved(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.solve(matrix, right)
    except np.linalg.LinAlgError:
        return np.linalg.lstsq(matrix, right, rcond=None)[0]


def pivots(rng: np.random.Generator, left: np.ndarray, undecided: list[int]) -> np.ndarray:
    """Two at a time, one of them is decided, until none is left; those that are in."""
    while len(undecided) > 1:
        one, other = undecided.pop(), undecided.pop()
        left[one], left[other] = pivot(rng, left[one], left[other])
        undecided += [i for i in (one, other) if SHORT < left[i] < 1.0 - SHORT]
    for i in undecided:  # by rounding alone
        left[i] = rng.random() < left[i]
    return np.flatnonzero(left > 0.5)


def pivot(rng: np.random.Generator, one: float, other: float) -> tuple[float, float]:
    """One of two chances becomes 0 or 1, and their expectations stay."""
    total = one + other
    if total < 1.0:
        return (total, 0.0) if rng.random() < one / total else (0.0, total)
    return (1.0, total - 1.0) if rng.random() < (1.0 - other) / (2.0 - total) else (total - 1.0, 1.0)


def local_pivotal(rng: np.random.Generator, chances: np.ndarray, points: np.ndarray) -> np.ndarray:
    """An undecided example, drawn at random, and its nearest undecided neighbour fight it out, again and again."""
    left, tree = chances.copy(), KDTree(points)
    alive = np.full(len(chances), True)
    alive_in_tree, names = len(chances), np.arange(len(chances))
    for first in rng.permutation(len(chances)):
        while alive[first] and alive.sum() > 1:
            if alive.sum() < alive_in_tree // 2:  # most neighbours are decided: a tree of those that are not
                names = np.flatnonzero(alive)
                tree, alive_in_tree = KDTree(points[names]), len(names)
            count = 8
            while True:
                near = names[tree.query(points[first], min(count, len(names)))[1]]
                near = near[alive[near] & (near != first)]
                if len(near):
                    break
                count *= 4
            other = near[0]
            left[first], left[other] = pivot(rng, left[first], left[other])
            alive[[first, other]] = (left[[first, other]] > SHORT) & (left[[first, other]] < 1.0 - SHORT)
    return pivots(rng, left, list(np.flatnonzero(alive)))


if __name__ == "__main__":
    main()
