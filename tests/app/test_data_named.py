"""Data sets by name: originals found or fetched whole, prepared whole, read back; every failure one sentence."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from isgd_jax.app import data
from isgd_jax.app.data import files, prepare
from isgd_jax.app.data.catalog import load_recipe
from isgd_jax.app.data.digits import DIGITS
from isgd_jax.app.data.idx import FASHION_MNIST, MNIST, read_idx
from isgd_jax.app.data.recipe import RawFile, hold_out

DEBIAN = FASHION_MNIST.folders[0]


@pytest.fixture(autouse=True)
def _temporary_files_stay_in_the_tests_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))


def test_hold_out_is_the_same_for_ever_and_keeps_the_order():
    kept, held = hold_out({"label": np.arange(10)}, 3)
    assert held["label"].tolist() == [0, 2, 9]
    assert kept["label"].tolist() == [1, 3, 4, 5, 6, 7, 8]


def is_mapped(array):
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


# ---- digits: the embedded default


def test_digits_is_there_offline_and_the_same_when_read_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(files, "_downloaded", lambda *_: pytest.fail("asked the network"))
    made = data.load("digits")
    assert (made.name, made.num_classes, made.train["image"].shape) == ("digits", 10, (1437, 8, 8, 1))
    assert (made.test["image"].shape, made.train["image"].dtype) == ((360, 8, 8, 1), np.uint8)
    assert made.train["image"].max() == 16
    assert made.fingerprint == "7dbbdd8cda9c9eb7e3025310eb0af2eff0b82a25475b1f830b0d722cf653051f"
    monkeypatch.setattr(prepare, "_prepare", lambda *_, **__: pytest.fail("prepared twice"))
    assert data.load("digits", data_dir=tmp_path / "tfds").fingerprint == made.fingerprint
    assert capfd.readouterr() == ("", "")  # no bars, no announcements


def test_many_shards_keep_the_order(tmp_path, monkeypatch):
    whole = data.load("digits")
    monkeypatch.setattr(prepare, "_SHARD_BYTES", 30_000)
    assert data.load("digits", data_dir=tmp_path / "many").fingerprint == whole.fingerprint
    assert len(list(tmp_path.glob("many/isgd_digits/1.0.0/*train*"))) == 4


@pytest.mark.slow
def test_tensorflow_is_not_imported(tmp_path):
    program = f"""
import sys, isgd_jax.app.data as data
assert not {{"tensorflow_datasets", "sklearn"}} & set(sys.modules), "the import alone must stay light"
data.load("digits", data_dir={str(tmp_path)!r})
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)


# ---- the original files


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def raw(tmp_path):
    """Four tiny files of MNIST's format."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for part, n in (("train", 5), ("t10k", 3)):
        images = np.random.default_rng(n).integers(0, 256, [n, 28, 28], np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8))
    return folder


TINY = dataclasses.replace(FASHION_MNIST, counts={"train": 5, "test": 3}, folders=())


def test_idx_files_through_the_door_and_back(raw, tmp_path):
    made = load_recipe(TINY, data_dir=tmp_path / "tfds", raw_dir=raw)
    np.testing.assert_array_equal(made.train["image"][..., 0], read_idx(raw / "train-images-idx3-ubyte.gz"))
    assert made.test["label"].tolist() == [0, 1, 2]


def test_files_are_found_where_a_package_puts_them(raw, tmp_path):
    recipe = dataclasses.replace(TINY, folders=(tmp_path / "elsewhere", raw))
    assert len(load_recipe(recipe, data_dir=tmp_path / "tfds")) == 5


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; those in ``promised`` are said to be longer than they are."""

    promised: ClassVar[dict[str, int]] = {}

    def log_message(self, *_):
        pass

    def send_header(self, name, value):
        more = self.promised.get(Path(self.path).name, 0) if name == "Content-Length" else 0
        super().send_header(name, str(int(value) + more) if more else value)


