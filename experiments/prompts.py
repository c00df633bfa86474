"""Rollouts to a given return, by how rollouts are shared out among prompts: a bandit over handwritten digits.

Claim      With rollouts shared out by the variance of their policy gradients (`isgd_jax.rollouts`), a return is reached
           with at most 0.6 of the rollouts that uniform prompts need.

A prompt is an image of a digit (1,437 of scikit-learn's), an action its name, the policy a network 64-64-10, trained on
the labels of 40 prompts first, as language models are before they are rewarded (or not: ``--scratch``). The reward
is 1 with probability 1 - e for the right name and e for a wrong one: e = 0 everywhere, a verifier that is right, or
spread over 0 to 0.4 by prompt, one that errs more on some prompts than on others. The return is the mean expected
reward over the prompts, computed exactly; levels are shares of the way from chance to the best there is.

Arms, each step of 64 rollouts, pilots counted; the baseline of each is a mean of the prompt's earlier rewards, and the
gradient of no arm is divided by a group's deviation:

* uniform          prompts in shuffled epochs; tuned: 1 or 4 rollouts each
* skip             prompts whose last z groups had rewards all alike come with probability p^z, and p follows the share
                   of such groups, after GRESO (Zheng et al., arXiv 2506.02177); no reweighting, which is a bias;
                   tuned: groups of 4 or 8
* pilots           16 shuffled prompts, 1 or 2 pilot rollouts each, the rest by their deviation of the reward times the
                   norm of ∇log π, after GVM (Yao et al., arXiv 2505.02391); tuned: 1 or 2
* ours             counts by the variance of the policy gradient over all prompts; tuned: floors 0.2 or 0.4 of uniform
* ours-reward      the same by the variance of the reward alone
* ours-sampler     `isgd_jax.importance_sampler` with a rollout as a draw: norms of the gradients as scores, calibrated;
                   tuned: score_memory 0 or 0.7

Protocol   Adam at a constant rate. Each arm has the same trials, three rates times the two values of its own, on three
           seeds that are not reported; a best rate at the end of the grid has one more trial (told). A level counts as
           reached where the mean of five looks, a hundred steps, is there.

Command    python experiments/prompts.py [--verifier right errs] [--quick]
Time       four minutes a verifier on a quiet core, ten on a busy one; --quick two and a half, busy. Runs are kept in
           runs/prompts, and a race goes on where it was stopped

Result (8 seeds; rollouts over uniform's, geometric means of pairs, [95 %]): **0.6 is missed.**

    level      verifier that is right                        verifier that errs
               ours               ours-sampler               ours               ours-sampler
    90 %       1.00 [0.96, 1.05]  0.95 [0.87, 1.03]          0.91 [0.75, 1.10]  0.94 [0.82, 1.07]
    95 %       0.96 [0.86, 1.07]  0.85 [0.81, 0.91]          0.86 [0.74, 1.00]  0.85 [0.74, 0.96]
    98 %       0.72 [0.62, 0.83]  0.70 [0.59, 0.83]          0.68 [0.57, 0.80]  0.64 [0.56, 0.73]

At first most prompts vary alike and there is little to share out otherwise; the gain grows as prompts are solved. The
variance of the reward alone gains nothing sure (0.89 [0.78, 1.01] and 1.13 [0.95, 1.34] at 98 %), pilots cost what they
save (1.07, 0.89), and skipping is slower everywhere (1.39, 2.25): what it gives up on stays unsolved, and its groups of
four or eight rollouts see fewer prompts. Uniform is best with one rollout a prompt.

From scratch, five seeds, a verifier that is right: 0.67 [0.54, inf] at 98 %. One run of ours did not arrive in 256,000
rollouts, all of uniform's did: a digit that is never named has gradients that hardly vary, and gets the floor alone.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cells import cell

import isgd_jax as isgd
from isgd_jax import rollouts
from isgd_jax.app import data
from isgd_jax.app.compare import paired_ratio

__all__ = ["ARMS", "Arm", "main", "make", "problem"]

ROLLOUTS = 64
"""Of a step."""
ACTIONS, HIDDEN = 10, 64
PRETRAINED_ON = 40
LOOK_EVERY, SMOOTH = 20, 5
"""Steps between two looks at the return, and the looks of which the mean must have reached a level."""
LEVELS = (0.9, 0.95, 0.98)
RATES = (1e-3, 3e-3, 1e-2)
TUNING_SEEDS = (1_000, 1_001, 1_002)
MAX_AGE = 1_000
WORST_ERROR = {"right": 0.0, "errs": 0.4}
"""Of the verifier, on the worst prompt."""
Tree = Any
Array = jax.Array


class Problem(NamedTuple):
    """Prompts and their verifier."""

    images: Array
    labels: Array
    errors: Array

    @property
    def num_prompts(self) -> int:
        """N."""
        return len(self.labels)


class Rollouts(NamedTuple):
    """A step's choice: prompts [r], the weight [r] of each rollout in the sum of gradients, and how they were drawn."""

    indices: Array
    weights: Array
    draw: isgd.Draw | None = None


