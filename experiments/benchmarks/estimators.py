"""Which estimator is best, with fresh scores and with stale ones?

Claims under test (Fashion-MNIST, MLP 784-512x4-10, He initialisation; M * MSE of the gradient of M = 128 draws):

* fresh scores, checkpoints of uniform SGD (rate 0.03) at steps 500, 4,000 and 12,000: the best design is at most 0.66,
  0.76 and 0.86 of IDEAL, the minimum over independent draws;
* scores 200 updates old, along runs trained by importance sampling (Nesterov 0.95, rate 0.01; 3 seeds, 10 checkpoints
  each): the best design is at most 0.75 of independent draws with a mixture of 0.3 on the same scores, in the median.

What the run knows of this by itself, and the gate: `watching.py`.

Independent and stratified draws are computed from all the data, without sampling error: stratified draws have
M * MSE = STALE moment - mean over strata of ‖mean weighted gradient of the stratum‖². Other samplers are measured on
200 batches, with a 95 % interval.

Result. Fresh, mixture 0.03, order by cells, share of IDEAL at the three checkpoints: stratified 0.569, 0.669, 0.728;
systematic 0.549, 0.655, 0.715 (+- 0.01); by (label, runner-up, norm) with mixture 0.1 0.639, 0.768, 0.854. Stale,
median (worst) of 30: stratified by cells, calibrated, mixture 0.1: 0.704 (0.976); the same order, raw scores, mixture
0.3: 0.780 (0.888); calibrated independent draws 0.919 (1.347): the calibration pays from its third period on, and hurts
in the second, which knows only the scores of the first parameters. All of this with sketches of the stacked gradients;
the sketches of factors that are used now, and cells shaped by 8,192 examples, take a third and a sixth of the time and
give 0.589, 0.690, 0.757 fresh, systematic 0.576, 0.668, 0.743 (version 0.2, eight minutes). The rest
was measured with version 0.1, whose stale runs drew along (label, runner-up, score) with a mixture of 0.3; now the
library's sampler trains them, whose uniform fraction the draws choose.

Command: python experiments/benchmarks/estimators.py [--raw-dir DIR] [--folder DIR] [fresh] [stale]
Time: about 25 minutes on two CPU cores. Checkpoints and seeds that are done are kept in the folder and used again.
"""

import argparse
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from estimation import (
    SEED,
    M,
    Problem,
    Truth,
    all_norms,
    full_truth,
    load,
    measured_mse,
    runner_up,
    sliced,
    stale_moment,
    stratified_mse,
    take,
    uniform_checkpoints,
)

import isgd_jax as isgd
from isgd_jax.gradients import sketches
from isgd_jax.sampling import calibration, clusters, fractions, proposal, samplers
from isgd_jax.types import Batch, LossFn, Params

PERIOD, PERIODS, SEEDS = 200, 10, 3


