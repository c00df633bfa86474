"""From what was measured to what it means: gains by refresh period, and the verdict in words. No jax here.

The measure is variance at equal time. A larger uniform batch buys less variance for more time, in proportion; so what
counts is variance · time of a step, over that of plain SGD. Below 1 importance sampling is the better buy. It is a
bound on hope, not a promise of fewer updates: updates are won only where the noise of the gradient is what slows
training down.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["LEARNT", "AsDrawn", "Period", "is_unlearnt", "periods", "verdict"]

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


class AsDrawn(NamedTuple):
    """Training that scores nothing but what it draws, as `isgd_jax.fit` does without an engine."""

    promised: float
    """Plain steps that a step replaces as far as variance goes."""
    saves: float
    """The part of it that is likely to be kept."""
    time: float
    """Time of a step over that of plain SGD."""

    @property
    def pays(self) -> bool:
        """Whether it is likely to take fewer seconds than plain SGD."""
        return self.saves > self.time


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
    drawn: AsDrawn,
    *,
    num_updates: int,
    losses: tuple[float, float],
) -> list[str]:
    """What the numbers mean, a sentence each.

    Args:
        second_moment_ratio: 1 + CV² of the norms.
        headroom: Tr Cov of uniform draws over that of ideal ones.
        table: the periods that were judged.
        drawn: what came of scoring draws alone.
        num_updates: made when they were measured.
        losses: at the first parameters, and now.
    """
    here = min(table, key=lambda period: period.at_equal_time)
    elsewhere = min(table, key=lambda period: period.at_equal_time_elsewhere)
    early = is_unlearnt(num_updates, losses)
    return [
        _early(num_updates, losses) if early else _head(here, elsewhere, drawn),
        f"Ideal draws would cut the variance of uniform ones {headroom:.3g} times (second moments: 1 + CV² = "
        f"{second_moment_ratio:.3g}).",
        _drawn(drawn),
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


def _head(here: Period, elsewhere: Period, drawn: AsDrawn) -> str:
    if drawn.pays or here.at_equal_time < PAYS:
        return "Importance sampling can pay here, scoring included."
    if elsewhere.at_equal_time_elsewhere < PAYS:
        return "Importance sampling can pay only if other devices do the scoring."
    if min(here.at_equal_time, elsewhere.at_equal_time_elsewhere) < HARDLY:
        return "Importance sampling hardly pays: what it gains is about what it costs."
    return "Importance sampling does not pay here: plain SGD, or a larger batch, is the better use of the time."


def _drawn(found: AsDrawn) -> str:
    pays = "that should pay" if found.pays else "that does not pay, and isgd.fit would leave it"
    return (
        f"Scored only as they are drawn, without an engine: the variance promises {found.promised:.2f} times fewer "
        f"steps, of which {found.saves:.2f} are likely, at {found.time:.2f} times the time of a step: {pays}."
    )


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
