"""Files of numbers that a user brings: read as they are, or refused by name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isgd_jax.app.userfiles import numbers


@pytest.mark.parametrize("dtype", ["f4", "f8", ">f8", "i8", "u1", "f2"])
def test_numbers_are_read_as_float32(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.arange(4).astype(dtype))
    found = numbers(str(tmp_path / "a.npy"), 4, name="static_scores")
    assert (found.dtype, found.tolist()) == (np.float32, [0, 1, 2, 3])


def header(shape: str) -> bytes:
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        b"PK\x03\x04nonsense",
        b"\x93NUMPY\x01\x00",
        header("(4,)") + bytes(31),
        header(f"({2**62},)"),
        header("(4,"),
        np.ones(4) + 1j,
        np.ones(4).astype("m8[s]"),
        np.ones(4, bool),
        np.array(["1"] * 4),
        np.array([1, None, {}, 2], object),
        np.zeros(4, [("a", "f8")]),
        np.ones([4, 1]),
        np.ones(()),
        np.ones(0),
    ],
    ids=lambda content: f"{len(content)} bytes" if isinstance(content, bytes) else None,
)
def test_files_of_something_else_are_refused_by_name(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "scores.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(ValueError, match="static_scores: expected 4 numbers, one for each") as caught:
        numbers(str(path), 4, name="static_scores")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_archives_and_missing_files_are_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "several.npz", a=np.ones(4))
    with pytest.raises(ValueError, match=r"several.npz is an archive of arrays: save the one with numpy.save"):
        numbers(str(tmp_path / "several.npz"), 4, name="example_weights")
    with pytest.raises(FileNotFoundError, match=r"example_weights: there is no file .*none.npy"):
        numbers(str(tmp_path / "none.npy"), 4, name="example_weights")


@pytest.mark.parametrize("values", [[1e300, 1, 1, 1], [-1, 1, 1, 1], [np.inf, 1, 1, 1], [np.nan, 1, 1, 1]])
def test_numbers_out_of_range_are_told(tmp_path: Path, values: list[float]) -> None:
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match=r"expected finite numbers of at least 0 in .*a.npy"):
        numbers(str(tmp_path / "a.npy"), 4, name="static_scores")
