"""Groups of examples, such as the corpora of a mixture: shares of the target, shares of the draws, and what each costs.

    groups = isgd.Groups(corpus, shares=lambda step: jnp.where(step < 1000, easy_first, even))
    sampler = isgd.importance_sampler(num_examples, batch_size=128, groups=groups)

The shares say what is estimated: sum over groups of share times the mean gradient of the group. The allocation says how
the draws are spent on it, and changes its variance alone. Within a group examples are drawn by score; the uniform
fraction is uniform within each group.

Guarantees:

* shares change ``Draw.target``, never ``Draw.probs`` of the proposal in use nor the transform; so the estimate is
  unbiased at each step for the shares of that step, whatever they were when the proposal was made;
* every example of a group that has a share can be drawn; where shares are a function of the step, every example can;
* with ``allocation="neyman"``, no floors and no example weights, no weight ``target / probs`` of a draw by the proposal
  exceeds 2 / uniform_fraction², at the step the proposal was made;
* a fixed allocation is exact: draws have these shares while the gate is open. Give ``gate=False`` if they must always.
  (Samplers of distinct examples draw none more than once, so a small group may have less; the report tells);
* shares that are negative or not finite, or all zero, make the target NaN: a step that cannot be right shows.

Source: Neyman (1934), "On the two different aspects of the representative method", for the allocation; learning its
moments from weighted draws, per group, is ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from isgd_jax.errors import ArgumentError, ArgumentTypeError, check_unmasked
from isgd_jax.types import Draw

__all__ = [
    "GroupReport",
    "GroupState",
    "Groups",
    "allocated",
    "as_groups",
    "check",
    "check_chances",
    "create",
    "drawn_by",
    "group_sums",
    "moments",
    "num_drawable",
    "observe",
    "shares_at",
    "target_shares",
    "unit_weights",
]

Numbers: TypeAlias = Array | np.ndarray | Sequence[float | int]
"""One for each group [G]."""

Shares: TypeAlias = Numbers | Callable[[Int[Array, ""]], Array] | None
"""One for each group [G], a function of the step that returns them, or None."""

HALF_LIFE = 100.0
"""Of what is known of the groups, in steps."""

STRENGTH = 10.0
"""Draws that the scores count for, beside those that a group has had."""

LARGEST = 1e30
"""No squared norm, and no moment of a draw, counts for more: sums of them stay within float32, and come back."""

LEAST = 1e-9
"""The least share of the draws in an allocation: one that float32 rounds to nothing would be a bias."""

CHUNK = 1 << 16
"""Numbers that are added up one by one; the sums of chunks are added as a tree."""


@dataclass(frozen=True)
class Groups:
    """Which group each example is of, what share of the target each group has, and how draws are allocated.

    Args:
        ids: the group of each example [n], 0 to G-1.
        shares: of the target [G]: the estimate is that of sum_g share_g (mean gradient of group g). Only their ratios
            count. A function of the step, ``(int32 scalar) -> [G]``, is a schedule: it is traced. None leaves the
            target as it is, the mean of all examples or ``example_weights``.
        allocation: the shares of the draws. "neyman": those of least variance (times cost) on what scores and draws
            have shown so far; "target": the shares of the target; or numbers [G], of which only ratios count.
        floors: the least share of the draws of each group, a number or [G]; not beside an allocation in numbers.
        names: of the groups, for the report.
    """

    ids: Array | np.ndarray
    shares: Shares = None
    allocation: Literal["neyman", "target"] | Numbers = "neyman"
    floors: float | Numbers = 0.0
    names: Sequence[str] | None = None

    @property
    def num_groups(self) -> int:
        """G: as many as have shares or an allocation, or as the ids name."""
        told = (_shape(given) for given in (self.shares, self.allocation))
        return next((shape[0] for shape in told if shape), int(np.max(_on_host(self.ids))) + 1)


class GroupState(NamedTuple):
    """What a sampler's state holds of groups: who is in which, how draws are shared out, and what they have shown."""

    ids: Int[Array, " n"]
    sizes: Float[Array, " g"]
    """Examples in each."""
    allocation: Float[Array, " g"]
    """The share of the draws of each under the proposal in use."""
    steps: Float[Array, ""]
    """Steps seen, decayed; so are the sums below."""
    draws: Float[Array, " g"]
    moments: Float[Array, " g"]
    """Estimates of sum_n (unit weight · norm)² / (probability within the group), over its examples."""


