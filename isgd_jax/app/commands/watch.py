"""`isgd watch`: a run as it goes on, in the terminal, from its metrics.jsonl alone; no port is opened."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from isgd_jax.app.help import WIDTH
from isgd_jax.app.records import Record, is_number
from isgd_jax.app.run_dir import RunDir
from isgd_jax.app.summary import ENDS, has_ended, key_numbers, shut_stretches, state_of, unusual
from isgd_jax.errors import ArgumentError

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Watch", "run", "sparkline", "view"]

_BARS = "▁▂▃▄▅▆▇█"
_POINTS = 48


@dataclass(frozen=True)
class Watch:
    """Watch a run in the terminal while it goes on: key numbers, small curves, warnings.

    Ctrl-C leaves; the run goes on. No port is opened.

    Attributes:
        folder: Folder of the run.
        every: Seconds between two looks.
    """

    folder: Annotated[str, tyro.conf.Positional]
    every: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.every < math.inf:
            raise ArgumentError(f"every must be above 0; got {self.every}")


def run(command: Watch) -> int:
    """Run `isgd watch` until the run has ended or nobody writes to it any more; returns the exit code.

    Raises:
        FileNotFoundError: this is not the folder of a run.
        ValueError: a file of it cannot be read.
    """
    from rich.live import Live

    from isgd_jax.app.terminal import Terminal

    folder = RunDir(Path(command.folder))
    batch_size = folder.read_config().training.batch_size
    console = Terminal(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    with Live(console=console, auto_refresh=False) as live:
        while True:
            records = list(folder.records())
            state = state_of(folder, records)
            live.update(view(folder.path.resolve().name, state, records, batch_size=batch_size), refresh=True)
            if state in (*ENDS, "killed"):
                break
            time.sleep(command.every)
    if not console.is_terminal:
        print()  # what is shown last has no end of line of its own
    return 0


def view(name: str, state: str, records: Sequence[Record], *, batch_size: int) -> "Group":
    """What is shown at one look.

    Args:
        name: of the run.
        state: in a word.
        records: of its metrics.jsonl, oldest first.
        batch_size: draws in a step.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines = [record for record in records if record["event"] == "progress"]
    numbers = key_numbers(lines, batch_size=batch_size)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column(no_wrap=True)
    for label, field, value in (
        ("training loss", "loss", _as(numbers.loss, ".4g")),
        ("held-out loss", "test_loss", _as(numbers.test_loss, ".4g")),
        ("held-out error", "test_error", _as(numbers.test_error, ".2%")),
        ("variance over uniform's", "variance_ratio", _as(numbers.variance, ".2f")),
        ("equivalent plain batch", "", _as(numbers.equivalent_batch, ".0f")),
        ("time spent on scoring", "share_scoring", _as(numbers.share_scoring, ".1%")),
        ("scores trusted", "trusted_share", _as(numbers.trusted_share, ".1%")),
        ("updates a second", "steps_per_second", _as(lines[-1].get("steps_per_second") if lines else None, ".4g")),
    ):
        table.add_row(label, value, sparkline([line.get(field) for line in lines]))
    minutes = "-" if numbers.seconds is None else f"{numbers.seconds / 60:.1f}"
    title = Text(f"{name}: {state}, update {numbers.step:,}, {minutes} minutes", style="bold")
    shut = shut_stretches(records)
    notes = [Text(f"! {text}", style="yellow") for text in unusual(records, batch_size=batch_size)[-6:]]
    if shut and shut[-1][1] == records[-1]["step"] and not has_ended(records):
        notes.append(Text(f"! the gate is shut since update {shut[-1][0]:,}: draws are uniform", style="yellow"))
    return Group(title, table, *notes)


def sparkline(values: Sequence[object]) -> str:
    """The last 48 numbers as bars, by their logarithms where they span more than a decade.

    What is no number is left out.

    >>> sparkline([1, 2, 3, None, 8])
    '▁▂▃█'
    >>> sparkline([0.001, 0.01, 0.1, 1.0])
    '▁▃▆█'
    """
    numbers = [float(value) for value in values if is_number(value) and math.isfinite(value)][-_POINTS:]
    if not numbers:
        return ""
    if min(numbers) > 0 and max(numbers) > 10 * min(numbers):
        numbers = [math.log(number) for number in numbers]
    low, width = min(numbers), (max(numbers) - min(numbers)) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int(len(_BARS) * (number - low) / width))] for number in numbers)


def _as(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
