"""How many rollouts each prompt gets, for policy gradients of least variance at a given number of rollouts.

    stats = isgd.rollouts.create(num_prompts)

    known = isgd.rollouts.moments(stats, version=step, max_age=500)
    counts = isgd.rollouts.expected_counts(
        known.variance, num_rollouts=64, second_moments=known.second, floors=0.3 * 64 / num_prompts
    )
    draw = isgd.rollouts.draw(key, counts, num_rollouts=64)     # before any of these rollouts
    ...                                                         # one rollout of the prompt draw.indices[j], for each j
    updates, opt_state = tx.update(grads, opt_state, params, probs=draw.probs, target=draw.target)
    products = isgd.rollouts.pair_products(isgd.gram(grads), draw.indices)
    stats = isgd.rollouts.observe(stats, draw, isgd.norms(grads), products, version=step)

The objective is sum(a_i J_i), J_i the expected reward of prompt i. One rollout of it has the policy gradient
G_i = (R - b_i) ∇log π, with mean ∇J_i and variance Tr Cov V_i. With m_i rollouts expected, at the cost c_i each, the
variance of the estimate is sum(a_i² V_i / m_i) where all m_i are whole, and it is least, times the cost, for
m_i ∝ |a_i| √(V_i / c_i). A prompt with m_i < 1 has one rollout or none: that varies too, its share is
a_i² (E‖G_i‖² / m_i - ‖∇J_i‖²), and the second moment stands in the place of V_i.

Guarantees:

* counts are whole, each m_i rounded up or down with expectation m_i, and their sum is exactly ``num_rollouts``;
* they are fixed before the rollouts, by what earlier rollouts have shown. Those teach the counts and are in no later
  estimate; so the weights ``target / probs`` = a_i / m_i make it unbiased, whatever the moments in use: wrong or old
  ones cost variance, never bias;
* every prompt with a target has a positive floor: one that is never tried would be a bias;
* what is expected of a prompt is what prompts like it have brought: E‖G‖² given the norms of its last rollouts and
  their age, learnt from all rollouts (`calibration`); beyond ``max_age`` it is the mean of all prompts;
* no rewards are divided by a group's deviation, which would change the objective. A baseline b_i must be known before
  the rollouts (the mean of earlier rewards), or leave the rollout's own reward out, which takes ``floors=2``.

Moments learnt from few rollouts are often wrong: a third of an even share, as above, is a floor that they cannot harm.

Source: Neyman (1934), and Cochran, "Sampling Techniques", section 5.5, for the allocation; Madow (1949) for the
rounding. Counts below one, floors and the moments of few rollouts are ours. Yao et al., arXiv 2505.02391, allocate
rollouts for rejection sampling by the same argument.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from isgd_jax.errors import ArgumentError, check_array, check_whole, first_wrong, seen
from isgd_jax.gradients.meshes import replicated
from isgd_jax.gradients.placement import laid_like
from isgd_jax.sampling import calibration, samplers
from isgd_jax.sampling.calibration import Calibration
from isgd_jax.types import Draw, Key

__all__ = [
    "Moments",
    "RolloutStats",
    "create",
    "draw",
    "expected_counts",
    "moments",
    "observe",
    "pair_products",
]

HALVINGS = 60


class RolloutStats(NamedTuple):
    """What rollouts have shown of each prompt [n], and what that has turned out to be worth."""

    scores: Float[Array, " n"]
    """The root mean square norm of a prompt's last rollouts."""
    products: Float[Array, " n"]
    """Sums of the inner products of two rollouts of one step, older ones counting less."""
    pairs: Float[Array, " n"]
    version: Int[Array, " n"]
    """Of the last rollout; -1 where there was none."""
    calibration: Calibration


class Moments(NamedTuple):
    """Of the policy gradient of one rollout of each prompt [n]."""

    second: Float[Array, " n"]
    """E‖G‖²."""
    variance: Float[Array, " n"]
    """Tr Cov(G) = E‖G‖² - ‖E G‖²."""


def create(num_prompts: int) -> RolloutStats:
    """Nothing is known yet.

    Raises:
        TypeError: ``num_prompts`` is no whole number.
        ValueError: it is less than 1.
    """
    num_prompts = check_whole("num_prompts", num_prompts, least=1)
    scores, products, pairs = (jnp.zeros(num_prompts, jnp.float32) for _ in range(3))
    return RolloutStats(scores, products, pairs, jnp.full(num_prompts, -1, jnp.int32), calibration.create())