class GroupReport(NamedTuple):
    """One number for each group [G]; printing the sampler's report makes a table of them."""

    sizes: Float[Array, " g"]
    """Examples in each."""
    target: Float[Array, " g"]
    """Shares of the target at this step; where example weights have signs, of their absolute values."""
    allocation: Float[Array, " g"]
    """Shares of the draws, by the proposal in use."""
    drawn: Float[Array, " g"]
    """Shares of the draws that were made, over the last hundred steps or so."""
    second_moment: Float[Array, " g"]
    """Of a draw by the proposal in use: what the group adds to it. The variance of the estimate is their sum less the
    square of the mean gradient."""


def as_groups(groups: Any) -> Groups | None:
    """What was given as ``groups=``, as `Groups`: an array of ids leaves the target as it is, and allocates as Neyman
    does.
    """
    return groups if groups is None or isinstance(groups, Groups) else Groups(groups)


def check(groups: Groups | None, num_examples: int, *, is_weighted: bool) -> None:
    """Refuse groups that no sampler can be made of, in the names of the arguments.

    Args:
        groups: as given; None passes.
        num_examples: N, which there must be as many ids as.
        is_weighted: whether there are example weights, which shares of groups exclude.

    Raises:
        TypeError: ids are no whole numbers.
        ValueError: a shape does not fit, a number is out of range, or a share belongs to no example.
    """
    if groups is None:
        return
    check_unmasked("groups", groups.ids)
    if not hasattr(groups.ids, "shape") or not hasattr(groups.ids, "dtype"):
        raise ArgumentTypeError(f"groups must be an array of ids [n] or isgd.Groups(ids, ...), got {groups.ids!r:.60}")
    if not np.issubdtype(groups.ids.dtype, np.integer):
        raise ArgumentTypeError(f"the ids of groups must be whole numbers, got {groups.ids.dtype}")
    if groups.ids.shape != (num_examples,):
        raise ArgumentError(f"groups need one id an example, [{num_examples}]; got shape {groups.ids.shape}")
    ids, size = _on_host(groups.ids), groups.num_groups
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise ArgumentError(f"the ids of groups must be 0 to {size - 1}, got {int(ids.min())} to {int(ids.max())}")
    if size > num_examples and not any(_shape(given) for given in (groups.shares, groups.allocation)):
        raise ArgumentError(
            f"the ids of groups are 0 to {size - 1} for {num_examples} examples: number the groups one after the "
            "other, np.unique(ids, return_inverse=True)[1]"
        )
    sizes = np.bincount(ids, minlength=size)
    if groups.shares is not None:
        _check_shares(groups, sizes, is_weighted)
    _check_allocation(groups, sizes)
    if groups.names is not None and len(groups.names) != size:
        raise ArgumentError(f"there are {size} groups, got {len(groups.names)} names")


def _check_shares(groups: Groups, sizes: np.ndarray, is_weighted: bool) -> None:
    size = len(sizes)
    if is_weighted:
        raise ArgumentError(
            "shares of groups and example_weights both say what is estimated: give one; weights within a group and "
            "shares of groups together are example_weights = share_g · weight_n / (sum of the group's weights)"
        )
    if callable(groups.shares):
        if _shape(groups.shares) != (size,):
            raise ArgumentError(
                f"shares(step) must return one number for each of the {size} groups, got shape {_shape(groups.shares)}"
            )
        if np.any(sizes == 0):
            raise ArgumentError(f"group {int(np.argmin(sizes))} has no example: a schedule may give it a share")
        return
    shares = _checked("shares", groups.shares, size)
    if np.any((shares > 0) & (sizes == 0)):
        raise ArgumentError(f"group {int(np.argmax((shares > 0) & (sizes == 0)))} has a share and no example")