@pytest.fixture
def server(raw, monkeypatch):
    """The tiny files at loopback addresses, with their true checksums: (the recipe, the handler)."""
    monkeypatch.setenv("NO_PROXY", "*")
    handler = type("Handler", (Quiet,), {"promised": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=raw)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield served(raw, f"http://127.0.0.1:{running.server_port}/"), handler
        finally:
            running.shutdown()
            thread.join()


def served(raw, base):
    """The recipe with its files at other addresses, and their true checksums."""
    return dataclasses.replace(
        TINY,
        files=tuple(
            RawFile(file.name, base + file.name, hashlib.sha256((raw / file.name).read_bytes()).hexdigest())
            for file in TINY.files
        ),
    )


NOWHERE = "http://127.0.0.1:9/"


def test_files_are_downloaded_once(server, raw, tmp_path, capfd):
    recipe, _ = server
    downloads = tmp_path / "downloads"
    found = files.locate(recipe, raw_dir=None, downloads=downloads)
    assert sorted(path.name for path in downloads.iterdir()) == sorted(found)
    assert {name: path.read_bytes() for name, path in found.items()} == {
        name: (raw / name).read_bytes() for name in found
    }
    assert files.locate(served(raw, NOWHERE), raw_dir=None, downloads=downloads) == found
    assert capfd.readouterr() == ("", "")


def test_a_downloaded_file_that_was_damaged_is_fetched_anew(server, raw, tmp_path):
    recipe, _ = server
    path = files.locate(recipe, raw_dir=None, downloads=tmp_path / "downloads")["t10k-labels-idx1-ubyte.gz"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConnectionError, match=r"t10k-labels-idx1-ubyte.gz is not whole on this machine"):
        files.locate(served(raw, NOWHERE), raw_dir=None, downloads=tmp_path / "downloads")
    files.locate(recipe, raw_dir=None, downloads=tmp_path / "downloads")
    assert path.read_bytes() == (raw / path.name).read_bytes()


def test_another_file_at_the_address_leaves_nothing(server, raw, tmp_path):
    recipe, _ = server
    for file in recipe.files:
        (raw / file.name).write_bytes((raw / file.name).read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1.* gave another file .* the download was cut short"):
        files.locate(recipe, raw_dir=None, downloads=tmp_path / "downloads")
    assert not list((tmp_path / "downloads").iterdir())


def test_a_download_cut_short_leaves_what_came_before(server, tmp_path):
    recipe, handler = server
    last = recipe.files[-1].name
    handler.promised[last] = 10
    with pytest.raises(ConnectionError, match=rf"{last} .* not to the file's end .* raw_dir"):
        files.locate(recipe, raw_dir=None, downloads=tmp_path / "downloads")
    assert sorted(path.name for path in (tmp_path / "downloads").iterdir()) == sorted(
        file.name for file in recipe.files[:-1]
    )


def test_a_folder_that_takes_no_downloads_is_told(server, tmp_path):
    recipe, _ = server
    (tmp_path / "taken").touch()
    with pytest.raises(OSError, match=r"cannot write train-images-idx3-ubyte.gz into .*taken.*another data_dir"):
        files.locate(recipe, raw_dir=None, downloads=tmp_path / "taken" / "below")


def test_no_network_is_told_with_the_files_to_bring(raw, tmp_path):
    with pytest.raises(ConnectionError, match=r"put train-images-idx3-ubyte.gz, .* into a folder .* raw_dir"):
        load_recipe(served(raw, NOWHERE), data_dir=tmp_path)


@pytest.mark.parametrize("damage", ["cut", "not gzip", "not idx", "short inside", "not bytes"])
def test_damaged_files_are_told_and_leave_nothing_prepared(raw, tmp_path, damage):
    path = raw / "train-images-idx3-ubyte.gz"
    content = {
        "cut": path.read_bytes()[:-100],
        "not gzip": b"<html>",
        "not idx": gzip.compress(b"P5"),
        "short inside": gzip.compress(gzip.decompress(path.read_bytes())[:-1]),
        "not bytes": gzip.compress(bytes([0, 0, 13, 1]) + bytes(8)),
    }[damage]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}.*(damaged|not an idx file)"):
        load_recipe(TINY, data_dir=tmp_path / "tfds", raw_dir=raw)
    assert not list((tmp_path / "tfds").glob("isgd_*/*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes([0, 0, 8, 0]), "a rank of at least 1"),
        (bytes([0, 0, 8, 3]) + b"\xff" * 12 + bytes(64), "more than fit into it"),  # 2^96 bytes
        (bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(1 << 24), r"expected \(9,\) bytes after its header, got more"),
        (bytes([0, 0, 8, 2, 0, 0, 0, 9]), "its header is cut short"),
    ],
)
def test_idx_headers_that_lie_are_told(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(content + b"\0"))
    with pytest.raises(ValueError, match=rf"{path}.*{message}"):
        read_idx(path)


def test_no_more_is_unpacked_than_the_header_says(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 9]) + bytes(1 << 27)))
    tracemalloc.start()
    with pytest.raises(ValueError, match="damaged"):
        read_idx(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 22


def test_files_of_another_data_set_are_told(raw, tmp_path):
    with pytest.raises(ValueError, match=r"mnist: expected {'train': 60000, 'test': 10000} examples"):
        load_recipe(MNIST, data_dir=tmp_path, raw_dir=raw)


def test_labels_out_of_range_are_told_before_anything_is_written(raw, tmp_path):
    write_idx(raw / "train-labels-idx1-ubyte.gz", np.array([0, 1, 2, 3, 10], np.uint8))
    message = "train in its original files: expected labels from 0 to 9, got 0 to 10"
    with pytest.raises(ValueError, match=message):
        load_recipe(TINY, data_dir=tmp_path / "tfds", raw_dir=raw)
    assert not list((tmp_path / "tfds").glob("isgd_*/*"))


# ---- names and folders


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fashion_mnits", r"did you mean 'fashion_mnist'\?"),
        ("imagine", r"known are digits, fashion_mnist, mnist, .* prepared as ArrayRecord in"),
    ],
)
def test_unknown_names_are_told(name, message):
    with pytest.raises(ValueError, match=message):
        data.load(name)


