"""Which estimator is best, with fresh scores and with stale ones?

Claims under test (Fashion-MNIST, MLP 784-512x4-10, He initialisation; M * MSE of the gradient of M = 128 draws):

* fresh scores, checkpoints of uniform SGD (rate 0.03) at steps 500, 4,000 and 12,000: the best design is at most 0.66,
  0.76 and 0.86 of IDEAL, the minimum over independent draws;
* scores 200 updates old, along runs trained by importance sampling (Nesterov 0.95, rate 0.01; 3 seeds, 10 checkpoints
  each): the best design is at most 0.75 of independent draws with a mixture of 0.3 on the same scores, in the median;
* the monitor, fed by the drawn batches alone: what all the data say lies in its 95 % band in at least 93 % of checks
  along a run, half-width at most 30 % of the value;
* the gate: with scores made worthless at update 500, the final loss differs from uniform draws' by nothing that 5
  paired seeds can tell; where scores help, it ends within 3 % of ungated draws.

Independent and stratified draws are computed from all the data, without sampling error: stratified draws have
M * MSE = STALE moment - mean over strata of ‖mean weighted gradient of the stratum‖². Other samplers are measured on
200 batches, with a 95 % interval.

Result. Fresh, mixture 0.03, order by cells, share of IDEAL at the three checkpoints: stratified 0.569, 0.669, 0.728;
systematic 0.549, 0.655, 0.715 (+- 0.01); by (label, runner-up, norm) with mixture 0.1 0.639, 0.768, 0.854. Stale,
median (worst) of 30: stratified by cells, calibrated, mixture 0.1: 0.704 (0.976); the same order, raw scores, mixture
0.3: 0.780 (0.888); calibrated independent draws 0.919 (1.347): the calibration pays from its third period on, and hurts
in the second, which knows only the scores of the first parameters. Monitor, share of 40 checks in the band (half-
width): uniform 0.700 (0.052), stale 0.900 (0.168), ideal 0.750 (0.059), ratio 0.825 (0.096). That was
before the noise of stratified draws was taken from neighbouring draws. The gate has not been run yet.

Command: python experiments/benchmarks/estimators.py [--raw-dir DIR] [--folder DIR] [fresh] [stale] [monitor] [gate]
Time: about 45 minutes on two CPU cores. Checkpoints are kept in the folder and used again.
"""

import argparse
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import isgd_jax as isgd
from isgd_jax import calibration, data, gate, models, monitor, orders, proposal, samplers, variance
from isgd_jax.task import cross_entropy
from isgd_jax.typing import Batch, Draw, LossFn, Params

M, SLICE, SEED = 128, 2000, 0
CHECKPOINTS = (500, 4000, 12000)
PERIOD, PERIODS, SEEDS = 200, 10, 3
WATCHED, CHECK = 40, 50
GATE_SEEDS, WORTHLESS_FROM, GATE_BLOCK, GATE_STEPS = 5, 500, 100, 2000
STUDENT_95 = 2.78
"""97.5 % point of Student's t, 5 seeds."""


class Problem(NamedTuple):
    """The data on the device, and the network as functions of one example."""

    train: Batch
    init: Callable[[jax.Array], Params]
    logits_fn: Callable[[Params, Batch], jax.Array]
    loss_fn: LossFn
    size: int


class Truth(NamedTuple):
    """What all the data say at some parameters."""

    params: Params
    norms: np.ndarray
    mean_grad: Params
    square: float
    """‖mean gradient‖²"""