def _check_allocation(groups: Groups, sizes: np.ndarray) -> None:
    size, is_rule = len(sizes), isinstance(groups.allocation, str)
    floors = np.asarray(groups.floors, np.float64)
    if floors.shape not in ((), (size,)) or not np.all(np.isfinite(floors)) or np.any(floors < 0):
        raise ArgumentError(
            f"floors are a number or one for each of the {size} groups, 0 or more; got {groups.floors!r}"
        )
    floors = np.where(sizes > 0, floors, 0.0)
    room = 1.0 if np.all(floors[sizes > 0] > 0) else 0.99  # a group without a floor must not be left without draws
    if floors.sum() > room + 1e-9:
        raise ArgumentError(f"floors are least shares of the draws and sum to at most {room}, got {floors.sum():.4g}")
    if is_rule:
        if groups.allocation not in ("neyman", "target"):
            raise ArgumentError(f'allocation must be "neyman", "target" or numbers [G], got {groups.allocation!r}')
        return
    if np.any(floors > 0):
        raise ArgumentError("floors go with a rule, and the allocation was given in numbers: raise those")
    allocation = _checked("allocation", groups.allocation, size)
    shares = None if groups.shares is None or callable(groups.shares) else np.asarray(groups.shares)
    starved = (sizes > 0 if shares is None else shares > 0) & (allocation < LEAST * allocation.sum())
    if np.any(starved):
        raise ArgumentError(
            f"group {int(np.argmax(starved))} is part of the target and has no share of the draws, or less than "
            f"{LEAST}: an example without a chance would be a bias"
        )
    if np.any((sizes == 0) & (allocation > 0)):
        raise ArgumentError(f"group {int(np.argmax((sizes == 0) & (allocation > 0)))} has draws and no example")


def _checked(name: str, given: Any, size: int) -> np.ndarray:
    try:
        values = np.asarray(_on_host(given), np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"{name} must be numbers, one for each of the {size} groups; got {given!r}") from error
    if values.shape != (size,):
        raise ArgumentError(f"{name} must have one number for each of the {size} groups, got shape {values.shape}")
    if not np.all(np.isfinite(values)) or np.any(values < 0) or not np.any(values > 0):
        raise ArgumentError(f"{name} must be finite, 0 or more, and not all 0; got {values.tolist()}")
    return values


def check_chances(groups: Groups | None, uniform_fraction: float | str) -> None:
    """Refuse a schedule under which a group without a share now could not be drawn when it has one.

    Raises:
        ValueError: the uniform fraction is 0, and nothing else gives each group draws.
    """
    if groups is None or not callable(groups.shares) or not isinstance(groups.allocation, str):
        return
    if uniform_fraction == 0.0 and np.any(np.asarray(groups.floors) == 0.0):
        raise ArgumentError(
            "uniform_fraction=0 with shares that are a function of the step leaves a group without a share now no "
            "chance until the next refresh, when it may have one: set it, or floors of the groups, above 0"
        )


def num_drawable(groups: Groups | None, num_examples: int) -> int:
    """How many examples can be drawn: those of groups that have a share, as far as it does not change."""
    given = None if groups is None else groups.shares if isinstance(groups.allocation, str) else groups.allocation
    if groups is None or given is None or callable(given):
        return num_examples
    return int(np.sum((_on_host(given) > 0)[_on_host(groups.ids)]))


def _shape(given: Any) -> tuple[int, ...] | None:
    """Of shares or of an allocation; None where there are none, or a rule has them."""
    if given is None or isinstance(given, str):
        return None
    if callable(given):
        return jax.eval_shape(lambda step: jnp.asarray(given(step)), jax.ShapeDtypeStruct((), jnp.int32)).shape
    return np.shape(given)


def _on_host(values: Any) -> np.ndarray:
    with jax.transfer_guard("allow"):
        return np.asarray(values)


def _parts(given: Numbers) -> Float[Array, " g"]:
    """Numbers of which only ratios count, over their sum: in float64, which holds sums that float32 does not."""
    values = _on_host(given).astype(np.float64)
    values = values / values.max()
    return jnp.asarray(values / values.sum(), jnp.float32)


