"""How draws are spent on groups: shares of the target at a step, Neyman's allocation, and what it is learnt from.

Guarantees: those of `groups`.

Source: Neyman (1934), "On the two different aspects of the representative method", for the allocation; learning its
moments from weighted draws, per group, is ours.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from isgd_jax.sampling.groups import Groups, proportions
from isgd_jax.types import Draw

__all__ = [
    "GroupReport",
    "GroupState",
    "allocated",
    "create",
    "drawn_by",
    "group_sums",
    "moments",
    "observe",
    "shares_at",
    "target_shares",
    "unit_weights",
]

HALF_LIFE = 100.0
"""Of what is known of the groups, in steps."""

STRENGTH = 10.0
"""Draws that the scores count for, beside those that a group has had."""

LARGEST = 1e30
"""No squared norm, and no moment of a draw, counts for more: sums of them stay within float32, and come back."""

CHUNK = 1 << 16
"""Numbers that are added up one by one; the sums of chunks are added as a tree."""


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
        return proportions(groups.shares)
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
        return proportions(groups.allocation)
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
