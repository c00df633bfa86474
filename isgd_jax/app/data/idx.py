"""MNIST and Fashion-MNIST, from the four ``idx`` files that both come in."""

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from isgd_jax.app.data.recipe import RawFile, Recipe, Splits
from isgd_jax.errors import ArgumentError

__all__ = ["FASHION_MNIST", "MNIST", "read_idx"]

_UINT8 = 0x08
_MOST_PACKED = 1032
"""Bytes that one byte of deflate can stand for, at most."""
_PIECE = 1 << 20
_PARTS = {"train": "train", "test": "t10k"}
_NAMES = [f"{part}-{kind}-ubyte.gz" for part in _PARTS.values() for kind in ("images-idx3", "labels-idx1")]


def read_idx(path: Path) -> np.ndarray:
    """An array of uint8 from a gzipped idx file: two zero bytes, type, rank, sizes (big-endian), data.

    No more is unpacked than the header says there is.

    Raises:
      ValueError: the file is damaged, or no idx file of bytes; it is named.
    """
    try:
        with gzip.open(path) as file:
            begin = file.read(4)
            if len(begin) < 4 or begin[:3] != bytes([0, 0, _UINT8]) or not begin[3]:
                raise ArgumentError(
                    f"{path} is not an idx file of bytes: expected it to begin with 0, 0, 8 and a rank of at least 1, "
                    f"got {begin!r}"
                )
            rank = begin[3]
            sizes = file.read(4 * rank)
            if len(sizes) < 4 * rank:
                raise ArgumentError(f"{path} is damaged: its header is cut short")
            shape = struct.unpack(f">{rank}I", sizes)
            size = math.prod(shape)
            if size > _MOST_PACKED * path.stat().st_size:
                raise ArgumentError(f"{path} is damaged: its header says {shape} bytes, more than fit into it")
            content = _read_at_most(file, size + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ArgumentError(f"{path} is cut short or damaged ({error}); fetch it again") from error
    if len(content) != size:
        got = "more" if len(content) > size else len(content)
        raise ArgumentError(f"{path} is damaged: expected {shape} bytes after its header, got {got}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_at_most(file: gzip.GzipFile, size: int) -> bytearray:
    """Piece by piece: asked for all at once, room for all of it would be taken before anything is read."""
    content = bytearray()
    while len(content) < size:
        piece = file.read(min(size - len(content), _PIECE))
        if not piece:
            break
        content += piece
    return content


def _read(files: Mapping[str, Path]) -> Splits:
    return {split: _read_split(files, part) for split, part in _PARTS.items()}


def _read_split(files: Mapping[str, Path], part: str) -> dict[str, np.ndarray]:
    images, labels = (files[f"{part}-{name}-ubyte.gz"] for name in ("images-idx3", "labels-idx1"))
    return {"image": read_idx(images)[..., None], "label": read_idx(labels).astype(np.int32)}


def _files(base: str, *sha256: str) -> tuple[RawFile, ...]:
    """Checksums in the order of `_NAMES`, as the TFDS catalog lists them."""
    return tuple(RawFile(name, base + name, digest) for name, digest in zip(_NAMES, sha256, strict=True))


MNIST = Recipe(
    name="mnist",
    version="1.0.0",
    about="Handwritten digits of 28x28 pixels (LeCun, Cortes, Burges).",
    homepage="http://yann.lecun.com/exdb/mnist/",
    num_classes=10,
    counts={"train": 60_000, "test": 10_000},
    read=_read,
    files=_files(
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
)

FASHION_MNIST = Recipe(
    name="fashion_mnist",
    version="1.0.0",
    about="Photographs of clothes, 28x28 pixels (Xiao, Rasul, Vollgraf 2017).",
    homepage="https://github.com/zalandoresearch/fashion-mnist",
    num_classes=10,
    counts={"train": 60_000, "test": 10_000},
    read=_read,
    files=_files(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
    folders=(Path("/usr/share/datasets/fashion-mnist"),),  # Debian's dataset-fashion-mnist
)