def create(ids: Int[Array, " n"], num_groups: int) -> GroupState:
    """The state before the first draw; the allocation is that of uniform draws, the sizes of the groups over N.

    Args:
        ids: the group of each example [n], 0 to G-1.
        num_groups: G; groups that no id names have size 0.
    """
    ids = ids.astype(jnp.int32)
    sizes = group_sums(jnp.ones(ids.shape, jnp.float32), ids, num_groups)
    nothing = jnp.zeros(num_groups, jnp.float32)
    return GroupState(ids, sizes, sizes / ids.shape[0], jnp.float32(0.0), nothing, jnp.copy(nothing))


def shares_at(groups: Groups, step: Int[Array, ""]) -> Float[Array, " g"] | None:
    """The shares [G] of the target at a step, which sum to one; None where groups have none.

    >>> groups = Groups(jnp.array([0, 1, 1]), shares=lambda step: jnp.where(step < 10, 1.0, jnp.array([1.0, 3.0])))
    >>> shares_at(groups, jnp.int32(0)).tolist(), shares_at(groups, jnp.int32(10)).tolist()
    ([0.5, 0.5], [0.25, 0.75])

    Args:
        groups: what they are a part of.
        step: steps observed so far, int32; where shares are a function, it is called with it.

    Returns:
        The shares; all NaN where one is negative or not finite, or all are zero, so that the update shows it.
    """
    if groups.shares is None:
        return None
    if not callable(groups.shares):
        return _parts(groups.shares)
    shares = jnp.asarray(groups.shares(step)).astype(jnp.float32)
    total = jnp.sum(shares)
    is_right = jnp.all(jnp.isfinite(shares) & (shares >= 0.0)) & (total > 0.0)
    return jnp.where(is_right, shares / jnp.where(is_right, total, 1.0), jnp.nan)


def unit_weights(state: GroupState, groups: Groups, target: Float[Array, " n"] | None) -> Float[Array, " n"]:
    """The factor [n] of each gradient in its group's part of the target, before the group's share.

    Args:
        state: the sizes of the groups.
        groups: whether they have shares; then it is one over the size of the example's group.
        target: example weights a_n [n], which come back as they are; None for the mean of all gradients.
    """
    if target is not None:
        return target
    if groups.shares is None:
        return jnp.full(state.ids.shape, 1.0 / state.ids.shape[0], jnp.float32)
    return (1.0 / jnp.maximum(state.sizes, 1.0))[state.ids]


def target_shares(
    state: GroupState, groups: Groups, target: Float[Array, " n"] | None, step: Int[Array, ""]
) -> Float[Array, " g"]:
    """The shares [G] of the target at a step; of absolute values, where weights have signs.

    Args:
        state: the sizes of the groups, which are their shares where nothing else says so.
        groups: their shares, or a schedule of them.
        target: example weights a_n [n]: a group's share is then sum |a_n| over it, over that of all.
        step: for a schedule.
    """
    shares = shares_at(groups, step)
    if shares is not None:
        return shares
    parts = state.sizes
    if target is not None:
        parts = group_sums(jnp.abs(target), state.ids, state.sizes.shape[0])
    return parts / jnp.maximum(jnp.sum(parts), jnp.finfo(jnp.float32).tiny)


