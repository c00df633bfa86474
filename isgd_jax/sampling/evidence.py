"""What the gradients of a draw teach: fresh scores, what old ones are worth, and what proposals cost.

The draws of each step bring fresh norms, with the probabilities they were drawn with. From these alone, without another
gradient: what old scores are worth (`calibration`), which uniform fraction is best (`mixtures`), whether scores are to
be used at all (`gate`) and, with the mean gradient of the batch, what variance each proposal has (`monitor`).

Guarantees:

* each is unbiased for its mean over all examples, whichever proposal the draw was made from;
* scores are judged by what they were at the draw, before fresh ones take their place.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from isgd_jax.errors import ArgumentError, ArgumentTypeError
from isgd_jax.gradients import lazy, placement
from isgd_jax.gradients.factors import wide
from isgd_jax.gradients.meshes import replicated
from isgd_jax.gradients.weights import draw_weights
from isgd_jax.sampling import allocation, calibration, fractions, samplers, score_table
from isgd_jax.sampling import costs as cost
from isgd_jax.sampling.fractions import Mixtures
from isgd_jax.sampling.gates import is_open
from isgd_jax.sampling.state import SamplerState, begun_anew
from isgd_jax.types import Draw, Params
from isgd_jax.variance import gate, monitor
from isgd_jax.variance.monitor import Monitor

__all__ = [
    "Fresh",
    "blank",
    "check_halves",
    "gathered",
    "learnt",
    "monitored",
    "norms_of",
    "places",
    "single",
    "target_of",
]

DRAWS_IN_WINDOW, MOST_STEPS, FEWEST_STEPS = 1536, 64, 12
SQUARES_EVERY, FEWEST_SQUARES = 4, 6


class Fresh(NamedTuple):
    """What a step measured of its draws [m]: norms, and what the table gets; None where nothing did."""

    norms: Float[Array, " m"] | None
    scores: Float[Array, " m"] | None


def blank(calibrate: bool, is_gated: bool, is_monitored: bool, num_draws: int) -> dict[str, Any]:
    """Nothing learnt yet, as fields of a `SamplerState`; the gate is open.

    The monitor's window holds about 1,500 draws, in 12 to 64 steps; that of ‖mean gradient‖² a quarter as many
    measurements, at least 6, since every fourth step measures it.

    Args:
        calibrate: whether old scores are calibrated.
        is_gated: whether draws are uniform while scores do harm.
        is_monitored: whether variances are estimated.
        num_draws: m.
    """
    steps = min(max(-(-DRAWS_IN_WINDOW // num_draws), FEWEST_STEPS), MOST_STEPS)
    return {
        "calibration": calibration.create() if calibrate else None,
        "gate": gate.create() if is_gated else None,
        "monitor": monitor.create(steps, max(steps // SQUARES_EVERY, FEWEST_SQUARES)) if is_monitored else None,
    }


def norms_of(
    draw: Draw,
    grads: Params,
    norms: Float[Array, " k"] | None,
    scores: Float[Array, " k"] | None,
    *,
    axis_name: str | None,
) -> Fresh:
    """The fresh norms and scores of the whole draw, in float32, from what this device has of it.

    Args:
        draw: the whole of it.
        grads: per-example gradients, lazy or stacked; None where norms are given, or nothing is known.
        norms: [k], of this device's part of the draw, in place of those of ``grads``. One that is negative or NaN
            becomes NaN: it teaches nothing.
        scores: [k], what the table gets in place of the norms.
        axis_name: of the devices that each have a part; norms are then gathered.

    Raises:
        ValueError: they are not one a draw.
    """
    if norms is None and grads is not None:
        norms = lazy.norms(grads)
    norms = None if norms is None else gathered(jnp.asarray(norms).astype(jnp.float32), axis_name)
    if norms is not None:  # one of the caller's that is no norm teaches nothing, as one that is not finite
        norms = jnp.where(norms >= 0.0, norms, jnp.nan)
    scores = norms if scores is None else gathered(jnp.asarray(scores).astype(jnp.float32), axis_name)
    for what, values in (("norms", norms), ("scores", scores)):
        if values is not None and values.shape != draw.probs.shape:
            raise ArgumentError(
                f"expected {what} of the {draw.probs.shape[0]} draws, got shape {values.shape}: pass the draw that the "
                "gradients were made of, whole (a device that has a part of it names the axis, axis_name=)"
            )
    return Fresh(norms, scores)


def check_halves(halves: Any, grads: Params, norms: Any, axis_name: str | None) -> None:
    """Refuse halves of the mean gradient that say nothing, or not what is needed.

    Raises:
        ValueError: they came with gradients, without norms, or on one of several devices.
    """
    if halves is None:
        return
    if grads is not None or norms is None:
        raise ArgumentError("halves= stand beside norms=, in place of gradients: give observe() either")
    if axis_name is not None:
        raise ArgumentError(
            "halves= are of a whole draw, and each device has a part of it: with axis_name= give observe() gradients"
        )


def gathered(x: Array, axis_name: str | None) -> Array:
    """The parts of all devices, one after the other; on an explicit mesh, a copy on each."""
    if axis_name is not None:
        return lax.all_gather(x, axis_name, tiled=True)
    return replicated(x)


def target_of(draw: Draw) -> Float[Array, " m"]:
    """The factor of each gradient in what is estimated.

    Raises:
        TypeError: the draw is of a bare sampler, which does not know it.
    """
    if draw.target is None:
        raise ArgumentTypeError("observe needs a draw that sample() of the same sampler made; this one has no target")
    return draw.target


def places(state: SamplerState, draw: Draw) -> Int[Array, " m"]:
    """Where to write what is learnt of the drawn examples: their rows, and n for padding.

    Calibration has read these rows, and must be done before they are written over; else XLA copies the whole table at
    each step, a third of a millisecond for a million examples. So the places are made to depend on its result, by a
    comparison that is always true: weights are not negative.
    """
    used = draw.mask
    if state.calibration is not None:
        used &= jnp.all(state.calibration.weight >= 0.0)
    return jnp.where(used, draw.indices, state.table.scores.shape[0])


def learnt(
    state: SamplerState, draw: Draw, norms: Float[Array, " m"], unit: Float[Array, " m"] | None = None
) -> SamplerState:
    """The state after a step's fresh norms have been judged: all but the monitor and the table.

    Args:
        state: before the fresh scores of this step are written. The draw may be of an earlier proposal, or uniform: it
            is judged by its own ``probs``.
        draw: the whole of it.
        norms: fresh ones [m]; NaN teaches nothing.
        unit: the unit weights of the drawn examples [m], where there are groups.
    """
    size = state.table.scores.shape[0]
    proposed = samplers.probabilities_of(state.proposal.law, draw.indices)
    weights = jnp.where(draw.mask, 1.0 / (size * jnp.where(draw.mask, draw.probs, 1.0)), 0.0)
    # Of an example without a share of the target, which the proposal never draws, nothing is wanted.
    proposal_weights = jnp.where(proposed == 0.0, 0.0, 1.0 / (size * proposed))
    wanted = norms * (size * jnp.abs(target_of(draw)))
    if state.calibration is not None:
        old, versions = state.table.scores[draw.indices], state.table.versions[draw.indices]
        known = draw.mask & (versions != score_table.NEVER)
        seen = calibration.observe(state.calibration, old, state.version - versions, norms, weights, known)
        state = state._replace(calibration=seen)
    if state.fractions is not None:
        state = state._replace(fractions=_fractions_after(state, state.fractions, draw, weights, wanted, proposed))
    if state.examples.groups is not None and unit is not None:
        seen_groups = allocation.observe(state.examples.groups, draw, norms, unit, proposed)
        state = state._replace(examples=state.examples._replace(groups=seen_groups))
    if isinstance(state.gate, gate.Gate):  # with costs, of second moment times cost
        dearer = proposal_weights * cost.ratio(state.examples.costs)
        judged, verdict = gate.observe(state.gate, weights, dearer, wanted, draw.mask)
        state = begun_anew(state._replace(gate=judged), verdict.switched)
    return state


def _fractions_after(
    state: SamplerState,
    known: Mixtures,
    draw: Draw,
    weights: Float[Array, " m"],
    wanted: Float[Array, " m"],
    proposed: Float[Array, " m"],
) -> Mixtures:
    """The evidence for each uniform fraction, which lies within each group where there are groups."""
    size, mask = state.table.scores.shape[0], draw.mask
    fraction = state.proposal.uniform_fraction
    alike = jnp.full(mask.shape, 1.0 / size, jnp.float32)
    if state.examples.groups is not None:
        at = state.examples.groups.ids[draw.indices]
        share, members = state.examples.groups.allocation[at], state.examples.groups.sizes[at]
        mask = mask & (share > 0.0)
        alike = share / jnp.maximum(members, 1.0)
        wanted = wanted * jnp.sqrt(jnp.where(mask, 1.0 / (size * jnp.where(mask, alike, 1.0)), 0.0))
    relative = fractions.relative_scores(alike / proposed, fraction)
    grid = jnp.asarray(fractions.GRID, jnp.float32)
    prices = None if state.examples.costs is None else cost.of_fractions(state.examples.costs, fraction, grid)
    return fractions.observe(known, weights, wanted, relative, mask, costs=prices)


def monitored(
    watched: Monitor,
    size: int,
    draw: Draw,
    grads: Params,
    norms: Float[Array, " m"],
    *,
    halves: tuple[Params, Params] | None = None,
    proposal_weights: Float[Array, " m"] | None = None,
    axis_name: str | None = None,
) -> Monitor:
    """The monitor after a step; what needs the mean gradient is left out where there are norms alone.

    ‖mean gradient‖² is measured at steps whose draw came in two independent halves: the inner product of the two
    weighted half-means. Lazy gradients get it from their factors, without forming either mean, where no axis lies on
    several devices.

    Args:
        watched: the monitor before.
        size: N.
        draw: the whole of it; one of a single draw tells no variance, and is passed over.
        grads: per-example gradients, of this device's part; or None.
        norms: fresh ones of the whole draw [m].
        halves: two trees whose average is the weighted mean gradient of the draw, made of its first ``m // 2``
            gradients and of the others, in place of ``grads``; on a mesh, of the whole draw.
        proposal_weights: 1/(N q) [m] of one draw by the law in use, where the draw's own are not that (`single`).
        axis_name: of the devices that each have a part.

    Raises:
        TypeError: the draw has no target.
    """
    if draw.probs.shape[0] < 2:
        return watched
    draw_scale = jnp.where(draw.mask, 1.0 / (size * jnp.where(draw.mask, draw.probs, 1.0)), 0.0)
    wanted = norms * (size * jnp.abs(target_of(draw)))
    if grads is None and halves is None:
        return monitor.observe(watched, draw_scale, wanted, None, draw.mask, proposal_weights=proposal_weights)
    weights = draw_weights(draw.probs, draw.mask, target_of(draw))

    def measured() -> tuple[Array, Array]:
        if halves is not None:
            return _of_halves(*halves, weights.shape[0])
        if axis_name is None and placement.split_axis(grads) is None:
            return lazy.halves(grads, weights)
        return _halves(grads, weights, axis_name)  # an axis that lies on several devices is not to be cut

    nothing = jnp.zeros((), jnp.float32)
    square, own = lax.cond(draw.in_halves, measured, lambda: (nothing, nothing))
    return monitor.observe(
        watched,
        draw_scale,
        wanted,
        square,
        draw.mask,
        batch_grad_norm_sq=own,
        is_measured=draw.in_halves,
        proposal_weights=proposal_weights,
    )


def single(state: SamplerState, draw: Draw) -> Float[Array, " m"]:
    """1/(N q) [m] of the drawn examples, with q the probability of a single draw by the law in use.

    Of draws of random size it is not what ``probs`` say: those are over all places, of which some stay empty.
    """
    size = state.table.scores.shape[0]
    proposed = samplers.probabilities_of(state.proposal.law, draw.indices)
    by_law = jnp.where(proposed == 0.0, 0.0, 1.0 / (size * jnp.where(proposed == 0.0, 1.0, proposed)))
    return jnp.where(is_open(state), by_law, 1.0)


def _mean(grads: Params, weights: Float[Array, " m"], axis_name: str | None) -> Params:
    """The weighted mean gradient of the whole draw, of which this device may have a part."""
    if axis_name is None:
        return lazy.weighted_mean(grads, weights)
    part = weights.shape[0] // lax.axis_size(axis_name)
    mine = lax.dynamic_slice_in_dim(weights, lax.axis_index(axis_name) * part, part)
    return jax.tree.map(lambda x: lax.pmean(x, axis_name), lazy.weighted_mean(grads, mine))


def _halves(grads: Params, weights: Float[Array, " m"], axis_name: str | None) -> tuple[Array, Array]:
    """`lazy.halves` of what lies on several devices: the means are made, of the whole draw with the other half's
    weights zero.
    """
    size = weights.shape[0]
    is_first = jnp.arange(size, dtype=jnp.int32) < size // 2
    first, second = (_mean(grads, jnp.where(mine, 2.0 * weights, 0.0), axis_name) for mine in (is_first, ~is_first))
    return _of_halves(first, second, size)


def _of_halves(first: Params, second: Params, size: int) -> tuple[Array, Array]:
    """What `lazy.halves` tells, of the trees whose average is the mean of ``size`` gradients."""
    first, second = (jax.tree.map(lambda x: x.astype(wide(x.dtype)), tree) for tree in (first, second))
    mean = jax.tree.map(lambda x, y: (x + y) / 2, first, second)
    half = size // 2
    return _inner(first, second) * (size / (2 * half)) * (size / (2 * (size - half))), _inner(mean, mean)


def _inner(one: Params, other: Params) -> Float[Array, ""]:
    def product(a: Array, b: Array) -> Array:  # in float32 or wider: low precision would lose the mean, which is small
        return lazy.inner(a[None], b, precision="highest")[0].astype(jnp.float32)

    products = jax.tree.map(product, one, other)
    return sum(jax.tree.leaves(products), start=jnp.zeros((), jnp.float32))
