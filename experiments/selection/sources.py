"""Whose code is this? Windows of the sources of Python's standard library, with the package as label.

A data set that every machine has, not used while the library was developed: the choice of packages, windows and
features stood in a commit before anything was trained on it. Test windows come from files of which none is trained on,
so that style must carry over and not the file; which files those are is decided by a hash of their names.

Sources differ between versions of Python: figures name theirs.
"""

import hashlib
import sysconfig
from pathlib import Path

import numpy as np

from isgd_jax.app import data

__all__ = ["NAME", "load"]

NAME = "python_sources"
PACKAGES = (
    "asyncio",
    "ctypes",
    "email",
    "encodings",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "xml",
)
WINDOW = 256
"""Bytes of an example; windows do not overlap."""
FEATURES = 512
"""Buckets that the trigrams of a window are counted in."""
MOST = {"train": 2_500, "test": 625}
"""Windows of one package at most: tables of `encodings` would be half of all."""
_ODD = np.array([0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35], np.uint32)
_SEED = 15


def load() -> data.Dataset:
    """Square roots of counts of hashed trigrams, [512] a window, and ten packages.

    Raises:
        FileNotFoundError: this Python came without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[tuple[np.ndarray, int]]] = {"train": [], "test": []}
    for label, package in enumerate(PACKAGES):
        files = sorted((root / package).rglob("*.py"))
        if not files:
            raise FileNotFoundError(f"expected sources of {package} in {root}, found none: take another Python")
        kept = [file for file in files if _is_held_out(file.relative_to(root))]
        # Some packages of newer Pythons are so few files that none may be held out: the largest is then.
        kept = kept or [max(files, key=lambda file: file.stat().st_size)]
        for split, held_out in (("train", False), ("test", True)):
            parts = [_windows(file) for file in files if (file in kept) == held_out]
            windows = np.concatenate(parts) if parts else np.zeros((0, WINDOW), np.uint8)
            chosen = np.random.default_rng(_SEED).permutation(len(windows))[: MOST[split]]
            found[split].append((windows[np.sort(chosen)], label))
    train, test = ({"x": _features(w), "label": y} for w, y in map(_joined, (found["train"], found["test"])))
    return data.from_arrays(train, test, name=NAME, num_classes=len(PACKAGES), per_coordinate=True)


def _is_held_out(path: Path) -> bool:
    """One file in five."""
    return hashlib.sha256(path.as_posix().encode()).digest()[0] % 5 == 0


def _windows(file: Path) -> np.ndarray:
    """The whole windows of a file, [n, 256]."""
    text = np.frombuffer(file.read_bytes(), np.uint8)
    return text[: len(text) // WINDOW * WINDOW].reshape(-1, WINDOW)


def _joined(parts: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    labels = np.concatenate([np.full(len(windows), label, np.int32) for windows, label in parts])
    return np.concatenate([windows for windows, _ in parts]), labels


def _features(windows: np.ndarray) -> np.ndarray:
    """Trigrams hashed by multiplication (Dietzfelbinger et al. 1997) and counted, [n, 512]."""
    wide = windows.astype(np.uint32)
    hashed = wide[:, :-2] * _ODD[0] + wide[:, 1:-1] * _ODD[1] + wide[:, 2:] * _ODD[2]
    buckets = (hashed >> np.uint32(32 - FEATURES.bit_length() + 1)).astype(np.int64)
    rows = np.arange(len(windows))[:, None] * FEATURES
    counts = np.bincount((rows + buckets).reshape(-1), minlength=len(windows) * FEATURES)
    return np.sqrt(counts.reshape(-1, FEATURES)).astype(np.float32)
