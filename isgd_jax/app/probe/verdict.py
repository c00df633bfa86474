"""From what was measured to what it means: gains by refresh period, and the verdict in words. No jax here.

The measure is variance at equal time. A larger uniform batch buys less variance for more time, in proportion; so what
counts is variance · time of a step, over that of plain SGD. Below 1 importance sampling is the better buy. It is a
bound on hope, not a promise of fewer updates: updates are won only where the noise of the gradient is what slows
training down.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from isgd_jax.app.compare.intervals import Interval, mean

__all__ = ["LEARNT", "Period", "Trial", "is_unlearnt", "periods", "verdict"]

PAYS, HARDLY = 0.9, 1.0
LEARNT = 0.9
"""The share of the first loss below which a model counts as having begun to learn."""


class Period(NamedTuple):
    """Scores of all examples refreshed every so many steps."""

    every: int
    variance: float
    """Tr Cov of a draw over that of a uniform draw, the mean over the ages that scores pass through."""
    time: float
    """Time of a step over that of plain SGD, where the training devices score too."""
    time_elsewhere: float
    """The same where other devices score."""

    @property
    def at_equal_time(self) -> float:
        """Variance · time over plain SGD's: below 1 it pays."""
        return self.variance * self.time

    @property
    def at_equal_time_elsewhere(self) -> float:
        """The same where other devices score."""
        return self.variance * self.time_elsewhere


class Trial(NamedTuple):
    """What came of training on both ways for as long."""

    steps: int
    """By importance sampling."""
    plain_steps: int
    """Of plain SGD in the same time."""
    losses: tuple[float, ...]
    """Mean losses at the end by importance sampling, one for each key; infinite where it diverged."""
    plain_losses: tuple[float, ...]
    """Those of plain SGD, with the same keys."""

    @property
    def gains(self) -> list[float]:
        """By how much the loss is lower than plain SGD's, for each key; infinite where one of them diverged."""
        both = zip(self.plain_losses, self.losses, strict=True)
        return [0.0 if plain == ours else plain - ours for plain, ours in both]

    @property
    def gain(self) -> Interval:
        """The mean of the gains, with its 95 % interval."""
        return mean(self.gains)

    @property
    def pays(self) -> bool:
        """Whether importance sampling came to the lower loss, in the mean."""
        return bool(self.gain.value > 0)

    @property
    def is_sure(self) -> bool:
        """Whether the interval of the gain leaves out 0; or one way diverged, and was behind with every key."""
        found, one_way = self.gain, len({gain > 0 for gain in self.gains}) == 1 and 0.0 not in self.gains
        return bool(found.low > 0 or found.high < 0 or (one_way and not math.isfinite(found.value)))


def is_unlearnt(num_updates: int, losses: tuple[float, float]) -> bool:
    """Whether hardly anything has been learnt: norms are then nearly alike, and tell nothing of those to come.

    >>> is_unlearnt(50, (2.3, 2.2)), is_unlearnt(50, (2.3, 1.1)), is_unlearnt(0, (2.3, 1.1))
    (True, False, True)

    Args:
        num_updates: made so far.
        losses: at the first parameters, and now.
    """
    first, now = losses
    return num_updates == 0 or not now < LEARNT * first


def periods(by_age: Mapping[int, float], *, update: float, reweighted_update: float, score_all: float) -> list[Period]:
    """Gain and cost of each refresh period that is an age of scores.

    Between ages that were measured STALE/UNIFORM is read off a straight line; the variance of a period is its mean over
    the ages that scores pass through, 0 to the period less one (ours).

    Args:
        by_age: STALE/UNIFORM by age in steps; age 0 is fresh scores.
        update: seconds of a step of plain SGD.
        reweighted_update: seconds of a step by importance sampling.
        score_all: seconds of scoring the training set once.
    """
    ages = np.array(sorted(by_age), np.float64)
    ratios = np.array([by_age[int(age)] for age in ages])
    return [
        Period(
            every=int(every),
            variance=float(np.interp(np.arange(every), ages, ratios).mean()),
            time=(reweighted_update + score_all / every) / update,
            time_elsewhere=reweighted_update / update,
        )
        for every in ages[ages > 0]
    ]


