import contextlib
import errno
import json
import multiprocessing
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from problems import small_config

from isgd_jax.app import files
from isgd_jax.app.config import configure
from isgd_jax.app.files import write_named, write_whole
from isgd_jax.app.run_dir import RunDir
from isgd_jax.errors import ArgumentError, RunInUseError

APP = Path(files.__file__).parent


def test_a_new_run_never_writes_into_an_old_one(tmp_path: Path) -> None:
    config = configure(run_dir=str(tmp_path / "run"))
    RunDir.create(config)
    with pytest.raises(FileExistsError, match="go on with it by resume="):
        RunDir.create(config)


def test_the_configuration_comes_back(tmp_path: Path) -> None:
    config = configure(run_dir=str(tmp_path / "run"), hidden=(3,), seed=5)
    assert RunDir.create(config).read_config() == config


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: it has no config.json"):
        RunDir(tmp_path).read_config()


def test_a_folder_of_runs_names_them(tmp_path: Path) -> None:
    RunDir.create(small_config(tmp_path / "runs" / "one"))
    with pytest.raises(FileNotFoundError, match=r"runs is not the folder of a run: .*; it holds the runs .*runs/one$"):
        RunDir(tmp_path / "runs").read_config()


def test_what_decides_the_parameters_may_not_change_on_resume(tmp_path: Path) -> None:
    run = RunDir.create(configure(run_dir=str(tmp_path / "run")))
    run.check_resumable(configure(run_dir="elsewhere", steps=9999, log_every=7))
    with pytest.raises(ValueError, match=r"learning_rate=0.5, but the run was started with"):
        run.check_resumable(configure(learning_rate=0.5))


def test_a_resumed_run_is_that_of_its_last_configuration(tmp_path: Path) -> None:
    run = RunDir.create(small_config(tmp_path / "run", steps=40))
    run.check_resumable(small_config(tmp_path / "run", steps=70))
    run.write_config(small_config(tmp_path / "run", steps=70))
    assert run.read_config().training.steps == 70


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    run = RunDir.create(configure(run_dir=str(tmp_path / "run")))
    run.append({"event": "progress", "step": 1})
    with run.metrics.open("a") as file:
        file.write('{"event": "progr')
    assert [record["step"] for record in run.records()] == [1]


