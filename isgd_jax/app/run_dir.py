"""The folder of a run: config.json, environment.json, inputs.json, metrics.jsonl, checkpoints/ and the figures."""

import json
import os
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from isgd_jax.app.config import MAY_CHANGE_ON_RESUME, Config
from isgd_jax.errors import ArgumentError

Record = dict[str, Any]
"""One line of metrics.jsonl: `event` says which kind, `step` how many updates had been made."""


class RunDir:
    """A run's folder.

    Guarantees:
        * A file other than metrics.jsonl is written whole or not at all.
        * metrics.jsonl holds one JSON object a line and is flushed at each; a line cut short by a kill is dropped when
          the run is resumed, as are the lines after the checkpoint it resumes from.
        * A new run never writes into the folder of an earlier one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"

    @classmethod
    def create(cls, config: Config) -> "RunDir":
        """Make the folder of a new run and write its configuration.

        Raises:
            FileExistsError: the folder holds something already.
            PermissionError: it cannot be written to.
        """
        path = Path(config.run_dir or _default_name(config))
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise FileExistsError(
                f"{path} is there already: resume it with --resume {path}, or name another --run-dir "
                "(in Python: fit(config, resume=True), or another run_dir)"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path)
            run.write_config(config)
        except PermissionError as error:
            raise PermissionError(f"cannot write to {path}: choose a --run-dir where you may write") from error
        return run

    def read_config(self) -> Config:
        """The configuration the run was started with, or resumed with last.

        Raises:
            FileNotFoundError: this is not the folder of a run.
        """
        file = self.path / "config.json"
        if not file.is_file():
            inside = sorted(str(found.parent) for found in self.path.glob("*/config.json"))
            meant = f"; it holds the runs {', '.join(inside)}" if inside else ""
            raise FileNotFoundError(f"{self.path} is not the folder of a run: it has no config.json{meant}")
        return Config.from_dict(_read_json(file))

    def check_resumable(self, config: Config) -> None:
        """Refuse to go on with other settings than the run was started with.

        Raises:
            ValueError: a field that decides the parameters differs, or the run is a replay.
        """
        if config.replay is not None:
            raise ArgumentError(
                f"{self.path} is a replay, which is not resumed: begin it anew, it gives the same again"
            )
        self._check_same(config, may_change=MAY_CHANGE_ON_RESUME)

    def write_config(self, config: Config) -> None:
        """The configuration that the run has from now on; of a resumed one it may differ in what decides nothing."""
        self.write("config.json", _pretty(config.as_saved().to_dict()))

    def check_replayable(self, config: Config) -> None:
        """Refuse to replay the run with other settings than it was started with.

        Raises:
            ValueError: a field that decides the parameters differs.
        """
        self._check_same(config, may_change=MAY_CHANGE_ON_RESUME | {"replay"})

    def _check_same(self, config: Config, *, may_change: frozenset[str]) -> None:
        before, now = self.read_config().to_dict(), config.to_dict()
        for name in before:
            if before[name] != now[name] and name not in may_change:
                flag = name.replace("_", "-")
                raise ArgumentError(
                    f"--{flag} is {now[name]!r} but the run was started with {before[name]!r}; drop the flag"
                )

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file whole or not at all."""
        target = self.path / name
        partial = target.with_name(f".{name}.partial")
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        return target

    def write_environment(self, devices: list[str], fingerprint: str) -> None:
        """Record what the run ran on, for whoever reads it later."""
        packages = ("isgd_jax", "jax", "flax", "optax", "tensorflow-datasets", "orbax-checkpoint")
        environment = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "devices": devices,
            "fingerprint": fingerprint,
            "packages": {name: metadata.version(name) for name in packages},
        }
        self.write("environment.json", _pretty(environment))

    def fingerprint(self) -> str | None:
        """Of the training set the run was made on; None if it has not begun."""
        file = self.path / "environment.json"
        return _read_json(file).get("fingerprint") if file.is_file() else None

    def append(self, record: Record) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def records(self, event: str | None = None) -> Iterator[Record]:
        """The lines of metrics.jsonl, those of one kind if ``event`` is given; a last line cut short is left out."""
        if not self.metrics.is_file():
            return
        with self.metrics.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    return
                record = _parsed(line, f"{self.metrics}, line {number}")
                if not {"event", "step"} <= set(record):
                    raise ArgumentError(f"{self.metrics}, line {number}: expected an event and its step, got {record}")
                if event is None or record["event"] == event:
                    yield record

    def forget_after(self, step: int) -> None:
        """Drop the lines written after ``step``: the resumed run will write them again.

        A refresh comes before the step it is numbered with, so that of ``step`` itself will be made again too.
        """
        last = {"refresh": step - 1}
        records = (record for record in self.records() if record["step"] <= last.get(record["event"], step))
        kept = [json.dumps(record) + "\n" for record in records]
        self.write("metrics.jsonl", "".join(kept))


class Unwritten(RunDir):
    """The folder of a run as the other processes of a distributed run see it: process 0 alone writes there."""

    def write(self, name: str, content: str | bytes) -> Path:
        return self.path / name

    def append(self, record: Record) -> None:
        pass

    def records(self, event: str | None = None) -> Iterator[Record]:
        return iter(())


def _read_json(file: Path) -> dict[str, Any]:
    return _parsed(file.read_bytes(), str(file))


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ArgumentError: it is damaged, or something else; ``where`` names the file.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(
            f"{where} is damaged, no JSON can be read from it ({error}): restore it, or start anew"
        ) from error
    if not isinstance(found, dict):
        raise ArgumentError(f"{where} is damaged: expected a JSON object, got a {type(found).__name__}")
    return found


def _default_name(config: Config) -> str:
    return f"runs/{config.dataset}-{config.mode}-{time.strftime('%Y%m%d-%H%M%S')}"


def _pretty(values: Record) -> str:
    return json.dumps(values, indent=2) + "\n"
