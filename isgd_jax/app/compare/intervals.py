"""How sure a few seeds make us: 95 % intervals of medians and of paired ratios.

A run that never reached its level counts as infinite, never as missing: leaving it out would flatter its arm.

Coverage at five seeds, log-normal runs (`tests/test_compare.py` counts): the median's bootstrap interval is then the
range of the five, which holds the true median in 94 %; Student's interval of the geometric mean holds 95 %. Below five
seeds the bootstrap holds less: 75 % with three.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from isgd_jax.errors import ArgumentError

__all__ = ["CONFIDENCE", "RESAMPLES", "UNKNOWN", "Interval", "geometric_mean", "mean", "median", "paired_ratio"]

CONFIDENCE = 0.95
RESAMPLES = 10_000


class Interval(NamedTuple):
    """A value and its 95 % interval; ``inf`` where runs never got there, NaN where nothing can be said."""

    value: float
    low: float
    high: float


UNKNOWN = Interval(math.nan, math.nan, math.nan)


def median(values: Any) -> Interval:
    """The median of one number a seed, with the percentile interval of 10,000 resamples of the seeds.

    >>> median([3.0, 1.0, 2.0, math.inf, 4.0])
    Interval(value=3.0, low=1.0, high=inf)

    Args:
        values: one a seed; infinite for a run that never got there. Without any, all is NaN. The resamples have a fixed
            seed: the same values give the same interval.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        return UNKNOWN
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = np.quantile(np.median(drawn, axis=1), tails, method="inverted_cdf")  # no arithmetic with infinity
    return Interval(float(np.median(values)), float(low), float(high))


def mean(values: Any) -> Interval:
    """The mean of one number a seed, with Student's interval; boundless for a single seed or an infinite number."""
    from scipy.stats import t as student

    values = np.asarray(values, np.float64)
    if not len(values):
        return UNKNOWN
    centre = float(values.mean())
    if len(values) == 1 or not np.isfinite(values).all():
        return Interval(centre, -math.inf, math.inf)
    half = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(centre, centre - half, centre + half)


def geometric_mean(values: Any) -> Interval:
    """The geometric mean of positive numbers, one a seed, with Student's interval of their logarithms.

    Raises:
        ValueError: a number is not positive and finite.
    """
    values = np.asarray(values, np.float64)
    if not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise ArgumentError(f"a geometric mean needs positive finite numbers, got {values}: take the median")
    return Interval(*(float(x) for x in np.exp(mean(np.log(values)))))


def paired_ratio(ours: Any, base: Any) -> Interval:
    """Ours over base, seed by seed: pairs with the same first parameters differ by less than strangers do.

    The geometric mean where every run got there; else the median of the ratios, which needs only half of them. Pairs of
    which neither run got there say nothing and are left out.

    >>> round(paired_ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]).value, 6)
    0.5

    Args:
        ours: one number a seed, infinite for a run that never got there.
        base: those of the same seeds, in the same order.

    Raises:
        ValueError: they are not as many.
    """
    ours, base = np.asarray(ours, np.float64), np.asarray(base, np.float64)
    if ours.shape != base.shape:
        raise ArgumentError(f"paired ratios need the same seeds, got {ours.shape} and {base.shape} of them")
    known = np.isfinite(ours) | np.isfinite(base)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = ours[known] / base[known]
    ratios = ratios[~np.isnan(ratios)]  # 0/0: both were there before the first update
    if len(ratios) and (np.isfinite(ratios) & (ratios > 0)).all():
        return geometric_mean(ratios)
    return median(ratios)