def pair_products(
    gram: Float[Array, "r r"], indices: Int[Array, " r"], mask: Bool[Array, " r"] | None = None
) -> Float[Array, " r"]:
    """For each rollout, the sum of its inner products with the other rollouts of its prompt in this step.

    They tell ‖E G‖² without bias, for the price of the Gram matrix. Of rewards alone it is ``jnp.outer(r, r)``.

    Args:
        gram: inner products of the gradients of the rollouts [r, r] (`isgd_jax.gram`).
        indices: the prompt of each rollout [r].
        mask: false for padding; None where there is none.

    Raises:
        ValueError: the shapes do not fit.
    """
    if gram.shape != (indices.shape[0], indices.shape[0]):
        raise ArgumentError(f"gram must be [r, r] of the {indices.shape[0]} rollouts, got shape {gram.shape}")
    is_pair = (indices[:, None] == indices[None]) & ~jnp.eye(indices.shape[0], dtype=bool)
    is_pair = is_pair if mask is None else is_pair & mask[None]
    return jnp.sum(jnp.where(is_pair, gram, 0.0), axis=1)


def observe(
    stats: RolloutStats,
    draw: Draw,
    norms: Float[Array, " r"],
    products: Float[Array, " r"] | None = None,
    *,
    version: int | Int[Array, ""],
    memory: float = 0.5,
) -> RolloutStats:
    """Add the rollouts of a step, after its estimate was made; pilot rollouts are added in the same way.

    Args:
        stats: what was seen so far.
        draw: of `draw`; what its ``mask`` leaves out teaches nothing.
        norms: of the gradients of the rollouts [r]; or absolute values of rewards less their baselines, which tells
            rewards' moments in place of gradients'. A rollout whose norm is not finite teaches nothing.
        products: of `pair_products` [r]. Without them nothing is known of ‖E G‖², and variances are second moments.
        version: parameter updates made when these rollouts were.
        memory: the share of what is known of a prompt that stays when new rollouts of it come, 0 to 1.

    Raises:
        ValueError: a shape does not fit the draw, or ``memory`` is out of range.
    """
    if not 0.0 <= memory <= 1.0:
        raise ArgumentError(f"memory must be 0 to 1, got {memory}")
    size, shape = stats.scores.shape[0], draw.indices.shape
    for name, found in (("norms", norms), ("products", products)):
        if found is not None and found.shape != shape:
            raise ArgumentError(f"{name} must have one number a rollout, {shape}; got {found.shape}")
    version = jnp.asarray(version, jnp.int32)
    given, (stats, draw, norms, products) = stats, jax.tree.map(replicated, (stats, draw, norms, products))
    at = draw.indices
    sound = draw.mask & (norms >= 0.0) & (norms <= calibration.LARGEST)
    was_seen = stats.version[at] >= 0
    fit = calibration.observe(
        stats.calibration,
        stats.scores[at],
        version - stats.version[at],
        norms,
        1.0 / (size * draw.probs),
        sound & was_seen,
    )
    count = _sums(sound.astype(jnp.float32), at, size)
    fresh = _over(_sums(jnp.square(jnp.where(sound, norms, 0.0)), at, size), count, 0.0)
    kept = jnp.where(was_seen, memory, 0.0)
    scores = jnp.sqrt(kept * jnp.square(stats.scores[at]) + (1.0 - kept) * fresh)
    # Where a rollout of a prompt is not finite, neither are the products of the others with it.
    paired = jnp.zeros_like(sound) if products is None else sound & (jnp.abs(products) <= calibration.LARGEST**2)
    products = jnp.zeros_like(norms) if products is None else jnp.where(paired, products, 0.0)
    # Written by each of a prompt's sound rollouts alike: one a step, however many rollouts it has.
    to = jnp.where(sound, at, size)
    after = RolloutStats(
        scores=stats.scores.at[to].set(scores, mode="drop"),
        products=stats.products.at[to].set(memory * stats.products[at] + _sums(products, at, size), mode="drop"),
        pairs=stats.pairs.at[to].set(
            memory * stats.pairs[at] + _sums(jnp.where(paired, count - 1.0, 0.0), at, size), mode="drop"
        ),
        version=stats.version.at[to].max(version, mode="drop"),
        calibration=fit,
    )
    return laid_like(after, given)


