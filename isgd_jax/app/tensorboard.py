"""The numbers of every line of progress, for a tracker: TensorBoard events without TensorFlow, or any other."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isgd_jax.app.run_dir import Record
from isgd_jax.errors import CannotImportError
from isgd_jax.training.callbacks import Log

__all__ = ["Events", "log_to", "require_tensorboard", "with_events"]


def require_tensorboard() -> None:
    """Refuse early.

    Raises:
        ImportError: tensorboardX is not installed.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        raise CannotImportError("tensorboard=True needs tensorboardX: pip install 'isgd_jax[tensorboard]'")


def with_events(folder: Path, observe: Callable[[Record], None]) -> Callable[[Record], None]:
    """An observer that also writes events into ``folder``; a resumed run takes the place of what it does again."""
    events = Events(folder)

    def both(record: Record) -> None:
        events(record)
        observe(record)

    return both


def log_to(log: Log) -> Callable[[Record], None]:
    """An observer of `isgd_jax.app.run.fit` that hands the numbers of each line of progress on.

    Args:
        log: called as ``log({"loss": 0.3, ...}, step=100)``, such as ``wandb.init(...).log``.
    """

    def observe(record: Record) -> None:
        if record["event"] == "progress":
            log(_numbers(record), step=record["step"])

    return observe


def _numbers(record: Record) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "step"}


class Events:
    """An observer of `isgd_jax.app.run.fit`: scalars ``progress/<field>`` by step, warnings as text."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def __call__(self, record: Record) -> None:
        event, step = record["event"], record.get("step", 0)
        if event == "resumed":
            self._open(purge_step=step + 1)
        elif event == "progress":
            for name, value in _numbers(record).items():
                self._open().add_scalar(f"progress/{name}", value, step)
            self._open().flush()
        elif event == "warning":
            self._open().add_text("warning", record["text"], step)
        elif event in ("finished", "stopped"):
            self._open().close()

    def _open(self, purge_step: int | None = None) -> Any:
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)
        return self._writer
