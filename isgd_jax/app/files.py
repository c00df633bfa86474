"""Files that are written whole or not at all, and JSON that is read with care: a person may have changed it."""

import contextlib
import errno
import json
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isgd_jax.errors import DamagedFileError

__all__ = ["make_folder", "parsed", "read_json", "write_named", "write_whole", "writing"]


_ADVICE = {
    errno.ENOENT: "put its folder back",
    errno.EISDIR: "move the folder of this name away",
    errno.ENOTDIR: "move the file away that has the name of its folder",
    errno.ENAMETOOLONG: "give it a shorter name",
}


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there.

    Raises:
        OSError: it cannot be made, or a file or a link that leads nowhere has its name; the message says what to do.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise FileExistsError(f"cannot make the folder {path}: {error.filename} is none; name another") from error
    except OSError as error:
        raise type(error)(
            f"cannot make the folder {path} ({error.strerror or error}): name one where you may write"
        ) from error


def write_whole(target: Path, content: str | bytes) -> Path:
    """Write a file whole or not at all; where there is a link of this name, the file takes its place.

    It is written beside, brought to the disk, and renamed.

    Args:
        target: the file, in a folder that is there.
        content: of text, what UTF-8 cannot say (bytes of a file's name that are none) is written as an escape.

    Raises:
        OSError: the folder cannot be written to; what was there stays.
    """
    partial = target.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with writing(target):
            with partial.open("xb") as file:
                file.write(_encoded(content))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
    finally:
        with contextlib.suppress(OSError):  # what kept it from being written is told, not that it is not there
            partial.unlink()
    return target


def write_named(target: Path, content: str | bytes) -> Path:
    """Write a file that a person named: as `write_whole` does, but a pipe or device of this name stays one.

    Raises:
        OSError: it cannot be written.
    """
    with writing(target):
        is_special = target.exists() and not target.is_file()  # of a name that is too long, this raises
        if is_special:
            target.write_bytes(_encoded(content))
    return target if is_special else write_whole(target, content)


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """A disk says only that it is full, not where: name the file, and what to do.

    Raises:
        OSError: what was raised inside, of the same type.
    """
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "make room there, or make it writable")
        raise type(error)(f"cannot write {file} ({error.strerror or error}): {advice}, then go on") from error


def _encoded(content: str | bytes) -> bytes:
    return content.encode(errors="backslashreplace") if isinstance(content, str) else content


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        DamagedFileError: it is damaged, or holds something else; the message names the file.
        OSError: it cannot be read.
    """
    return parsed(file.read_bytes(), str(file))


def parsed(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DamagedFileError: it is damaged, or something else; ``where`` names the file.
    """
    try:
        found = json.loads(content, parse_int=_whole, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            f"{where} is damaged, no JSON can be read from it ({error}): restore it, or start anew"
        ) from error
    if not isinstance(found, dict):
        raise DamagedFileError(f"{where} is damaged: expected a JSON object, got a {type(found).__name__}")
    return found


def _whole(digits: str) -> int:
    """A whole number of at most 64 bits: what we write has no larger ones, and floats cannot hold them."""
    if not -(2**63) <= int(digits) < 2**64:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(float(digits)):
        raise ValueError(f"the number {digits[:20]} is beyond what floats can hold")
    return float(digits)
