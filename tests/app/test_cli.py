"""The command as a user types it: in a process of its own where that is what matters."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jax._src.lru_cache import LRUCache

import isgd_jax
from isgd_jax.app.cli import FIRST_PAGES, _at_home, _leave_failures_to_us, _parse, main
from isgd_jax.app.config import Config, configure
from isgd_jax.app.gone import IN_PYTHON
from isgd_jax.app.run_dir import RunDir
from isgd_jax.app.summary import key_numbers, state_of, unusual

SMALL = [
    "--hidden", "16", "--steps", "60", "--refresh-every", "20", "--log-every", "20", "--checkpoint-every", "20",
    "--chunk-size", "512",
]  # fmt: skip
PLAIN = [*SMALL, "--mode", "uniform", "--monitor", "off"]
"""Where the sampling does not matter: less to compile."""


def isgd(*arguments: str, cwd: Path, first: str = "", **changes: str) -> subprocess.Popen[str]:
    """The command in a process of its own, ``first`` before all else; changes are of its environment."""
    environment = os.environ | changes
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # not so in the background
    return subprocess.Popen(
        [sys.executable, "-c", f"{first}\n{heard}; from isgd_jax.app.entry import main; main()", *arguments],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finished(process: subprocess.Popen[str], seconds: float = 200) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of a mistake: its exit message, or what the parser printed."""
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code not in (0, None)
    return " ".join(f"{exit_info.value.code} {capsys.readouterr().err}".replace("│", " ").split())


def test_a_run_goes_on_in_its_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        RunDir.create(configure(run_dir=str(tmp_path / name)))
    said = sentence(["train", "--resume", str(tmp_path / "a"), "--run-dir", str(tmp_path / "b")], capsys)
    assert "a run goes on in its own folder; leave --run-dir out" in said


def test_of_a_run_that_cannot_be_written_to_a_page_is_made_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir.create(configure(run_dir=str(tmp_path / "run")))
    (run.path / "loss.png").mkdir()  # root may write whatever the mode of a folder is
    (run.path / "loss.png" / "file").touch()
    assert "loss.png" in sentence(["report", str(run.path)], capsys)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run.path), "--out", str(tmp_path / "page.html")])
    assert ended.value.code == 0
    assert "the figures were not written into" in capsys.readouterr().err
    assert "</html>" in (tmp_path / "page.html").read_text()


