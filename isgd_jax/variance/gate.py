"""Do no harm: importance sampling while it helps, uniform draws while it hurts.

The gate watches STALE/UNIFORM, the ratio of second moments of one draw under the proposal and under uniform draws. The
proposal is judged on the batches drawn, whichever law they were drawn from, so a closed gate learns when to open.

Guarantees:

* shut as soon as the ratio is above 1 beyond its 95 % band, open again as soon as it is below ``open_below``;
* what is judged is unbiased, whether the gate is open or shut;
* what shut it is not held against it for long: to open it is judged by what was seen since, so it opens after
  ``min_steps`` looks that speak for it;
* the decision is a function of the draws alone: no clock, so a resumed run decides the same.

Source: ours. The effective sample size of the weights would be no gate: it falls while the variance falls too.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from isgd_jax.variance import rolling
from isgd_jax.variance.rolling import Band, Window

__all__ = ["Gate", "Verdict", "create", "observe", "reason"]


class Gate(NamedTuple):
    """The evidence, STALE and UNIFORM of each step, and whether the proposal is in use."""

    window: Window
    is_open: Bool[Array, ""]
    looks: Int[Array, ""]
    """Steps seen since it shut; 0 while it is open."""


class Verdict(NamedTuple):
    """The ratio STALE/UNIFORM that was judged, with its band, and whether the gate has just moved: for the log."""

    ratio: Band
    switched: Bool[Array, ""]


def create(size: int = 64) -> Gate:
    """An open gate that judges by the last ``size`` steps.

    Args:
        size: steps in the window, at least 2; a shorter one moves sooner and is wrong more often.

    Raises:
        ValueError: ``size`` is below 2.
    """
    return Gate(rolling.create(size, 2), jnp.asarray(True), jnp.int32(0))


# Inline: traced once for each set of shapes, and written out in the program of whoever calls it.
@partial(jax.jit, inline=True, static_argnames=("min_steps", "open_below"))
def observe(
    gate: Gate,
    weights: Float[Array, " m"],
    proposal_weights: Float[Array, " m"],
    norms: Float[Array, " m"],
    mask: Bool[Array, " m"] | None = None,
    *,
    min_steps: int = 8,
    open_below: float = 0.95,
) -> tuple[Gate, Verdict]:
    """Add a step, and decide.

    A step whose moments are not finite adds nothing to the evidence. The window is emptied at the first look after the
    gate has shut, so that what shut it can still be read until then.

    Args:
        gate: what was seen so far.
        weights: 1/(N probs) [m] of the draws as they were made.
        proposal_weights: 1/(N q) [m] that the proposal would have given them; the same while the gate is open. Times
            the cost of a draw over that of a uniform one, where costs differ.
        norms: fresh norms [m], times N |a_n| where the target is weighted.
        mask: false on padding [m]; None where there is none.
        min_steps: looks before it may move, either way.
        open_below: the ratio that the upper end of the band must be below to open. Below 1, so that a proposal that is
            neither good nor bad does not make it flutter.

    Returns:
        The gate after the step, and the `Verdict` with the ratio that has just been judged.
    """
    uniform = weights * jnp.square(norms)
    stale = uniform * proposal_weights
    used = jnp.ones(norms.shape, bool) if mask is None else mask
    stale_mean, uniform_mean = (jnp.mean(jnp.where(used, moment, 0.0)) for moment in (stale, uniform))
    # The evidence that shut it stays to be looked at until the first look after that.
    is_first_look = ~gate.is_open & (gate.looks == 0)
    known = gate.window._replace(seen=jnp.where(is_first_look, 0, gate.window.seen))
    window = rolling.push(known, stale_mean, uniform_mean)
    ratio = rolling.ratio(window, *window.values.T)
    enough = window.seen >= min_steps
    shut, open_ = gate.is_open & enough & (ratio.low > 1.0), ~gate.is_open & enough & (ratio.high < open_below)
    is_open = (gate.is_open & ~shut) | open_
    looks = jnp.where(is_open | shut, 0, gate.looks + 1)
    return Gate(window, is_open, looks), Verdict(ratio, shut | open_)


def reason(is_open: bool, ratio: Band) -> str:
    """In words, why the gate has moved.

    >>> from isgd_jax.variance.rolling import Band
    >>> reason(False, Band(1.3, 1.1, 1.5))
    'STALE/UNIFORM is 1.30 [1.10, 1.50]: the scores do harm, draws are uniform'

    Args:
        is_open: whether it has opened; else it has shut.
        ratio: what was judged, as the `Verdict` has it.
    """
    band = f"STALE/UNIFORM is {float(ratio.value):.2f} [{float(ratio.low):.2f}, {float(ratio.high):.2f}]"
    return f"{band}: the scores help again" if is_open else f"{band}: the scores do harm, draws are uniform"
