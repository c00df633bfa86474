"""Training sets larger than memory: written to a folder once, and mapped from there.

Guarantees:
  - an array is there only whole: it is written under a name of its own, and ``spilled.json``, written last, says what
    belongs together, of which type and shape, and with which checksum;
  - of several processes that write at once one does, the others wait and read what it wrote; where files cannot be
    locked each writes, and the last one's files stay;
  - a full disk is told before a byte is written, where the disk can be asked for room;
  - what is read is checked: a file that was changed, cut or emptied is named.
"""

import contextlib
import errno
import io
import json
import logging
import math
import operator
import os
import shutil
import urllib.parse
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from isgd_jax.app.data.checks import blocks, held
from isgd_jax.app.data.sources import check_source, gathered, stacked
from isgd_jax.app.locks import locked
from isgd_jax.errors import ArgumentError

__all__ = ["CannotSpillError", "spilled"]

_MANIFEST = "spilled.json"
_FORMAT = 1
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_log = logging.getLogger(__name__)


class CannotSpillError(OSError):
    """The folder cannot be written to: the data set itself is whole."""


def spilled(source: Any, folder: Path) -> dict[str, np.ndarray]:
    """Like `sources.read`, for what is larger than memory: arrays that are mapped from ``folder``.

    They have the types that `from_arrays` gives them, which then copies nothing.

    Args:
      source: what is written, if it is not there yet.
      folder: a folder of its own; files of these names in it are replaced.

    Raises:
      CannotSpillError: the folder cannot be written to, or has not the space.
      ImportError: ``filelock`` is not installed.
      TypeError: as `sources.read`, or as `from_arrays` of an array.
      ValueError: as there; or what the folder holds is damaged, or another data set.
    """
    check_source(source)
    found = _mapped(folder)
    if found is None:
        with _told_if_unwritable(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            found = _mapped(folder)  # by whoever had the lock before
            if found is None:
                _write(source, folder)
                found = _mapped(folder)
    if found is None:
        raise ArgumentError(f"{folder} was emptied while it was read: try again")
    _check_same(source, found, folder)
    return found


def _mapped(folder: Path) -> dict[str, np.ndarray] | None:
    """The arrays in a folder, each checked; None if nothing has been written there, or by an earlier version."""
    path = folder / _MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            return None
        return {name: _map_one(folder / one["file"], one) for name, one in content["arrays"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ArgumentError(f"{path} or what it names is damaged ({reason}): delete {folder} and try again") from error


def _map_one(path: Path, one: dict[str, Any]) -> np.ndarray:
    dtype, shape, start = np.dtype(one["dtype"]), tuple(map(operator.index, one["shape"])), int(one["start"])
    if dtype.hasobject:
        raise ArgumentError(f"{path} is said to hold Python objects")
    expected = start + _nbytes(dtype, shape)
    size = path.stat().st_size
    if size != expected:
        raise ArgumentError(f"{path} has {size} bytes, expected {expected}")
    array = np.memmap(path, dtype, mode="r", offset=start, shape=shape)
    if _checksum(array) != one["crc32"]:
        raise ArgumentError(f"{path} has been changed since it was written: its checksum is another one")
    return array


def _checksum(array: np.ndarray) -> int:
    value = 0
    count = len(array) if array.size else 0  # a damaged manifest may tell of any number of rows of nothing
    for rows in blocks(count, rows=1024):
        value = zlib.crc32(_bytes(array[rows]), value)
    return value


def _nbytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _write(source: Any, folder: Path) -> None:
    """Every array under a name of its own, then all renamed, then the manifest."""
    with contextlib.ExitStack() as stack:
        files: dict[str, _File] = {}
        for rows, values in stacked(source):
            block = {name: held(f"{name!r} from row {rows.start}", array) for name, array in values.items()}
            for name, array in block.items():
                if rows.start == 0:
                    shape = (len(source), *array.shape[1:])
                    files[name] = stack.enter_context(_File(folder, name, shape, array.dtype))
                files[name].append(array)
        with _told_if_unwritable(folder):
            for file in files.values():
                file.finish()
            content = {"format": _FORMAT, "arrays": {name: file.told() for name, file in files.items()}}
            manifest = stack.enter_context(_temporary(folder, _MANIFEST))
            manifest.write(json.dumps(content, indent=2).encode() + b"\n")
            _sync(manifest)
            os.replace(manifest.name, folder / _MANIFEST)


class _File(contextlib.AbstractContextManager):
    """One array on its way to disk, as .npy; left half-way, it is removed."""

    def __init__(self, folder: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.path = folder / f"{urllib.parse.quote(name, safe=' ')}.npy"
        self.shape, self.dtype, self.crc32 = shape, dtype, 0

    def __enter__(self) -> "_File":
        # NumPy has no name for bfloat16 in a file: there it is raw bytes, and the manifest says what they are.
        described = self.dtype.str if self.dtype.kind != "V" else f"<V{self.dtype.itemsize}"
        header = {"descr": described, "fortran_order": False, "shape": self.shape}
        with _told_if_unwritable(self.path.parent), contextlib.ExitStack() as stack:
            self._file = stack.enter_context(_temporary(self.path.parent, self.path.name))
            np.lib.format.write_array_header_1_0(self._file, header)
            self.start = self._file.tell()
            _reserve(self._file, self.start + _nbytes(self.dtype, self.shape))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def append(self, array: np.ndarray) -> None:
        """The next rows. Ordinary writes: those into a mapped file end by a signal where the disk is full."""
        if (array.dtype, array.shape[1:]) != (self.dtype, self.shape[1:]):
            raise ArgumentError(
                f"expected items of one type and shape, got {self.dtype}{self.shape[1:]} and then "
                f"{array.dtype}{array.shape[1:]} for {self.path.name}"
            )
        content = _bytes(array)
        with _told_if_unwritable(self.path.parent):
            self._file.write(content)
        self.crc32 = zlib.crc32(content, self.crc32)

    def finish(self) -> None:
        """Give the file its name."""
        _sync(self._file)
        os.replace(self._file.name, self.path)

    def told(self) -> dict[str, Any]:
        """What the manifest has to say of it."""
        kept = {"file": self.path.name, "dtype": self.dtype.name, "shape": list(self.shape)}
        return kept | {"start": self.start, "crc32": self.crc32}


@contextlib.contextmanager
def _temporary(folder: Path, name: str) -> Iterator[io.BufferedWriter]:
    """A file that nobody else writes, gone at the end unless it was renamed."""
    path = folder / f".{name}.{uuid.uuid4().hex}.partial"
    try:
        with path.open("xb") as file:
            yield file
    finally:
        with contextlib.suppress(OSError):  # what kept it from being written is told, not that it is not there
            path.unlink()


def _sync(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())


def _reserve(file: io.BufferedWriter, size: int) -> None:
    """Ask the disk for the room at once, where it can be asked."""
    if not hasattr(os, "posix_fallocate"):
        return
    file.flush()
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise OSError(error.errno, f"{os.strerror(error.errno or 0)}, of {size:,} bytes that are needed") from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, where files can be locked; the others wait."""
    lock = locked(
        folder / ".lock", when_busy=lambda: _log.info("waiting for another process, which is writing to %s", folder)
    )
    with contextlib.ExitStack() as stack:
        with _told_if_unwritable(folder):
            stack.enter_context(lock)
        yield


@contextlib.contextmanager
def _told_if_unwritable(folder: Path) -> Iterator[None]:
    try:
        yield
    except CannotSpillError:
        raise
    except OSError as error:
        room = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            room = f", and {shutil.disk_usage(folder).free:,} bytes of space are free there; make room"
        reason = " ".join(str(error).split())
        raise CannotSpillError(
            f"cannot write the training set to {folder} ({reason}){room}; name another folder, or hold it in memory"
        ) from error


def _check_same(source: Any, found: dict[str, np.ndarray], folder: Path) -> None:
    """The folder holds this source: as many rows, and the same ones at three places."""
    places = sorted({0, len(source) // 2, len(source) - 1})
    wanted = {name: held(repr(name), array) for name, array in gathered(source, places).items()}
    is_same = set(found) == set(wanted) and all(
        len(found[name]) == len(source)
        and found[name].dtype == array.dtype
        and np.array_equal(found[name][places], array)
        for name, array in wanted.items()
    )
    if not is_same:
        raise ArgumentError(f"{folder} holds another data set: delete it and try again, or name another folder")
