"""The command `isgd`. It parses first and imports jax after, so that `--help` is instant and mistakes are cheap."""

import dataclasses
import functools
import io
import logging
import operator
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

try:
    import tyro
except ModuleNotFoundError:
    sys.exit("isgd: the command needs more than the library: pip install 'isgd_jax[train]'")

import isgd_jax
from isgd_jax.app import userfiles
from isgd_jax.app.commands import compare, predict, probe, runs, watch
from isgd_jax.app.config import Config
from isgd_jax.app.files import write_named, write_whole
from isgd_jax.app.flags import in_flags, parse
from isgd_jax.app.gone import refuse_gone
from isgd_jax.app.help import WIDTH, first_page
from isgd_jax.app.ignored import refuse_ignored
from isgd_jax.app.presets import PRESETS
from isgd_jax.app.run_dir import RunDir
from isgd_jax.errors import ArgumentError, IsgdError

__all__ = ["main"]

EXPECTED_ERRORS = (IsgdError, OSError)
"""Mistakes of the user or of the machine: one sentence. Set ISGD_TRACEBACK=1 to see where they come from. All else that
is raised is a fault of a program, ours or the model's, and keeps its traceback."""


@dataclass(frozen=True)
class Train:
    """Train a model by importance-sampling SGD, or with --mode uniform by plain SGD.

    The run leaves a folder with config.json, metrics.jsonl, figures and checkpoints.

    Ctrl-C, SIGTERM and a closed terminal save and stop.

    Attributes:
        resume: Folder of a run to go on with, from its newest checkpoint. Its configuration is taken from there.
        preset: Begin with the paper's values, of its setting 1 or 2; flags beside it change single ones.
    """

    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Config)
    resume: str | None = None
    preset: Literal["paper-1", "paper-2"] | None = None


