"""A study: arms and seeds in one folder, each run in ``<arm>-<seed>``; trained, resumed, or read."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from isgd_jax.app.compare.levels import Level
from isgd_jax.app.config import MAY_CHANGE_ON_RESUME, Config
from isgd_jax.app.files import make_folder, read_json, write_whole
from isgd_jax.app.records import Record, is_number
from isgd_jax.app.run_dir import RunDir
from isgd_jax.errors import ArgumentError, DamagedFileError, RunInUseError

__all__ = ["Arm", "Curve", "Fit", "Say", "Study", "group", "read", "train"]

SAID = ("train_seconds", "train_loss", "test_loss", "test_error")

Curve = list[Record]
"""The lines of progress of one run."""


@runtime_checkable
class Fit(Protocol):
    """How an arm is trained: `isgd_jax.app.run.fit`, or a loop of one's own that leaves the same kind of folder."""

    def __call__(
        self, config: Config, /, *, resume: bool, observe: Callable[[Record], None], until: Callable[[Record], bool]
    ) -> Any: ...


Say = Callable[[str], None]
"""How a person is told what goes on."""


class Arm(NamedTuple):
    """A configuration to compare, its seed and folder left to the study.

    ``fit`` takes the place of `isgd_jax.app.run.fit`. A fit of one's own writes, with `RunDir.append`, lines of
    progress with ``step``, ``train_seconds`` and the fields of the levels, then a record ``finished``; its result may
    have ``stopped_by``, the number of the signal that ended it early.
    """

    config: Config
    fit: Fit | None = None


class Study(NamedTuple):
    """The curves of each arm by seed; the first arm is the one that others are compared to."""

    curves: dict[str, dict[int, Curve]]
    unfinished: frozenset[tuple[str, int]] = frozenset()
    """Arm and seed of runs that go on, were stopped or were killed: what they would reach is not known."""
    ended_early: frozenset[tuple[str, int]] = frozenset()
    """Of runs that ended before their last update, at levels: whether they would reach another is not known."""

    @property
    def base(self) -> str:
        """The name of the first arm."""
        return next(iter(self.curves))

    def seeds(self, *arms: str) -> list[int]:
        """The seeds that all these arms have."""
        return sorted(set.intersection(*(set(self.curves[arm]) for arm in arms)))


def train(
    arms: Mapping[str, Arm],
    *,
    seeds: int | Sequence[int],
    folder: Path,
    levels: Sequence[Level] = (),
    say: Say = print,
    observe: Callable[[Record], None] = lambda record: None,
) -> Study:
    """Train what is missing, seed by seed, and read everything.

    A run that is whole is left alone, one that was stopped goes on. One whose loss becomes infinite or NaN ends there,
    and the others go on. In the folder are ``study.json`` with the names of the arms, and the folder of a run for each
    arm and seed, ``NAME-SEED``.

    Args:
        arms: by name; configurations are checked against those of runs that are there, before anything is trained.
        seeds: how many, from 0 on, or which.
        folder: it is made if need be.
        levels: a run ends when it has reached all of them; without any it makes all its steps.
        say: a sentence to a person, when a run begins and ends.
        observe: is given each record of each run.

    Returns:
        The curves of all runs.

    Raises:
        ValueError: the folder holds an arm of this name with another configuration, or a name cannot be a folder's.
        SystemExit: a signal asked to stop; the same call goes on.
    """
    seeds = range(seeds) if isinstance(seeds, int) else seeds
    _check_names(arms)
    make_folder(folder)
    configs = {
        (name, seed): arm.config.replace(seed=seed, run_dir=str(folder / f"{name}-{seed}"))
        for seed in seeds
        for name, arm in arms.items()
    }
    for config in configs.values():
        if (Path(str(config.recording.run_dir)) / "config.json").is_file():
            RunDir(Path(str(config.recording.run_dir))).check_resumable(config)
    write_whole(folder / "study.json", json.dumps({"arms": list(arms)}) + "\n")
    for (name, seed), config in configs.items():
        _train_one(f"{name}, seed {seed}", arms[name], config, levels, say, observe)
    return _study({name: {seed: folder / f"{name}-{seed}" for seed in seeds} for name in arms})


def read(folder: Path) -> Study:
    """The study in a folder: finished and unfinished runs as they stand, and which are unfinished.

    Raises:
        FileNotFoundError: the folder holds no study.
        DamagedFileError: study.json, or the records of a run, are damaged.
    """
    if not (folder / "study.json").is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a study: it has no study.json")
    arms = read_json(folder / "study.json").get("arms")
    if not (isinstance(arms, list) and all(isinstance(name, str) for name in arms)):
        raise DamagedFileError(f"{folder / 'study.json'} is damaged: expected the names of arms, got {str(arms)[:200]}")
    found: dict[str, dict[int, Path]] = {name: {} for name in arms}
    for path in sorted(folder.iterdir()):
        name, _, seed = path.name.rpartition("-")
        if name in found and seed.isdigit() and (path / "metrics.jsonl").is_file():
            found[name][int(seed)] = path
    return _study({name: dict(sorted(by_seed.items())) for name, by_seed in found.items() if by_seed})


