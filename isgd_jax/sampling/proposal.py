"""From scores and their ages to the probabilities that examples are drawn with.

Guarantees:

* every probability is positive, whatever the scores: unscored, stale and zero-score examples stay drawable;
* the relative ``mixture`` bounds every weight ``1 / (N q)`` by ``1 / mixture``;
* scores that are not trusted (too old, never measured, negative, not finite) count as the mean trusted score, never as
  zero: nothing about the estimate is biased, it only gains less; how many are trusted is told;
* a table that knows nothing (all scores zero, trusted share under ``min_trusted``) gives exactly the uniform law;
* scores may be as small or as large as float32 goes;
* with costs the law is that of least variance times cost; with groups (``mix``) a table that knows nothing is uniform
  within each group.

Source: the paper, sections 4.2 (additive smoothing) and 4.3 (staleness threshold); the relative mixture and the
fallback score are ours.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from isgd_jax.errors import ArgumentError, seen
from isgd_jax.gradients.weights import first_not_finite
from isgd_jax.sampling import calibration as calibrations
from isgd_jax.sampling import score_table as tables
from isgd_jax.sampling.calibration import Calibration
from isgd_jax.sampling.double_float import in_range, tree_sum
from isgd_jax.sampling.score_table import ScoreTable

__all__ = ["Proposal", "fill_untrusted", "propose", "smooth", "trust"]


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
    costs: Float[Array, " n"] | None = None,
    mix: Callable[[Float[Array, " n"]], Float[Array, " n"]] | None = None,
) -> Proposal:
    """The probabilities of the next draws, from the table at a version and a clock.

    q = (1 - mixture) w / sum(w) + mixture / N with w = score + additive, times \\|a_n\\| for the weighted target
    sum(a_n g_n), and over √c_n where draws cost c_n.

    Args:
        table: scores [n], their versions and seconds.
        version: of the parameters, in updates.
        seconds: the clock of the table's measurements.
        mixture: share of the uniform distribution, 0 to 1.
        additive: added to each score, in the units of the scores.
        max_age: versions after which a score is not trusted; None trusts all that were measured.
        max_age_seconds: the same by the clock.
        min_trusted: share of trusted scores below which the law is uniform.
        example_weights: a_n [n] of the target; None for the mean of all gradients.
        calibration: what counts as the score is then what it has learnt of the norm from score and age.
        horizon: updates from now for which it predicts: about the life of the law, if it is to be frozen.
        costs: c_n [n] of a draw of each example, above 0.
        mix: w [n], in any unit, to probabilities [n], in place of the mixture with 1/N: how groups share out draws.

    Raises:
        ValueError: ``mixture`` and ``additive`` are both 0, or a number is out of range.
    """
    if isinstance(mixture, float | int) and mixture == 0.0 and additive == 0.0:
        raise ArgumentError("mixture=0 with additive=0 gives examples of score zero no chance: set one of them above 0")
    trusted = trust(table, version=version, seconds=seconds, max_age=max_age, max_age_seconds=max_age_seconds)
    scores = table.scores
    if calibration is not None:
        scores = calibrations.predict(calibration, scores, tables.ages(table, version) + horizon)
    trusted &= _is_score(table.scores)
    share = jnp.sum(trusted, dtype=jnp.int32).astype(jnp.float32) / trusted.shape[0]
    if mix is not None:
        wanted = _wanted(scores, trusted, mixture, additive, example_weights, costs)
        is_uniform = (jnp.max(wanted) == 0.0) | (share < min_trusted)
        alike = _wanted(jnp.ones_like(scores), jnp.ones_like(trusted), mixture, 0.0, example_weights, costs)
        return Proposal(mix(jnp.where(is_uniform, alike, wanted)), share, is_uniform)
    probs, blank = _smoothed(scores, trusted, mixture, additive, example_weights, costs)
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
    """Which scores to believe [n]: measured at all, and neither older than ``max_age`` nor ``max_age_seconds``.

    A score that a clock which was set back has in the future is as far from now as an old one: else one wrong reading
    would be believed until the clock comes there.

    Args:
        table: scores with their versions and seconds.
        version: of the parameters now, in updates.
        seconds: the clock now, as the table's measurements read it.
        max_age: in versions; a score of exactly this age is believed. None believes all that were measured.
        max_age_seconds: the same by the clock.
    """
    trusted = table.versions != tables.NEVER
    if max_age is not None:
        trusted &= tables.ages(table, version) <= max_age
    if max_age_seconds is not None:
        trusted &= jnp.abs(jnp.asarray(seconds, jnp.float32) - table.seconds) <= max_age_seconds
    return trusted


def fill_untrusted(scores: Float[Array, " n"], trusted: Bool[Array, " n"]) -> Float[Array, " n"]:
    """The scores [n], with the mean trusted score in the place of those not trusted; zeros when none is.

    >>> fill_untrusted(jnp.array([1.0, 9.0, 3.0]), jnp.array([True, False, True])).tolist()
    [1.0, 2.0, 3.0]
    """
    filled, scale = _filled(scores, trusted)
    return jnp.where(trusted, scores, filled / scale)


def smooth(
    scores: Float[Array, " n"],
    *,
    mixture: float | Float[Array, ""] = 0.1,
    additive: float = 0.0,
    example_weights: Float[Array, " n"] | None = None,
) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
    """Probabilities [n] from scores of one's own, and whether they had nothing to say (then they are uniform).

    A score that is negative or not finite is none: it counts as the mean of the others. Where values can be seen,
    outside ``jax.jit``, a warning tells how many there are.

    >>> probs, is_blank = smooth(jnp.array([1.0, 3.0]), mixture=0.5)
    >>> probs.tolist(), bool(is_blank)
    ([0.375, 0.625], False)

    Args:
        scores: one number [n] for each example, of at least 0; only their ratios count.
        mixture: share of the uniform distribution, 0 to 1; no weight 1/(N q) is larger than one over it.
        additive: added to each score, in the units of the scores.
        example_weights: a_n [n] of the target sum(a_n g_n), of any sign.

    Raises:
        ValueError: ``mixture`` is not in [0, 1], ``additive`` is negative or not finite, or, where values can be seen,
            a weight is not finite.
    """
    is_score = _is_score(scores)
    found = seen(is_score)
    if found is not None and not found.all():
        warnings.warn(
            f"{int(np.sum(~found)):,} of {found.size:,} scores are negative or not finite, the first at "
            f"{int(np.argmin(found))}: they count as the mean of the others",
            stacklevel=2,
        )
    return _smoothed(scores, is_score, mixture, additive, example_weights)


def _smoothed(
    scores: Float[Array, " n"],
    trusted: Bool[Array, " n"],
    mixture: float | Float[Array, ""],
    additive: float,
    example_weights: Float[Array, " n"] | None,
    costs: Float[Array, " n"] | None = None,
) -> tuple[Float[Array, " n"], Bool[Array, ""]]:
    """Probabilities from the scores to be trusted, and whether those had nothing to say."""
    wanted, size = _wanted(scores, trusted, mixture, additive, example_weights, costs), scores.shape[0]
    total = tree_sum(wanted)
    mixed = (1.0 - mixture) * (wanted / _positive(total)) + mixture / size
    return jnp.where(total > 0.0, mixed, 1.0 / size), total == 0.0


def _wanted(
    scores: Float[Array, " n"],
    trusted: Bool[Array, " n"],
    mixture: float | Float[Array, ""],
    additive: float,
    example_weights: Float[Array, " n"] | None,
    costs: Float[Array, " n"] | None,
) -> Float[Array, " n"]:
    """What examples are drawn in proportion to, but for the uniform part: at most 1."""
    if isinstance(mixture, float | int) and not 0.0 <= mixture <= 1.0:
        raise ArgumentError(f"mixture is a share of uniform draws, 0 to 1, got {mixture}")
    if not 0.0 <= additive < float("inf"):
        raise ArgumentError(f"additive must be finite and not negative, got {additive}")
    filled, scale = _filled(scores, trusted)
    wanted = _relative(filled + jnp.minimum(additive * scale, 2.0**100))
    if example_weights is not None:
        wrong = first_not_finite(example_weights)
        if wrong is not None:
            raise ArgumentError(f"example_weights must be finite, got {wrong.value} at {wrong.at}")
        weights = jnp.abs(example_weights.astype(jnp.float32))  # one that is not finite shows in the target
        wanted = _relative(wanted * _relative(in_range(jnp.where(jnp.isfinite(weights), weights, 0.0))[0]))
    if costs is not None:
        wanted = _relative(wanted * jnp.sqrt(jnp.min(costs) / costs))
    return wanted


def _is_score(scores: Float[Array, " n"]) -> Bool[Array, " n"]:
    return jnp.isfinite(scores) & (scores >= 0.0)


def _filled(scores: Float[Array, " n"], trusted: Bool[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """The scores times a power of two, and that power: with the mean of those trusted in the place of the others."""
    known, scale = in_range(jnp.where(trusted, scores, 0.0).astype(jnp.float32))
    largest = jnp.max(known)
    count = jnp.sum(trusted, dtype=jnp.int32).astype(jnp.float32)
    mean = largest * (tree_sum(known / _positive(largest)) / jnp.maximum(count, 1.0))
    return jnp.where(trusted, known, mean), scale


def _relative(values: Float[Array, " n"]) -> Float[Array, " n"]:
    """The values over their largest: sums of huge values would overflow."""
    return values / _positive(jnp.max(values))


def _positive(number: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(number > 0.0, number, 1.0)
