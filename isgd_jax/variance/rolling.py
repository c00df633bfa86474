"""A window over the last steps: means and ratios of what each step measured, with 95 % bands.

A step's measurements are one independent sample whatever the sampler inside the step, so the bands hold for dependent
draws too. Everything is a fixed-size ring, so it lives inside a jitted step and in a checkpoint.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from isgd_jax.errors import ArgumentError

__all__ = [
    "Band",
    "Window",
    "ages",
    "band",
    "band_of_series",
    "create",
    "filled",
    "latest",
    "less",
    "means",
    "push",
    "ratio",
    "ratio_of_means",
]


class Window(NamedTuple):
    """The measurements of the last w steps, k numbers a step, and the number of steps seen in all."""

    values: Float[Array, "w k"]
    seen: Int[Array, ""]


class Band(NamedTuple):
    """An estimate and its 95 % interval."""

    value: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]


def create(size: int, width: int) -> Window:
    """A window over ``size`` steps of ``width`` numbers each.

    It takes 4 size width bytes, and each step writes one row of it.

    Raises:
        ValueError: ``size`` is below 2.
    """
    if size < 2:
        raise ArgumentError(f"a window needs at least 2 steps to know its own error, got {size}")
    return Window(jnp.zeros((size, width), jnp.float32), jnp.int32(0))


def push(window: Window, *values: Float[Array, ""], when: Bool[Array, ""] | None = None) -> Window:
    """The window with one more step; the oldest drops out. A step that measured anything not finite is left out.

    >>> window = push(push(create(2, 1), jnp.float32(3.0)), jnp.float32(jnp.nan))
    >>> int(window.seen), float(means(window)[0])
    (1, 3.0)

    Args:
        window: donate it, and the row is written in place.
        values: the k numbers of the step, scalars.
        when: where false, the step has measured nothing and is left out too.
    """
    row = jnp.stack([value.astype(jnp.float32) for value in values])
    sound = jnp.all(jnp.isfinite(row))
    sound = sound if when is None else sound & when
    at = jnp.where(sound, window.seen % window.values.shape[0], window.values.shape[0])
    return Window(window.values.at[at].set(row, mode="drop"), window.seen + sound.astype(jnp.int32))


def filled(window: Window) -> Bool[Array, " w"]:
    """Which rows hold a step."""
    return jnp.arange(window.values.shape[0], dtype=jnp.int32) < window.seen


def means(window: Window, recent: Bool[Array, " w"] | None = None) -> Float[Array, " k"]:
    """The mean [k] of each measurement over the steps in the window; zero when there are none.

    Args:
        window: the measurements.
        recent: the rows to count [w] (`latest`), in place of all that hold a step.
    """
    return _mean(window.values, (filled(window) if recent is None else recent)[:, None])


def band(
    window: Window,
    value: Float[Array, ""],
    influence: Float[Array, " w"],
    noise: Float[Array, " w"] | None = None,
    recent: Bool[Array, " w"] | None = None,
    level: Float[Array, " w"] | None = None,
) -> Band:
    """The band of an estimate whose change with step t is ``influence[t] / w`` (the delta method).

    Without ``noise`` it is a band for the mean over the window. With ``noise`` it is a band for the value *now*: what
    steps differ by beyond chance is movement, and its variance is added. Half a band is Student's 97.5 % point times
    the standard error; with fewer than two steps it is infinite.

    Args:
        window: tells which rows hold a step, and how old they are; its values are not read.
        value: the estimate.
        influence: of each step on it [w], in the unit of ``value``: the measurement itself for a mean,
            (numerator - value · denominator) / mean denominator for a ratio.
        noise: the variance [w] that chance alone gives each influence; None for the band of the mean.
        recent: the rows that ``value`` was made of [w]; None for all. How much steps move is told by all rows, a
            stretch as long as the recent one at a time.
        level: the size of what is measured [w]. If given, movement in older stretches counts in proportion to it: a
            loss that has fallen tenfold also moves a tenth as much.
    """
    used = filled(window) if recent is None else recent
    steps = jnp.sum(used, dtype=jnp.int32).astype(jnp.float32)
    variance = _variance(influence, used)
    moving = jnp.float32(0.0) if noise is None else _moving(window, influence, noise, steps, level)
    half = _student_95(steps - 1.0) * jnp.sqrt(variance / jnp.maximum(steps, 1.0) + moving)
    half = jnp.where(steps > 1.0, half, jnp.inf)
    return Band(value, value - half, value + half)


def _student_95(freedom: Array) -> Array:
    """The 97.5 % point of Student's t, to 1 % from 3 degrees of freedom on (Abramowitz & Stegun 26.7.5)."""
    freedom = jnp.maximum(freedom, 1.0)
    return 1.960 + 2.372 / freedom + 2.823 / freedom**2 + 2.556 / freedom**3