def main() -> None:
    """The tables asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["fresh", "stale"])
    parser.add_argument("--folder", type=Path, default=Path("runs/estimators"))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--raw-dir", default=None)
    options = parser.parse_args()
    problem = load(options.data_dir, options.raw_dir)
    options.folder.mkdir(parents=True, exist_ok=True)
    if "fresh" in options.parts:
        for step, params in uniform_checkpoints(problem, options.folder):
            print_fresh(problem, step, params)
    if "stale" in options.parts:
        print_stale(problem, options.folder, options.seeds)


def print_fresh(problem: Problem, step: int, params: Params) -> None:
    """Every sampler, order and mixture with exact scores."""
    truth = full_truth(problem, params)
    norms, label = jnp.asarray(truth.norms), problem.train["label"]
    uniform, ideal = (float(np.mean(truth.norms**2)), float(np.mean(truth.norms) ** 2))
    uniform, ideal = uniform - truth.square, ideal - truth.square
    loss = np.mean(sliced(jax.jit(jax.vmap(problem.loss_fn, (None, 0))), truth.params, problem))
    print(f"\nstep {step}, train loss {loss:.3f}: UNIFORM {uniform:.1f}, IDEAL {ideal:.1f}", flush=True)
    lines = {
        "as numbered": jnp.arange(problem.size, dtype=jnp.int32),
        "label": samplers.order_by(label),
        "label, runner-up, norm": samplers.order_by(label, runner_up(problem, truth.params), norms),
        "cells": by_cells(problem, truth.params, norms),
    }
    for mixture in (0.1, 0.03):
        probs = proposal.smooth(norms, mixture=mixture)[0]
        row(f"independent, mixture {mixture}", stale_moment(truth, probs) - truth.square, uniform, ideal)
        for name, order in lines.items():
            row(f"stratified by {name}, {mixture}", stratified_mse(problem, truth, probs, order), uniform, ideal)
    law = samplers.prepare(proposal.smooth(norms, mixture=0.03)[0], lines["cells"])
    for name, sampler, kept in (
        ("systematic", samplers.systematic, law),
        ("without replacement", samplers.systematic, samplers.capped(law, num_draws=M)),
        ("stratified (check)", samplers.stratified, law),
    ):
        value, error = measured_mse(problem, truth, sampler, kept)
        row(f"{name} by cells, 0.03", value, uniform, ideal, error)


def row(name: str, value: float, uniform: float, ideal: float, error: float | None = None) -> None:
    interval = "" if error is None else f" +- {error:.1f}"
    print(f"  {name:45} {value:7.1f}{interval:9} {value / uniform:6.3f} UNIFORM {value / ideal:6.3f} IDEAL", flush=True)


def print_stale(problem: Problem, folder: Path, seeds: int) -> None:
    """Designs on scores 200 updates old, as shares of independent draws with a mixture of 0.3."""
    rows = []
    for seed in range(seeds):
        kept = folder / f"stale-{seed}.json"
        if not kept.exists():
            kept.write_text(json.dumps(stale_run(problem, seed)))
        rows += json.loads(kept.read_text())
    print(f"\nscores {PERIOD} updates old, {len(rows)} checkpoints: share of independent draws, mixture 0.3")
    for name in rows[0]:
        shares = np.array([found[name] / found["independent, raw, 0.3"] for found in rows])
        print(f"  {name:45} median {np.median(shares):.3f}, worst {shares.max():.3f}", flush=True)


def stale_run(problem: Problem, seed: int) -> list[dict[str, float]]:
    """Train by the library's sampler, from scores refreshed every 200 updates; judge just before each refresh."""
    sampler, tx = sampler_of(problem), tx_of(problem)
    train_block, params = make_train_block(problem, sampler, tx), problem.init(jax.random.key(seed))
    opt_state, state, found = tx.init(params), sampler.init(), []
    for period in range(PERIODS):
        scores = jnp.asarray(all_norms(problem, params))
        order = samplers.order_by(problem.train["label"], runner_up(problem, params), scores)
        cells = by_cells(problem, params, scores)
        everyone = jnp.arange(problem.size, dtype=jnp.int32)
        state = sampler.refresh(sampler.record(state, everyone, scores, version=state.version))
        ages = jnp.full(problem.size, PERIOD, jnp.int32)
        predicted = calibration.predict(state.calibration, scores, ages)  # by what earlier periods have taught
        chosen = float(fractions.choose(state.fractions))  # likewise
        key = jax.random.fold_in(jax.random.key(seed), period)
        params, opt_state, state = train_block(params, opt_state, state, problem.train, key)
        found.append(judge(problem, full_truth(problem, params), scores, predicted, order, cells, chosen))
        print(f"seed {seed}, uniform fraction chosen {chosen:.2f}", flush=True)
        ratios = {name: round(value / found[-1]["independent, raw, 0.3"], 3) for name, value in found[-1].items()}
        print(f"seed {seed}, update {(period + 1) * PERIOD}: {ratios}", flush=True)
    return found