def test_a_wrong_raw_dir_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        data.load("mnist", raw_dir=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"expected the files train-images-idx3-ubyte.gz, .* in raw_dir"):
        data.load("mnist", raw_dir=tmp_path)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device")])
def test_a_data_dir_that_cannot_be_written_is_told(tmp_path, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(prepare._Builder, "_shard_iterators_per_split", refuse)
    with pytest.raises(OSError, match=rf"cannot write digits into data_dir .*{error.strerror}.*TFDS_DATA_DIR"):
        data.load("digits", data_dir=tmp_path / "tfds")
    assert not list((tmp_path / "tfds" / "isgd_digits").iterdir())


def test_the_writer_of_array_records_may_say_runtime_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("write() failed: No space left on device;\n writing")

    monkeypatch.setattr(prepare._Builder, "_shard_iterators_per_split", refuse)
    with pytest.raises(OSError, match=r"cannot write digits into data_dir .*No space left on device; writing"):
        data.load("digits", data_dir=tmp_path / "tfds")


def test_a_user_without_a_home_folder_is_told(monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(FileNotFoundError, match=r"no home folder, so ~/tensorflow_datasets is nowhere; .* data_dir"):
        data.load("digits")


def test_a_copy_on_disk_is_mapped_and_the_same(tmp_path):
    made = data.load("digits", data_dir=tmp_path, on_disk=True)
    assert is_mapped(made.train["image"])
    assert made.fingerprint == data.load("digits", data_dir=tmp_path).fingerprint


def test_damages_of_a_prepared_set_are_told_when_it_is_copied_too(tmp_path):
    data.load("digits", data_dir=tmp_path)
    path = tmp_path / "isgd_digits" / "1.0.0" / "isgd_digits-train.array_record-00000-of-00001"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cannot be read .* delete that folder and try again"):
        data.load("digits", data_dir=tmp_path, on_disk=True)


def test_a_file_in_place_of_the_data_dir_is_told(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(OSError, match="cannot write digits into data_dir"):
        data.load("digits", data_dir=tmp_path / "taken" / "below")


@pytest.mark.slow
def test_a_preparation_killed_half_way_is_not_read_as_whole(tmp_path):
    program = f"""
import os
from isgd_jax.app import data
from isgd_jax.app.data import prepare
write = prepare._examples
def killed(arrays, rows):
    for row, example in write(arrays, rows):
        if len(rows) == 360 and row == 100:
            os.kill(os.getpid(), 9)
        yield row, example
prepare._examples = killed
data.load("digits", data_dir={str(tmp_path)!r})
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == -9
    assert list(tmp_path.glob("isgd_digits/*1.0.0*"))  # it had begun
    assert not (tmp_path / "isgd_digits" / "1.0.0").exists()
    assert len(data.load("digits", data_dir=tmp_path)) == 1437


@pytest.mark.slow
def test_two_processes_may_prepare_at_once(tmp_path):
    program = f"""
import sys
from isgd_jax.app import data
from isgd_jax.app.data import prepare
write = prepare._Builder.download_and_prepare
def together(self, **options):
    print("ready", file=sys.__stdout__, flush=True)
    sys.stdin.readline()
    write(self, **options)
prepare._Builder.download_and_prepare = together
assert len(data.load("digits", data_dir={str(tmp_path)!r})) == 1437
"""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    for each in both:
        assert each.stdout.readline() == "ready\n"  # both found nothing prepared, and stand before writing
    for each in both:
        each.stdin.write("\n")
        each.stdin.flush()
    assert [each.communicate(timeout=120)[1] for each in both] == ["", ""]
    assert [each.returncode for each in both] == [0, 0]


def test_the_loser_of_a_race_reads_what_the_winner_wrote(tmp_path, monkeypatch):
    shards = prepare._Builder._shard_iterators_per_split

    def overtaken(self, manager):
        monkeypatch.setattr(prepare._Builder, "_shard_iterators_per_split", shards)
        prepare._Builder(self.recipe, self.splits, tmp_path).download_and_prepare(file_format="array_record")
        return shards(self, manager)

    monkeypatch.setattr(prepare._Builder, "_shard_iterators_per_split", overtaken)
    assert len(data.load("digits", data_dir=tmp_path)) == 1437
    assert [path.name for path in (tmp_path / "isgd_digits").iterdir()] == ["1.0.0"]


@pytest.mark.parametrize(
    "file", ["isgd_digits-train.array_record-00000-of-00001", "dataset_info.json", "features.json"]
)
def test_prepared_files_cut_short_are_told(tmp_path, file):
    data.load("digits", data_dir=tmp_path)
    path = tmp_path / "isgd_digits" / "1.0.0" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"cannot be read .* delete that folder and try again"):
        data.load("digits", data_dir=tmp_path)


def test_a_prepared_set_of_another_size_is_told(tmp_path):
    data.load("digits", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"expected {'train': 9, 'test': 360} examples in"):
        load_recipe(dataclasses.replace(DIGITS, counts={"train": 9, "test": 360}), data_dir=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN.is_dir(), reason=f"Debian's package dataset-fashion-mnist is not installed in {DEBIAN}")
def test_fashion_mnist_from_debians_files(tmp_path):
    made = data.load("fashion_mnist", data_dir=tmp_path)
    assert (made.train["image"].shape, made.test["image"].shape) == ((60_000, 28, 28, 1), (10_000, 28, 28, 1))
    assert np.bincount(made.train["label"]).tolist() == [6000] * 10
    mean, std = made.statistics["image"]
    np.testing.assert_allclose((mean / 255, std / 255), (0.2860, 0.3530), atol=1e-4)  # as published
    assert made.fingerprint == "916e220ebc2337d62b0eb93ec05a89f2dc61a7ad8d6d9e31d5633eef74c799c1"
