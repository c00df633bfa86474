"""`isgd runs`: the runs in a folder, a line each, the newest first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from isgd_jax.app.help import WIDTH
from isgd_jax.app.run_dir import RunDir
from isgd_jax.app.summary import key_numbers, state_of
from isgd_jax.errors import ArgumentError

_DROPPED = ("minutes", "scoring", "variance", "mode", "error", "held-out")
"""What a narrow terminal has no room for, the first first."""
_NAME, _GAP = 16, 2
"""Columns that a run's name has at least, where it is as long, and those between two cells."""

__all__ = ["Runs", "rows", "run"]

HEADS = ("run", "state", "step", "mode", "held-out", "error", "variance", "scoring", "minutes")


@dataclass(frozen=True)
class Runs:
    """List the runs in a folder: their state, and what came out, the newest first.

    Attributes:
        folder: The folder that holds the runs.
    """

    folder: Annotated[str, tyro.conf.Positional] = "runs"


def run(command: Runs) -> int:
    """Run `isgd runs`: print the table; returns the exit code.

    Raises:
        FileNotFoundError: there is no such folder, or no run in it.
    """
    from rich.table import Table

    from isgd_jax.app.terminal import Terminal

    table, found = Table(box=None, padding=(0, _GAP, 0, 0)), rows(Path(command.folder))
    console = Terminal(highlight=False)
    width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    shown, needed = _fitting([HEADS, *found], width)
    console.width = max(width, needed)
    for i in shown:
        table.add_column(HEADS[i], justify="left" if i in (0, 1, 3) else "right", overflow="fold", no_wrap=i > 0)
    for row in found:
        table.add_row(*(row[i] for i in shown))
    console.print(table)
    return 0


def _fitting(lines: Sequence[tuple[str, ...]], width: int) -> tuple[list[int], int]:
    """The columns that are shown whole in so many, and how many they need; a name may be folded, a number never."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths[0] = min(widths[0], _NAME)
    shown = list(range(len(widths)))
    for head in (*_DROPPED, ""):
        needed = sum(widths[i] + _GAP for i in shown)
        if needed <= width or not head:
            break
        shown.remove(HEADS.index(head))
    return shown, needed


def rows(folder: Path) -> list[tuple[str, ...]]:
    """The cells of each run in a folder, as `HEADS` names them, the newest first.

    Args:
        folder: of it, folders with a ``config.json`` are runs, one level down. One whose files cannot be read is a line
            too, "damaged".

    Raises:
        FileNotFoundError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: name the one that holds the runs")
    found = [path.parent for path in folder.glob("*/config.json")]
    if not found:
        raise FileNotFoundError(f"{folder} holds no runs: no folder in it has a config.json")
    return [_row(path) for path in sorted(found, key=_began, reverse=True)]


def _began(path: Path) -> float:
    try:
        return (path / "config.json").stat().st_mtime
    except OSError:  # it has just been removed
        return 0.0


def _row(path: Path) -> tuple[str, ...]:
    run = RunDir(path)
    try:
        config, records = run.read_config(), list(run.records())
    except (ArgumentError, TypeError):
        return path.name, "damaged", *["-"] * (len(HEADS) - 2)
    except OSError:
        return path.name, "unreadable", *["-"] * (len(HEADS) - 2)
    numbers = key_numbers([r for r in records if r["event"] == "progress"], batch_size=config.training.batch_size)
    return (
        path.name,
        state_of(run, records),
        f"{numbers.step:,}",
        config.sampling.mode,
        _as(numbers.test_loss, ".4g"),
        _as(numbers.test_error, ".1%"),
        _as(numbers.variance, ".2f"),
        _as(numbers.share_scoring, ".0%"),
        _as(None if numbers.seconds is None else numbers.seconds / 60, ".1f"),
    )


def _as(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