@dataclass(frozen=True)
class Report:
    """Draw the figures of runs anew, and write one self-contained HTML page of them.

    It has figures, tables, configuration, environment and the hardest examples, and opens offline, light or dark.

    Attributes:
        runs: Folders of runs, finished or going on.
        out: File of the page. Default: report.html, in the folder of the run, or in the one that holds all of them.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    out: str | None = None


Command = Train | Report | compare.Compare | probe.Probe | runs.Runs | watch.Watch | predict.Predict

FIRST_PAGES: dict[type, tuple[str, tuple[str, ...]]] = {
    Train: ("", ("dataset", "model", "loss", "optimizer", "learning_rate", "batch_size", "steps", "mode",
                 "refresh_every", "engine", "run_dir", "resume", "seed")),
    Report: ("RUN ...", ("out",)),
    compare.Compare: ("[RUN ...]", ("arms", "seeds", "levels", "until_levels", "out", "dataset", "model", "steps")),
    probe.Probe: ("", ("run", "after", "ages", "examples", "trial", "out", "mixture", "dataset", "model", "loss",
                       "scorer")),
    runs.Runs: ("[FOLDER]", ()),
    watch.Watch: ("RUN", ("every",)),
    predict.Predict: ("RUN INPUTS.npy", ("out",)),
}  # fmt: skip
"""What ``--help`` shows of each command: what follows it without a flag, and the flags that people use."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the command.

    Args:
        argv: what follows the command's name; by default what was typed.

    Raises:
        SystemExit: always, with 0, 128 + a signal's number, or a sentence about what went wrong.
    """
    arguments = [_at_home(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding cannot say is no reason to end
            stream.reconfigure(errors="backslashreplace")
    try:
        command = _parse(arguments)
        sys.exit(_run(command))
    except KeyboardInterrupt:  # while it still starts, or already ends: within a run a signal saves first
        if os.environ.get("ISGD_TRACEBACK"):
            raise
        print("isgd: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except EXPECTED_ERRORS as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            sys.exit(128 + signal.SIGPIPE)
        if isinstance(error, OSError) and (reason := _unwritable_output(error)) is not None:
            sys.exit(f"isgd: cannot write to standard output ({reason}): send it elsewhere; a run goes on by --resume")
        if os.environ.get("ISGD_TRACEBACK"):
            raise
        sys.exit(f"isgd: {in_flags(_one_sentence(error))}")


def _nobody_reads() -> bool:
    """Whether the reader of our output is gone, as `head` is early; then what is still to be written goes nowhere."""
    ready = select.poll()
    ready.register(1, 0)
    is_gone = any(event & select.POLLERR for _, event in ready.poll(0))
    if is_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return is_gone


def _unwritable_output(error: OSError) -> str | None:
    """Why what we print cannot be written, as on a full disk; then what is still to be written goes nowhere."""
    if error.errno is None or error.filename is not None:  # of a file, with a sentence of its own
        return None
    try:
        print(flush=True)
    except OSError as again:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return again.strerror
    return None


def _at_home(argument: str) -> str:
    """``--run-dir=~/x`` with the home folder in it, as shells give it only where an argument begins with the tilde."""
    flag, equals, value = argument.partition("=")
    return f"{flag}={os.path.expanduser(value)}" if equals and flag.startswith("--") else argument


def _run(command: Command) -> int:
    """Run a command; returns the exit code."""
    _leave_failures_to_us()
    match command:
        case Train():
            return train(command)
        case Report():
            return report(command)
        case compare.Compare():
            return compare.run(command)
        case probe.Probe():
            if command.run is not None:
                _tell_code(dataclasses.asdict(command))
            return probe.run(command)
        case runs.Runs():
            return runs.run(command)
        case watch.Watch():
            return watch.run(command)
        case predict.Predict():
            _tell_code(RunDir(Path(command.folder)).read_config().to_dict())
            return predict.run(command)


def train(command: Train) -> int:
    """Run `isgd train`: train, or go on, and show it as it goes.

    A new run makes its folder; with ``--resume`` its own is written to, and ``--run-dir`` must not name another one.
    Before code that lies in a folder's configuration is imported, it is named.

    Args:
        command: as it was parsed.

    Returns:
        The exit code, 0 or 128 + the number of the signal that stopped the run.

    Raises:
        ValueError, TypeError: a flag does not fit the data, the model or the run.
        FileExistsError: the folder of a new run holds something.
        FileNotFoundError: there is no run to go on with, or no file that a flag names.
        OSError: the folder cannot be written to.
        FloatingPointError: the loss is no longer finite; checkpoints from before stay.
    """
    import jax
    from rich.logging import RichHandler

    from isgd_jax.app.console import RunConsole
    from isgd_jax.app.run import fit
    from isgd_jax.app.terminal import Terminal

    console = Terminal()
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    named = command.config.recording.run_dir
    if command.resume is not None and Path(str(named)) != Path(command.resume):
        raise ArgumentError(
            f"--run-dir {named} beside --resume {command.resume}: a run goes on in its own folder; leave --run-dir out"
        )
    if command.resume is not None or command.config.refresh.replay is not None:
        _tell_code(command.config.to_dict())
    logging.getLogger("isgd_jax").addHandler(RichHandler(console=console, show_path=False, show_level=False))
    logging.getLogger("isgd_jax").setLevel(logging.INFO)  # a data set that has to be downloaded first says so
    logging.getLogger("isgd_jax").propagate = False  # once is enough
    with RunConsole(console) as observe:
        result = fit(command.config, resume=command.resume is not None, observe=observe)
    typed = shlex.quote(str(result.run_dir))
    if result.stopped_by is None:
        if jax.process_index() == 0:  # of several processes one has the folder
            console.print(f"One page of it all: isgd report {typed}", soft_wrap=True, highlight=False)
        return 0
    go_on = f"Stopped by signal {result.stopped_by}. Go on with: isgd train --resume {typed}"
    console.print(go_on, soft_wrap=True, highlight=False)
    return 128 + result.stopped_by


def report(command: Report) -> int:
    """Run `isgd report`: figures of each run, and one page of all; returns the exit code.

    Raises:
        ValueError: no folder was named, or one holds what cannot be read.
        FileNotFoundError: a folder is not that of a run.
    """
    from isgd_jax.app.html import run_page
    from isgd_jax.app.plots import draw

    if not command.runs:
        raise ArgumentError("isgd report needs the folder of a run: isgd report runs/NAME")
    folders = [RunDir(Path(folder)) for folder in command.runs]
    for run in folders:
        run.read_config()
    for run in folders:
        try:
            print(*draw(run), sep="\n")
        except OSError as error:  # of a run on a disk that can only be read a page can be made elsewhere
            if command.out is None:
                raise
            print(f"isgd: the figures were not written into {run.path} ({error})", file=sys.stderr)
    together = Path(os.path.commonpath([run.path.resolve() for run in folders]))
    content = run_page(folders)
    written = write_named(Path(command.out), content) if command.out else write_whole(together / "report.html", content)
    print(written)
    return 0


def _tell_code(values: dict[str, Any]) -> None:
    """Which code a configuration that lies in a folder of a run will have imported, before it is."""
    for line in userfiles.code_named(values):
        print(f"isgd: {line}", file=sys.stderr, flush=True)


def _leave_failures_to_us() -> None:
    """Of a checkpoint that cannot be written or read we speak in one sentence; Orbax and tensorstore print tracebacks.

    After the first failure Orbax closes its event loop. Calls that end later find it closed and say so, each through
    `sys.unraisablehook`; nobody waits for them any more.

    Ctrl-C that falls into a callback which cannot raise, such as XLA's at each garbage collection, comes again.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    shown = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            main_thread = threading.main_thread().ident  # in 0.05 s the callback has returned
            threading.Timer(0.05, signal.pthread_kill, (main_thread, signal.SIGINT)).start()
        elif str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    sys.unraisablehook = hook


