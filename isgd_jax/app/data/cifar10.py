"""CIFAR-10, from its binary archive: nothing is unpickled."""

import gzip
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from isgd_jax.app.data.recipe import RawFile, Recipe, Splits
from isgd_jax.errors import ArgumentError

__all__ = ["CIFAR10", "read_archive"]

_ARCHIVE = "cifar-10-binary.tar.gz"
_FOLDER = "cifar-10-batches-bin"
_MEMBERS = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
_RECORD = 1 + 3 * 32 * 32
_RECORDS = 10_000
"""In each file of the archive."""


def read_archive(path: Path) -> Splits:
    """Records of one byte of label and three planes of 32x32 pixels: red, green, blue.

    Raises:
      ValueError: the archive is damaged, or another one; it is named.
    """
    try:
        with tarfile.open(path, "r:gz") as archive:
            content = {split: b"".join(_member(archive, name) for name in names) for split, names in _MEMBERS.items()}
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ArgumentError(f"{path} is cut short or damaged ({error}); fetch it again") from error
    except LookupError as error:
        raise ArgumentError(f"{path} is not CIFAR-10's binary archive: {error.args[0]}") from error
    return {split: _records(path, data) for split, data in content.items()}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.getmember(f"{_FOLDER}/{name}")
    opened = archive.extractfile(member) if member.isreg() else None  # a link may lead to itself
    if opened is None or member.size > _RECORDS * _RECORD:
        raise LookupError(f"{member.name} is no file of at most {_RECORDS:,} records")
    return opened.read()


def _records(path: Path, content: bytes) -> dict[str, np.ndarray]:
    if not content or len(content) % _RECORD:
        raise ArgumentError(f"{path} is damaged: expected records of {_RECORD} bytes, got {len(content)} bytes in all")
    records = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return {"image": images, "label": records[:, 0].astype(np.int32)}


def _read(files: Mapping[str, Path]) -> Splits:
    return read_archive(files[_ARCHIVE])


CIFAR10 = Recipe(
    name="cifar10",
    version="1.0.0",
    about="Small photographs of ten kinds of things, 32x32 pixels in colour (Krizhevsky 2009).",
    homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
    num_classes=10,
    counts={"train": 50_000, "test": 10_000},
    read=_read,
    files=(
        RawFile(
            _ARCHIVE,
            f"https://www.cs.toronto.edu/~kriz/{_ARCHIVE}",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
)
