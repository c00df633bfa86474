"""The folder of a run: config.json, environment.json, inputs.json, metrics.jsonl, checkpoints/ and the figures."""

import contextlib
import itertools
import json
import os
import platform
import socket
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import isgd_jax
from isgd_jax.app.config import MAY_CHANGE_ON_RESUME, Config, TrainingConfig
from isgd_jax.app.files import make_folder, parsed, read_json, write_whole, writing
from isgd_jax.app.locks import is_alive, locked, start_of
from isgd_jax.app.records import Record, check_record
from isgd_jax.errors import ArgumentError, DamagedFileError, IsgdError, RunInUseError

__all__ = ["Holder", "RunDir", "Unwritten"]

_LOCK, _HOLDER = ".lock", ".holder.json"


class Holder(NamedTuple):
    """Who says that it writes to a run's folder: a process that was killed says so for ever."""

    host: str
    is_alive: bool | None
    """Whether it still runs; None if it is on another host, where we cannot look."""


class RunDir:
    """A run's folder.

    Guarantees:
        * A file other than metrics.jsonl is written whole or not at all.
        * metrics.jsonl holds one JSON object a line and is flushed at each; a line cut short by a kill is dropped when
          the run is resumed, as are the lines after the checkpoint it resumes from.
        * A new run never writes into the folder of an earlier one; of two that begin at once in one folder one does,
          and the other is refused.
        * Of several processes one at a time writes to the folder, within `alone`, where files can be locked; one whose
          folder is removed or replaced meanwhile writes no more.
        * The folder may be a stranger's: reading it follows no link that leads out of it, and a file that is written
          takes the place of a link.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self._held: bytes | None = None  # what .holder.json says of us, within `alone`

    @classmethod
    def create(cls, config: Config) -> "RunDir":
        """Make the folder of a new run and write its configuration, ``config.json``.

        Args:
            config: its ``run_dir`` names the folder; without, it is ``runs/<dataset>-<mode>-<time>``, with a number
                where that is taken.

        Raises:
            FileExistsError: the folder holds something already, or another process is making it; what to do is said.
            OSError: it cannot be made, or not be written to.
        """
        named = config.recording.run_dir
        if named is not None:
            return cls._create(Path(named), config)
        name = _default_name(config)
        for count in itertools.count(1):  # another run may have begun in the same second
            path = Path(name if count == 1 else f"{name}-{count}")
            try:
                return cls._create(path, config)
            except FileExistsError:
                if not os.path.lexists(path):  # what stands in the way is above it
                    raise
        raise AssertionError("names do not end")

    @classmethod
    def _create(cls, path: Path, config: Config) -> "RunDir":
        run = cls(path)
        run._check_new()
        try:
            make_folder(path)
            with run.alone():
                run._check_new()  # once more, alone
                run.write_config(config)
        except RunInUseError:
            run._refuse_new()
        return run

    def _check_new(self) -> None:
        """Nothing is here but what a kill may have left of a run that had not begun."""
        if self.path.is_file() or (
            self.path.is_dir() and any(not _is_ours_aside(found) for found in self.path.iterdir())
        ):
            self._refuse_new()

    def _refuse_new(self) -> NoReturn:
        raise FileExistsError(
            f"{self.path} is there already: go on with it by resume={self.path}, or name another run_dir"
        )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Within this no other process writes to the folder; however this one ends, the folder is free again.

        Raises:
            RunInUseError: another process is within it; the message has its host, its number, and since when.
            OSError: the folder cannot be written to.
        """
        with contextlib.ExitStack() as stack:
            with writing(self.path / _LOCK):
                stack.enter_context(locked(self.path / _LOCK, when_busy=self._refuse_second))
            since, pid = time.strftime("%Y-%m-%d %H:%M:%S %Z"), os.getpid()
            holder = {"host": socket.gethostname(), "pid": pid, "started": start_of(pid), "since": since}
            self.write(_HOLDER, _pretty(holder))
            self._held = _pretty(holder).encode()
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # one that stays tells of a process that is dead
                    self.check_held()
                    (self.path / _HOLDER).unlink()
                self._held = None

    def check_held(self) -> None:
        """Within `alone`, see that the folder is still the one that it was.

        Raises:
            FileNotFoundError: somebody has removed it, and may have begun another run in its place.
        """
        if self._held is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if (self.path / _HOLDER).read_bytes() == self._held:
                return
        raise FileNotFoundError(
            f"cannot write to {self.path} (it was removed or replaced while this run wrote to it): put its folder "
            "back, then go on"
        )

    def _refuse_second(self) -> NoReturn:
        try:
            holder = read_json(self.own(_HOLDER))
            who = f"process {holder['pid']} on {holder['host']} has been writing to it since {holder['since']}"
        except (OSError, ArgumentError, KeyError):  # it has only just begun, or is just ending
            who = "another process is writing to it"
        raise RunInUseError(f"{self.path} is in use: {who}; wait for it, or stop it")

    def holder(self) -> Holder | None:
        """Who says that it writes to the folder. None if nobody does, or it cannot be read."""
        try:
            found = read_json(self.own(_HOLDER))
        except (OSError, ArgumentError):
            return None
        host, pid = str(found.get("host")), found.get("pid")
        if host != socket.gethostname():
            return Holder(host, None)
        return Holder(host, isinstance(pid, int) and is_alive(pid, found.get("started")))

    def own(self, name: str) -> Path:
        """The path of something in the folder, for reading.

        Args:
            name: from the folder on, such as "checkpoints/100"; it need not exist.

        Raises:
            ArgumentError: it is a link, or lies behind one, that leads out of the folder.
        """
        path = self.path / name
        try:
            leads_to = path.resolve()
        except (OSError, RuntimeError) as error:  # a link to itself
            raise ArgumentError(f"{path} is a link that leads nowhere ({error})") from error
        if not leads_to.is_relative_to(self.path.resolve()):
            raise ArgumentError(
                f"{path} is a link that leads out of the run's folder, to {leads_to}: "
                "put what it leads to in its place if you want it read"
            )
        return path

    def own_checkpoints(self) -> Path:
        """The folder of checkpoints, for reading.

        Raises:
            ArgumentError: it is, or something in it is, a link that leads out of the run's folder.
        """
        folder = self.own("checkpoints")
        for root, folders, files in os.walk(folder):
            for name in [*folders, *files]:
                if (Path(root) / name).is_symlink():
                    self.own(str((Path(root) / name).relative_to(self.path)))
        return folder

    def read_config(self) -> Config:
        """The configuration the run was started with, or resumed with last.

        Raises:
            FileNotFoundError: this is not the folder of a run.
            ArgumentError: config.json is damaged, or a link that leads out of the folder.
        """
        file = self.own("config.json")
        if not file.is_file():
            inside = sorted(str(found.parent) for found in self.path.glob("*/config.json"))
            meant = f"; it holds the runs {', '.join(inside)}" if inside else ""
            raise FileNotFoundError(f"{self.path} is not the folder of a run: it has no config.json{meant}")
        try:
            return Config.from_dict(read_json(file))
        except DamagedFileError:
            raise
        except IsgdError as error:
            raise ArgumentError(f"{file}: {error}") from error

    def check_resumable(self, config: Config) -> None:
        """Refuse to go on with other settings than the run was started with.

        Args:
            config: of the resumed run. It may make more steps (where the rate is constant), write other things more
                often, lie in other folders, and have other workers.

        Raises:
            ValueError: a field that decides the parameters differs, or the run is a replay; or its checkpoints are, or
                lie behind, a link that leads out of the folder, where old ones would be deleted.
        """
        self.own_checkpoints()
        if config.refresh.replay is not None:
            raise ArgumentError(
                f"{self.path} is a replay, which is not resumed: begin it anew, it gives the same again"
            )
        self._check_same(config, may_change=MAY_CHANGE_ON_RESUME)
        before, now = self.read_config().training, config.training
        if now.schedule != "constant" and (before.steps, before.epochs) != (now.steps, now.epochs):
            raise ArgumentError(
                f"schedule={now.schedule} is made for the whole length of the run, which was started with "
                f"{_length(before)}; got {_length(now)}: leave it as it was"
            )

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
        before, now = self.read_config().flat(), config.flat()
        for name in before:
            if before[name] != now[name] and name not in may_change:
                raise ArgumentError(
                    f"{name}={now[name]!r}, but the run was started with {before[name]!r}: leave it as it was"
                )

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file whole or not at all."""
        self.check_held()
        return write_whole(self.path / name, content)

    def files(self) -> list[Path]:
        """What a person finds in the folder."""
        return sorted(path for path in self.path.iterdir() if not path.name.startswith("."))

    def write_environment(self, devices: list[str], fingerprint: str, *, num_classes: int | None = None) -> None:
        """Record what the run ran on, for whoever reads it later.

        Args:
            devices: their names.
            fingerprint: of the training set.
            num_classes: that its labels are of, which a model is made for; None where there are none.
        """
        packages = ("jax", "flax", "optax", "tensorflow-datasets", "orbax-checkpoint")
        environment = {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "devices": devices,
            "fingerprint": fingerprint,
            "num_classes": num_classes,
            "packages": {"isgd_jax": isgd_jax.__version__} | {name: metadata.version(name) for name in packages},
        }
        self.write("environment.json", _pretty(environment))

    def environment(self) -> dict[str, Any]:
        """What the run ran on; empty if it has not begun.

        Raises:
            ArgumentError: the file is damaged, or a link that leads out of the folder.
        """
        file = self.own("environment.json")
        return read_json(file) if file.is_file() else {}

    def fingerprint(self) -> str | None:
        """Of the training set the run was made on; None if it has not begun."""
        return self.environment().get("fingerprint")

    def append(self, record: Record) -> None:
        """Add one line to metrics.jsonl.

        Raises:
            OSError: it cannot be written, such as on a full disk; a line cut short is dropped when it is read.
        """
        self.check_held()
        with writing(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def records(self, event: str | None = None) -> Iterator[Record]:
        """The lines of metrics.jsonl as they are read, one by one, so that a long file takes no memory.

        A last line cut short, as a kill leaves it, is left out. Without a file there are none.

        Args:
            event: of one kind alone, such as "progress", "refresh", "gate", "finished".

        Raises:
            ArgumentError: a line is damaged, or the file is a link that leads out of the folder; the message names the
                line.
        """
        if not self.own("metrics.jsonl").is_file():
            return
        with self.metrics.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    return
                where = f"{self.metrics}, line {number}"
                try:
                    record = parsed(line, where)
                    check_record(record, where)
                except DamagedFileError as error:
                    raise DamagedFileError(f"{error}; or take this line out, a run goes on without it") from error
                if event is None or record["event"] == event:
                    yield record

    def forget_after(self, step: int) -> None:
        """Drop the lines written after ``step``: the resumed run will write them again.

        A refresh comes before the step it is numbered with, so that of ``step`` itself will be made again too.

        Args:
            step: of the checkpoint that the run goes on from. The file is written anew, whole or not at all.
        """
        last = {"refresh": step - 1}
        records = (record for record in self.records() if record["step"] <= last.get(record["event"], step))
        kept = [json.dumps(record) + "\n" for record in records]
        self.write("metrics.jsonl", "".join(kept))


class Unwritten(RunDir):
    """The folder of a run as the other processes of a distributed run see it: process 0 alone writes there."""

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else is kept out of what is not written."""
        yield

    def write(self, name: str, content: str | bytes) -> Path:
        """Write nothing."""
        return self.path / name

    def append(self, record: Record) -> None:
        """Write nothing."""
        pass

    def records(self, event: str | None = None) -> Iterator[Record]:
        """There are none."""
        return iter(())


def _is_ours_aside(path: Path) -> bool:
    """Whether this is left of a run that was killed before it wrote its configuration."""
    return path.name in (_LOCK, _HOLDER) or path.name.endswith(".partial")


def _length(training: TrainingConfig) -> str:
    return f"steps={training.steps}" if training.epochs is None else f"epochs={training.epochs}"


def _default_name(config: Config) -> str:
    return f"runs/{config.data.dataset}-{config.sampling.mode}-{time.strftime('%Y%m%d-%H%M%S')}"


def _pretty(values: Record) -> str:
    return json.dumps(values, indent=2) + "\n"