DESCRIPTION = "Importance-sampling SGD for JAX. More: isgd COMMAND --help, isgd --version."


def _parse(arguments: list[str]) -> Command:
    """The command in typed form."""
    refuse_gone(arguments)
    _show_help(arguments)
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    named, probed = arguments[:1], _value_of("--run", arguments) if arguments[:1] == ["probe"] else None
    defaults: dict[type, Any] = {
        Train: _defaults(_value_of("--resume", arguments), _value_of("--replay", arguments), arguments),
        probe.Probe: probe.Probe() if probed is None else probe.Probe.of_run(probed),
    }
    commands = []
    for kind in get_args(Command):
        name, first_line = kind.__name__.lower(), str(kind.__doc__).partition("\n")[0]
        described = first_line if named != [name] else None  # among others a line is enough
        default = {"default": defaults[kind]} if kind in defaults else {}
        commands.append(Annotated[kind, tyro.conf.subcommand(name, description=described, **default)])
    command = parse(functools.reduce(operator.or_, commands), arguments, prog="isgd", description=DESCRIPTION)
    if isinstance(command, Train):
        refuse_ignored(command.config, defaults[Train].config)
    return command


def _show_help(arguments: list[str]) -> None:
    """Print what is asked for and needs no parser: the version, and the first page of a command's help.

    Raises:
        SystemExit: it has been printed.
        ArgumentError: help is asked for, and Python has dropped the docstrings that it is made of.
    """
    if sys.flags.optimize >= 2 and {"--help", "-h", "--help-all"} & set(arguments):
        raise ArgumentError("help is made of docstrings, which Python drops: leave PYTHONOPTIMIZE=2, or -OO, out")
    if arguments == ["--version"]:
        print(f"isgd_jax {isgd_jax.__version__}")
        sys.exit(0)
    for kind, (positional, names) in FIRST_PAGES.items():
        name = kind.__name__.lower()
        if arguments[:1] == [name] and {"--help", "-h"} & set(arguments):
            print(first_page(kind, prog=f"isgd {name}", names=names, positional=positional))
            sys.exit(0)


def _defaults(resume: str | None, replay: str | None, arguments: list[str]) -> Train:
    """With --resume and --replay the configuration that the run was started with, with --preset a named one."""
    if resume is not None:
        config = RunDir(Path(resume)).read_config()
        return Train(config.replace(run_dir=resume), resume)
    if replay is not None:
        config = RunDir(Path(replay)).read_config()
        return Train(config.replace(run_dir=None, replay=replay))
    return Train(PRESETS.get(_value_of("--preset", arguments) or "", Config()))


def _value_of(flag: str, arguments: list[str]) -> str | None:
    for here, following in zip(arguments, [*arguments[1:], None], strict=False):
        if here == flag:
            return following
        if here.startswith(f"{flag}="):
            return here.removeprefix(f"{flag}=")
    return None


def _one_sentence(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(line.strip() for line in text.splitlines())
