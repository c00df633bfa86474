"""From scores and their ages to the probabilities that examples are drawn with.

Guarantees:

* every probability is positive, whatever the scores: unscored, stale and zero-score examples stay drawable;
* the relative ``mixture`` bounds every weight ``1 / (N q)`` by ``1 / mixture``;
* scores that are not trusted (too old, never measured) count as the mean trusted score, never as zero: nothing about
  the estimate is biased, it only gains less;
* a table that knows nothing (all scores zero, trusted share under ``min_trusted``) gives exactly the uniform law.

Source: the paper, sections 4.2 (additive smoothing) and 4.3 (staleness threshold); the relative mixture and the
fallback score are ours.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from isgd_jax.errors import ArgumentError
from isgd_jax.sampling import calibration as calibrations
from isgd_jax.sampling import score_table as tables
from isgd_jax.sampling.calibration import Calibration
from isgd_jax.sampling.double_float import tree_sum
from isgd_jax.sampling.score_table import ScoreTable


class Proposal(NamedTuple):
    """The probabilities [n] to draw with, and two facts for the log: the trusted share, and whether it is uniform."""

    probs: Float[Array, " n"]
    trusted_share: Float[Array, ""]
    is_uniform: Bool[Array, ""]


def propose(
    table: ScoreTable,
    *,
    version: int | Int[Array, ""],
    seconds: float | Float[Array, ""] = 0.0,
    mixture: float | Float[Array, ""] = 0.1,
    additive: float = 0.0,
    max_age: int | None = None,
    max_age_seconds: float | None = None,
    min_trusted: float = 0.1,
    example_weights: Float[Array, " n"] | None = None,
    calibration: Calibration | None = None,
    horizon: int = 0,
) -> Proposal:
    """The law of the next draws, from the table at parameter ``version`` and clock ``seconds``.

    q = (1 - mixture) w / sum(w) + mixture / N with w = score + additive, times \\|a_n\\| for the weighted target
    sum(a_n g_n). Scores older than ``max_age`` versions or ``max_age_seconds`` are not trusted. With a
    ``calibration`` what counts as the score is what it has learnt of the norm from score and age, ``horizon`` updates
    from now: about the life of the law, if it is to be frozen.

    Raises:
        ValueError: ``mixture`` and ``additive`` are both 0, or one of the numbers is out of range.
    """
    if isinstance(mixture, float | int) and mixture == 0.0 and additive == 0.0:
        raise ArgumentError("mixture=0 with additive=0 gives examples of score zero no chance: set one of them above 0")
    trusted = trust(table, version=version, seconds=seconds, max_age=max_age, max_age_seconds=max_age_seconds)
    share = jnp.sum(trusted, dtype=jnp.int32).astype(jnp.float32) / trusted.shape[0]
    scores = table.scores
    if calibration is not None:
        scores = calibrations.predict(calibration, scores, tables.ages(table, version) + horizon)
    scores = fill_untrusted(scores, trusted)
    probs, blank = smooth(scores, mixture=mixture, additive=additive, example_weights=example_weights)
    is_uniform = blank | (share < min_trusted)
    return Proposal(jnp.where(is_uniform, 1.0 / probs.shape[0], probs), share, is_uniform)


def trust(
    table: ScoreTable,
    *,
    version: int | Int[Array, ""],
    seconds: float | Float[Array, ""] = 0.0,
    max_age: int | None = None,
    max_age_seconds: float | None = None,
) -> Bool[Array, " n"]:
    """Which scores to believe: measured at all, and neither older than ``max_age`` versions nor ``max_age_seconds``."""
    trusted = table.versions != tables.NEVER
    if max_age is not None:
        trusted &= tables.ages(table, version) <= max_age
    if max_age_seconds is not None:
        trusted &= jnp.asarray(seconds, jnp.float32) - table.seconds <= max_age_seconds
    return trusted


def fill_untrusted(scores: Float[Array, " n"], trusted: Bool[Array, " n"]) -> Float[Array, " n"]:
    """The scores [n], with the mean trusted score in the place of those not trusted; zeros when none is."""
    relative, unit = _relative(jnp.where(trusted, scores, 0.0))
    count = jnp.sum(trusted, dtype=jnp.int32).astype(jnp.float32)
    return jnp.where(trusted, scores, unit * (tree_sum(relative) / jnp.maximum(count, 1.0)))


def smooth(
    scores: Float[Array, " n"],
    *,
    mixture: float | Float[Array, ""] = 0.1,
    additive: float = 0.0,
    example_weights: Float[Array, " n"] | None = None,
) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
    """Probabilities [n] from scores of one's own, and whether they had nothing to say (then they are uniform).

    Raises:
        ValueError: ``mixture`` is not in [0, 1], or ``additive`` is negative.
    """
    if isinstance(mixture, float | int) and not 0.0 <= mixture <= 1.0:
        raise ArgumentError(f"mixture is a share of uniform draws, 0 to 1, got {mixture}")
    if not additive >= 0.0:
        raise ArgumentError(f"additive must not be negative, got {additive}")
    size = scores.shape[0]
    wanted = _relative(scores + additive)[0]
    if example_weights is not None:
        wanted = _relative(wanted * jnp.abs(example_weights))[0]
    total = tree_sum(wanted)
    mixed = (1.0 - mixture) * (wanted / _positive(total)) + mixture / size
    return jnp.where(total > 0.0, mixed, 1.0 / size), total == 0.0


def _relative(values: Float[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """The values over their largest, and the largest: sums of huge values would overflow.

    In two steps, because 1 / 3e38 is below the smallest normal float32 and a compiler may divide by multiplying.
    """
    largest = jnp.max(values)
    scale = jnp.where(largest > 2.0**64, 2.0**-64, 1.0)
    return (values * scale) / _positive(largest * scale), largest


def _positive(number: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(number > 0.0, number, 1.0)