def moments(
    stats: RolloutStats, *, version: int | Int[Array, ""], max_age: int | None = None, prior_pairs: float = 8.0
) -> Moments:
    """What one rollout of each prompt is expected to bring.

    The root of the second moment is ``calibration.predict`` of the prompt's score and its age. Of it the part that is
    the mean gradient, and so no variance, is the prompt's own as far as it had pairs of rollouts, and that of all
    prompts otherwise. Where nothing is known, all prompts are alike.

    Args:
        stats: what was seen.
        version: parameter updates made by now.
        max_age: versions after which what is known of a prompt is not used; None trusts it for ever.
        prior_pairs: how many pairs the share of all prompts counts for, above 0.

    Raises:
        ValueError: ``prior_pairs`` or ``max_age`` is out of range.
    """
    if not prior_pairs > 0.0:
        raise ArgumentError(f"prior_pairs must be above 0, got {prior_pairs}")
    if max_age is not None:
        max_age = check_whole("max_age", max_age, least=0)
    stats = jax.tree.map(replicated, stats)
    age = jnp.asarray(version, jnp.int32) - stats.version
    trusted = stats.version >= 0
    trusted = trusted if max_age is None else trusted & (age <= max_age)
    fit = stats.calibration
    predicted = jnp.square(calibration.predict(fit, stats.scores, jnp.maximum(age, 0)))
    count = jnp.sum(trusted.astype(jnp.float32))
    typical = _over(jnp.sum(jnp.where(trusted, predicted, 0.0)), count, 1.0)
    second = jnp.where(trusted, predicted, typical)
    products, pairs = (jnp.where(trusted, x, 0.0) for x in (stats.products, stats.pairs))
    share = jnp.clip(_over(jnp.sum(products), jnp.sum(pairs * second), 0.0), 0.0, 1.0)
    square_of_mean = (products + prior_pairs * share * second) / (pairs + prior_pairs)
    return Moments(second, second - jnp.clip(square_of_mean, 0.0, second))


def expected_counts(
    variance: Float[Array | np.ndarray, " n"],
    *,
    num_rollouts: int,
    second_moments: Float[Array | np.ndarray, " n"] | None = None,
    costs: Float[Array | np.ndarray, " n"] | None = None,
    target: Float[Array | np.ndarray, " n"] | None = None,
    floors: float | Float[Array | np.ndarray, " n"] = 1.0,
) -> Float[Array, " n"]:
    """The expected number of rollouts of each prompt [n], which sums to ``num_rollouts``: least variance times cost.

    >>> counts = expected_counts(jnp.array([1.0, 4.0, 9.0]), num_rollouts=12)
    >>> [round(float(count), 4) for count in counts]
    [2.0, 4.0, 6.0]

    Args:
        variance: V_i of the gradient of one rollout [n], in any unit.
        num_rollouts: of the step.
        second_moments: E‖G_i‖² [n] in the same unit, which count where a prompt has less than one rollout; None takes
            the variances for them.
        costs: of one rollout of each prompt [n], above 0, such as expected tokens. The cost of a step is then
            ``sum(costs * counts)`` in expectation.
        target: a_i [n], of any sign; None is 1/n for each.
        floors: the least expected count, one number or [n]; above 0, but for prompts of target 0. Below one, a
            prompt is skipped in some steps, and the weight of its rollout in the others makes up for it. 1 tries
            every prompt in every step; 2 also gives each a leave-one-out baseline.

    Raises:
        TypeError: ``num_rollouts`` is no whole number, or an array is masked or a list.
        ValueError: a shape does not fit; or, where values can be seen, a number is out of range, or the floors sum to
            more than ``num_rollouts``. Inside ``jax.jit`` all counts are then NaN.
    """
    num_rollouts = check_whole("num_rollouts", num_rollouts, least=1)
    size = variance.shape[0]
    variance, ones = _checked("variance", variance, size), jnp.ones(size, jnp.float32)
    second = variance if second_moments is None else _checked("second_moments", second_moments, size)
    cost = ones if costs is None else _checked("costs", costs, size)
    weight = ones if target is None else jnp.abs(_checked("target", target, size, is_signed=True))
    if isinstance(floors, float | int | np.number) or (isinstance(floors, Array) and floors.ndim == 0):
        floor = ones * jnp.float32(floors)
    else:
        floor = _checked("floors", floors, size)
    is_right = _check_floors(floor, weight, cost, num_rollouts)
    is_right &= jnp.all(jnp.isfinite(second) & (second >= 0.0) & jnp.isfinite(variance) & (variance >= 0.0))
    # Deviations in one unit, or sums leave float32. Where nothing varies, what the floors leave is shared out evenly.
    deviation, root = jnp.sqrt(variance), jnp.sqrt(second)
    unit = jnp.maximum(jnp.max(deviation), jnp.max(root))
    unit = jnp.where(unit > 0.0, unit, 1.0)
    deviation = jnp.maximum(deviation / unit, 1e-4)
    root = jnp.maximum(root / unit, deviation)
    by_variance, by_second = (weight * of_one / jnp.sqrt(cost) for of_one in (deviation, root))

    def counts(factor: Array) -> Float[Array, " n"]:
        return jnp.maximum(jnp.maximum(factor * by_variance, jnp.minimum(factor * by_second, 1.0)), floor)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        is_low = jnp.sum(counts(middle)) < num_rollouts
        return jnp.where(is_low, middle, low), jnp.where(is_low, high, middle)

    highest = num_rollouts / jnp.sum(by_variance)
    found = counts(lax.fori_loop(0, HALVINGS, halve, (jnp.zeros_like(highest), highest))[1])
    return jnp.where(is_right, found * (num_rollouts / jnp.sum(found)), jnp.nan)