def drawn_by(
    state: GroupState,
    groups: Groups,
    wanted: Float[Array, " n"],
    *,
    target: Float[Array, " n"] | None,
    costs: Float[Array, " n"] | None,
    uniform_fraction: float | Float[Array, ""],
    step: Int[Array, ""],
) -> Float[Array, " n"]:
    """The probabilities [n] of a proposal: in each group by what is ``wanted``, the groups by the allocation.

    Args:
        state: sizes, and what draws have shown.
        groups: shares and the rule of the allocation.
        wanted: unit weight times score (over √cost) [n], in any unit.
        target: example weights, if there are any.
        costs: of the examples.
        uniform_fraction: the uniform part within each group.
        step: of the proposal, for shares that depend on it.
    """
    size, ids = state.sizes.shape[0], state.ids
    sums = group_sums(wanted, ids, size)
    per_group = jnp.stack([jnp.where(sums > 0.0, sums, 1.0), jnp.maximum(state.sizes, 1.0)], axis=1)[ids]
    inverse = 1.0 / per_group[:, 1]
    within = jnp.where((sums > 0.0)[ids], wanted / per_group[:, 0], inverse)
    within = (1.0 - uniform_fraction) * within + uniform_fraction * inverse
    cost = jnp.ones(size, jnp.float32) if costs is None else group_sums(within * costs, ids, size)
    targets = target_shares(state, groups, target, step)
    share = allocated(state, groups, sums, targets, costs=cost, uniform_fraction=uniform_fraction, step=step)
    return within * share[ids]


def allocated(
    state: GroupState,
    groups: Groups,
    sums: Float[Array, " g"],
    targets: Float[Array, " g"],
    *,
    costs: Float[Array, " g"],
    uniform_fraction: float | Float[Array, ""],
    step: Int[Array, ""],
) -> Float[Array, " g"]:
    """The shares [G] of the draws.

    Neyman's are proportional to share_g √(M_g / c_g), with M_g the second moment of unit weight times gradient within
    the group, and c_g the mean cost of a draw in it. M_g is measured on the draws; the scores say
    (sum of ``wanted``)² c_g, as far as they are right, and count for ten draws.

    Args:
        state: sizes, and what draws have shown.
        groups: the rule: numbers are taken as they are, "target" and "neyman" get the uniform part and the floors.
        sums: of what is ``wanted`` over each group [G], in any unit: what draws have shown says how large it is in
            norms.
        targets: the shares of the target [G]; NaN counts as the sizes.
        costs: c_g [G]; 1 where costs do not differ.
        uniform_fraction: the part of the allocation that follows the target instead of the rule; so no group that is
            wanted starves while little is known of it.
        step: for a schedule of shares, which also reserves a part in proportion to sizes for what it may want later.

    Returns:
        The shares; they sum to one, and where the floors allow it none is below its own.
    """
    if not isinstance(groups.allocation, str):
        return _parts(groups.allocation)
    is_told = jnp.all(jnp.isfinite(targets)) & (jnp.sum(targets) > 0.0)  # weights may all be 0
    targets = jnp.where(is_told, targets, state.sizes / jnp.sum(state.sizes))
    floor = jnp.broadcast_to(jnp.asarray(groups.floors).astype(jnp.float32), targets.shape)
    floor = jnp.where(state.sizes > 0.0, floor, 0.0)
    even = state.sizes / jnp.sum(state.sizes)
    base = 0.5 * (targets + even) if callable(groups.shares) else targets
    if groups.allocation == "target":
        # A schedule may give a share tomorrow to who has none today, before the next proposal is made.
        share = (1.0 - uniform_fraction) * targets + uniform_fraction * base
        return _above(share / jnp.sum(share), floor)
    by_scores = jnp.square(sums) * costs
    known = jnp.where(state.steps > 0.0, state.moments / jnp.maximum(state.steps, 1e-6), 0.0)
    weight = state.draws / (state.draws + STRENGTH)
    unit = _over(jnp.sum(weight * known), jnp.sum(weight * by_scores), 1.0)  # of the scores, in squares of norms
    moment = weight * known + (1.0 - weight) * unit * by_scores
    shares = shares_at(groups, step)
    factor = jnp.ones_like(targets) if shares is None else jnp.where(jnp.isfinite(shares), shares, targets)
    best = factor * jnp.sqrt(_over(moment, costs, 0.0))  # an empty group costs nothing
    best = jnp.where(jnp.sum(best) > 0.0, best / jnp.where(jnp.sum(best) > 0.0, jnp.sum(best), 1.0), targets)
    share = (1.0 - uniform_fraction) * best + uniform_fraction * base
    return _above(share / jnp.sum(share), floor)