def test_resuming_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    run = RunDir.create(configure(run_dir=str(tmp_path / "run")))
    for step in (10, 20, 30):
        run.append({"event": "progress", "step": step})
    run.forget_after(20)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [10, 20]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir.create(configure(run_dir=str(tmp_path / "run")))
    run.write("note.txt", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*run/note.txt \(No space left on device\): make room there"):
        run.write("note.txt", "new and longer")
    assert (run.path / "note.txt").read_text() == "old"
    run.metrics.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write .*run/metrics.jsonl \(No space left on device\): make room there"):
        run.append({"event": "progress", "step": 1})


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    run = RunDir.create(configure(run_dir=str(tmp_path / "run")))
    run.path.rename(tmp_path / "elsewhere")
    for write in (lambda: run.write("note.txt", "new"), lambda: run.append({"event": "progress", "step": 1})):
        with pytest.raises(
            FileNotFoundError, match=r"cannot write .* \(No such file or directory\): put its folder back"
        ):
            write()


def test_metrics_are_json_that_any_reader_takes(tmp_path: Path) -> None:
    run = RunDir.create(configure(run_dir=str(tmp_path / "run")))
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.append({"event": "progress", "step": 1, "loss": float("nan")})


def test_a_folder_one_may_not_write_to_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot make the folder .*file/run \(Not a directory\): name one"):
        RunDir.create(configure(run_dir=str(tmp_path / "file" / "run")))
    monkeypatch.setattr(Path, "mkdir", forbidden)  # as root every folder is writable
    with pytest.raises(
        PermissionError, match=r"cannot make the folder .*run \(Permission denied\): name one where you"
    ):
        RunDir.create(configure(run_dir=str(tmp_path / "run")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"[1, 2]", "config.json is damaged: expected a JSON object, got a list"),
        ("config.json", b'{"mode": ', "config.json is damaged, no JSON can be read from it"),
        ("config.json", b"\xff\xfe", "config.json is damaged, no JSON can be read from it"),
        ("config.json", b"[" * 100_000, "config.json is damaged, no JSON can be read from it"),
        (
            "metrics.jsonl",
            b'{"event": "progress", "step": 0}\nnull\n',
            "metrics.jsonl, line 2 is damaged: expected a JSON",
        ),
        ("metrics.jsonl", b'{"event": "progress"}\n', "metrics.jsonl, line 1: expected an event and its step"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    run = RunDir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArgumentError, match=re.escape(message)):
        list(run.records()) if name == "metrics.jsonl" else run.read_config()


def test_a_line_may_hold_any_separator_that_json_allows(tmp_path: Path) -> None:
    """U+2028 and form feeds end a line for str.splitlines, not for a file."""
    (tmp_path / "metrics.jsonl").write_text('{"event": "warning", "step": 1, "text": "a\u2028b"}\n')
    assert [record["text"] for record in RunDir(tmp_path).records()] == ["a\u2028b"]


def create(path: str, at: float) -> str:
    while time.time() < at:
        pass
    try:
        RunDir.create(configure(run_dir=path))
        return "made"
    except FileExistsError:
        return "refused"


@pytest.mark.slow
def test_of_two_that_create_a_folder_at_once_one_does_and_one_is_refused(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for trial in range(20):
            asked = (str(tmp_path / str(trial)), time.time() + 0.02)
            assert sorted(pool.starmap(create, [asked, asked], 1)) == ["made", "refused"]


def test_what_a_kill_left_of_a_folder_that_was_being_made_is_no_run(tmp_path: Path) -> None:
    for name in (".lock", ".holder.json", ".0123.partial"):
        (tmp_path / name).touch()
    RunDir.create(configure(run_dir=str(tmp_path)))


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    run = RunDir.create(configure(run_dir=str(tmp_path / "run")))
    told = rf"run is in use: process {os.getpid()} on \S+ has been writing to it since \d{{4}}-.*; wait for it"
    with run.alone():
        for _ in range(2):
            with pytest.raises(RunInUseError, match=told), RunDir(run.path).alone():
                pass
        (run.path / ".holder.json").write_text("cut sho")
        with pytest.raises(RunInUseError, match="is in use: another process is writing to it"), run.alone():
            pass
    with run.alone():  # free again
        assert [path.name for path in run.files()] == ["config.json"]


def test_a_file_that_is_written_takes_the_place_of_a_link(tmp_path: Path) -> None:
    run = RunDir.create(configure(run_dir=str(tmp_path / "run")))
    (tmp_path / "precious").write_text("precious")
    (run.path / "loss.png").symlink_to(tmp_path / "precious")
    run.write("loss.png", "a figure")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (run.path / "loss.png").read_text() == "a figure"
    assert not (run.path / "loss.png").is_symlink()


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.jsonl", "checkpoints", "checkpoints/9/x"])
def test_reading_a_run_follows_no_link_out_of_it(tmp_path: Path, name: str) -> None:
    run = RunDir.create(configure(run_dir=str(tmp_path / "run")))
    (tmp_path / "secret").write_text("{}")
    (run.path / name).parent.mkdir(parents=True, exist_ok=True)
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(tmp_path / "secret")
    reads = {
        "config.json": run.read_config,
        "environment.json": run.environment,
        "metrics.jsonl": lambda: list(run.records()),
    }
    with pytest.raises(ArgumentError, match=rf"{name} is a link that leads out of the run's folder, to .*secret"):
        reads.get(name, run.own_checkpoints)()


def test_a_run_whose_checkpoints_or_lock_lie_elsewhere_is_not_gone_on_with(tmp_path: Path) -> None:
    """There old checkpoints would be deleted, and by some versions of filelock a file be emptied."""
    config = configure(run_dir=str(tmp_path / "run"))
    run = RunDir.create(config)
    (tmp_path / "checkpoints" / "20").mkdir(parents=True)
    run.checkpoints.symlink_to(tmp_path / "checkpoints")
    with pytest.raises(ArgumentError, match=r"checkpoints is a link that leads out of the run's folder"):
        run.check_resumable(config)
    (tmp_path / "precious").write_text("precious")
    (run.path / ".lock").unlink()
    (run.path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ArgumentError, match=r"\.lock is a link, and a lock must be a file of its own"), run.alone():
        pass
    assert (tmp_path / "precious").read_text() == "precious"


def test_what_a_person_named_is_written_whole_and_a_pipe_stays_one(tmp_path: Path) -> None:
    assert write_named(tmp_path / "page", "a name that is no UTF-8: \udcff").read_text().endswith(r": \udcff")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_named(tmp_path / "pipe", "content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    with pytest.raises(OSError, match=r"cannot write .*\(Is a directory\)"):
        write_named(tmp_path, "content")


def test_what_keeps_a_file_from_being_written_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the disk refuses to remove what was never made, as one that can only be read does."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name, reason, advice in (
        ("file/page", "Not a directory", "move the file away that has the name of its folder"),
        ("x" * 300, "File name too long", "give it a shorter name"),
        ("folder", "Is a directory", "move the folder of this name away"),
    ):
        for write in (write_named, write_whole):
            with pytest.raises(OSError, match=rf"cannot write .*{name} \({reason}\): {advice}, then go on"):
                write(tmp_path / name, "content")

    def refused(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(OSError, match=r"cannot write .*page \(Read-only file system\): make room there, or make it"):
        write_named(tmp_path / "page", "content")


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_run_whose_folder_is_removed_writes_no_more_into_what_stands_there(tmp_path: Path, is_replaced: bool) -> None:
    config = configure(run_dir=str(tmp_path / "run"))
    run, other = RunDir.create(config), RunDir(tmp_path / "run")
    with contextlib.ExitStack() as stack:
        with run.alone():
            run.append({"event": "progress", "step": 1})
            shutil.rmtree(run.path)
            run.path.mkdir()
            if is_replaced:
                stack.enter_context(RunDir.create(config).alone())
                (run.path / ".holder.json").write_text("of another process")
            before = {path.name: path.read_bytes() for path in run.path.iterdir()}
            for write in (lambda: run.append({"event": "progress", "step": 2}), lambda: run.write("x", "y")):
                with pytest.raises(
                    FileNotFoundError, match=r"run \(it was removed or replaced while this run wrote to it"
                ):
                    write()
        assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before
        assert list(other.records()) == []


def test_one_function_writes_the_files_of_the_command() -> None:
    """Whole or not at all, with the file's name where the disk is full; what is spilled has its own."""
    other = re.compile(r"\.write_(text|bytes)\(|open\([^)]*[\"'][wxa]b?[\"']|(np\.save|savefig)\(\w*(path|file|out)")
    sources = {str(file.relative_to(APP)): file.read_text() for file in APP.rglob("*.py")}
    found = {name: len(other.findall(source)) for name, source in sources.items() if other.search(source)}
    assert found == {"files.py": 2, "run_dir.py": 1, "data/spill.py": 1}


def test_links_within_a_run_are_followed(tmp_path: Path) -> None:
    run = RunDir.create(configure(run_dir=str(tmp_path / "run")))
    (run.path / "config.json").rename(run.path / "renamed")
    (run.path / "config.json").symlink_to("renamed")
    (tmp_path / "elsewhere").symlink_to(run.path)
    assert RunDir(tmp_path / "elsewhere").read_config() == run.read_config()


@pytest.mark.parametrize("changes", [{"steps": 50}, {"epochs": 3.0}])
def test_a_schedule_of_the_whole_length_is_not_resumed_with_another(tmp_path: Path, changes: dict[str, float]) -> None:
    begun = small_config(tmp_path / "run", steps=40, schedule="cosine")
    run = RunDir.create(begun)
    run.check_resumable(begun)
    with pytest.raises(ArgumentError, match=r"schedule=cosine is made for the whole length .* steps=40; got "):
        run.check_resumable(small_config(tmp_path / "run", **({"steps": 40, "schedule": "cosine"} | changes)))


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *args: "20300101-000000")
    made = [RunDir.create(configure(mode="uniform")).path.name for _ in range(3)]
    first = "digits-uniform-20300101-000000"
    assert made == [first, f"{first}-2", f"{first}-3"]
    (tmp_path / "runs").rename("before")
    (tmp_path / "runs").symlink_to("nowhere")  # looking for a free name beneath it would never end
    with pytest.raises(FileExistsError, match=r"cannot make the folder runs/digits.*: runs is none; name another"):
        RunDir.create(configure(mode="uniform"))