def draw(
    key: Key,
    counts: Float[Array, " n"],
    *,
    num_rollouts: int,
    target: Float[Array | np.ndarray, " n"] | None = None,
) -> Draw:
    """The prompt of each rollout of a step, those of one prompt beside one another.

    ``jnp.bincount(draw.indices, length=n)`` are the whole counts.

    Args:
        key: this step's own.
        counts: of `expected_counts` [n]; only ratios count.
        num_rollouts: of the step.
        target: a_i [n], as they were given there.

    Returns:
        Indices [r] of prompts, ``probs`` m_i / num_rollouts, and the target, as the transform takes them.

    Raises:
        TypeError: ``num_rollouts`` is no whole number.
        ValueError: a shape does not fit; or, where values can be seen, a count is negative or not finite.
    """
    size = counts.shape[0]
    if target is not None and target.shape != (size,):
        raise ArgumentError(f"target must have one number a prompt, [{size}]; got shape {target.shape}")
    made = samplers.systematic(key, samplers.prepare(counts), num_draws=num_rollouts)
    if target is None:
        return made._replace(target=jnp.full(made.probs.shape, 1.0 / size, jnp.float32))
    return made._replace(target=jnp.asarray(target, jnp.float32)[made.indices])


def _checked(
    name: str, given: Float[Array | np.ndarray, " n"], size: int, *, is_signed: bool = False
) -> Float[Array, " n"]:
    """The numbers in float32, if they are one a prompt; those out of range show as NaN where they cannot be seen."""
    check_array(name, given)
    if given.shape != (size,):
        raise ArgumentError(f"{name} must have one number a prompt, [{size}]; got shape {given.shape}")

    def in_range(x: np.ndarray) -> np.ndarray:
        found = np.isfinite(x.astype(np.float32))
        return found if is_signed else found & ((x > 0) if name == "costs" else (x >= 0))

    wrong = first_wrong(in_range, given)
    if wrong is not None:
        least = "" if is_signed else " and above 0" if name == "costs" else " and 0 or more"
        raise ArgumentError(f"{name} must be finite as float32{least}, got {wrong.value} at {wrong.at}")
    return jnp.asarray(given).astype(jnp.float32)


def _check_floors(
    floor: Float[Array, " n"], weight: Float[Array, " n"], cost: Float[Array, " n"], num_rollouts: int
) -> Bool[Array, ""]:
    """Whether every prompt that counts can have rollouts and the floors can be met; seen, they are refused by name."""
    missing = (weight > 0.0) & ~(floor > 0.0)
    total = jnp.sum(floor)
    fits = total <= num_rollouts * (1.0 + 1e-5)
    if (gaps := seen(missing)) is not None and gaps.any():
        raise ArgumentError(
            f"floors must be above 0 for every prompt with a target, and that of prompt {int(gaps.argmax())} is not: "
            "a prompt without a chance would be a bias"
        )
    if (fit := seen(fits)) is not None and not fit:
        raise ArgumentError(
            f"floors sum to {float(total):.6g}, more than the {num_rollouts} rollouts of a step: lower them (below 1, "
            "prompts take turns), or give more rollouts"
        )
    return jnp.all(~missing) & fits & jnp.all(cost > 0.0) & jnp.any(weight > 0.0)


def _sums(values: Float[Array, " r"], at: Int[Array, " r"], size: int) -> Float[Array, " r"]:
    """For each rollout, the sum over the rollouts of its prompt."""
    return jnp.zeros(size, jnp.float32).at[at].add(values)[at]


def _over(numerator: Array, denominator: Array, otherwise: float) -> Array:
    is_known = denominator > 0.0
    return jnp.where(is_known, numerator / jnp.where(is_known, denominator, 1.0), otherwise)