class Seen(NamedTuple):
    """What the rollouts of a step showed: rewards, baselines, and per-example gradients, lazy."""

    rewards: Array
    baselines: Array
    grads: Any


class Arm(NamedTuple):
    """A way to share out rollouts: pure functions around a memory of its own."""

    init: Callable[[], Tree]
    choose: Callable[[Array, Tree, Array, Callable[..., Any]], tuple[Rollouts, Tree]]
    """``(key, memory, step, pilot) -> (rollouts, memory)``; ``pilot(key, indices)`` makes rollouts and tells of them:
    their rewards, and the norms of ∇log π."""
    learn: Callable[[Tree, Rollouts, Seen, Array], Tree]


@functools.cache
def problem(verifier: str) -> Problem:
    """The digits, and how often each prompt's reward is wrong: the same for all seeds."""
    train = data.load("digits").train
    images = np.asarray(train["image"], np.float32).reshape(len(train["label"]), -1) / 16.0
    errors = WORST_ERROR[verifier] * np.random.default_rng(7).uniform(size=len(images))
    return Problem(jnp.asarray(images), jnp.asarray(train["label"], jnp.int32), jnp.asarray(errors, jnp.float32))


def init_policy(key: Array) -> Tree:
    """Two layers."""
    first, second = jax.random.split(key)
    return {
        "w1": jax.random.normal(first, (64, HIDDEN)) / 8.0,
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(second, (HIDDEN, ACTIONS)) * 0.1,
        "b2": jnp.zeros(ACTIONS),
    }


@functools.cache
def pretrained() -> Tree:
    """A policy that is two thirds of the way: trained on the labels of a few prompts."""
    p, params, adam = problem("right"), init_policy(jax.random.key(12)), optax.adam(1e-2)
    images, labels = p.images[:PRETRAINED_ON], p.labels[:PRETRAINED_ON]

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        def loss(params: Tree) -> Array:
            logits = jax.vmap(log_policy, (None, 0))(params, images)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        updates, opt_state = adam.update(jax.grad(loss)(carry[0]), carry[1])
        return (optax.apply_updates(carry[0], updates), opt_state), None

    return jax.jit(lambda carry: jax.lax.scan(step, carry, None, 30)[0])((params, adam.init(params)))[0]


def log_policy(params: Tree, image: Array) -> Array:
    """log π(action | image) [10]."""
    hidden = jax.nn.relu(image @ params["w1"] + params["b1"])
    return jax.nn.log_softmax(hidden @ params["w2"] + params["b2"])


def loss_fn(params: Tree, rollout: dict[str, Array]) -> Array:
    """Its gradient is minus the policy gradient of one rollout."""
    return -rollout["advantage"] * log_policy(params, rollout["image"])[rollout["action"]]


def expected_rewards(p: Problem) -> Array:
    """Of each action on each prompt [n, 10]."""
    right = jax.nn.one_hot(p.labels, ACTIONS)
    return right * (1.0 - p.errors[:, None]) + (1.0 - right) * p.errors[:, None]


