"""The numbers of every line of progress, for a tracker: TensorBoard events without TensorFlow, or any other."""

import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isgd_jax.app.files import make_folder, writing
from isgd_jax.app.records import Record
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
    """An observer that also writes events into ``folder``; a resumed run takes the place of what it does again.

    Args:
        folder: of the run; TensorBoard finds the file by its name, ``events.out.tfevents...``.
        observe: is called after the event is on disk.
    """
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
    """An observer of `isgd_jax.app.run.fit`: scalars ``progress/<field>`` by step, warnings as text.

    Each line of progress is on disk when the call returns: no thread and no queue stand between, as in tensorboardX's
    own `SummaryWriter`, where a full disk ends the thread and the next call waits for ever.

    Args:
        folder: where the file of events goes.

    Raises:
        OSError: at a call, the file cannot be written; it is named.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def __call__(self, record: Record) -> None:
        event, step = record["event"], record.get("step", 0)
        if event not in ("resumed", "progress", "warning", "finished", "stopped"):
            return
        with writing(self._folder / "events.out.tfevents"):
            self._write(event, step, record)

    def _write(self, event: str, step: int, record: Record) -> None:
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import SessionLog

        if event == "resumed":  # TensorBoard forgets what came from this step on
            self._add(step + 1, file_version="brain.Event:2")
            self._add(step + 1, session_log=SessionLog(status=SessionLog.START))
        elif event == "progress":
            for name, value in _numbers(record).items():
                self._add(step, summary=summary.scalar(f"progress/{name}", value))
        elif event == "warning":
            self._add(step, summary=summary.text("warning", record["text"]))
        if self._writer is not None:
            self._writer.flush()
        if self._writer is not None and event in ("finished", "stopped"):
            self._writer.close()
            self._writer = None

    def _add(self, step: int, **what: Any) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event

        if self._writer is None:
            make_folder(self._folder)
            self._writer = EventsWriter(str(self._folder / "events"), f".{os.getpid()}")
        self._writer.write_event(Event(wall_time=time.time(), step=step, **what))