def observe(
    state: GroupState,
    draw: Draw,
    norms: Float[Array, " m"],
    unit: Float[Array, " m"],
    proposed: Float[Array, " m"],
) -> GroupState:
    """Add the draws of a step.

    Args:
        state: what was seen so far.
        draw: the draws, with the probabilities they were made with, by whichever proposal.
        norms: fresh ones [m]; one that is not finite teaches nothing, nor does one beyond the range of moments.
        unit: unit weights [m] of the drawn examples.
        proposed: probabilities [m] that the proposal in use gives them.
    """
    size, at = state.sizes.shape[0], state.ids[draw.indices]
    within = proposed / state.allocation[at]
    sound = draw.mask & (norms >= 0.0) & (proposed > 0.0)
    chance = jnp.where(sound, within * draw.probs * norms.shape[0], 1.0)
    moment = jnp.square(jnp.where(sound, norms * unit, 0.0)) / chance
    sound &= (moment <= LARGEST) & (jnp.square(norms) <= LARGEST)
    moment = jnp.where(sound, moment, 0.0)
    keep = 2.0 ** (-1.0 / HALF_LIFE)

    def added(kept: Array, values: Array) -> Array:
        return keep * kept + jax.ops.segment_sum(values, at, size)

    return state._replace(
        steps=keep * state.steps + 1.0,
        draws=added(state.draws, sound.astype(jnp.float32)),
        moments=added(state.moments, moment),
    )


def moments(state: GroupState, groups: Groups, target: Float[Array, " n"] | None, step: Int[Array, ""]) -> GroupReport:
    """What each group got, and what it adds to the second moment of a draw.

    Args:
        state: what draws have shown, with a half-life of a hundred steps.
        groups: their shares.
        target: example weights a_n [n], or None.
        step: for a schedule of shares.

    Returns:
        The report. Second moments are in squares of the unit of the gradients; before the first draw, all 0.
    """
    shares = shares_at(groups, step)
    known = jnp.where(state.steps > 0.0, state.moments / jnp.maximum(state.steps, 1e-6), 0.0)
    factor = jnp.ones_like(known) if shares is None else shares
    return GroupReport(
        sizes=state.sizes,
        target=target_shares(state, groups, target, step),
        allocation=state.allocation,
        drawn=_over(state.draws, jnp.sum(state.draws), 0.0),
        second_moment=_over(jnp.square(factor) * known, state.allocation, 0.0),
    )


def group_sums(values: Float[Array, " n"], ids: Int[Array, " n"], num_groups: int) -> Float[Array, " g"]:
    """The sum over each group [G]. In chunks: ten million float32 numbers added one by one would lose the last ones.

    Args:
        values: one for each example [n].
        ids: the group of each [n]; one outside 0..G-1 would be added to another chunk's sum, and `check` refuses it.
        num_groups: G.
    """
    num_chunks = -(-values.shape[0] // CHUNK)
    chunk = jnp.arange(values.shape[0], dtype=jnp.int32) // CHUNK
    parts = jax.ops.segment_sum(values, chunk * num_groups + ids, num_chunks * num_groups)
    return jnp.sum(parts.reshape(num_chunks, num_groups), axis=0)


def _above(share: Float[Array, " g"], floor: Float[Array, " g"]) -> Float[Array, " g"]:
    """The shares, none below its floor and the others in proportion as they were."""

    def total(factor: Array) -> Array:
        return jnp.sum(jnp.maximum(factor * share, floor))

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = 0.5 * (low + high)
        is_low = total(middle) < 1.0
        return jnp.where(is_low, middle, low), jnp.where(is_low, high, middle)

    low, high = lax.fori_loop(0, 40, halve, (jnp.float32(0.0), jnp.float32(1.0)))
    found = jnp.where(jnp.any(floor > share), jnp.maximum(0.5 * (low + high) * share, floor), share)
    return found / jnp.sum(found)


def _over(numerator: Array, denominator: Array, otherwise: float) -> Array:
    is_known = denominator > 0.0
    return jnp.where(is_known, numerator / jnp.where(is_known, denominator, 1.0), otherwise)
