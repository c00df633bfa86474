"""The readers of files, fed with damaged and arbitrary ones: what they cannot read is one sentence, never a traceback.

Small here; `make soak` tries 10,000 of each.
"""

import copy
import gzip
import io
import json
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.io
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import small_config

from isgd_jax.app import compare, data, plots, schedule, userfiles
from isgd_jax.app.config import configure
from isgd_jax.app.data import cifar10, flights, idx, spill, svhn
from isgd_jax.app.html import run as page
from isgd_jax.app.run_dir import RunDir
from isgd_jax.errors import IsgdError

SMALL = 60

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=6,
)


class Reader(NamedTuple):
    """A file that is whole, and who reads it."""

    name: str
    content: bytes
    read: Callable[[Path], Any]
    """Given the folder."""


def fuzz(reader: Reader, folder: Path, *, examples: int) -> int:
    """Feed a reader; returns how often it refused. Anything but our own errors and the system's is a failure."""
    said: list[str] = []

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(damaged(reader.content))
    def once(content: bytes) -> None:
        (folder / reader.name).write_bytes(content)
        try:
            reader.read(folder)
        except (IsgdError, OSError) as error:
            said.append(str(error).strip())

    once()
    assert all(said), "a refusal says something"
    return len(said)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The file with bytes changed, cut, or put in; where it is JSON, lines of it with other values; or anything."""
    how = draw(st.sampled_from(["flip", "cut", "insert", "json", "json", "json", "anything"]))
    lines = as_json(content)
    if how == "json" and lines:
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = draw(changed(lines[at]))
        return b"\n".join(json.dumps(line).encode() for line in lines) + b"\n"
    at = draw(st.integers(0, len(content) - 1))
    if how in ("flip", "json"):
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
    "event": "progress", "step": 10, "seconds": 1.5, "loss": 0.5, "test_loss": 0.4, "sd_uniform": 2.0,
    "sd_uniform_low": 1.0, "sd_uniform_high": 3.0, "sd_ideal": 1.0, "age_mean": 3.0, "share_updating": 0.5,
    "variance_ratio": 0.5, "scores_per_second_by_worker": {"a": 1.0, "b": 2.0}, "mine": 3.0,
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
    if not (folder / "config.json").exists():
        RunDir.create(small_config(folder / "new"))
        (folder / "new" / "config.json").rename(folder / "config.json")
    schedule.read(run, "")


def read_figures(folder: Path) -> None:
    plots.all_figures(list(RunDir(folder).records("progress")))


def read_mapped(folder: Path) -> None:
    np.save(folder / "x.npy", np.arange(6, dtype=np.int32))
    spill._mapped(folder)


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


def readers(tmp: Path) -> list[Reader]:
    def scores(at: Path) -> np.ndarray:
        return userfiles.numbers(str(at / "scores.npy"), 5, name="static_scores")

    environment = json.dumps({"fingerprint": "abc", "packages": {"jax": "0.10"}, "devices": ["cpu:0"]}).encode()
    records = b"\n".join(json.dumps(record).encode() for record in RECORDS) + b"\n"
    made = data.from_arrays({"x": np.ones((3, 2), np.float32)}, {"x": np.ones((1, 2), np.float32)})
    crc32 = zlib.crc32(np.arange(6, dtype=np.int32).tobytes())
    mapped = {
        "format": 1,
        "arrays": {"x": {"file": "x.npy", "dtype": "int32", "shape": [6], "start": 128, "crc32": crc32}},
    }
    return [
        Reader("config.json", json.dumps(small_config("run").to_dict()).encode(), lambda at: RunDir(at).read_config()),
        Reader("environment.json", environment, lambda at: page._environment(RunDir(at))),
        Reader("metrics.jsonl", records, read_records),
        Reader("inputs.json", made.inputs.to_json().encode(), data.read_inputs),
        Reader("study.json", b'{"arms": ["uniform", "exact"]}', compare.read),
        Reader("spilled.json", json.dumps(mapped).encode(), read_mapped),
        Reader("scores.npy", npy_file(tmp), scores),
        Reader("images.idx", idx_file(), lambda at: idx.read_idx(at / "images.idx")),
        Reader("cifar.tar.gz", cifar_file(), lambda at: cifar10.read_archive(at / "cifar.tar.gz")),
        Reader("flights.zip", flights_file(), lambda at: flights.read_table(at / "flights.zip")),
    ]  # fmt: skip


NAMES = ["config.json", "environment.json", "metrics.jsonl", "inputs.json", "study.json", "spilled.json", "scores.npy",
         "images.idx", "cifar.tar.gz", "flights.zip"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, name: str) -> None:
    reader = next(reader for reader in readers(tmp_path) if reader.name == name)
    (tmp_path / "at").mkdir()
    (tmp_path / "at" / name).write_bytes(reader.content)
    reader.read(tmp_path / "at")  # the whole one is taken
    assert fuzz(reader, tmp_path / "at", examples=SMALL) > 0


@pytest.mark.slow
def test_figures_are_drawn_of_whatever_is_read(tmp_path: Path) -> None:
    metrics = next(reader for reader in readers(tmp_path) if reader.name == "metrics.jsonl")
    fuzz(metrics._replace(read=read_figures), tmp_path, examples=20)


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
