"""Levels: the loss or error that a run is waited for to reach."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from isgd_jax.app.records import Record
from isgd_jax.errors import ArgumentError

__all__ = ["FIELDS", "Level", "common", "first_seen", "levels"]

FIELDS = ("train_loss", "test_loss", "test_error")


class Level(NamedTuple):
    """A field of the lines of progress, and the value at or below which it counts as reached."""

    field: str
    value: float

    def reached(self, record: Record) -> bool:
        """Whether a line of progress is at or below the level."""
        seen = record.get(self.field)
        return seen is not None and seen <= self.value

    def __str__(self) -> str:
        return f"{self.field.replace('_', ' ')} {self.value:g}"


def levels(*texts: str) -> tuple[Level, ...]:
    """Levels as a person writes them, a field and its values in a text.

        >>> levels("train_loss=0.1,0.05", "test_error=0.1")[1]
        Level(field='train_loss', value=0.05)

    Raises:
        ValueError: a text is not of that form.
    """
    return tuple(level for text in texts for level in _parse(text))


def first_seen(curve: list[Record], level: Level, against: str = "step") -> float:
    """The step of the first line of progress at or below a level; infinite if there is none.

    It is that of a line, so it is late by up to ``log_every`` steps, for all arms alike.

    Args:
        curve: lines of progress, oldest first. Without any, the answer is infinite.
        level: of a loss or an error.
        against: the field that counts what was needed: "step", or "train_seconds".

    Raises:
        ArgumentError: the run has no such field, or the line that reaches the level has not.
    """
    for name in (level.field, against):
        if curve and not any(line.get(name) is not None for line in curve):
            raise ArgumentError(f"the lines of progress have no {name!r}; they have {', '.join(_fields(curve))}")
    reached = next((line for line in curve if level.reached(line)), None)
    if reached is None:
        return math.inf
    if reached.get(against) is None:
        raise ArgumentError(
            f"the line of progress of step {reached['step']}, which reaches {level}, has no {against!r}"
        )
    return float(reached[against])


def common(curves: Sequence[list[Record]], fields: Sequence[str] = FIELDS) -> tuple[Level, ...]:
    """For each field that all runs measured, the lowest level that all of them reached, rounded up to two digits.

    Args:
        curves: lines of progress of each run.
        fields: losses and errors, in the order of the answer; one that a run has not measured is left out.
    """
    seen = [[[line[field] for line in curve if line.get(field) is not None] for curve in curves] for field in fields]
    return tuple(
        Level(field, _rounded_up(max(map(min, runs))))
        for field, runs in zip(fields, seen, strict=True)
        if runs and all(runs)
    )


def _rounded_up(value: float) -> float:
    """The next number of two digits that is not below a value.

    >>> _rounded_up(0.07071), _rounded_up(0.5), _rounded_up(0.0)
    (0.071, 0.5, 0.0)
    """
    if value < 1e-300:  # below which a unit of two digits less is none
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(round(value / unit, 9)) * unit:.3g}")


def _parse(text: str) -> list[Level]:
    field, equals, values = text.partition("=")
    try:
        parsed = [Level(field.strip(), float(value)) for value in values.split(",")]
    except ValueError:
        parsed = []
    if not equals or not field.strip() or not all(math.isfinite(level.value) for level in parsed) or not parsed:
        raise ArgumentError(f"a level is a field and its values, such as test_loss=0.2,0.1; got {text!r}")
    return parsed


def _fields(curve: list[Record]) -> list[str]:
    numbers = {name for line in curve for name, value in line.items() if isinstance(value, (int, float))}
    return sorted(numbers - {"step"})
