"""What the user brings beside the data: numbers an example, and functions by name. Checked before the first step."""

import importlib.machinery
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from isgd_jax.errors import ArgumentError

__all__ = ["code_named", "numbers"]

_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def code_named(values: Mapping[str, Any]) -> list[str]:
    """Which modules a configuration names as ``pkg.module:name``, and where they would be imported from.

    Nothing is imported: of a module in a package the package is looked up.

    Args:
        values: of a configuration, nested or not.

    Returns:
        A line for each, such as ``--model my_model:Net imports my_model from /home/me/my_model.py``.
    """
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += code_named(value)
        elif isinstance(value, str) and _REFERENCE.fullmatch(value):
            module = value.partition(":")[0]
            lines.append(f"--{name.replace('_', '-')} {value} imports {module} from {_origin(module)}")
    return lines


def _origin(module: str) -> str:
    """Where Python would take a module from, the current folder first."""
    root, path = module.partition(".")[0], sys.path
    if os.getcwd() not in path:
        path = [os.getcwd(), *path]
    found = importlib.machinery.PathFinder.find_spec(root, path)
    if found is None:
        return "nowhere: it is not there"
    return found.origin or ", ".join(found.submodule_search_locations or ["an unknown place"])


def numbers(path: str, num_examples: int, *, name: str, allow_negative: bool = False) -> np.ndarray:
    """The ``num_examples`` finite numbers in a .npy file, as float32.

    Args:
        path: the file, as `numpy.save` writes it.
        num_examples: how many numbers there must be, one for each training example.
        name: of the option, as messages give it.
        allow_negative: whether numbers may be less than 0.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else; the message begins with ``name``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: there is no file {path}")
    expected = f"{name}: expected {num_examples} numbers, one for each training example"
    with open(path, "rb") as file:
        begin = file.read(6)
    if begin.startswith(b"PK"):
        raise ArgumentError(f"{expected}, but {path} is an archive of arrays: save the one with numpy.save, as .npy")
    if begin != np.lib.format.MAGIC_PREFIX:
        raise ArgumentError(f"{expected}, but {path} is no .npy file: it begins with {begin!r}")
    try:
        with np.errstate(over="raise"):
            found = np.lib.format.open_memmap(path, mode="r")  # a header may lie about the size
    except Exception as error:  # NumPy's parser of headers raises whatever it stumbles over
        reason = " ".join(str(error).split())
        raise ArgumentError(f"{expected}, but {path} is no whole .npy file of numbers ({reason})") from error
    if found.shape != (num_examples,) or found.dtype.kind not in "iuf":
        raise ArgumentError(f"{expected}, got {found.dtype}{list(found.shape)} in {path}")
    with np.errstate(over="ignore"):  # told below
        values = np.array(found, np.float32)
    if not np.isfinite(values).all() or not (allow_negative or (values >= 0).all()):
        raise ArgumentError(f"{name}: expected finite numbers{'' if allow_negative else ' of at least 0'} in {path}")
    return values