def main() -> None:
    """The tables asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["fresh", "stale", "monitor", "gate"])
    parser.add_argument("--folder", type=Path, default=Path("runs/estimators"))
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--raw-dir", default=None)
    options = parser.parse_args()
    problem = load(options.data_dir, options.raw_dir)
    options.folder.mkdir(parents=True, exist_ok=True)
    if "fresh" in options.parts:
        for step, params in uniform_checkpoints(problem, options.folder):
            print_fresh(problem, step, params)
    if "stale" in options.parts:
        print_stale(problem)
    if "monitor" in options.parts:
        print_monitor(problem)
    if "gate" in options.parts:
        print_gate(problem)


def load(data_dir: str | None, raw_dir: str | None) -> Problem:
    dataset = data.load("fashion_mnist", data_dir=data_dir, raw_dir=raw_dir)
    model = models.mlp(dataset.num_classes)

    def logits_fn(params: Params, example: Batch) -> jax.Array:
        return model.apply({"params": params}, dataset.standardise(example["image"]))

    def init(key: jax.Array) -> Params:
        return models.init(model, key, jnp.asarray(dataset.standardise(dataset.train["image"][0])))

    def loss_fn(params: Params, example: Batch) -> jax.Array:
        return cross_entropy(logits_fn(params, example), example)

    return Problem(jax.tree.map(jnp.asarray, dataset.train), init, logits_fn, loss_fn, len(dataset))


def uniform_checkpoints(problem: Problem, folder: Path) -> list[tuple[int, Params]]:
    """Parameters of plain SGD at the steps asked for."""
    tx = optax.sgd(0.03)

    @jax.jit
    def block(params: Params, start: jax.Array, train: Batch) -> Params:
        def step(i: jax.Array, params: Params) -> Params:
            key = jax.random.fold_in(jax.random.key(SEED + 1), start + i)
            at = jax.random.randint(key, (M,), 0, problem.size)
            grads = weighted_grad(problem.loss_fn, params, take(train, at), jnp.full(M, 1.0 / M))
            return optax.apply_updates(params, tx.update(grads, tx.init(params))[0])

        return jax.lax.fori_loop(0, 100, step, params)

    params, found = problem.init(jax.random.key(SEED)), []
    kept = folder / "uniform.pkl"
    if kept.exists():
        return pickle.loads(kept.read_bytes())
    for start in range(0, max(CHECKPOINTS), 100):
        params = block(params, jnp.int32(start), problem.train)
        if start + 100 in CHECKPOINTS:
            found.append((start + 100, jax.tree.map(np.asarray, params)))
    kept.write_bytes(pickle.dumps(found))
    return found


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


def print_stale(problem: Problem) -> None:
    """Designs on scores 200 updates old, as shares of independent draws with a mixture of 0.3."""
    rows = [found for seed in range(SEEDS) for found in stale_run(problem, seed)]
    print(f"\nscores {PERIOD} updates old, {len(rows)} checkpoints: share of independent draws, mixture 0.3")
    for name in rows[0]:
        shares = np.array([found[name] / found["independent, raw, 0.3"] for found in rows])
        print(f"  {name:45} median {np.median(shares):.3f}, worst {shares.max():.3f}", flush=True)


def stale_run(problem: Problem, seed: int) -> list[dict[str, float]]:
    """Train by stratified draws from scores refreshed every 200 updates; judge designs just before each refresh."""
    train_block, params = make_train_block(problem), problem.init(jax.random.key(seed))
    opt_state, fit = tx_of(problem).init(params), calibration.create()
    found = []
    for period in range(PERIODS):
        scores = jnp.asarray(all_norms(problem, params))
        second = runner_up(problem, params)
        cells = by_cells(problem, params, scores)
        order = samplers.order_by(problem.train["label"], second, scores)
        law = samplers.prepare(proposal.smooth(scores, mixture=0.3)[0], order)
        ages = jnp.full(problem.size, PERIOD, jnp.int32)
        predicted = calibration.predict(fit, scores, ages)  # by what earlier periods have taught
        key = jax.random.fold_in(jax.random.key(seed), period)
        params, opt_state, fit = train_block(params, opt_state, fit, scores, law, problem.train, key)
        found.append(judge(problem, full_truth(problem, params), scores, predicted, order, cells))
        shares = {name: round(value / found[-1]["independent, raw, 0.3"], 3) for name, value in found[-1].items()}
        print(f"seed {seed}, update {(period + 1) * PERIOD}: {shares}", flush=True)
    return found


def judge(
    problem: Problem, truth: Truth, scores: jax.Array, predicted: jax.Array, order: jax.Array, cells: jax.Array
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
    }


def tx_of(problem: Problem) -> optax.GradientTransformationExtraArgs:
    return optax.chain(isgd.importance_weighting(problem.size), optax.sgd(0.01, momentum=0.95, nesterov=True))


def make_train_block(problem: Problem) -> Callable[..., tuple[Params, Any, calibration.Calibration]]:
    """200 updates from a frozen law, which also teach the calibration what scores are worth at each age."""
    tx = tx_of(problem)

    @jax.jit
    def block(
        params: Params, opt_state: Any, fit: Any, scores: jax.Array, law: samplers.Law, train: Batch, key: jax.Array
    ) -> tuple[Params, Any, calibration.Calibration]:
        def step(age: jax.Array, state: tuple) -> tuple:
            params, opt_state, fit = state
            draw = samplers.stratified(jax.random.fold_in(key, age), law, num_draws=M)
            _, grads = isgd.per_example_value_and_grad(problem.loss_fn)(params, take(train, draw.indices))
            updates, opt_state = tx.update(grads, opt_state, params, probs=draw.probs)
            weights, ages = 1.0 / (problem.size * draw.probs), jnp.full(M, age, jnp.int32)
            fit = calibration.observe(fit, scores[draw.indices], ages, isgd.norms(grads), weights)
            return optax.apply_updates(params, updates), opt_state, fit

        return jax.lax.fori_loop(0, PERIOD, step, (params, opt_state, fit))

    return block


def print_monitor(problem: Problem) -> None:
    """Bands against all the data, every 50 updates of a run; a window never spans a refresh."""
    block, params = make_watched_block(problem), problem.init(jax.random.key(SEED))
    opt_state, inside, widths = tx_of(problem).init(params), [], []
    for check in range(PERIODS * PERIOD // CHECK):
        if check % (PERIOD // CHECK) == 0:
            scores = jnp.asarray(all_norms(problem, params))
            probs = proposal.smooth(scores, mixture=0.3)[0]
            law = samplers.prepare(probs, samplers.order_by(problem.train["label"], scores))
        key = jax.random.fold_in(jax.random.key(SEED), check)
        params, opt_state, report = block(params, opt_state, law, problem.train, key)
        found, true = report._asdict(), true_report(full_truth(problem, params), probs)
        inside.append([float(found[name].low) < true[name] < float(found[name].high) for name in true])
        widths.append([float(found[name].high - found[name].value) / abs(true[name]) for name in true])
        print(
            f"update {(check + 1) * CHECK}: {[(n, round(float(found[n].value / true[n]), 3)) for n in true]}",
            flush=True,
        )
    print(f"\nmonitor, {len(inside)} checks, windows of {WATCHED} updates")
    for name, share, width in zip(true, np.mean(inside, axis=0), np.median(widths, axis=0), strict=True):
        print(f"  {name:20} in the band {share:.3f}, half-width {width:.3f} of the value in the median", flush=True)


def true_report(truth: Truth, probs: jax.Array) -> dict[str, float]:
    moments = variance.moments(jnp.asarray(truth.norms), probs)
    traces = {name: float(trace) for name, trace in variance.trace_covariance(moments, truth.square)._asdict().items()}
    return {**traces, "ratio": float(moments.stale / moments.uniform)}


def make_watched_block(problem: Problem) -> Callable[..., tuple[Params, Any, monitor.Report]]:
    """50 updates, each from two half-batches of stratified draws drawn apart, under the monitor's eyes."""
    tx = tx_of(problem)

    @jax.jit
    def block(
        params: Params, opt_state: Any, law: samplers.Law, train: Batch, key: jax.Array
    ) -> tuple[Params, Any, monitor.Report]:
        def step(i: jax.Array, state: tuple) -> tuple:
            params, opt_state, watch = state
            keys = jax.random.split(jax.random.fold_in(key, i))
            halves = [samplers.stratified(half, law, num_draws=M // 2) for half in keys]
            draw = jax.tree.map(lambda *parts: jnp.concatenate(parts), *halves)
            _, grads = isgd.per_example_value_and_grad(problem.loss_fn)(params, take(train, draw.indices))
            weights, first = 1.0 / (problem.size * draw.probs), jnp.arange(M) < M // 2
            one, other = (isgd.weighted_mean(grads, 2.0 * weights * half) for half in (first, ~first))
            products = jax.tree.map(lambda a, b: jnp.vdot(a, b, precision="highest"), one, other)
            square = sum(jax.tree.leaves(products), start=jnp.zeros(()))
            watch = monitor.observe(watch, weights, isgd.norms(grads), square)
            updates, opt_state = tx.update(grads, opt_state, params, probs=draw.probs)
            return optax.apply_updates(params, updates), opt_state, watch

        state = (params, opt_state, monitor.create(WATCHED))
        params, opt_state, watch = jax.lax.fori_loop(0, CHECK, step, state)
        return params, opt_state, monitor.report(watch)

    return block


def print_gate(problem: Problem) -> None:
    """Final losses of four arms from the same beginnings, and the paired differences that the claims are about."""
    block = make_gated_block(problem)
    arms = {
        "uniform": {"is_gated": False, "is_open": False, "is_worthless": False},
        "worthless, gated": {"is_gated": True, "is_open": True, "is_worthless": True},
        "helpful, gated": {"is_gated": True, "is_open": True, "is_worthless": False},
        "helpful, ungated": {"is_gated": False, "is_open": True, "is_worthless": False},
    }
    losses = np.array([[gated_run(problem, block, seed, **arm) for arm in arms.values()] for seed in range(GATE_SEEDS)])
    print(
        f"\ngate, {GATE_SEEDS} seeds, {GATE_STEPS} updates: mean final train loss",
        dict(zip(arms, losses.mean(axis=0), strict=True)),
    )
    for arm, other in ((1, 0), (2, 3)):
        share = losses[:, arm] / losses[:, other] - 1.0
        half = STUDENT_95 * share.std(ddof=1) / np.sqrt(GATE_SEEDS)
        print(f"  {list(arms)[arm]} against {list(arms)[other]}: {share.mean():+.3f} +- {half:.3f}", flush=True)


def gated_run(
    problem: Problem, block: Callable, seed: int, *, is_gated: bool, is_open: bool, is_worthless: bool
) -> float:
    """The final train loss of one arm. Exact scores every 200 updates; worthless ones, if any, from update 500 on."""
    params, rng = problem.init(jax.random.key(seed)), np.random.default_rng(seed)
    opt_state, state = tx_of(problem).init(params), gate.create()._replace(is_open=jnp.asarray(is_open))
    for start in range(0, GATE_STEPS, GATE_BLOCK):
        if is_worthless and start >= WORTHLESS_FROM:
            scores = jnp.asarray(rng.lognormal(0.0, 1.5, problem.size), jnp.float32)
        elif start % PERIOD == 0 and is_open:
            scores = jnp.asarray(all_norms(problem, params))
        elif start == 0:
            scores = jnp.ones(problem.size)
        law = samplers.prepare(
            proposal.smooth(scores, mixture=0.3)[0], samplers.order_by(problem.train["label"], scores)
        )
        key = jax.random.fold_in(jax.random.key(seed), start)
        params, opt_state, state = block(params, opt_state, state, law, problem.train, key, jnp.asarray(is_gated))
        if is_gated:
            print(f"seed {seed}, update {start + GATE_BLOCK}: open {bool(state.is_open)}", flush=True)
    loss_fn = jax.jit(jax.vmap(problem.loss_fn, (None, 0)))
    return float(np.mean(sliced(loss_fn, params, problem)))


def make_gated_block(problem: Problem) -> Callable[..., tuple[Params, Any, gate.Gate]]:
    """100 updates; a gate that is not in use keeps its first state."""
    tx = tx_of(problem)

    @jax.jit
    def block(
        params: Params,
        opt_state: Any,
        state: gate.Gate,
        law: samplers.Law,
        train: Batch,
        key: jax.Array,
        is_gated: jax.Array,
    ) -> tuple[Params, Any, gate.Gate]:
        proposed = samplers.probabilities(law)

        def step(i: jax.Array, carry: tuple) -> tuple:
            params, opt_state, state = carry
            drawn = [sampler(jax.random.fold_in(key, i), law, num_draws=M) for sampler in SHUT_OR_OPEN]
            draw = jax.tree.map(lambda shut, opened: jnp.where(state.is_open, opened, shut), *drawn)
            _, grads = isgd.per_example_value_and_grad(problem.loss_fn)(params, take(train, draw.indices))
            weights, hypothetical = (1.0 / (problem.size * probs) for probs in (draw.probs, proposed[draw.indices]))
            judged, _ = gate.observe(state, weights, hypothetical, isgd.norms(grads))
            state = judged._replace(is_open=jnp.where(is_gated, judged.is_open, state.is_open))
            updates, opt_state = tx.update(grads, opt_state, params, probs=draw.probs)
            return optax.apply_updates(params, updates), opt_state, state

        return jax.lax.fori_loop(0, GATE_BLOCK, step, (params, opt_state, state))

    return block


SHUT_OR_OPEN = (samplers.uniform, samplers.stratified)


def take(train: Batch, at: jax.Array) -> Batch:
    return jax.tree.map(lambda x: x[at], train)


def weighted_grad(loss_fn: LossFn, params: Params, batch: Batch, weights: jax.Array) -> Params:
    """sum of weights * gradients: one ordinary backward pass."""
    return jax.grad(lambda p: jnp.vdot(weights, jax.vmap(loss_fn, (None, 0))(p, batch), precision="highest"))(params)


def sliced(function: Callable[[Params, Batch], jax.Array], params: Params, problem: Problem) -> np.ndarray:
    slices = range(0, problem.size, SLICE)
    parts = [function(params, jax.tree.map(lambda x, s=start: x[s : s + SLICE], problem.train)) for start in slices]
    return np.concatenate([np.asarray(part) for part in parts])


@cache
def norms_of(loss_fn: LossFn) -> Callable[[Params, Batch], jax.Array]:
    return jax.jit(isgd.scorers.grad_norm(loss_fn))


def all_norms(problem: Problem, params: Params) -> np.ndarray:
    return sliced(norms_of(problem.loss_fn), params, problem)


@cache
def runner_up_of(logits_fn: Callable[[Params, Batch], jax.Array]) -> Callable[[Params, Batch], jax.Array]:
    def one(params: Params, example: Batch) -> jax.Array:
        return jnp.argmax(logits_fn(params, example).at[example["label"]].set(-jnp.inf))

    return jax.jit(jax.vmap(one, (None, 0)))


def runner_up(problem: Problem, params: Params) -> jax.Array:
    """The most likely class that is not the label."""
    return jnp.asarray(sliced(runner_up_of(problem.logits_fn), params, problem))


@cache
def sketch_of(loss_fn: LossFn) -> Callable[[Params, Batch], jax.Array]:
    """Sketches of the directions of the last layer's gradients."""

    def sketch(params: Params, batch: Batch) -> jax.Array:
        last = max(params)  # Dense_4

        def loss_of_last(layer: Params, example: Batch) -> jax.Array:
            return loss_fn({**params, last: layer}, example)

        grads = isgd.stack(isgd.per_example_grads(loss_of_last)(params[last], batch))
        return orders.sketch(jax.random.key(SEED), grads)

    return jax.jit(sketch)


order_by_cells = jax.jit(orders.by_cells)


def by_cells(problem: Problem, params: Params, scores: jax.Array) -> jax.Array:
    sketches = sliced(sketch_of(problem.loss_fn), params, problem)
    return order_by_cells(jax.random.key(SEED), jnp.asarray(sketches), scores)


@cache
def mean_grad_of(loss_fn: LossFn) -> Callable[[Params, Batch, jax.Array], Params]:
    def mean_grad(params: Params, train: Batch, pieces: jax.Array) -> Params:
        def add(total: Params, at: jax.Array) -> tuple[Params, None]:
            grads = weighted_grad(loss_fn, params, take(train, at), jnp.full(SLICE, 1.0 / pieces.size))
            return jax.tree.map(jnp.add, total, grads), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), pieces)[0]

    return jax.jit(mean_grad)


