"""The readers of files, fed with damaged and arbitrary ones: what they cannot read is one sentence, never a traceback.

Small here; `make soak` tries 10,000 of each.
"""

import copy
import gzip
import io
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import small_config
from rich.console import Console

from isgd_jax.app import checkpoints, compare, data, plots, schedule, userfiles
from isgd_jax.app.commands import predict, runs, watch
from isgd_jax.app.compare import plots as compare_plots
from isgd_jax.app.config import configure
from isgd_jax.app.data import catalog, cifar10, flights, idx, spill, svhn
from isgd_jax.app.data.recipe import Recipe
from isgd_jax.app.html import run as page
from isgd_jax.app.run_dir import RunDir
from isgd_jax.app.summary import state_of
from isgd_jax.errors import DamagedFileError, IsgdError, RunInUseError

SMALL = 60

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=6,
)


class Reader(NamedTuple):
    """Files that are whole, by their path in a folder, and who reads them."""

    name: str
    files: dict[str, bytes]
    read: Callable[[Path], Any]
    """Given the folder."""


def fuzz(reader: Reader, folder: Path, *, examples: int) -> int:
    """Feed a reader, one file damaged at a time; returns how often it refused.

    Anything but our own errors and the system's is a failure.
    """
    said: list[str] = []
    write(reader, folder)

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.sampled_from(sorted(reader.files)), st.data())
    def once(name: str, drawn: st.DataObject) -> None:
        (folder / name).write_bytes(drawn.draw(damaged(reader.files[name])))
        try:
            reader.read(folder)
        except (IsgdError, OSError) as error:
            said.append(str(error).strip())
        finally:
            (folder / name).write_bytes(reader.files[name])

    once()
    assert all(said), "a refusal says something"
    return len(said)


def write(reader: Reader, folder: Path) -> None:
    for name, content in reader.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The file with bytes changed, cut, or put in; where it is JSON, lines of it with other values; or anything."""
    how = draw(st.sampled_from(["flip", "cut", "insert", "json", "json", "json", "anything"]))
    lines = as_json(content)
    if how == "json" and lines:
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = draw(changed(lines[at]))
        return b"\n".join(json.dumps(line).encode() for line in lines) + b"\n"
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if content and how in ("flip", "json"):
        return content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
    if how == "cut":
        return content[:at]
    if how == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
    return draw(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode() + b"\n"))


def as_json(content: bytes) -> list[Any]:
    """The JSON of a file, or of each of its lines; nothing, if it is of another kind."""
    try:
        return [json.loads(content)]
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in content.splitlines()]
    except ValueError:
        return []


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """JSON with one value, anywhere, made another, or left out."""
    tree = copy.deepcopy(tree)
    path = draw(st.sampled_from(list(places(tree))))
    if not path:
        return draw(VALUES)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    if draw(st.booleans()) and isinstance(parent, dict):
        del parent[path[-1]]
    else:
        parent[path[-1]] = draw(VALUES)
    return tree


def places(tree: Any, path: tuple[Any, ...] = ()) -> Any:
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


PROGRESS = {
    "event": "progress", "step": 10, "seconds": 1.5, "train_seconds": 1.0, "loss": 0.5, "test_loss": 0.4,
    "sd_uniform": 2.0, "sd_uniform_low": 1.0, "sd_uniform_high": 3.0, "sd_ideal": 1.0, "age_mean": 3.0,
    "share_updating": 0.5, "variance_ratio": 0.5, "scores_per_second_by_worker": {"a": 1.0, "b": 2.0}, "mine": 3.0,
}  # fmt: skip
RECORDS = [
    PROGRESS,
    PROGRESS | {"step": 20, "mine": 4.0},
    {"event": "refresh", "step": 8, "seconds": 1.0, "clock": 1.0, "chunk_size": 4, "arrived": [[0, 0, 3]]},
    {"event": "warning", "step": 9, "seconds": 1.0, "text": "a warning"},
    {"event": "finished", "step": 20, "seconds": 3.0, "spent": {"updating": 2.0}, "num_steps": 20},
]


def read_records(folder: Path) -> None:
    """All that a page makes of the records but the drawing, which takes too long here."""
    run = RunDir(folder)
    records = list(run.records())
    lines = [record for record in records if record["event"] == "progress"]
    page._state(records)
    page._tiles(lines, configure())
    page._progress_table(lines)
    page._spent(records)
    plots.others(lines)
    runs.rows(folder.parent)
    shown = watch.view("run", state_of(run, records), records, batch_size=8)
    Console(file=io.StringIO()).print(shown)
    study = compare.group([folder])
    compare.text(compare.rows(study, compare.common_levels(study)))
    schedule.read(run, "")


def read_figures(folder: Path) -> None:
    plots.all_figures(list(RunDir(folder).records("progress")))
    compare_plots.all_figures(compare.group([folder]))


def read_holder(folder: Path) -> None:
    run = RunDir(folder)
    state_of(run, [])
    with pytest.raises(RunInUseError):
        run._refuse_second()
    if run.holder() is None:
        raise DamagedFileError("nobody is said to write")


def read_checkpoint(folder: Path) -> None:
    """What is read is what was saved; a damaged one of two is left out, and that is told."""
    saved = checkpoints.read(folder / "checkpoints")
    assert saved is not None
    np.testing.assert_array_equal(saved.tree["x"], np.arange(3.0))
    assert saved.notes == {"cursor": saved.step}
    if saved.step != 2:
        raise DamagedFileError(saved.remarks[0])


def checkpoint_files(tmp: Path) -> dict[str, bytes]:
    """Of two checkpoints, the newer one is damaged."""
    made = checkpoints.Checkpoints(tmp / "checkpoints", identity={"data set": "abc"})
    for step in (1, 2):
        made.save(step, {"x": jnp.arange(3.0), "count": jnp.int32(4)}, {"cursor": step})
    made.close()
    return files_of(tmp / "checkpoints" / "2", tmp)


TINY = Recipe(
    name="tiny", version="1.0.0", about="Four examples.", homepage="", num_classes=2, counts={"train": 3, "test": 1},
    read=lambda files: {
        split: {"image": np.arange(2 * n, dtype=np.float32).reshape(n, 2), "label": np.zeros(n, np.int32)}
        for split, n in (("train", 3), ("test", 1))
    },
)  # fmt: skip


def read_prepared(folder: Path) -> None:
    catalog.load_recipe(TINY, data_dir=folder, prepare=False)
    catalog.load("isgd_tiny", data_dir=folder, prepare=False)


def prepared_files(tmp: Path) -> dict[str, bytes]:
    catalog.load_recipe(TINY, data_dir=tmp / "prepared")
    return files_of(tmp / "prepared", tmp / "prepared")


def files_of(folder: Path, root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


PARSE = """
import sys
from pathlib import Path
from isgd_jax.app.data.svhn import parsed
from isgd_jax.errors import ArgumentError
for line in sys.stdin:
    try:
        parsed(Path(line.rstrip("\\n")))
        print("read", flush=True)
    except ArgumentError as error:
        print("refused", error, flush=True)
