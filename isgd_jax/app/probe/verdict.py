"""From what was measured to what it means: gains by refresh period, and the verdict in words. No jax here.

The measure is variance at equal time. A larger uniform batch buys less variance for more time, in proportion; so what
counts is variance · time of a step, over that of plain SGD. Below 1 importance sampling is the better buy. It is a
bound on hope, not a promise of fewer updates: updates are won only where the noise of the gradient is what slows
training down.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Period", "periods", "verdict"]

PAYS, HARDLY = 0.9, 1.0


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


def verdict(second_moment_ratio: float, headroom: float, table: Sequence[Period], *, num_updates: int) -> list[str]:
    """What the numbers mean, a sentence each.

    Args:
        second_moment_ratio: 1 + CV² of the norms.
        headroom: Tr Cov of uniform draws over that of ideal ones.
        table: the periods that were judged.
        num_updates: made when they were measured.
    """
    here = min(table, key=lambda period: period.at_equal_time)
    elsewhere = min(table, key=lambda period: period.at_equal_time_elsewhere)
    return [
        _head(here, elsewhere),
        f"Ideal draws would cut the variance of uniform ones {headroom:.3g} times (second moments: 1 + CV² = "
        f"{second_moment_ratio:.3g}).",
        _here(here),
        _there(elsewhere),
        *_remarks(table, num_updates),
    ]


def _head(here: Period, elsewhere: Period) -> str:
    if here.at_equal_time < PAYS:
        return "Importance sampling can pay here, scoring included."
    if elsewhere.at_equal_time_elsewhere < PAYS:
        return "Importance sampling can pay only if other devices do the scoring."
    if min(here.at_equal_time, elsewhere.at_equal_time_elsewhere) < HARDLY:
        return "Importance sampling hardly pays: what it gains is about what it costs."
    return "Importance sampling does not pay here: plain SGD, or a larger batch, is the better use of the time."


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


def _remarks(table: Sequence[Period], num_updates: int) -> list[str]:
    remarks = []
    if num_updates == 0:
        remarks.append(
            "This was measured at initialization, where norms are nearly alike: the gain grows with training. "
            "Probe again after some training: --after 1000, or --run RUN for a checkpoint."
        )
    harmful = [period.every for period in table if period.variance > 1]
    if harmful:
        remarks.append(f"From {min(harmful)} updates between refreshes on, stale scores are worse than none.")
    remarks.append("Less variance is not as many fewer updates: try it on a few seeds with isgd compare.")
    return remarks