def test_ctrl_c_before_a_run_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: list[str]) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("isgd_jax.app.cli._parse", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["train"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "isgd: interrupted\n"


@pytest.mark.parametrize("imported", ["tyro", "jax"])
def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path: Path, imported: str) -> None:
    """In the place of one stands a module whose import is interrupted, and which makes something else of that."""
    (tmp_path / f"{imported}.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    for _ in iter(int, 1): pass\n"
        "except BaseException:\n    os.abort()\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = isgd("train", cwd=tmp_path, PYTHONPATH=paths)
    assert finished(process) == (130, "", "isgd: interrupted\n")


def test_ctrl_c_in_a_callback_that_cannot_raise_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    _leave_failures_to_us()

    class Collected:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def collect_and_wait() -> None:
        Collected()
        time.sleep(60)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            collect_and_wait()
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_standard_output_cannot_take(tmp_path: Path) -> None:
    """A full disk behind it ends the command with a sentence; a name that its encoding has not is written as it can."""
    RunDir.create(configure(run_dir=str(tmp_path / "r\u00fcn")))
    command = [sys.executable, "-c", "from isgd_jax.app.cli import main; main()", "runs", str(tmp_path)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    told = "isgd: cannot write to standard output (No space left on device): send it elsewhere"
    assert (done.returncode, done.stderr.startswith(told), done.stderr.count("\n")) == (1, True, 1), done.stderr
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "r\\xfcn" in done.stdout


def test_a_tilde_after_a_flags_equals_sign_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    asked = ["--run-dir=~/x", "--data-dir=a/~", "~"]
    assert [_at_home(argument) for argument in asked] == ["--run-dir=/home/somebody/x", *asked[1:]]


def test_the_code_that_a_runs_folder_names_is_told_before_it_is_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strange_model.py").write_text("raise ImportError('run')")
    RunDir.create(configure(run_dir="run", model="strange_model:Net", loss="nowhere_to_be_found:loss"))
    said = sentence(["train", "--resume", "run"], capsys)
    assert f"isgd: --model strange_model:Net imports strange_model from {tmp_path}/strange_model.py" in said
    assert "--loss nowhere_to_be_found:loss imports nowhere_to_be_found from nowhere: it is not there" in said


def ended(*arguments: str) -> Any:
    """The code that the command ends with, in this process: what imports it has is not asked here."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(arguments))
    return exit_info.value.code


@pytest.mark.slow
@pytest.mark.figures
def test_train_on_digits_from_plan_to_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended("train", "--run-dir", "run", "--data-dir", "data", *SMALL) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("digits, N = 1,437", "of the training time", "held-out error", "run/variance.png"):
        assert text in " ".join(out.split())
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {
        "loss.png", "error.png", "variance.png", "scores.png",
    }  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_is_resumed_from_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kill -9 as soon as the first checkpoint is there; the same parameters come out as without a kill."""
    arguments = ["train", "--run-dir", "run", "--data-dir", "data", *PLAIN, "--steps", "400"]
    # Without the cache of compiled programs: killed while it writes there, a process would leave half an entry.
    process = isgd(*arguments, cwd=tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    deadline = time.monotonic() + 150
    while not any((tmp_path / "run" / "checkpoints").glob("[0-9]*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert (tmp_path / "run" / "config.json").is_file()
    monkeypatch.chdir(tmp_path)
    assert ended("train", "--resume", "run") == 0
    assert capsys.readouterr().err == ""
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 400


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_checkpoints_before_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Writing is refused past a size, as by a quota: the run ends with a sentence, and goes on when there is room."""
    monkeypatch.chdir(tmp_path)
    large = ["--hidden", "2048"]  # a checkpoint of it is larger than the limit, a figure is not
    assert ended("train", "--run-dir", "run", "--data-dir", "data", *PLAIN, *large) == 0
    more = ["train", "--resume", "run", "--steps", "100"]
    monkeypatch.setattr(LRUCache, "put", lambda self, key, value: None)  # or the limit would cut what is compiled
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, before[1]))
    try:
        full = str(ended(*more))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "isgd: cannot write a checkpoint to" in full
    assert "the one of step 60 stays; make room and resume" in full
    assert "Traceback" not in full + capsys.readouterr().err
    assert ended(*more) == 0


@pytest.mark.slow
def test_sigterm_saves_says_how_to_go_on_and_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"

    def terminate() -> None:
        while not (metrics.is_file() and '"step": 20,' in metrics.read_text()):
            if over.wait(0.05):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    over = threading.Event()
    waiting = threading.Thread(target=terminate)
    waiting.start()
    try:
        code = ended("train", "--run-dir", "run", "--data-dir", "data", *PLAIN, "--steps", "100000")
    finally:
        over.set()
        waiting.join()
    assert code == 128 + signal.SIGTERM
    assert "Go on with: isgd train --resume run" in capsys.readouterr().out


def test_the_bare_command_says_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Expected one of" in sentence([], capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--preset", "paper-2"], {"learning_rate": 0.001, "additive": 1.0, "mode": "relaxed", "run_dir": None}),
        (
            ["--preset", "paper-1", "--momentum", "0.5", "--steps", "7"],
            {"learning_rate": 0.01, "momentum": 0.5, "additive": 10.0, "order": "index", "steps": 7},
        ),
        (["--replay", "old"], {"seed": 5, "mode": "relaxed", "run_dir": None, "replay": "old"}),
    ],
)
def test_presets_and_replays_begin_with_their_configuration(
    arguments: list[str], expected: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    RunDir.create(configure(mode="relaxed", seed=5, run_dir="old"))
    config = _parse(["train", *arguments]).config.flat()
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize("arguments", ["train --help", "runs ."])
def test_who_reads_us_may_stop_reading(arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RunDir.create(configure(run_dir="run"))
    called = f"{sys.executable} -c 'from isgd_jax.app.cli import main; main()' {arguments}"
    command = f"(sleep 0.5; {called}; echo $? >&2) | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stderr.split() == [str(128 + signal.SIGPIPE)]


def test_standard_streams_may_be_closed(tmp_path: Path) -> None:
    RunDir.create(configure(run_dir=str(tmp_path / "run")))
    code = (
        "import os, sys; from isgd_jax.app import entry; "
        "sys.exit = lambda code: os._exit(code or os.fstat(1).st_ino != os.stat(os.devnull).st_ino); entry.main()"
    )
    closed = f"{sys.executable} -c '{code}' runs {tmp_path} <&- >&-"
    done = subprocess.run(closed, shell=True, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_is_instant(tmp_path: Path) -> None:
    """It imports none of the heavy packages: that is what keeps it fast."""
    code = (
        "import sys\nfrom isgd_jax.app.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('jax', 'flax', 'optax', 'tensorflow_datasets', 'orbax', 'matplotlib') "
        "if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "--learning-rate" in done.stdout
    assert done.stderr.strip() == "[]"


def test_help_without_docstrings_is_refused() -> None:
    """Python of PYTHONOPTIMIZE=2 has none."""
    code = "from isgd_jax.app.cli import main; main()"
    for page in ("--help", "--help-all"):
        command = [sys.executable, "-OO", "-B", "-c", code, "train", page]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stderr == (
            "isgd: help is made of docstrings, which Python drops: leave PYTHONOPTIMIZE=2, or -OO, out\n"
        )


def test_help_on_the_narrowest_terminal_ends() -> None:
    code = "from isgd_jax.app.cli import main; main()"
    command = [sys.executable, "-c", code, "runs", "--help-all"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"COLUMNS": "5"})
    assert "╭─ options" in done.stdout


def test_help_is_one_screen_of_each_command_and_all_of_it_has_a_panel_for_each_part(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main([*arguments])
        assert exit_info.value.code == 0
        told = capsys.readouterr().out
        assert max(map(len, told.splitlines())) <= 100
        return told

    for command, (positional, names) in FIRST_PAGES.items():
        told = said(command.__name__.lower(), "--help")
        assert len(told.splitlines()) <= 50
        for word in re.findall(r"[A-Z][\w.]*", positional):  # what follows the command is told like its flags
            assert re.search(rf"^  {re.escape(word)} .*\w", told, flags=re.MULTILINE)
        assert re.findall(r"^  --([a-z-]+)", told, flags=re.MULTILINE) == [name.replace("_", "-") for name in names]
    parts = list(Config().to_dict())[1:]
    for name, named in {"train": parts, "compare": parts, "probe": ["data", "model", "training", "scoring"]}.items():
        told = said(name, "--help-all")
        assert "None" not in told  # of Python's, which nobody types
        assert re.findall(r"^\W+ (\w+) options \W+$", told, flags=re.MULTILINE) == named
        flags = {f"--{flag.replace('_', '-')}" for part in named for flag in Config().to_dict()[part]}
        shown = {flag for flag in flags if re.search(rf"^\W {flag}\b", told, flags=re.MULTILINE)}
        assert flags - shown == {f"--{flag.replace('_', '-')}" for flag in IN_PYTHON} & flags
    assert len(set(re.findall(r"^\W (--[a-z][a-z-]*)", said("train", "--help-all"), flags=re.MULTILINE))) <= 45
    assert len(said("--help").splitlines()) < 25
    assert said("--version") == f"isgd_jax {isgd_jax.__version__}\n"


NAMES = ("done", "gone", "on", "bad", "again", "huge")


def test_runs_are_listed_watched_and_never_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that has finished, one whose process is gone, one that a living process writes, one that is damaged; one
    whose process is gone and its number used again, and one with a number that no process has."""
    line = {"event": "progress", "seconds": 90.0, "loss": 0.5, "test_loss": 0.25, "test_error": 0.125,
            "sd_uniform": 2.0, "sd_drawn": 1.0, "variance_ratio": 0.5, "share_scoring": 0.25,
            "trusted_share": 1.0}  # fmt: skip
    made = {name: RunDir.create(configure(run_dir=str(tmp_path / name))) for name in NAMES}
    for run in made.values():
        run.append(line | {"step": 100})
    made["done"].append({"event": "gate", "step": 100, "at": 50, "is_open": False, "reason": "harm"})
    made["done"].append({"event": "finished", "step": 100, "seconds": 90.0, "spent": {}})
    for name, pid in {"gone": 2**22 - 1, "on": os.getpid(), "again": os.getpid(), "huge": 2**63}.items():
        holder = {"host": socket.gethostname(), "pid": pid, "since": "now"}
        made[name].write(".holder.json", json.dumps(holder | ({"started": "before"} if name == "again" else {})))
    (tmp_path / "bad" / "config.json").write_text("{")
    (tmp_path / "odd" / "config.json").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == 0
        return capsys.readouterr().out

    listed = {row.split()[0]: row.split()[1:] for row in said("runs", str(tmp_path)).splitlines()}
    assert listed["done"] == ["finished", "100", "exact", "0.25", "12.5%", "0.25", "25%", "1.5"]
    states = {"gone": "killed", "on": "running", "bad": "damaged", "again": "killed", "huge": "killed",
              "odd": "unreadable"}  # fmt: skip
    assert {name: listed[name][0] for name in states} == states
    watched = said("watch", str(tmp_path / "done"))
    for text in ("done: finished, update 100", "equivalent plain batch", "128", "the gate was shut for 50%"):
        assert text in watched
    assert watched.endswith("\n")
    assert max(map(len, watched.splitlines())) <= 100
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_is_gone_on_with_or_diverged_is_said_to_be(tmp_path: Path) -> None:
    run = RunDir.create(configure(run_dir=str(tmp_path / "run")))
    run.append({"event": "finished", "step": 9})
    with run.alone():
        assert state_of(run, list(run.records())) == "running"
    assert state_of(run, list(run.records())) == "finished"
    run.append({"event": "diverged", "step": 9})
    assert state_of(run, list(run.records())) == "diverged"


def test_what_is_told_of_a_run_is_of_its_last_line() -> None:
    """Inline all score at refreshes, between which nobody does; a loss that is not finite has no older number."""
    lines = [{"event": "progress", "step": step, "test_loss": loss, "scores_per_second": 0.0, "workers": 1}
             for step, loss in ((0, 1.0), (10, None))]  # fmt: skip
    refresh = {"event": "refresh", "step": 0, "scored": 90}
    assert key_numbers(lines, batch_size=8).test_loss is None
    assert unusual([refresh, *lines], batch_size=8) == ["the held-out loss is not finite any more"]
    assert "no worker scores any more" in unusual([refresh | {"scored": 0}, *lines], batch_size=8)


@pytest.mark.parametrize("process", [0, 1])
def test_of_several_processes_one_tells_of_the_page(
    process: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jax.process_index", lambda: process)
    monkeypatch.setattr("isgd_jax.app.run.fit", lambda *args, **options: SimpleNamespace(stopped_by=None, run_dir="x"))
    assert ended("train") == 0
    assert ("isgd report x" in capsys.readouterr().out) == (process == 0)


@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_a_narrow_terminal_cuts_no_number_off(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"event": "progress", "step": 1_234_567, "seconds": 90_000.0, "test_loss": 0.1234, "test_error": 0.125,
            "sd_uniform": 2.0, "sd_drawn": 1.0, "share_scoring": 0.25}  # fmt: skip
    run = RunDir.create(configure(run_dir=str(tmp_path / "a-run-with-a-long-name-of-its-own")))
    run.append(line)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")  # Rich takes it for a terminal
    with pytest.raises(SystemExit):
        main(["runs", str(tmp_path)])
    said = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "1,234,567" in said
    assert max(len(row.rstrip()) for row in said.splitlines()) <= max(width, 38)
    whole = {"run", "state", "step", "mode", "held-out", "error", "variance", "scoring", "minutes", "killed", "exact",
             "1,234,567", "0.1234", "12.5%", "0.25", "25%", "1500.0"}  # fmt: skip
    assert all(word in "a-run-with-a-long-name-of-its-own" for word in set(said.split()) - whole)
    assert ("0.1234" in said) == (width >= 60)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--learning-rte", "0.1"], "--learning-rate"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--batch-size", "0"], "--batch-size must be at least 1; got 0"),
        (["train", "--mode", "sometimes"], "--mode"),
        (["train", "--dataset", "digit"], "did you mean 'digits'"),
        (["train", "--resume", "nowhere"], "nowhere is not the folder of a run: it has no config.json"),
        (["report", "nowhere"], "nowhere is not the folder of a run"),
        (["train", "--model", "no.such:thing"], "cannot import 'no.such'"),
        (["compare"], "name either --arms to train or folders to read"),
        (["compare", "--arms", "a: --mode exact"], "--out must name the folder of the study"),
        (["compare", "--arms", "a --mode exact", "--out", "x"], 'an arm is "NAME: FLAGS"'),
        (["compare", "--arms", "a: --seed 3", "--out", "x"], "--seed is the same for all arms"),
        (["compare", "--arms", "a: --mode exact", "a: --mode uniform", "--out", "x"], "two arms are called 'a'"),
        (["compare", "--arms", "a: --mixtur 3", "--out", "x"], "--mixtur"),
        (["compare", "--arms", "a:", "--out", "x", "--levels", "train_loss=1"], "needs --full-train-loss"),
        (["compare", "--arms", "a:", "--out", "x", "--run-dir", "y"], "name the folder of them all with --out"),
        (["compare", "--arms", "a:", "--out", "x", "--until-levels"], "--until-levels needs --levels"),
        (["compare", "nowhere"], "nowhere is not the folder of a study"),
        (
            ["compare", "--arms", "a:", "--out", "x", "--levels", "test_los=1"],
            "such as test_loss; got 'test_los'; did you mean test_loss?",
        ),
        (["compare", "--arms", "a: --mode uniform --mixture 0.3", "--out", "x"], "--mixture must be left out unless"),
        (["train", "--learning-rate", "nan"], "isgd: --learning-rate must be a number; got nan"),
        (["train", "--optimizer", "adam", "--momentum", "0.5"], "--momentum must be left out unless --optimizer nest"),
        (["train", "--epochs", "2", "--steps", "50"], "--steps must be left out unless --epochs None; got 50"),
        (["train", "--model", "cnn", "--hidden", "8"], "--hidden must be left out unless --model mlp; got (8,)"),
        (["train", "--refresh-share", "0.5"], "--refresh-share must be left out unless --mode relaxed; got 0.5"),
        (["train", "--mode", "uniform", "--scorer", "loss"], "--scorer must be left out unless --mode exact or --mode"),
        (
            ["train", "--mode", "uniform", "--engine", "local"],
            "--engine must be left out unless --mode exact or --mode",
        ),
        (["train", "--mode", "uniform", "--max-age", "9"], "--max-age must be left out unless --mode exact or --mode"),
        (["train", "--scorers", "2"], "--scorers must be left out unless --engine cluster; got 2"),
        (["compare", "--levels", "low", "--arms", "a:", "--out", "x"], "a level is a field and its values"),
        (["probe", "--run", "nowhere"], "nowhere is not the folder of a run"),
        (["train", "--coin", "0.5"], "isgd: --coin went in 0.2: every step draws from the proposal; use --mixture"),
        (
            ["train", "--publish-every", "5"],
            "--publish-every went in 0.2: few tuned it; in Python publish_every is set",
        ),
        (["runs", "nowhere"], "there is no folder nowhere: name the one that holds the runs"),
        (["watch", "nowhere"], "nowhere is not the folder of a run"),
        (["predict", "nowhere", "x.npy"], "nowhere is not the folder of a run"),
        (["probe", "--power=0.5"], "isgd: --power went in 0.2: "),
        (["probe", "--mode", "relaxed"], "--mode (applied to isgd probe)"),
        (["probe", "--hold", "host"], "isgd: --hold must be device, where the probe measures; got 'host'"),
        (["probe", "--mixture", "2"], "isgd: --mixture must be above 0 and at most 1; got 2.0"),
        (["train", "--engine", "local", "--train-devices", "3"], "isgd: --batch-size must be a multiple of --train-"),
        (["train", "--num-processes", "2"], "isgd: --num-processes must be left out unless --distributed; got 2"),
        (["train", "--sampler", "poisson"], "isgd: --sampler poisson went in 0.2: use stratified (the default)"),
        (["compare", "--arms", "a: --coin 0.5", "--out", "x"], "isgd: --coin went in 0.2: "),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in sentence(arguments, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_existing_run_is_left_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("keep me")
    said = sentence(["train", "--run-dir", "run", "--data-dir", "data"], capsys)
    assert "run is there already: go on with it by --resume run" in said
    assert "or name another --run-dir" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]


@pytest.mark.slow
def test_a_model_and_a_loss_of_ones_own_in_a_folder_whose_name_looks_like_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--model pkg.module:factory and --loss pkg.module:fn, found in the current folder; brackets are no markup."""
    (tmp_path / "mine.py").write_text(
        "import flax.linen as nn\nimport jax.numpy as jnp\n"
        "class Small(nn.Module):\n"
        "    classes: int\n"
        "    @nn.compact\n"
        "    def __call__(self, x):\n"
        "        return nn.Dense(self.classes)(x.reshape(-1))\n"
        "def factory(num_classes):\n"
        "    return Small(num_classes)\n"
        "def squared(outputs, example):\n"
        "    return jnp.sum(jnp.square(outputs - jnp.eye(10)[example['label']]))\n"
    )
    monkeypatch.chdir(tmp_path)
    mine = ["--model", "mine:factory", "--loss", "mine:squared", "--run-dir", "a[/b]c[bold]", "--data-dir", "data"]
    with pytest.raises(SystemExit) as exit_info:
        main(["train", *mine, *PLAIN])
    assert exit_info.value.code == 0
    assert "a[/b]c[bold]/config.json" in capsys.readouterr().out


@pytest.mark.slow
def test_from_a_run_to_the_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Two arms compared, one of the runs reported and probed: every file that is promised is there."""
    monkeypatch.chdir(tmp_path)

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_info:
            main(arguments)
        assert exit_info.value.code == 0
        return capsys.readouterr().out

    arms = ["uniform: --mode uniform", "exact: --mode exact"]
    small = [*SMALL, "--data-dir", "data", "--tensorboard"]
    out = said("compare", "--arms", *arms, "--seeds", "1", "--levels", "test_loss=1.0", "--out", "study", *small)
    assert "over the first arm's [95 %]" in out
    assert {"test_loss-updates.png", "test_loss-seconds.png", "comparison.html", "comparison.md"} <= names("study")
    assert "exact-0" in names("study")
    assert any(name.startswith("events.out") for name in names("study/exact-0"))
    assert "1/1" in said("compare", "study", "--levels", "test_loss=2.0")
    assert "mode=exact" in said("compare", "study/uniform-0", "study/exact-0")
    assert "report.html" in said("report", "study/exact-0")
    assert 'src="data:image/png' in Path("study/exact-0/report.html").read_text()
    out = said("probe", "--run", "study/exact-0", "--ages", "5", "10", "--examples", "200")
    assert "Importance sampling" in out
    assert {"norms.png", "ageing.png", "periods.png", "probe.json", "probe.html"} <= names("study/exact-0/probe")
    assert json.loads(Path("study/exact-0/probe/probe.json").read_text())["num_updates"] == 60


def names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}
