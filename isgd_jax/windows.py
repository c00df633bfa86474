"""A window over the last steps: means and ratios of what each step measured, with 95 % bands.

A step's measurements are one independent sample whatever the sampler inside the step, so the bands hold for dependent
draws too. Everything is a fixed-size ring, so it lives inside a jitted step and in a checkpoint.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

Z_95 = 1.96


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
    """A window over ``size`` steps of ``width`` numbers each."""
    if size < 2:
        raise ValueError(f"a window needs at least 2 steps to know its own error, got {size}")
    return Window(jnp.zeros((size, width), jnp.float32), jnp.int32(0))


def push(window: Window, *values: Float[Array, ""]) -> Window:
    """The window with one more step; the oldest drops out. A step that measured anything not finite is left out."""
    row = jnp.stack([value.astype(jnp.float32) for value in values])
    sound = jnp.all(jnp.isfinite(row))
    at = jnp.where(sound, window.seen % window.values.shape[0], window.values.shape[0])
    return Window(window.values.at[at].set(row, mode="drop"), window.seen + sound.astype(jnp.int32))


def filled(window: Window) -> Bool[Array, " w"]:
    """Which rows hold a step."""
    return jnp.arange(window.values.shape[0], dtype=jnp.int32) < window.seen


def means(window: Window) -> Float[Array, " k"]:
    """The mean of each measurement over the steps in the window; zero when there are none."""
    return _mean(window.values, filled(window)[:, None])


def band(
    window: Window, value: Float[Array, ""], influence: Float[Array, " w"], noise: Float[Array, " w"] | None = None
) -> Band:
    """The band of an estimate whose change with step t is ``influence[t] / w`` (the delta method).

    Without ``noise`` it is a band for the mean over the window. With ``noise``, the variance that chance alone gives
    each step's influence, it is a band for the value now: steps that differ by more than chance are moving.
    """
    seen = filled(window)
    steps = jnp.sum(seen, dtype=jnp.int32).astype(jnp.float32)
    spread = jnp.sum(jnp.where(seen, jnp.square(influence - _mean(influence, seen)), 0.0))
    variance = spread / jnp.maximum(steps - 1.0, 1.0)
    moving = 0.0 if noise is None else jnp.maximum(variance - _mean(noise, seen), 0.0)
    half = jnp.where(steps > 1.0, Z_95 * jnp.sqrt(variance / jnp.maximum(steps, 1.0) + moving), jnp.inf)
    return Band(value, value - half, value + half)


def ratio(window: Window, numerator: Float[Array, " w"], denominator: Float[Array, " w"]) -> Band:
    """The ratio of two means, with the band of the means."""
    value, scale = ratio_of_means(window, numerator, denominator)
    return band(window, value, (numerator - value * denominator) * scale)


def ratio_of_means(
    window: Window, numerator: Float[Array, " w"], denominator: Float[Array, " w"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The ratio, and one over the mean of the denominator."""
    seen = filled(window)
    below = _mean(denominator, seen)
    scale = 1.0 / jnp.where(below > 0.0, below, 1.0)
    return _mean(numerator, seen) * scale, scale


def _mean(values: Array, seen: Bool[Array, "..."]) -> Array:
    count = jnp.maximum(jnp.sum(seen, dtype=jnp.int32).astype(jnp.float32), 1.0)
    return jnp.sum(jnp.where(seen, values, 0.0), axis=0) / count