"""


class MatReader:
    """`svhn.parsed` in a process that is started anew where it crashes: `svhn.read_mat` starts one for each file."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, folder: Path) -> None:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PARSE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(folder / "svhn.mat", file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            assert code < 0, f"an exception that is no refusal, exit code {code}"
            raise DamagedFileError(f"SciPy's parser crashes on it, by signal {-code}")
        if answer.startswith("refused"):
            raise DamagedFileError(answer)


def idx_file() -> bytes:
    return gzip.compress(bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(range(12)))


def cifar_file() -> bytes:
    """Two records in each file, not 10,000: the reader counts later."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = 2 * 3073
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return content.getvalue()


def flights_file() -> bytes:
    content = io.BytesIO()
    head = "year,month,day,sched_dep_time,sched_arr_time,dep_delay,arr_delay,distance,carrier,origin"
    with zipfile.ZipFile(content, "w") as archive:  # not compressed, so that what is changed is the table as well
        archive.writestr(
            "flights.csv", f"{head}\n2013,1,1,515,819,2,11,1400,UA,EWR\n2013,1,2,530,830,4,20,1416,AA,LGA\n"
        )
    return content.getvalue()


def svhn_file() -> bytes:
    content = io.BytesIO()
    scipy.io.savemat(content, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [10]], np.uint8)})
    return content.getvalue()


def npy_file(tmp: Path) -> bytes:
    np.save(tmp / "whole.npy", np.arange(5, dtype=np.float32))
    return (tmp / "whole.npy").read_bytes()


def npz_file() -> bytes:
    content = io.BytesIO()
    np.savez(content, x=np.ones((2, 3), np.float32), y=np.ones((2, 1), np.int32))
    return content.getvalue()


def one(name: str, content: bytes, read: Callable[[Path], Any]) -> Reader:
    return Reader(name, {name: content}, read)


def mapped_file() -> bytes:
    crc32 = zlib.crc32(np.arange(6, dtype=np.int32).tobytes())
    array = {"file": "x.npy", "dtype": "int32", "shape": [6], "start": 128, "crc32": crc32}
    return json.dumps({"format": 1, "arrays": {"x": array}}).encode()


def inputs_file() -> bytes:
    made = data.from_arrays({"x": np.ones((3, 2), np.float32)}, {"x": np.ones((1, 2), np.float32)})
    return made.inputs.to_json().encode()


def read_scores(folder: Path) -> np.ndarray:
    return userfiles.numbers(str(folder / "scores.npy"), 5, name="static_scores")


CONFIG = json.dumps(small_config("run").to_dict()).encode()
ENVIRONMENT = json.dumps({"fingerprint": "abc", "packages": {"jax": "0.10"}, "devices": ["cpu:0"]}).encode()
LINES = b"\n".join(json.dumps(record).encode() for record in RECORDS) + b"\n"
HOLDER = json.dumps({"host": socket.gethostname(), "pid": 1, "started": "x", "since": "now"}).encode()

READERS: dict[str, Callable[[Path], Reader]] = {
    "config.json": lambda tmp: one("config.json", CONFIG, lambda at: RunDir(at).read_config()),
    "environment.json": lambda tmp: one("environment.json", ENVIRONMENT, lambda at: page._environment(RunDir(at))),
    "metrics.jsonl": lambda tmp: one("metrics.jsonl", LINES, read_records),
    "inputs.json": lambda tmp: one("inputs.json", inputs_file(), data.read_inputs),
    "study.json": lambda tmp: one("study.json", b'{"arms": ["uniform", "exact"]}', compare.read),
    ".holder.json": lambda tmp: one(".holder.json", HOLDER, read_holder),
    "checkpoints": lambda tmp: Reader("checkpoints", checkpoint_files(tmp), read_checkpoint),
    "prepared": lambda tmp: Reader("prepared", prepared_files(tmp), read_prepared),
    "spilled.json": lambda tmp: one("spilled.json", mapped_file(), spill._mapped),
    "scores.npy": lambda tmp: one("scores.npy", npy_file(tmp), read_scores),
    "in.npy": lambda tmp: one("in.npy", npy_file(tmp), lambda at: predict.read_inputs(at / "in.npy")),
    "in.npz": lambda tmp: one("in.npz", npz_file(), lambda at: predict.read_inputs(at / "in.npz")),
    "images.idx": lambda tmp: one("images.idx", idx_file(), lambda at: idx.read_idx(at / "images.idx")),
    "cifar.tar.gz": lambda tmp: one("cifar.tar.gz", cifar_file(), lambda at: cifar10.read_archive(at / "cifar.tar.gz")),
    "flights.zip": lambda tmp: one("flights.zip", flights_file(), lambda at: flights.read_table(at / "flights.zip")),
    "svhn.mat": lambda tmp: one("svhn.mat", svhn_file(), MatReader()),
}  # fmt: skip


def fed(tmp_path: Path, name: str) -> tuple[Reader, Path]:
    """A reader, and the folder to feed it in, with what else it needs."""
    reader, folder = READERS[name](tmp_path), tmp_path / "at"
    folder.mkdir()
    if name == "metrics.jsonl":
        (folder / "config.json").write_bytes(CONFIG)
    if name == "spilled.json":
        np.save(folder / "x.npy", np.arange(6, dtype=np.int32))
    if name == "checkpoints":
        shutil.copytree(tmp_path / "checkpoints", folder / "checkpoints")
    return reader, folder


@pytest.mark.slow
@pytest.mark.usefixtures("failed_reads")
@pytest.mark.parametrize("name", READERS)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, name: str) -> None:
    reader, folder = fed(tmp_path, name)
    write(reader, folder)
    reader.read(folder)  # the whole one is taken
    assert fuzz(reader, folder, examples=SMALL) > 0


@pytest.mark.slow
def test_figures_are_drawn_of_whatever_is_read(tmp_path: Path) -> None:
    metrics, folder = fed(tmp_path, "metrics.jsonl")
    fuzz(metrics._replace(read=read_figures), folder, examples=20)


def test_a_mat_file_on_which_scipys_parser_crashes_is_refused(tmp_path: Path) -> None:
    """One bit makes a tag of MATLAB's format that SciPy takes for an address: the process ended by SIGSEGV."""
    content = bytearray(svhn_file())
    (tmp_path / "whole.mat").write_bytes(content)
    assert svhn.read_mat(tmp_path / "whole.mat")["label"].tolist() == [1, 0]
    content[185] ^= 1
    (tmp_path / "damaged.mat").write_bytes(content)
    with pytest.raises(
        IsgdError, match=r"damaged.mat is damaged: SciPy's parser crashes on it|damaged.mat is cut short"
    ):
        svhn.read_mat(tmp_path / "damaged.mat")