def _moving(
    window: Window, influence: Float[Array, " w"], noise: Float[Array, " w"], steps: Array, level: Array | None
) -> Array:
    """The variance of the value now about its mean over a stretch of so many steps, over what chance alone gives.

    That of steps within a stretch: values come and go. (A random walk would end twice as far from its mean.)
    """
    age = ages(window)
    stretch = jnp.minimum(age // jnp.maximum(steps.astype(jnp.int32), 1), influence.shape[0] - 1)
    seen = filled(window).astype(jnp.float32)

    def of_stretches(values: Array) -> Array:
        return jax.ops.segment_sum(values * seen, stretch, influence.shape[0])

    count = of_stretches(jnp.ones_like(seen))
    mean = of_stretches(influence) / jnp.maximum(count, 1.0)
    within = of_stretches(jnp.square(influence - mean[stretch])) / jnp.maximum(count - 1.0, 1.0)
    excess = within - of_stretches(noise) / jnp.maximum(count, 1.0)
    if level is not None:
        levels = of_stretches(level) / jnp.maximum(count, 1.0)
        excess = excess * jnp.square(jnp.where(levels > 0.0, levels[0] / jnp.where(levels > 0.0, levels, 1.0), 1.0))
    known = jnp.where(count > 1.0, count, 0.0)
    return jnp.maximum(jnp.sum(known * excess) / jnp.maximum(jnp.sum(known), 1.0), 0.0)


def _variance(values: Float[Array, " w"], used: Bool[Array, " w"]) -> Array:
    steps = jnp.sum(used, dtype=jnp.int32).astype(jnp.float32)
    spread = jnp.sum(jnp.where(used, jnp.square(values - _mean(values, used)), 0.0))
    return spread / jnp.maximum(steps - 1.0, 1.0)


def ages(window: Window) -> Int[Array, " w"]:
    """How many steps ago each row was pushed, 0 for the last; meaningless for rows that hold no step."""
    size = window.values.shape[0]
    return (window.seen - 1 - jnp.arange(size, dtype=jnp.int32)) % size


def latest(window: Window, count: int) -> Bool[Array, " w"]:
    """Which rows [w] hold one of the last ``count`` steps; fewer where fewer were seen."""
    return filled(window) & (ages(window) < count)


def band_of_series(window: Window) -> Band:
    """The first measurement now: its mean over the window, with a band that widens when it moves.

    What chance alone gives a step is taken from the differences of successive steps: half their mean square (von
    Neumann 1941), which a slow drift hardly enters. The other measurements of the window are not read.
    """
    size, seen = window.values.shape[0], filled(window)
    oldest = jnp.where(window.seen > size, window.seen % size, 0)
    series = jnp.roll(window.values[:, 0], -oldest)
    pairs = seen[1:]  # rows fill from the first on, and all are seen once the ring turns
    noise = jnp.sum(jnp.where(pairs, jnp.square(jnp.diff(series)), 0.0)) / 2.0
    noise = noise / jnp.maximum(jnp.sum(pairs, dtype=jnp.int32).astype(jnp.float32), 1.0)
    return band(window, _mean(series, seen), series, jnp.full(size, noise))


def less(first: Band, second: Band) -> Band:
    """The difference of two estimates, with half-bands added in squares: right where their errors are independent.

    >>> Band(*map(float, less(Band(5.0, 2.0, 8.0), Band(1.0, -3.0, 5.0))))
    Band(value=4.0, low=-1.0, high=9.0)
    """
    half = jnp.hypot(first.high - first.value, second.high - second.value)
    value = first.value - second.value
    return Band(value, value - half, value + half)


# Inline: traced once for each set of shapes, and written out in the program of whoever calls it.
@partial(jax.jit, inline=True)
def ratio(window: Window, numerator: Float[Array, " w"], denominator: Float[Array, " w"]) -> Band:
    """The ratio of two means, with the band of the means over the window (not of the value now).

    Args:
        window: tells which rows hold a step.
        numerator: of each step [w].
        denominator: of each step [w]; where its mean is not above zero, it is taken to be 1.
    """
    value, scale = ratio_of_means(window, numerator, denominator)
    return band(window, value, (numerator - value * denominator) * scale)


def ratio_of_means(
    window: Window,
    numerator: Float[Array, " w"],
    denominator: Float[Array, " w"],
    recent: Bool[Array, " w"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The ratio of two means, and one over the mean of the denominator, which scales influences on the ratio.

    It is the ratio of sums, not the mean of ratios: unbiased but for a term in 1/w.

    Args:
        window: tells which rows hold a step.
        numerator: of each step [w].
        denominator: of each step [w]; where its mean is not above zero, it is taken to be 1.
        recent: the rows to count [w] (`latest`), in place of all that hold a step.
    """
    seen = filled(window) if recent is None else recent
    below = _mean(denominator, seen)
    scale = 1.0 / jnp.where(below > 0.0, below, 1.0)
    return _mean(numerator, seen) * scale, scale


def _mean(values: Array, seen: Bool[Array, "..."]) -> Array:
    count = jnp.maximum(jnp.sum(seen, dtype=jnp.int32).astype(jnp.float32), 1.0)
    return jnp.sum(jnp.where(seen, values, 0.0), axis=0) / count
