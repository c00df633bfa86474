"""Training sets on disk: whole or not at all, one writer at a time, checked when read; every failure one sentence."""

import errno
import json
import multiprocessing
import os
from pathlib import Path

import filelock
import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax.app import data
from isgd_jax.app.data import spill
from isgd_jax.app.data.spill import CannotSpillError, spilled


class Rows:
    """Row i has the features i, i, i and the label i % 2."""

    def __init__(self, size, dtype=np.float32, more=0):
        self.size, self.dtype, self.more, self.read = size, dtype, more, 0

    def __len__(self):
        return self.size

    def __getitems__(self, indices):
        self.read += len(indices)
        return [{"x": np.full(3, i + self.more, self.dtype), "label": i % 2} for i in indices]


def is_mapped(array):
    while array is not None and not isinstance(array, np.memmap):
        array = getattr(array, "base", None)
    return array is not None


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, ">f4", jnp.bfloat16])
def test_rows_are_written_once_and_mapped_as_they_would_be_held(tmp_path, dtype):
    size = 200 if dtype in (np.uint8, jnp.bfloat16) else 5000
    made = data.from_source(Rows(size, dtype), Rows(4, dtype), spill=tmp_path / "deep" / "spilled")
    in_memory = data.from_source(Rows(size, dtype), Rows(4, dtype))
    assert made.fingerprint == in_memory.fingerprint
    assert {key: array.dtype for key, array in made.train.items()} == {
        key: array.dtype for key, array in in_memory.train.items()
    }
    assert all(is_mapped(array) for array in made.train.values())
    assert names(tmp_path / "deep" / "spilled") == [".lock", "label.npy", "spilled.json", "x.npy"]
    again = Rows(size, dtype)
    assert data.from_source(again, Rows(4, dtype), spill=tmp_path / "deep" / "spilled").fingerprint == made.fingerprint
    assert again.read == 3  # is it this source? its first, middle and last row


def test_the_files_are_numpys_own(tmp_path):
    spilled(Rows(10), tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy")[:, 0], np.arange(10))


def test_files_may_be_read_by_whom_the_mask_lets(tmp_path):
    spilled(Rows(10), tmp_path)
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "x.npy").stat().st_mode & 0o777 == 0o666 & ~mask


def test_another_source_is_told(tmp_path):
    spilled(Rows(10), tmp_path)
    for other in (Rows(9), Rows(10, more=1), Rows(10, np.float16)):
        with pytest.raises(ValueError, match=rf"{tmp_path} holds another data set: delete it"):
            spilled(other, tmp_path)


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "gone", "grown"])
def test_a_file_that_was_changed_is_named(tmp_path, damage):
    spilled(Rows(1000), tmp_path)
    path = tmp_path / "x.npy"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1 if damage == "bit" else 0
    content = {"cut": content[:-4], "empty": b"", "grown": content + b"0"}.get(damage, content)
    path.write_bytes(content)
    if damage == "gone":
        path.unlink()
    with pytest.raises(ValueError, match=rf"x\.npy.*: delete {tmp_path} and try again"):
        spilled(Rows(1000), tmp_path)


OF_TEXT = {"file": "x.npy", "dtype": "int32", "shape": ["x", 10**9], "start": 128, "crc32": 0}
"""The product of such a shape is a text of gigabytes."""


@pytest.mark.parametrize(
    "content",
    [
        "", "[1]", "{}", '{"format": 1, "arrays": {"x": {}}}', "[" * 100_000,
        json.dumps({"format": 1, "arrays": {"x": OF_TEXT}}),
    ],
)  # fmt: skip
def test_a_damaged_list_of_the_files_is_named(tmp_path, content):
    spilled(Rows(10), tmp_path)
    (tmp_path / "spilled.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/spilled.json or what it names is damaged .*: delete "):
        spilled(Rows(10), tmp_path)


