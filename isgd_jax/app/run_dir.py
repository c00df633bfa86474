"""The folder of a run: config.json, environment.json, inputs.json, metrics.jsonl, checkpoints/ and the figures."""

import contextlib
import itertools
import json
import math
import os
import platform
import socket
import time
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeGuard

import isgd_jax
from isgd_jax.app.config import MAY_CHANGE_ON_RESUME, Config, TrainingConfig
from isgd_jax.app.locks import locked
from isgd_jax.errors import ArgumentError, DamagedFileError, IsgdError, RunInUseError

__all__ = [
    "MEASURED",
    "Holder",
    "Record",
    "RunDir",
    "Unwritten",
    "is_number",
    "make_folder",
    "read_json",
    "write_named",
    "write_whole",
    "writing",
]

_LOCK, _HOLDER = ".lock", ".holder.json"

Record = dict[str, Any]
"""One line of metrics.jsonl: `event` says which kind, `step` how many updates had been made."""


MEASURED = frozenset(
    {
        "seconds", "train_seconds", "loss", "train_loss", "test_loss", "train_error", "test_error", "max_weight",
        "age_mean", "age_p95", "variance_ratio", "steps_per_second", "scores_per_second", "trusted_share", "workers",
        "bytes_moved", "chunks_again", "results_refused",
    }
)  # fmt: skip
"""Fields of a line of progress that are numbers, or None where nothing was measured. So are ``sd_*``, ``share_*``."""


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
        * Of several processes one at a time writes to the folder, within `alone`, where files can be locked.
        * The folder may be a stranger's: reading it follows no link that leads out of it, and a file that is written
          takes the place of a link.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"

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
            holder = {"host": socket.gethostname(), "pid": pid, "started": _start_of(pid), "since": since}
            self.write(_HOLDER, _pretty(holder))
            try:
                yield
            finally:
                (self.path / _HOLDER).unlink(missing_ok=True)

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
        return Holder(host, isinstance(pid, int) and _is_alive(pid, found.get("started")))

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
                    record = _parsed(line, where)
                    _check_record(record, where)
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


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there.

    Raises:
        OSError: it cannot be made, or a file or a link that leads nowhere has its name; the message says what to do.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise FileExistsError(f"cannot make the folder {path}: {error.filename} is none; name another") from error
    except OSError as error:
        raise type(error)(
            f"cannot make the folder {path} ({error.strerror or error}): name one where you may write"
        ) from error


def write_whole(target: Path, content: str | bytes) -> Path:
    """Write a file whole or not at all; where there is a link of this name, the file takes its place.

    It is written beside, brought to the disk, and renamed.

    Args:
        target: the file, in a folder that is there.
        content: of text, what UTF-8 cannot say (bytes of a file's name that are none) is written as an escape.

    Raises:
        OSError: the folder cannot be written to; what was there stays.
    """
    partial = target.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with writing(target):
            with partial.open("xb") as file:
                file.write(_encoded(content))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def write_named(target: Path, content: str | bytes) -> Path:
    """Write a file that a person named: as `write_whole` does, but a pipe or device of this name stays one.

    Raises:
        OSError: it cannot be written.
    """
    if target.is_file() or not target.exists():
        return write_whole(target, content)
    with writing(target):
        target.write_bytes(_encoded(content))
    return target


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """A disk says only that it is full, not where: name the file, and what to do.

    Raises:
        OSError: what was raised inside, of the same type.
    """
    try:
        yield
    except OSError as error:
        raise type(error)(
            f"cannot write {file} ({error.strerror or error}): make room there, or make it writable, then go on"
        ) from error


def _encoded(content: str | bytes) -> bytes:
    return content.encode(errors="backslashreplace") if isinstance(content, str) else content


def _is_ours_aside(path: Path) -> bool:
    """Whether this is left of a run that was killed before it wrote its configuration."""
    return path.name in (_LOCK, _HOLDER) or path.name.endswith(".partial")


def _start_of(pid: int) -> str | None:
    """When a process of this host began, in ticks since a boot that is named: numbers of processes are used again.

    None where the system does not say, or there is no such process.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2]
        return f"{boot} {after_name.split()[19]}"
    except (OSError, IndexError):
        return None


def _is_alive(pid: int, started: object) -> bool:
    """Whether a process of this host still runs, and is the one that began then."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        pass
    return started is None or _start_of(pid) in (started, None)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a field of a record is a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_record(record: Record, where: str) -> None:
    """What every reader of a record relies on.

    Raises:
        DamagedFileError: a field is missing or of another type; ``where`` names the line.
    """
    step = record.get("step")
    if not (isinstance(record.get("event"), str) and isinstance(step, int) and not isinstance(step, bool)):
        raise DamagedFileError(f"{where}: expected an event and its step, got {str(record)[:200]}")
    spent = record.get("spent", {})
    if not (isinstance(spent, dict) and all(is_number(value) for value in spent.values())):
        raise DamagedFileError(f"{where}: expected seconds by task as spent, got {str(spent)[:200]}")
    is_progress = record["event"] == "progress"
    for name, value in record.items():
        is_measured = name == "seconds" or (is_progress and (name in MEASURED or name.startswith(("sd_", "share_"))))
        if is_measured and not (value is None or is_number(value)):
            raise DamagedFileError(f"{where}: expected a number or null as {name}, got {str(value)[:200]}")


def _length(training: TrainingConfig) -> str:
    return f"steps={training.steps}" if training.epochs is None else f"epochs={training.epochs}"


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DamagedFileError: it is damaged, or holds something else; the message names the file.
        OSError: it cannot be read.
    """
    return _parsed(file.read_bytes(), str(file))


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DamagedFileError: it is damaged, or something else; ``where`` names the file.
    """
    try:
        found = json.loads(content, parse_int=_whole, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            f"{where} is damaged, no JSON can be read from it ({error}): restore it, or start anew"
        ) from error
    if not isinstance(found, dict):
        raise DamagedFileError(f"{where} is damaged: expected a JSON object, got a {type(found).__name__}")
    return found


def _whole(digits: str) -> int:
    """A whole number of at most 64 bits: what we write has no larger ones, and floats cannot hold them."""
    if not -(2**63) <= int(digits) < 2**64:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise ValueError(f"the number {digits[:20]} is beyond what floats can hold")
    return float(digits)


def _default_name(config: Config) -> str:
    return f"runs/{config.data.dataset}-{config.sampling.mode}-{time.strftime('%Y%m%d-%H%M%S')}"


def _pretty(values: Record) -> str:
    return json.dumps(values, indent=2) + "\n"