def group(folders: Iterable[Path]) -> Study:
    """Runs that were made one by one: those whose configurations differ in the seed alone are one arm.

    An arm is called by the fields in which it differs from the others, such as ``mode=exact``. What decides nothing
    about the parameters (folders, how often is recorded) makes no other arm; the length does where the rate decays over
    it.

    Args:
        folders: of runs, of which only configurations and records are read; the first is of the arm that others are
            compared to.

    Raises:
        FileNotFoundError: a folder is not that of a run.
        ValueError: an arm has the same seed twice, or a file is damaged.
    """
    arms: dict[str, dict[int, Path]] = {}
    configs = {folder: RunDir(folder).read_config() for folder in folders}
    deciding = {folder: _deciding(config) for folder, config in configs.items()}
    fields = dict.fromkeys(name for values in deciding.values() for name in values)
    differing = [name for name in fields if len({json.dumps(values.get(name)) for values in deciding.values()}) > 1]
    for folder, config in configs.items():
        values, seed = deciding[folder], config.training.seed
        name = " ".join(f"{field}={_plain(values[field])}" for field in differing if field in values) or "all runs"
        by_seed = arms.setdefault(name, {})
        if seed in by_seed:
            raise ArgumentError(f"{folder}: there is another run of the arm {name!r} with seed {seed}; leave one")
        by_seed[seed] = folder
    return _study(arms)


def _train_one(
    what: str,
    arm: Arm,
    config: Config,
    levels: Sequence[Level],
    say: Say,
    observe: Callable[[Record], None],
) -> None:
    """Train a run of an arm, from where it stands; ``what`` names it to a person."""

    def until(record: Record) -> bool:
        return bool(levels) and all(level.reached(record) for level in levels)

    run = RunDir(Path(str(config.recording.run_dir)))
    if _is_whole(run, config, until):
        return
    say(f"{what}: training in {run.path}")
    resume = (run.path / "config.json").is_file()
    try:
        result = (arm.fit or _fit())(config, resume=resume, observe=observe, until=until)
    except FileExistsError as error:
        if resume or not (run.path / "config.json").is_file():  # something else stands in the way
            raise
        raise RunInUseError(
            f"{run.path} was begun by another process meanwhile: wait until it ends, the same command then goes on"
        ) from error
    except FloatingPointError as error:
        if _last_turn(run).get("event") != "diverged":  # a loop of one's own
            step = (_curve(run.path) or [{"step": 0}])[-1]["step"]
            run.append({"event": "diverged", "step": step, "text": str(error)})
        say(f"{what}: diverged, so it counts as one that never gets there: {error}")
        return
    stopped_by = getattr(result, "stopped_by", None)
    say(f"{what}: {_last(run)}")
    if stopped_by is not None:
        say(f"stopped by signal {stopped_by}; the same command goes on")
        raise SystemExit(128 + stopped_by)


def _is_whole(run: RunDir, config: Config, until: Callable[[Record], bool]) -> bool:
    """Finished, and nothing more was asked for since; or diverged, as it would again."""
    last = _last_turn(run)
    if last.get("event") not in ("finished", "diverged"):
        return False
    if last["event"] == "diverged" or any(until(line) for line in _curve(run.path)[-1:]):
        return True
    if config.training.epochs is None:
        return last["step"] >= config.training.steps
    return last["step"] == last.get("num_steps") and config.training.epochs == run.read_config().training.epochs


def _last_turn(run: RunDir) -> Record:
    """The last record of how the run began anew or ended; empty where there is none."""
    turns = [record for record in run.records() if record["event"] in ("resumed", "stopped", "finished", "diverged")]
    return turns[-1] if turns else {}


def _study(folders: Mapping[str, Mapping[int, Path]]) -> Study:
    """The runs of each arm by seed, as they stand."""
    ends = {
        (name, seed): _last_turn(RunDir(path)) for name, by_seed in folders.items() for seed, path in by_seed.items()
    }
    return Study(
        {name: {seed: _curve(path) for seed, path in by_seed.items()} for name, by_seed in folders.items()},
        frozenset(run for run, end in ends.items() if end.get("event") not in ("finished", "diverged")),
        frozenset(run for run, end in ends.items() if end.get("event") == "finished" and _is_early(end)),
    )


def _is_early(finished: Record) -> bool:
    """Whether a run had updates left when it ended: it had reached its levels."""
    last = finished.get("num_steps")
    return is_number(last) and finished["step"] < last


def _deciding(config: Config) -> dict[str, Any]:
    """The fields that decide the parameters, but for the seed."""
    training, values = config.training, config.flat()
    length = () if training.schedule == "constant" else ("steps",) if training.epochs is None else ("epochs",)
    asides = (MAY_CHANGE_ON_RESUME | {"seed"}) - set(length)
    return {name: value for name, value in values.items() if name not in asides}


def _fit() -> Fit:
    from isgd_jax.app.run import fit

    return fit


def _curve(folder: Path) -> Curve:
    return list(RunDir(folder).records("progress"))


def _last(run: RunDir) -> str:
    """Where a run stands, in words."""
    line = (_curve(run.path) or [{"step": 0}])[-1]
    seen = [f"{name.replace('_', ' ')} {line[name]:.4g}" for name in SAID if line.get(name) is not None]
    return ", ".join([f"{line['step']:,} updates", *seen])


def _plain(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _check_names(arms: Mapping[str, Arm]) -> None:
    if not arms:
        raise ArgumentError("nothing to compare: name at least one arm")
    for name in arms:
        if not name or name.startswith(".") or any(sign in name for sign in "/\\\0"):
            raise ArgumentError(
                f"an arm's name becomes a folder: it must have no slash and begin with no dot; got {name!r}"
            )