def test_a_list_that_tells_of_endless_rows_of_nothing_is_refused_at_once(tmp_path):
    spilled(Rows(4), tmp_path)
    manifest = json.loads((tmp_path / "spilled.json").read_text())
    x = manifest["arrays"]["x"]
    x |= {"shape": [10**12, 0], "start": (tmp_path / x["file"]).stat().st_size, "crc32": 0}
    (tmp_path / "spilled.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="another data set"):
        spilled(Rows(4), tmp_path)


def test_files_of_python_objects_are_not_mapped(tmp_path):
    spilled(Rows(10), tmp_path)
    listed = (tmp_path / "spilled.json").read_text()
    (tmp_path / "spilled.json").write_text(listed.replace("float32", "object"))
    with pytest.raises(ValueError, match="is said to hold Python objects"):
        spilled(Rows(10), tmp_path)


def test_what_an_earlier_version_wrote_is_written_anew(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros([10, 3], np.float32))
    np.save(tmp_path / "label.npy", np.zeros(10, np.int32))
    assert spilled(Rows(10), tmp_path)["x"][:, 0].tolist() == [*range(10)]
    whole = json.loads((tmp_path / "spilled.json").read_text())
    (tmp_path / "spilled.json").write_text(json.dumps(whole | {"format": 0}))
    assert spilled(Rows(10), tmp_path)["x"][:, 0].tolist() == [*range(10)]


def test_a_source_that_fails_half_way_leaves_nothing(tmp_path):
    class Failing(Rows):
        def __getitems__(self, indices):
            if indices[0] >= 4096:
                raise OSError(errno.EIO, "Input/output error", "theirs")
            return super().__getitems__(indices)

    with pytest.raises(OSError, match="theirs") as caught:
        spilled(Failing(5000), tmp_path)
    assert not isinstance(caught.value, CannotSpillError)  # it is not our folder
    assert names(tmp_path) == [".lock"]


def test_items_that_change_their_type_are_told(tmp_path):
    class Changing(Rows):
        def __getitems__(self, indices):
            return [{"x": 1 if i < 4096 else 1.5, "label": 0} for i in indices]

    with pytest.raises(ValueError, match=r"one type and shape, got int32\(\) and then float32\(\) for x.npy"):
        spilled(Changing(5000), tmp_path)
    assert names(tmp_path) == [".lock"]


def test_keys_that_are_no_names_of_files(tmp_path):
    class Odd(Rows):
        def __getitems__(self, indices):
            return [{"../x/y": float(i), "": i} for i in indices]

    found = spilled(Odd(10), tmp_path / "spilled")
    assert found["../x/y"].tolist() == [*range(10)]
    assert names(tmp_path) == ["spilled"]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    def full(file, start, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CannotSpillError, match=rf"{tmp_path} \(.*No space left.* 12,\d+ bytes .* free there; make"):
        spilled(Rows(1000), tmp_path)
    assert names(tmp_path) == [".lock"]


def test_a_disk_that_cannot_be_asked_for_room_is_written_to(tmp_path, monkeypatch):
    def cannot(file, start, size):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    assert len(spilled(Rows(1000), tmp_path)["x"]) == 1000


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(CannotSpillError, match=r"cannot write the training set to .*taken.*name another folder"):
        spilled(Rows(10), tmp_path / "taken" / "below")


def test_a_folder_that_was_written_is_read_without_writing(tmp_path, monkeypatch):
    spilled(Rows(10), tmp_path)
    monkeypatch.setattr(spill, "_alone", lambda folder: pytest.fail("asked for the lock"))
    assert len(spilled(Rows(10), tmp_path)["x"]) == 10


def test_where_files_cannot_be_locked_each_writes(tmp_path, monkeypatch):
    def cannot(self, **_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", cannot)
    assert len(spilled(Rows(10), tmp_path)["x"]) == 10


def _load(together, folders, found):
    for folder in folders:
        together.wait()
        try:
            rows = data.from_source(Rows(30_000), Rows(4), spill=Path(folder)).train["x"][:, 0]
            found.put("good" if (rows == np.arange(30_000)).all() else "wrong")
        except Exception as error:
            found.put(f"{type(error).__name__}: {error}")


@pytest.mark.slow
def test_processes_that_write_at_once_all_get_the_whole_data_set(tmp_path):
    context = multiprocessing.get_context("spawn")
    together, found = context.Barrier(3), context.Queue()
    folders = [str(tmp_path / str(trial)) for trial in range(3)]
    all_three = [context.Process(target=_load, args=(together, folders, found)) for _ in range(3)]
    for each in all_three:
        each.start()
    assert [found.get(timeout=120) for _ in range(9)] == ["good"] * 9
    for each in all_three:
        each.join(timeout=60)
    assert [names(tmp_path / trial) for trial in "012"] == [[".lock", "label.npy", "spilled.json", "x.npy"]] * 3
