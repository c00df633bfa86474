"""`isgd compare`: arms and seeds trained, or runs read that are there; who needs what to reach which level."""

import dataclasses
import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from isgd_jax.app import compare
from isgd_jax.app.config import Config
from isgd_jax.app.files import make_folder, write_whole
from isgd_jax.app.flags import in_flags, parse
from isgd_jax.app.gone import refuse_gone
from isgd_jax.app.ignored import refuse_ignored
from isgd_jax.app.records import MEASURED
from isgd_jax.errors import ArgumentError

_MEASURED = MEASURED | {f"share_{task}" for task in ("scoring", "updating", "measuring")}
_MEASURED |= {f"sd_{of}{end}" for of in ("uniform", "stale", "ideal", "drawn") for end in ("", "_low", "_high")}

__all__ = ["Compare", "parse_arms", "run"]


@dataclass(frozen=True)
class Compare:
    """Compare ways of training over several seeds: the updates and seconds each needs to given levels.

    Train what is missing, every arm from the same seeds (stopped, the same command goes on):

        isgd compare --arms "uniform: --mode uniform" "exact: --mode exact" --seeds 5 --out DIR

    or read what is there, a study's folder or the folders of single runs: isgd compare DIR.

    The flags of isgd train hold for every arm; what an arm is followed by holds for that one.

    Attributes:
        runs: Folders to read: one of a study, or those of runs; runs that differ in the seed alone are one arm.
        arms: One text an arm, "NAME: FLAGS": the flags in which it differs. The others are compared to the first.
        seeds: Runs of each arm, from --seed on.
        levels: Levels to reach, such as test_loss=0.2,0.1 train_loss=0.05. Default: the lowest that every run has
            reached.
        until_levels: A run ends when it has reached all levels.
        out: Folder of the study: its runs, figures, table and page. Reading single runs: where to write figures and
            page.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    arms: tuple[str, ...] = ()
    seeds: int = 5
    levels: tuple[str, ...] = ()
    until_levels: bool = False
    out: str | None = None
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)

    def __post_init__(self) -> None:
        if bool(self.runs) == bool(self.arms):
            raise ArgumentError("name either arms= to train or folders to read")
        if self.arms and self.out is None:
            raise ArgumentError("out must name the folder of the study")
        if self.config.recording.run_dir is not None:
            raise ArgumentError("run_dir is chosen for each run; name the folder of them all with out=")
        if self.seeds < 1:
            raise ArgumentError(f"seeds must be at least 1; got {self.seeds}")
        if self.until_levels and not self.levels:
            raise ArgumentError("until_levels needs levels=")


def run(command: Compare) -> int:
    """Run `isgd compare`: train or read, then print the table and write figures and page; returns the exit code.

    Into the folder of the study, or ``--out``, go a PNG for each measured field, ``comparison.md`` and
    ``comparison.html``, over what is there; where single runs are read without ``--out``, nothing is written.

    Raises:
        ValueError: arms or levels are mistaken, or differ from what the folder holds.
        FileNotFoundError: a folder to read is no study's and no run's.
        SystemExit: a signal asked to stop; the same command goes on.
    """
    from isgd_jax.app.html import comparison_page
    from isgd_jax.app.terminal import Terminal

    console = Terminal()
    levels = compare.levels(*command.levels)
    study = train(command, levels, lambda text: console.print(in_flags(text))) if command.arms else read(command.runs)
    rows = compare.rows(study, levels or compare.common_levels(study))
    notes = compare.left_out(study)
    console.print(compare.text(rows), *notes, sep="\n", soft_wrap=True, highlight=False, markup=False)
    out = folder(command)
    if out is None:
        return 0
    make_folder(out)
    paths = [*compare.draw(study, out), out / "comparison.md", out / "comparison.html"]
    write_whole(paths[-2], "\n\n".join([compare.markdown(rows), *notes]) + "\n")
    write_whole(paths[-1], comparison_page(study, rows, title=out.resolve().name))
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False, markup=False)
    return 0


def train(command: Compare, levels: Sequence[compare.Level], say: compare.Say) -> compare.Study:
    """Train the arms of a command line.

    Args:
        command: its arms, seeds and folder.
        levels: those that are asked for; with ``until_levels`` a run ends there.
        say: how a person is told what goes on.

    Raises:
        ValueError: an arm cannot be read, or does not measure a level.
    """
    arms = parse_arms(command.arms, command.config)
    _check_fields(levels)
    measured_on_train = [level for level in levels if level.field.startswith("train_")]
    for name, arm in arms.items():
        if measured_on_train and not arm.config.recording.full_train_loss:
            raise ArgumentError(f"the level {measured_on_train[0]} of arm {name!r} needs full_train_loss")
    first = command.config.training.seed
    return compare.train(
        arms,
        seeds=range(first, first + command.seeds),
        folder=Path(str(command.out)),
        levels=levels if command.until_levels else (),
        say=say,
    )


def _check_fields(levels: Sequence[compare.Level]) -> None:
    """Before anything is trained: the command's own runs measure no other fields."""
    for level in levels:
        if level.field not in _MEASURED:
            near = difflib.get_close_matches(level.field, _MEASURED, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ArgumentError(
                f"a level is of what a line of progress measures, such as test_loss; got {level.field!r}{meant}"
            )


def read(folders: Sequence[str]) -> compare.Study:
    """The study in one folder, or the runs in several; nothing is written.

    Raises:
        FileNotFoundError: a folder is no study's and no run's.
        ValueError: the records of a run are damaged, or two runs of an arm have the same seed.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) == 1 and not (paths[0] / "config.json").is_file():
        return compare.read(paths[0])
    return compare.group(paths)


def folder(command: Compare) -> Path | None:
    """Where figures and page go: --out, else the folder of the study that was read, else nowhere."""
    if command.out is not None:
        return Path(command.out)
    return Path(command.runs[0]) if (Path(command.runs[0]) / "study.json").is_file() else None


def parse_arms(texts: Sequence[str], base: Config) -> dict[str, compare.Arm]:
    """Arms as a person writes them, ``"NAME: FLAGS"``, on top of the flags they share.

    Args:
        texts: one an arm; flags are split as a shell does.
        base: what the arms have in common. Seed and folder are chosen for each run, and refused here.

    Raises:
        ValueError: a text is not of that form, a name comes twice, or a flag is not one of `isgd train`.
    """
    arms: dict[str, compare.Arm] = {}
    for text in texts:
        name, colon, flags = text.partition(":")
        name = name.strip()
        if not colon or not re.fullmatch(r"[\w.+=-]+", name):
            raise ArgumentError(
                f'an arm is "NAME: FLAGS", such as "exact: --mode exact", its name without spaces; got {text!r}'
            )
        if name in arms:
            raise ArgumentError(f"two arms are called {name!r}")
        arms[name] = compare.Arm(_config(name, shlex.split(flags), base))
    return arms


def _config(name: str, flags: list[str], base: Config) -> Config:
    """The configuration of an arm, from its own flags and those that all share."""
    refuse_gone(flags)
    for fixed in ("--seed", "--run-dir"):
        if any(flag.split("=")[0] == fixed for flag in flags):
            raise ArgumentError(f"arm {name!r}: {fixed} is the same for all arms")
    config = parse(Config, flags, prog=f"isgd compare, arm {name!r}", default=base)
    refuse_ignored(config, base)
    return config