def full_truth(problem: Problem, params: Params) -> Truth:
    params = jax.tree.map(jnp.asarray, params)
    pieces = jnp.arange(problem.size).reshape(-1, SLICE)
    mean = mean_grad_of(problem.loss_fn)(params, problem.train, pieces)
    return Truth(params, all_norms(problem, params), mean, float(squared(mean)))


def squared(tree: Params) -> jax.Array:
    return sum((jnp.vdot(x, x, precision="highest") for x in jax.tree.leaves(tree)), start=jnp.zeros(()))


def stale_moment(truth: Truth, probs: jax.Array) -> float:
    return float(variance.moments(jnp.asarray(truth.norms), probs).stale)


PIECE = 256


def stratified_mse(problem: Problem, truth: Truth, probs: jax.Array, order: jax.Array) -> float:
    """M * MSE of stratified draws along ``order``, from all the data."""
    at, weights, starts = strata_pieces(np.asarray(probs, np.float64), np.asarray(order))
    total = jax.jit(sum_of_squares, static_argnums=0)(
        problem.loss_fn, truth.params, problem.train, jnp.asarray(at), jnp.asarray(weights), jnp.asarray(starts)
    )
    return stale_moment(truth, probs) - float(total) / M


def strata_pieces(probs: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The examples of each stratum in pieces of 256, the weights of its mean gradient, and where strata start."""
    size = len(order)
    masses = probs[order] / probs.sum()
    ends = np.cumsum(masses)
    begins = np.concatenate([[0.0], ends[:-1]])
    at, weights, starts = [], [], []
    for stratum in range(M):
        low, high = stratum / M, (stratum + 1) / M
        part = slice(np.searchsorted(ends, low, side="right"), np.searchsorted(begins, high, side="left"))
        inside = np.maximum(np.minimum(ends[part], high) - np.maximum(begins[part], low), 0.0)
        weight, member = M * inside / (size * masses[part]), order[part]
        for start in range(0, len(member), PIECE):
            pad = (0, max(0, start + PIECE - len(member)))
            at.append(np.pad(member[start : start + PIECE], pad))
            weights.append(np.pad(weight[start : start + PIECE], pad))
            starts.append(start == 0)
    missing = size // PIECE + M + 1 - len(at)  # one shape for all laws
    pad = ((0, missing), (0, 0))
    return (
        np.pad(np.array(at, np.int32), pad),
        np.pad(np.array(weights, np.float32), pad),
        np.pad(np.array(starts), (0, missing)),
    )


def sum_of_squares(
    loss_fn: LossFn, params: Params, train: Batch, at: jax.Array, weights: jax.Array, starts: jax.Array
) -> jax.Array:
    """The sum over strata of ‖sum of weights * gradients‖²; a True in ``starts`` begins a stratum."""

    def add(state: tuple[Params, jax.Array], piece: tuple) -> tuple[tuple[Params, jax.Array], None]:
        stratum, total = state
        members, weight, is_first = piece
        total = total + jnp.where(is_first, squared(stratum), 0.0)
        grads = weighted_grad(loss_fn, params, take(train, members), weight)
        return (jax.tree.map(lambda s, g: jnp.where(is_first, g, s + g), stratum, grads), total), None

    start = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
    (last, total), _ = jax.lax.scan(add, start, (at, weights, starts))
    return total + squared(last)


def measured_mse(
    problem: Problem, truth: Truth, sampler: Callable[..., Draw], law: samplers.Law, batches: int = 200
) -> tuple[float, float]:
    """M * MSE over batches drawn, and the half-width of its 95 % interval."""

    @jax.jit
    def run(params: Params, mean: Params, train: Batch, law: samplers.Law, keys: jax.Array) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            draw = sampler(key, law, num_draws=M)
            weights = draw.mask / (problem.size * draw.probs * M)
            found = weighted_grad(problem.loss_fn, params, take(train, draw.indices), weights)
            return M * squared(jax.tree.map(jnp.subtract, found, mean))

        return jax.lax.map(one, keys)

    keys = jax.random.split(jax.random.key(SEED + 2), batches)
    found = np.asarray(run(truth.params, truth.mean_grad, problem.train, law, keys))
    return float(found.mean()), 1.96 * float(found.std(ddof=1)) / np.sqrt(batches)


if __name__ == "__main__":
    main()
