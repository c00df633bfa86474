"""The table of a comparison: updates and seconds to each level, and their ratios to the first arm's."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from isgd_jax.app.compare.intervals import Interval, median, paired_ratio
from isgd_jax.app.compare.levels import Level, common, first_seen
from isgd_jax.app.compare.study import Study

__all__ = ["HEADS", "Row", "aligned", "cells", "common_levels", "left_out", "markdown", "rows", "text"]

UNITS = {"step": "updates", "train_seconds": "seconds"}


class Row(NamedTuple):
    """One arm, one level, one unit."""

    arm: str
    level: Level
    unit: str
    seeds: int
    """Of runs that have ended, or got there before they ended at other levels."""
    reached: int
    """Seeds that got there."""
    median: Interval
    ratio: Interval
    """To the first arm, paired by seed."""
    unfinished: int = 0
    """Seeds that are left out of all these: of runs that have not ended, so that nobody knows."""


def rows(study: Study, levels: Sequence[Level], against: Sequence[str] = ("step", "train_seconds")) -> list[Row]:
    """What each arm needs to each level, in updates and in seconds of training; unfinished runs are left out.

    Args:
        study: the curves of all arms.
        levels: of losses and errors.
        against: the fields that count what was needed, ``step`` or ``train_seconds``.

    Raises:
        ValueError: a run has not measured the field of a level, or not its seconds of training.
    """
    return [_row(study, arm, level, field) for level in levels for field in against for arm in study.curves]


def common_levels(study: Study) -> tuple[Level, ...]:
    """The lowest levels of loss and error that every run of the study has reached, but for unfinished ones."""
    runs = [(arm, seed, curve) for arm, by_seed in study.curves.items() for seed, curve in by_seed.items()]
    return common([curve for arm, seed, curve in runs if (arm, seed) not in study.unfinished])


def left_out(study: Study) -> list[str]:
    """A sentence where runs are unfinished: which, by arm, and what becomes of them."""
    runs = [f"{arm} with seed {seed}" for arm, seed in sorted(study.unfinished)]
    if not runs:
        return []
    return [f"Left out of the table, for they have not ended: {', '.join(runs)}. Finish them, then compare again."]


def text(rows: Sequence[Row]) -> str:
    """The rows as aligned lines."""
    return aligned([HEADS, *map(cells, rows)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns two blanks apart.

    Args:
        lines: of as many texts each.
    """
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
        _reached_at(row, value, low, high),
        f"{_number(row.ratio.value, 2)} [{_number(row.ratio.low, 2)}, {_number(row.ratio.high, 2)}]",
        f"{row.reached}/{row.seeds}" + (f", {row.unfinished} unfinished" if row.unfinished else ""),
    )


def _reached_at(row: Row, value: str, low: str, high: str) -> str:
    if not row.seeds:
        return "unfinished"
    return f"{value} [{low}, {high}]" if value == "never" else f"{value} {row.unit} [{low}, {high}]"


def _row(study: Study, arm: str, level: Level, against: str) -> Row:
    ours = _needed(study, arm, level, against)
    base = _needed(study, study.base, level, against)
    shared = sorted(ours.keys() & base.keys())
    return Row(
        arm=arm,
        level=level,
        unit=UNITS.get(against, against),
        seeds=len(ours),
        reached=sum(map(math.isfinite, ours.values())),
        median=median(list(ours.values())),
        ratio=paired_ratio([ours[seed] for seed in shared], [base[seed] for seed in shared]),
        unfinished=len(study.curves[arm]) - len(ours),
    )


def _needed(study: Study, arm: str, level: Level, against: str) -> dict[int, float]:
    """What the runs of an arm needed by seed; infinite for one that never got there, without those nobody knows of."""
    runs = {seed: curve for seed, curve in study.curves[arm].items() if (arm, seed) not in study.unfinished}
    found = {seed: first_seen(curve, level, against) for seed, curve in runs.items()}
    return {seed: x for seed, x in found.items() if math.isfinite(x) or (arm, seed) not in study.ended_early}


def _number(value: float, places: int) -> str:
    if math.isnan(value):
        return "?"
    return "never" if math.isinf(value) else f"{value:,.{places}f}"
