"""The protocol of an honest comparison: every method gets the same budget, the same schedule, and pays for its scores.

A budget is counted in passes: one is a forward and backward pass of one example; a forward pass alone is a third, the
norms of gradients two thirds. Equal seconds are passes too, at the price of each method, the seconds that a pass takes
it (`price`): so a machine that is busy now and then favours nobody. The rate decays to zero, by a cosine, over the
share of the budget that is spent: a method with dear steps makes fewer of them and still ends fully decayed. Programs
are compiled before the clock starts; measurements stand outside it.

Two clocks run: seconds of the wall, and seconds that the process had a core (`core_seconds`), which leave out what
others on the machine took. Pinned to one core of a machine at rest they are the same, as they are on an
accelerator.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmarks.norm_models import ResNet
from clocks import core_seconds

import isgd_jax as isgd
from isgd_jax.app import models

__all__ = [
    "FORWARD",
    "NORMS",
    "Choice",
    "Method",
    "Problem",
    "Programs",
    "compile_method",
    "price",
    "run",
    "warm_up",
]

Tree = Any
Array = jax.Array
FORWARD, NORMS = 1 / 3, 2 / 3
"""The cost of a score, in passes: a loss or a bound from the logits, and an exact norm."""
MOMENTUM = 0.9
EVAL_BATCH = 1024
LOOK_EVERY = 100
"""Steps in one program at most: between two looks at the budget."""
CALIBRATION_BINS = 15


class Problem(NamedTuple):
    """A data set and a model. Splits are dicts of arrays on the device, ``x`` [n, d] and ``y`` [n].

    The model is an MLP of ``hidden`` widths, or, of pictures of a shape, a ResNet.
    """

    name: str
    hidden: tuple[int, ...]
    num_classes: int
    batch_size: int
    train: dict[str, Array]
    valid: dict[str, Array]
    test: dict[str, Array]
    picture: tuple[int, ...] | None = None

    @property
    def num_examples(self) -> int:
        return len(self.train["y"])

    def logits_fn(self, params: Tree, example: dict[str, Array]) -> Array:
        return self._model.apply({"params": params}, example["x"])

    def loss_fn(self, params: Tree, example: dict[str, Array]) -> Array:
        logits = self.logits_fn(params, example)
        return optax.softmax_cross_entropy_with_integer_labels(logits, example["y"])

    def init(self, key: Array) -> Tree:
        return models.init(self._model, key, self.train["x"][0], num_classes=self.num_classes)

    @property
    def _model(self) -> models.Model:
        if self.picture is None:
            return models.mlp(self.num_classes, hidden=self.hidden)
        return OfPictures(self.picture, self.num_classes)


class OfPictures(nn.Module):
    """The ResNet of `norm_models` on flat pictures: fourteen layers, GroupNorm."""

    picture: tuple[int, ...]
    num_classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return ResNet(self.num_classes)(x.reshape(self.picture))


class Choice(NamedTuple):
    """What a step learns from: indices [m], the weights [m] of their gradients in the mean, and what choosing cost."""

    indices: Array
    weights: Array
    cost: Array | float
    draw: isgd.Draw | None = None
    """What a method wants to remember of it until it learns."""


def _no_refresh(key: Array, memory: Tree, params: Tree, data: Tree, step: Array) -> tuple[Tree, Array | float]:
    return memory, 0.0


def _no_lesson(memory: Tree, choice: Choice, losses: Array, measured: Any, step: Array) -> Tree:
    return memory


class Method(NamedTuple):
    """A way to choose batches: pure functions around a memory of its own."""

    start: Callable[[Array, Tree], tuple[Tree, float]]
    """``(key, data) -> (memory, cost)``."""
    choose: Callable[[Array, Tree, Tree, Tree, Array], tuple[Choice, Tree]]
    """``(key, memory, params, data, progress) -> (choice, memory)``; progress is the share of the budget spent."""
    learn: Callable[[Tree, Choice, Array, Any, Array], Tree] = _no_lesson
    """``(memory, choice, losses, measured, step) -> memory``, after the gradients of the choice."""
    refresh: Callable[[Array, Tree, Tree, Tree, Array], tuple[Tree, Array | float]] = _no_refresh
    """``(key, memory, params, data, step) -> (memory, cost)``, every ``refresh_every`` steps."""
    refresh_every: int = 0
    """0 is never."""
    measure: Callable[[Tree, Any, Tree], Any] | None = None
    """``(memory, grads, mean) -> measured``: of the lazy per-example gradients and their weighted mean. Without it the
    ordinary gradient is taken, at its ordinary price, and ``measured`` is None."""


class Carry(NamedTuple):
    params: Tree
    velocity: Tree
    memory: Tree
    spent: Array
    step: Array
    counts: Array
    """How often each example was drawn, [n]."""


class Fit(NamedTuple):
    """How well parameters do on a split."""

    loss: Any
    error: Any
    worst_class: Any
    """The largest error of a class that the split has."""
    calibration: Any
    """Expected calibration error: mean gap of confidence and accuracy over 15 equal bins (Guo et al. 2017)."""


class Programs(NamedTuple):
    """The compiled parts of a method on a problem; made once, used by every seed and rate."""

    start: Callable[..., Any]
    advance: Callable[..., Carry]
    refresh: Callable[..., Carry]
    evaluate: Callable[..., Fit]


def compile_method(problem: Problem, method: Method) -> Programs:
    """The programs of a method, ready to run."""
    tx = optax.trace(MOMENTUM, nesterov=True)

    def start(key: Array, data: Tree) -> tuple[Carry, Array]:
        params = problem.init(jax.random.fold_in(key, 0))
        memory, cost = method.start(jax.random.fold_in(key, 1), data)
        spent = jnp.asarray(cost, jnp.float32)
        counts = jnp.zeros(problem.num_examples, jnp.int32)
        return Carry(params, tx.init(params), memory, spent, jnp.int32(0), counts), spent

    def step(carry: Carry, key: Array, data: Tree, rate: Array, progress: Array) -> Carry:
        choice, memory = method.choose(key, carry.memory, carry.params, data, progress)
        batch = jax.tree.map(lambda leaf: leaf[choice.indices], data)
        measure = functools.partial(method.measure, memory) if method.measure else None
        losses, measured, grad = _gradient(problem.loss_fn, carry.params, batch, choice.weights, measure)
        updates, velocity = tx.update(grad, carry.velocity)
        scale = rate * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
        params = jax.tree.map(lambda p, u: p - scale * u, carry.params, updates)
        memory = method.learn(memory, choice, losses, measured, carry.step)
        spent = carry.spent + len(choice.indices) + choice.cost
        counts = carry.counts.at[choice.indices].add(1)
        return Carry(params, velocity, memory, spent, carry.step + 1, counts)

    def advance(
        carry: Carry, key: Array, data: Tree, rate: Array, progress: Array, slope: Array, steps: Array
    ) -> Carry:
        def body(i: Array, carry: Carry) -> Carry:
            now = progress + slope * i.astype(jnp.float32)
            return step(carry, jax.random.fold_in(key, carry.step), data, rate, now)

        return jax.lax.fori_loop(jnp.int32(0), steps, body, carry)

    def refresh(carry: Carry, key: Array, data: Tree) -> Carry:
        key = jax.random.fold_in(key, carry.step)
        memory, cost = method.refresh(key, carry.memory, carry.params, data, carry.step)
        return carry._replace(memory=memory, spent=carry.spent + cost)

    return Programs(jax.jit(start), jax.jit(advance), jax.jit(refresh), jax.jit(_evaluator(problem)))


def _gradient(loss_fn: Any, params: Tree, batch: Tree, weights: Array, measure: Any) -> tuple[Any, ...]:
    """Losses, what is measured of single gradients, and the weighted mean gradient, each way at its ordinary price."""
    if measure is not None:
        losses, grads = isgd.per_example_value_and_grad(loss_fn)(params, batch)
        mean = isgd.weighted_mean(grads, weights)
        return losses, measure(grads, mean), mean

    def mean_loss(params: Tree) -> tuple[Array, Array]:
        losses = jax.vmap(loss_fn, (None, 0))(params, batch)
        return jnp.mean(weights * losses), losses

    (_, losses), grad = jax.value_and_grad(mean_loss, has_aux=True)(params)
    return losses, None, grad


def _evaluator(problem: Problem) -> Callable[[Tree, Tree], Fit]:
    def evaluate(params: Tree, data: Tree) -> Fit:
        def one(example: Tree) -> tuple[Array, Array, Array]:
            logits = problem.logits_fn(params, example)
            wrong = jnp.argmax(logits) != example["y"]
            return problem.loss_fn(params, example), wrong.astype(jnp.float32), jnp.max(jax.nn.softmax(logits))

        losses, wrong, confidence = jax.lax.map(one, data, batch_size=EVAL_BATCH)
        by_class = sums_by(jnp.stack([wrong, jnp.ones_like(wrong)], 1), data["y"], problem.num_classes)
        worst = jnp.max(by_class[:, 0] / jnp.maximum(by_class[:, 1], 1.0))
        bins = jnp.minimum((confidence * CALIBRATION_BINS).astype(jnp.int32), CALIBRATION_BINS - 1)
        gaps = jnp.abs(sums_by(confidence - (1.0 - wrong), bins, CALIBRATION_BINS))
        return Fit(jnp.mean(losses), jnp.mean(wrong), worst, jnp.sum(gaps) / len(wrong))

    return evaluate


def sums_by(values: Array, groups: Array, count: int) -> Array:
    """Sums over the rows of each group."""
    return jax.ops.segment_sum(values, groups, num_segments=count)


def top_share(counts: np.ndarray, share: float = 0.01) -> float:
    """The share of all draws that the most drawn 1 % of examples hold; 0.01 if all are drawn alike."""
    most = np.sort(np.asarray(counts, np.float64))[::-1][: max(1, round(share * len(counts)))]
    return float(most.sum() / max(1.0, np.sum(counts)))


class Clock:
    """Seconds that count, by the wall and of this process: it can be stopped."""

    def __init__(self) -> None:
        self.elapsed = self.core = 0.0

    def timed(self, function: Callable[..., Any], *args: Any) -> Any:
        began, core = time.perf_counter(), core_seconds()
        result = jax.block_until_ready(function(*args))
        self.elapsed += time.perf_counter() - began
        self.core += core_seconds() - core
        return result


def warm_up(programs: Programs, method: Method, data: Tree) -> None:
    """Compile everything, off every clock."""
    key, nothing = jax.random.key(0), jnp.float32(0)
    carry, _ = programs.start(key, data)
    for _ in range(2):  # what a program returns may be typed otherwise than what it was first given
        if method.refresh_every:
            carry = programs.refresh(carry, key, data)
        carry = jax.block_until_ready(programs.advance(carry, key, data, nothing, nothing, nothing, jnp.int32(1)))


def price(run: dict[str, Any]) -> float:
    """Seconds a pass, as a run has met them. Of several runs take the least: others on the machine only add to it."""
    return run["seconds"] / run["passes"]


def run(
    problem: Problem, method: Method, programs: Programs, *, rate: float, seed: int, passes: float
) -> dict[str, Any]:
    """One run to the end of its budget, and how well it did; one that diverges ends there, without losses (None)."""
    key, data, clock = jax.random.key(seed), problem.train, Clock()
    carry, _ = clock.timed(programs.start, key, data)
    progress = slope = 0.0
    steps, now = 0, LOOK_EVERY // 10  # a short look at what a step costs, then longer ones
    while now > 0:
        if method.refresh_every and steps % method.refresh_every == 0:
            carry = clock.timed(programs.refresh, carry, key, data)
        if method.refresh_every:
            now = min(now, method.refresh_every - steps % method.refresh_every)
        at = (jnp.float32(rate), jnp.float32(progress), jnp.float32(slope), jnp.int32(now))
        carry = clock.timed(programs.advance, carry, key, data, *at)
        steps += now
        spent = float(carry.spent) / passes
        progress, slope = spent, (spent - progress) / now
        now = min(LOOK_EVERY, round((1.0 - progress) / slope)) if _is_finite(carry.params) else 0
    found = {"steps": steps, "passes": float(carry.spent), "seconds": clock.elapsed, "core_seconds": clock.core}
    for split in ("train", "valid", "test"):
        fit = programs.evaluate(carry.params, getattr(problem, split))
        found |= {f"{split}_{name}": _finite(float(value)) for name, value in fit._asdict().items()}
    return found | {"top_share": top_share(np.asarray(carry.counts))}


@jax.jit
def _is_finite(params: Tree) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