def verdict(
    second_moment_ratio: float,
    headroom: float,
    table: Sequence[Period],
    tried: Trial | None,
    *,
    num_updates: int,
    losses: tuple[float, float],
) -> list[str]:
    """What the numbers mean, a sentence each.

    Args:
        second_moment_ratio: 1 + CV² of the norms.
        headroom: Tr Cov of uniform draws over that of ideal ones.
        table: the periods that were judged.
        tried: what came of training on both ways; None where nobody tried.
        num_updates: made when they were measured.
        losses: at the first parameters, and now.
    """
    here = min(table, key=lambda period: period.at_equal_time)
    elsewhere = min(table, key=lambda period: period.at_equal_time_elsewhere)
    early = is_unlearnt(num_updates, losses)
    return [
        _early(num_updates, losses) if early else _head(here, elsewhere, tried),
        f"Ideal draws would cut the variance of uniform ones {headroom:.3g} times (second moments: 1 + CV² = "
        f"{second_moment_ratio:.3g}).",
        *_tried(tried),
        _here(here),
        _there(elsewhere),
        *_remarks(table),
    ]


def _early(num_updates: int, losses: tuple[float, float]) -> str:
    return (
        f"Ask again later: after {num_updates:,} updates the loss is {losses[1]:.3g}, of {losses[0]:.3g} at the start, "
        "and what scores are worth shows only when some examples are learnt. Probe again after some training: "
        "--after 1000, or --run RUN for a checkpoint."
    )


def _head(here: Period, elsewhere: Period, tried: Trial | None) -> str:
    if tried is not None and tried.is_sure and tried.pays:
        return "Importance sampling pays here: it came to a lower loss in the same time."
    if (tried is None or not tried.is_sure) and here.at_equal_time < PAYS:
        return "Importance sampling can pay here, scoring included."
    if elsewhere.at_equal_time_elsewhere < PAYS:
        return "Importance sampling can pay only if other devices do the scoring."
    if min(here.at_equal_time, elsewhere.at_equal_time_elsewhere) < HARDLY:
        return "Importance sampling hardly pays: what it gains is about what it costs."
    return "Importance sampling does not pay here: plain SGD, or a larger batch, is the better use of the time."


def _tried(found: Trial | None) -> list[str]:
    if found is None:
        return []
    gain = found.gain
    ahead = "importance sampling was ahead" if found.pays else "plain SGD was ahead"
    word = ahead if found.is_sure else "a tie"
    return [
        f"Tried from here, both fading out, scoring only what is drawn: {found.steps:,} steps by importance sampling "
        f"came to a loss of {_middle(found.losses)}, {found.plain_steps:,} of plain SGD, which take as long, to "
        f"{_middle(found.plain_losses)}: a gain of {gain.value:.2g} [{gain.low:.2g}, {gain.high:.2g}], {word}."
    ]


def _middle(losses: Sequence[float]) -> str:
    return f"{float(np.median(losses)):.4g}"


def _effect(ratio: float) -> str:
    """What a ratio of variances at equal time means."""
    return f"{1 - ratio:.0%} less variance" if ratio <= 1 else f"{ratio - 1:.0%} more variance"


def _here(best: Period) -> str:
    return (
        f"Scored on the training devices every {best.every} updates, the best of the periods tried: "
        f"{_effect(best.at_equal_time)} than uniform draws for the same time (variance "
        f"{best.variance:.2f} of uniform's, a step's time {best.time:.2f} of plain SGD's)."
    )


def _there(best: Period) -> str:
    return (
        f"Scored by other devices every {best.every} updates: {_effect(best.at_equal_time_elsewhere)} for the same "
        f"time (variance {best.variance:.2f} of uniform's, a step's time {best.time_elsewhere:.2f} of plain SGD's)."
    )


def _remarks(table: Sequence[Period]) -> list[str]:
    remarks = []
    harmful = [period.every for period in table if period.variance > 1]
    if harmful:
        remarks.append(f"From {min(harmful)} updates between refreshes on, stale scores are worse than none.")
    remarks.append("Less variance is not as many fewer updates: try it on a few seeds with isgd compare.")
    return remarks
