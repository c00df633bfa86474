"""How a data set is made from its original files: what they are, where they are found, how they are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

__all__ = ["RawFile", "Reader", "Recipe", "Splits", "hold_out"]

Splits: TypeAlias = dict[str, dict[str, np.ndarray]]
"""Split by name, each a dict of arrays: the one input, and ``label``."""

Reader: TypeAlias = Callable[[Mapping[str, Path]], Splits]
"""From the original files, by name, to arrays."""


@dataclass(frozen=True)
class RawFile:
    """An original file. ``sha256`` is that of the file at ``url``; copies elsewhere may be compressed differently."""

    name: str
    url: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Recipe:
    """One named data set."""

    name: str
    version: str
    """Changes whenever what is written changes."""
    about: str
    homepage: str
    num_classes: int
    counts: Mapping[str, int]
    """Examples a split."""
    read: Reader
    files: tuple[RawFile, ...] = ()
    folders: tuple[Path, ...] = ()
    """Where a package of the operating system puts the files."""
    package: str | None = None
    """A Python package that has the files in its folder ``data``."""
    per_coordinate: bool = False
    """Standardise each coordinate of the input by itself."""


def hold_out(arrays: Mapping[str, np.ndarray], count: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Splits off ``count`` examples, the same ones for ever: (kept, held out), both in their old order.

    The raw stream of a bit generator is the one thing that NumPy promises to keep from version to version.

    Args:
        arrays: with the leading axis of ``label``.
        count: how many to hold out; which ones depends on nothing but the number of examples.
    """
    size = len(arrays["label"])
    held = np.zeros(size, bool)
    held[np.argsort(np.random.Philox(key=0).random_raw(size), kind="stable")[:count]] = True
    return {k: a[~held] for k, a in arrays.items()}, {k: a[held] for k, a in arrays.items()}
