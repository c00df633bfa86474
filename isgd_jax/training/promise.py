"""What draws by score promise beside shuffled epochs: the steps that they are likely to save, from what was seen.

Source: McCandlish et al. (2018) for what less noise is worth; the noise of epochs, and what is kept of a promise, ours.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from isgd_jax.sampling.drawing import MONITOR_EVERY
from isgd_jax.variance import rolling
from isgd_jax.variance.monitor import Monitor
from isgd_jax.variance.speedup import expected_speedup

__all__ = ["MEMORY", "REALIZED", "RECENT", "Promise", "noise_left", "promise", "saves"]

REALIZED = 0.4
"""The part of what variance promises that is kept: on Fashion-MNIST variances 2.6 times smaller saved a factor 1.67 in
passes, with a rate tuned for each side (docs/results.md)."""

MEMORY = 10
"""Steps whose gradients an optimizer averages, as momentum 0.9 does: noise that cancels within them does no harm."""

RECENT = {True: 64, False: 8}
"""Steps that a decision is made of, while the gate is open and while it is shut."""


class Promise(NamedTuple):
    """Plain steps that a step with these draws replaces, as far as variance goes."""

    drawn: float
    """With draws as they are made now."""
    ideal: float
    """With ideal independent draws."""


def promise(monitor: Monitor, *, num_examples: int, batch_size: int, is_open: bool) -> Promise:
    """What draws are worth beside shuffled epochs, from what the monitor has seen last.

    Args:
        monitor: of the sampler's state.
        num_examples: N, of which a plain batch takes none twice: its variance is (N - m) / (N - 1) of independent ones.
        batch_size: draws in a step, m.
        is_open: whether steps learn; while they rest, fewer of the last ones count.

    Returns:
        The two speed-ups, 1 while nothing is measured. Draws as made count as DRAWN where its 95 % band lies below
        STALE, else as STALE, which is much surer. Of all noise that part counts which even batches leave in `MEMORY`
        steps (`noise_left`): where an epoch is a few steps there is hardly any to save.
    """
    found = jax.device_get(_moments(monitor, recent=RECENT[is_open]))
    square = max(float(found["square"]), 0.0)
    uniform, stale, ideal = (max(float(found[name]) - square, 0.0) for name in ("uniform", "stale", "ideal"))
    drawn = max(float(found["drawn"].value), 0.0) if float(found["drawn"].high) < stale else stale
    plain = uniform * (num_examples - batch_size) / max(num_examples - 1, 1)
    left = noise_left(MEMORY * batch_size / num_examples)
    speedup = partial(expected_speedup, uniform=plain * left, mean_grad_norm_sq=square, batch_size=batch_size)
    return Promise(speedup(drawn=drawn * left), speedup(drawn=ideal * left))


def noise_left(epochs: float) -> float:
    """The variance of the mean over a stretch of shuffled epochs, over that of as many independent batches.

    Whole epochs have none; of the pieces at both ends one of length r leaves r(1 - r), on the average over where the
    stretch begins.

    >>> noise_left(0.0), round(noise_left(1.0), 3), round(noise_left(10.0), 3)
    (1.0, 0.333, 0.033)

    Args:
        epochs: the length of the stretch.

    Source: ours, for epochs of many batches.
    """
    return 1.0 - epochs + epochs**2 / 3.0 if epochs < 1.0 else 1.0 / (3.0 * epochs)


def saves(speedup: float) -> float:
    """How many plain steps one step is likely to replace, of a speed-up that the variance promises.

    >>> round(saves(2.6), 2)
    1.64
    """
    return 1.0 + REALIZED * (speedup - 1.0)


def _means(monitor: Monitor, *, recent: int) -> dict[str, Any]:
    """Second moments of the last steps that learnt, ‖mean gradient‖², and DRAWN with its band."""
    rows = rolling.latest(monitor.steps, recent)
    uniform, stale, norm, *_ = rolling.means(monitor.steps, rows)
    count = jnp.maximum(jnp.sum(rows, dtype=jnp.int32).astype(jnp.float32), 2.0)
    own = jnp.sum(jnp.where(rows, jnp.square(monitor.steps.values[:, 2]), 0.0)) / count
    few = rolling.latest(monitor.squares, max(recent // MONITOR_EVERY, 8))
    return {
        "uniform": uniform,
        "stale": stale,
        "ideal": (count * jnp.square(norm) - own) / (count - 1.0),  # over pairs of steps: without bias
        "square": rolling.means(monitor.squares, few)[0],
        "drawn": rolling.band_of_series(monitor.batches),
    }


_moments = jax.jit(_means, static_argnames="recent")