def judge(
    problem: Problem,
    truth: Truth,
    scores: jax.Array,
    predicted: jax.Array,
    order: jax.Array,
    cells: jax.Array,
    chosen: float,
) -> dict[str, float]:
    """M * MSE of designs on old ``scores``, or on what they ``predicted``; UNIFORM and IDEAL for comparison."""

    def independent(scores: jax.Array, mixture: float) -> float:
        return stale_moment(truth, proposal.smooth(scores, mixture=mixture)[0]) - truth.square

    def stratified(scores: jax.Array, mixture: float, order: jax.Array) -> float:
        return stratified_mse(problem, truth, proposal.smooth(scores, mixture=mixture)[0], order)

    return {
        "UNIFORM": float(np.mean(truth.norms**2)) - truth.square,
        "IDEAL": float(np.mean(truth.norms)) ** 2 - truth.square,
        **{f"independent, raw, {mixture}": independent(scores, mixture) for mixture in (0.1, 0.3, 0.5)},
        **{f"independent, calibrated, {mixture}": independent(predicted, mixture) for mixture in (0.05, 0.1, 0.2, 0.3)},
        "stratified by label, runner-up, score, raw, 0.3": stratified(scores, 0.3, order),
        "stratified by cells, raw, 0.3": stratified(scores, 0.3, cells),
        "stratified by cells, calibrated, 0.1": stratified(predicted, 0.1, cells),
        "stratified by cells, calibrated, chosen": stratified(predicted, chosen, cells),
    }


def tx_of(problem: Problem) -> optax.GradientTransformationExtraArgs:
    return optax.chain(isgd.importance_weighting(problem.size), optax.sgd(0.01, momentum=0.95, nesterov=True))


def sampler_of(problem: Problem) -> isgd.BatchSampler:
    """The library's sampler on scores that only a refresh renews; what draws teach is kept."""
    return isgd.importance_sampler(
        problem.size, batch_size=M, order=problem.train["label"], gate=False, monitor=False, record_drawn=False
    )


def make_train_block(
    problem: Problem, sampler: isgd.BatchSampler, tx: optax.GradientTransformationExtraArgs
) -> Callable[..., tuple[Params, Any, isgd.SamplerState]]:
    """200 updates from one proposal, which also teach what scores are worth at each age, and which mixture is best."""

    @jax.jit
    def block(
        params: Params, opt_state: Any, state: isgd.SamplerState, train: Batch, key: jax.Array
    ) -> tuple[Params, Any, isgd.SamplerState]:
        def step(age: jax.Array, carry: tuple) -> tuple:
            params, opt_state, state = carry
            draw = sampler.sample(jax.random.fold_in(key, age), state)
            grads = isgd.per_example_grads(problem.loss_fn)(params, take(train, draw.indices))
            updates, opt_state = tx.update(grads, opt_state, params, probs=draw.probs, target=draw.target)
            return optax.apply_updates(params, updates), opt_state, sampler.observe(state, draw, grads)

        return jax.lax.fori_loop(0, PERIOD, step, (params, opt_state, state))

    return block


order_by_cells = jax.jit(clusters.by_cells)


@cache
def sketch_of(loss_fn: LossFn) -> Callable[[Params, Batch], jax.Array]:
    """Sketches of the directions of the last layer's gradients."""

    def sketch(params: Params, batch: Batch) -> jax.Array:
        example = jax.tree.map(lambda x: x[0], batch)
        return sketches.last_layer(jax.random.key(SEED), loss_fn, params, example)(params, batch)

    return jax.jit(sketch)


def by_cells(problem: Problem, params: Params, scores: jax.Array) -> jax.Array:
    found = sliced(sketch_of(problem.loss_fn), params, problem)
    return order_by_cells(jax.random.key(SEED), jnp.asarray(found), scores)


if __name__ == "__main__":
    main()
