"""The table of a comparison: updates and seconds to each level, and their ratios to the first arm's."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from isgd_jax.app.compare.intervals import Interval, median, paired_ratio
from isgd_jax.app.compare.levels import Level, common, first_seen
from isgd_jax.app.compare.study import Study

__all__ = ["HEADS", "Row", "cells", "common_levels", "markdown", "rows", "text"]

UNITS = {"step": "updates", "train_seconds": "seconds"}


class Row(NamedTuple):
    """One arm, one level, one unit."""

    arm: str
    level: Level
    unit: str
    seeds: int
    reached: int
    """Seeds that got there."""
    median: Interval
    ratio: Interval
    """To the first arm, paired by seed."""


def rows(study: Study, levels: Sequence[Level], against: Sequence[str] = ("step", "train_seconds")) -> list[Row]:
    """What each arm needs to each level, in updates and in seconds of training.

    Args:
        study: the curves of all arms.
        levels: of losses and errors.
        against: the fields that count what was needed, ``step`` or ``train_seconds``.

    Raises:
        ValueError: a run has not measured the field of a level, or not its seconds of training.
    """
    return [_row(study, arm, level, field) for level in levels for field in against for arm in study.curves]


def common_levels(study: Study) -> tuple[Level, ...]:
    """The lowest levels of loss and error that every run of the study has reached."""
    return common([curve for by_seed in study.curves.values() for curve in by_seed.values()])


def text(rows: Sequence[Row]) -> str:
    """The rows as aligned lines."""
    lines = [HEADS, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [HEADS, ("---",) * len(HEADS), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


HEADS = ("level", "arm", "to reach it: median [95 %]", "over the first arm's [95 %]", "seeds there")


def cells(row: Row) -> tuple[str, ...]:
    """A row as a person reads it, one text for each of `HEADS`."""
    places = 0 if row.unit == "updates" else 2 if row.median.value < 10 else 1
    low, value, high = (_number(x, places) for x in (row.median.low, row.median.value, row.median.high))
    return (
        str(row.level),
        row.arm,
        f"{value} [{low}, {high}]" if value == "never" else f"{value} {row.unit} [{low}, {high}]",
        f"{_number(row.ratio.value, 2)} [{_number(row.ratio.low, 2)}, {_number(row.ratio.high, 2)}]",
        f"{row.reached}/{row.seeds}",
    )


def _row(study: Study, arm: str, level: Level, against: str) -> Row:
    ours = {seed: first_seen(curve, level, against) for seed, curve in study.curves[arm].items()}
    shared = study.seeds(arm, study.base)
    base = [first_seen(study.curves[study.base][seed], level, against) for seed in shared]
    return Row(
        arm=arm,
        level=level,
        unit=UNITS.get(against, against),
        seeds=len(ours),
        reached=sum(map(math.isfinite, ours.values())),
        median=median(list(ours.values())),
        ratio=paired_ratio([ours[seed] for seed in shared], base),
    )


def _number(value: float, places: int) -> str:
    if math.isnan(value):
        return "?"
    return "never" if math.isinf(value) else f"{value:,.{places}f}"