def reached(p: Problem, params: Tree) -> Array:
    """The return, as a share of the way from chance to the best."""
    rewards = expected_rewards(p)
    policy = jnp.exp(jax.vmap(log_policy, (None, 0))(params, p.images))
    chance = jnp.mean(rewards)
    return (jnp.mean(jnp.sum(policy * rewards, axis=1)) - chance) / (jnp.mean(jnp.max(rewards, axis=1)) - chance)


class Epochs(NamedTuple):
    """Prompts in shuffled order, each once an epoch."""

    order: Array
    place: Array


def next_prompts(key: Array, epochs: Epochs, count: int, size: int) -> tuple[Array, Epochs]:
    """The next ``count`` of the epoch; a new one is begun where they do not fit."""
    renew = epochs.place + count > size
    order = jnp.where(renew, jax.random.permutation(key, size).astype(jnp.int32), epochs.order)
    place = jnp.where(renew, 0, epochs.place)
    return jax.lax.dynamic_slice(order, (place,), (count,)), Epochs(order, place + count)


def _no_epochs(size: int) -> Epochs:
    return Epochs(jnp.zeros(size, jnp.int32), jnp.int32(size))


def uniform(p: Problem, each: float) -> Arm:
    """``each`` rollouts of prompts in shuffled epochs."""
    count = int(each)

    def choose(key: Array, memory: Epochs, step: Array, pilot: Any) -> tuple[Rollouts, Epochs]:
        prompts, memory = next_prompts(key, memory, ROLLOUTS // count, p.num_prompts)
        return Rollouts(jnp.repeat(prompts, count), jnp.full(ROLLOUTS, 1.0 / ROLLOUTS)), memory

    return Arm(lambda: _no_epochs(p.num_prompts), choose, lambda memory, *_: memory)


class Skips(NamedTuple):
    alike: Array
    """Groups in a row that had rewards all alike, [n]."""
    explore: Array


def skip(p: Problem, each: float) -> Arm:
    """After GRESO: prompts come with probability p^z, without replacement in a step; a biased estimate."""
    count = int(each)

    def choose(key: Array, memory: Skips, step: Array, pilot: Any) -> tuple[Rollouts, Skips]:
        logits = memory.alike * jnp.log(memory.explore) + jax.random.gumbel(key, memory.alike.shape)
        prompts = jax.lax.top_k(logits, ROLLOUTS // count)[1]
        return Rollouts(jnp.repeat(prompts, count), jnp.full(ROLLOUTS, 1.0 / ROLLOUTS)), memory

    def learn(memory: Skips, chosen: Rollouts, seen: Seen, step: Array) -> Skips:
        groups, prompts = seen.rewards.reshape(-1, count), chosen.indices.reshape(-1, count)[:, 0]
        alike = jnp.all(groups == groups[:, :1], axis=1)
        runs = memory.alike.at[prompts].set(jnp.where(alike, memory.alike[prompts] + 1.0, 0.0))
        change = jnp.where(jnp.mean(alike.astype(jnp.float32)) >= 0.25, -0.01, 0.01)
        return Skips(runs, jnp.clip(memory.explore + change, 0.05, 0.95))

    return Arm(lambda: Skips(jnp.zeros(p.num_prompts), jnp.float32(0.5)), choose, learn)


def pilots(p: Problem, each: float) -> Arm:
    """After GVM: pilot rollouts of this step's prompts say how the others are shared out."""
    count, prompts_a_step = int(each), ROLLOUTS // 4
    rest = ROLLOUTS - count * prompts_a_step

    def choose(key: Array, memory: Epochs, step: Array, pilot: Any) -> tuple[Rollouts, Epochs]:
        prompts, memory = next_prompts(key, memory, prompts_a_step, p.num_prompts)
        rewards, norms = pilot(jax.random.fold_in(key, 1), jnp.repeat(prompts, count))
        share = (jnp.sum(rewards.reshape(-1, count), axis=1) + 0.5) / (count + 1.0)
        slope = jnp.mean(jnp.square(norms).reshape(-1, count), axis=1)
        counts = rollouts.expected_counts(share * (1.0 - share) * slope, num_rollouts=rest, floors=1.0)
        draw = rollouts.draw(jax.random.fold_in(key, 2), counts, num_rollouts=rest)
        return Rollouts(prompts[draw.indices], draw.target / draw.probs / rest), memory

    return Arm(lambda: _no_epochs(p.num_prompts), choose, lambda memory, *_: memory)


def _by_moments(p: Problem, floor: float, of_rollouts: Callable[[Seen], tuple[Array, Array]]) -> Arm:
    def choose(key: Array, memory: Any, step: Array, pilot: Any) -> tuple[Rollouts, Any]:
        known = rollouts.moments(memory, version=step, max_age=MAX_AGE)
        counts = rollouts.expected_counts(
            known.variance,
            num_rollouts=ROLLOUTS,
            second_moments=known.second,
            floors=floor * ROLLOUTS / p.num_prompts,
        )
        draw = rollouts.draw(key, counts, num_rollouts=ROLLOUTS)
        return Rollouts(draw.indices, draw.target / draw.probs / ROLLOUTS, draw), memory

    def learn(memory: Any, chosen: Rollouts, seen: Seen, step: Array) -> Any:
        norms, gram = of_rollouts(seen)
        products = rollouts.pair_products(gram, chosen.indices)
        return rollouts.observe(memory, chosen.draw, norms, products, version=step)

    return Arm(lambda: rollouts.create(p.num_prompts), choose, learn)


def ours(p: Problem, floor: float) -> Arm:
    """By the variance of the policy gradient."""
    return _by_moments(p, floor, lambda seen: (isgd.norms(seen.grads), isgd.gram(seen.grads)))


def ours_reward(p: Problem, floor: float) -> Arm:
    """By the variance of the reward alone."""

    def of_rewards(seen: Seen) -> tuple[Array, Array]:
        left = seen.rewards - seen.baselines
        return jnp.abs(left), jnp.outer(left, left)

    return _by_moments(p, floor, of_rewards)


def ours_sampler(p: Problem, score_memory: float) -> Arm:
    """The estimator for examples, a rollout as a draw."""
    sampler = isgd.importance_sampler(
        p.num_prompts, batch_size=ROLLOUTS, sampler="systematic", score_memory=score_memory, monitor=False, gate=False
    )

    def choose(key: Array, memory: Any, step: Array, pilot: Any) -> tuple[Rollouts, Any]:
        memory = jax.lax.cond(step % 10 == 0, sampler.refresh, lambda state: state, memory)
        draw = sampler.sample(key, memory)
        return Rollouts(draw.indices, draw.target / draw.probs / ROLLOUTS, draw), memory

    def learn(memory: Any, chosen: Rollouts, seen: Seen, step: Array) -> Any:
        return sampler.observe(memory, chosen.draw, seen.grads)

    return Arm(sampler.init, choose, learn)


ARMS: dict[str, tuple[Callable[[Problem, float], Arm], tuple[float, float]]] = {
    "uniform": (uniform, (1, 4)),
    "skip": (skip, (4, 8)),
    "pilots": (pilots, (1, 2)),
    "ours": (ours, (0.2, 0.4)),
    "ours-reward": (ours_reward, (0.2, 0.4)),
    "ours-sampler": (ours_sampler, (0.0, 0.7)),
}


class Programs(NamedTuple):
    """The compiled parts of an arm; one for all seeds and rates."""

    begin: Callable[..., Any]
    advance: Callable[..., Any]
    """``(carry, key, rate) -> (carry, return)``, `LOOK_EVERY` steps."""


@functools.cache
def make(verifier: str, name: str, own: float, scratch: bool = False) -> Programs:
    """Compiled on first use."""
    p, start = problem(verifier), pretrained()
    arm = ARMS[name][0](p, own)
    adam = optax.scale_by_adam()

    def rolled(key: Array, params: Tree, indices: Array) -> tuple[Array, Array]:
        """Actions and rewards."""
        logits = jax.vmap(log_policy, (None, 0))(params, p.images[indices])
        actions = jax.random.categorical(jax.random.fold_in(key, 0), logits)
        chance = jnp.where(actions == p.labels[indices], 1.0 - p.errors[indices], p.errors[indices])
        return actions, jax.random.bernoulli(jax.random.fold_in(key, 1), chance).astype(jnp.float32)

    def begin(key: Array) -> Any:
        params = init_policy(key) if scratch else jax.tree.map(jnp.copy, start)
        sums = jnp.zeros((2, p.num_prompts))  # of rewards, and of their counts
        return params, adam.init(params), sums, arm.init(), jnp.int32(0)

    def step(carry: Any, _: Any, key: Array, rate: Array) -> tuple[Any, None]:
        params, opt_state, sums, memory, at = carry
        key = jax.random.fold_in(key, at)

        def pilot(key: Array, indices: Array) -> tuple[Array, Array]:
            actions, rewards = rolled(key, params, indices)
            batch = {"image": p.images[indices], "action": actions, "advantage": jnp.ones(indices.shape)}
            return rewards, isgd.norms(isgd.per_example_grads(loss_fn)(params, batch))

        chosen, memory = arm.choose(jax.random.fold_in(key, 0), memory, at, pilot)
        actions, rewards = rolled(jax.random.fold_in(key, 1), params, chosen.indices)
        # Before any reward of a prompt is known, the mean of all: two rewards' worth of it.
        overall = jnp.sum(sums[0]) / jnp.maximum(jnp.sum(sums[1]), 1.0)
        baselines = ((sums[0] + 2.0 * overall) / (sums[1] + 2.0))[chosen.indices]
        batch = {"image": p.images[chosen.indices], "action": actions, "advantage": rewards - baselines}
        grads = isgd.per_example_grads(loss_fn)(params, batch)
        mean = isgd.weighted_mean(grads, chosen.weights * len(chosen.weights))
        updates, opt_state = adam.update(mean, opt_state)
        after = jax.tree.map(lambda x, u: x - rate * u, params, updates)
        memory = arm.learn(memory, chosen, Seen(rewards, baselines, grads), at)
        kept = sums.at[:, chosen.indices].set(0.7 * sums[:, chosen.indices])
        sums = kept.at[:, chosen.indices].add(jnp.stack([rewards, jnp.ones_like(rewards)]))
        return (after, opt_state, sums, memory, at + 1), None

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(carry: Any, key: Array, rate: Array) -> tuple[Any, Array]:
        carry = jax.lax.scan(functools.partial(step, key=key, rate=rate), carry, None, LOOK_EVERY)[0]
        return carry, reached(p, carry[0])

    return Programs(jax.jit(begin), advance)


def run(verifier: str, name: str, own: float, rate: float, seed: int, steps: int, scratch: bool = False) -> list[float]:
    """The return after each look, in shares of the way to the best."""
    programs, key = make(verifier, name, own, scratch), jax.random.key(seed)
    carry, curve = programs.begin(jax.random.fold_in(key, 2**20)), []
    for _ in range(steps // LOOK_EVERY):
        carry, found = programs.advance(carry, key, jnp.float32(rate))
        curve.append(float(found))
        if not math.isfinite(curve[-1]):
            break
    return curve


def arrival(curve: list[float], level: float) -> float:
    """Rollouts until the mean of `SMOOTH` looks is at the level; infinite if it never was."""
    means = np.convolve(curve, np.full(SMOOTH, 1.0 / SMOOTH), mode="valid") if len(curve) >= SMOOTH else np.zeros(0)
    there = np.flatnonzero(means >= level)
    return float((there[0] + SMOOTH) * LOOK_EVERY * ROLLOUTS) if len(there) else math.inf


class Race:
    """A verifier, arms and seeds, and the folder of what was run."""

    def __init__(self, verifier: str, options: argparse.Namespace) -> None:
        self.verifier, self.names, self.seeds = verifier, options.arms, options.seeds
        self.steps, self.scratch = options.steps, options.scratch
        self.folder = options.folder / (verifier + "-scratch" * options.scratch)

    def curve(self, name: str, own: float, rate: float, seed: int) -> list[float]:
        """A run, or what is kept of it."""
        key = f"{name}-{own:g}-{rate:g}-{seed}-{self.steps}"
        return cell(self.folder, key, lambda: run(self.verifier, name, own, rate, seed, self.steps, self.scratch))

    def tuned(self, name: str, rates: tuple[float, ...]) -> tuple[float, float, str]:
        """The arm's own value, its rate, and what is to be told of the search."""
        tried = {(own, rate): self.merit(name, own, rate) for own in ARMS[name][1] for rate in rates}
        best, told = min(tried, key=lambda trial: tried[trial]), ""
        ends = {rates[0]: rates[0] / 3, rates[-1]: rates[-1] * 3} if len(rates) > 1 else {}
        if best[1] in ends:
            further = best[0], ends[best[1]]
            tried[further] = self.merit(name, *further)
            best, told = min(tried, key=lambda trial: tried[trial]), f"; also tried rate {further[1]:g}"
        return *best, told

    def merit(self, name: str, own: float, rate: float) -> float:
        """The mean logarithm of the rollouts to the levels, over the tuning seeds; not to arrive is four budgets."""
        curves = [self.curve(name, own, rate, seed) for seed in TUNING_SEEDS]
        never = 4.0 * self.steps * ROLLOUTS
        return float(np.mean([math.log(min(arrival(curve, level), never)) for curve in curves for level in LEVELS]))

    def race(self, rates: tuple[float, ...]) -> None:
        """Tune, run all seeds, print the tables."""
        began = time.perf_counter()
        chosen = {}
        for name in self.names:
            chosen[name] = self.tuned(name, rates)
            own, rate, told = chosen[name]
            print(f"{self.verifier:6} {name:12} {own:g}, rate {rate:g}{told}", flush=True)
        curves = {
            name: [self.curve(name, *chosen[name][:2], seed) for seed in range(self.seeds)] for name in self.names
        }
        print("\n" + "\n".join(self.table(curves)) + f"\n{time.perf_counter() - began:.0f} s\n", flush=True)

    def table(self, curves: dict[str, list[list[float]]]) -> list[str]:
        """What came out, in lines of text."""
        lines = []
        for level in LEVELS:
            found = {name: np.array([arrival(curve, level) for curve in some]) for name, some in curves.items()}
            lines.append(f"{self.verifier}: {100 * level:g} % of the way")
            lines.append(f"  {'arm':12} arrived   rollouts  over uniform's [95 %]   return after all")
            for name, times in found.items():
                count, ends = int(np.isfinite(times).sum()), np.median([curve[-1] for curve in curves[name]])
                told = ""
                if name != "uniform" and np.isfinite(times).any() and np.isfinite(found["uniform"]).any():
                    ratio = paired_ratio(times, found["uniform"])
                    told = f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
                middle = np.median(times)
                lines.append(f"  {name:12} {count:3} of {len(times):<3} {middle:9,.0f}  {told:22}  {100 * ends:.1f} %")
        return lines


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verifier", nargs="+", choices=list(WORST_ERROR), default=list(WORST_ERROR))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--scratch", action="store_true", help="an untrained policy")
    parser.add_argument("--quick", action="store_true", help="uniform and ours, five seeds, one rate")
    parser.add_argument("--folder", type=Path, default=Path("runs/prompts"), help="of the cells")
    options = parser.parse_args()
    rates = RATES
    if options.quick:
        rates, options.arms, options.seeds = RATES[1:2], ["uniform", "ours"], 5
    if "uniform" not in options.arms:
        parser.error("uniform must be among --arms: the others are told over it")
    for verifier in options.verifier:
        Race(verifier, options).race(rates)


if __name__ == "__main__":
    main()
