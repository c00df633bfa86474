"""What is asked of arrays before they are a data set; each failure is one sentence."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

Arrays: TypeAlias = Mapping[str, np.ndarray]
"""A split: named arrays with one leading axis, the examples. ``label`` is one of them."""

_INT32 = np.iinfo(np.int32)


def blocks(count: int, *, rows: int = 256) -> Iterator[slice]:
    """Slices that cover ``count`` rows in order; so few that a float64 copy of them stays in the processor's cache."""
    return (slice(start, start + rows) for start in range(0, count, rows))


def converted(split: str, arrays: Any) -> dict[str, np.ndarray]:
    """The arrays as JAX will hold them, all of one length; views that cannot be written through."""
    if not isinstance(arrays, Mapping) or "label" not in arrays:
        came = f"the keys {sorted(arrays)}" if isinstance(arrays, Mapping) else f"a {type(arrays).__name__}"
        raise TypeError(f"{split}: expected a dict with 'label' and the model's input, got {came}")
    made = {key: _converted(f"{split}[{key!r}]", np.asarray(array)) for key, array in arrays.items()}
    if made["label"].dtype.kind in "biu":
        made["label"] = made["label"].astype(np.int32)
    lengths = {key: len(array) for key, array in made.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{split}: expected arrays of one length, got {lengths}")
    if not lengths["label"]:
        raise ValueError(f"{split}: expected at least one example, got none")
    return {key: _read_only(array) for key, array in made.items()}


def check_like_train(split: str, arrays: Arrays, train: Arrays, *, input_key: str) -> None:
    """A model that takes a training example takes this split's."""
    if input_key not in arrays:
        raise ValueError(f"{split}: expected the input {input_key!r}, got the keys {sorted(arrays)}")
    got, expected = ({key: (array.dtype.name, array.shape[1:]) for key, array in of.items()} for of in (arrays, train))
    if got != expected:
        raise ValueError(f"{split}: expected the keys, types and shapes of train, {expected}, got {got}")


def check_labels(where: str, labels: np.ndarray, *, num_classes: int) -> None:
    """Integers [n] in ``[0, num_classes)``."""
    if labels.ndim != 1 or labels.dtype != np.int32:
        raise TypeError(f"{where}: expected integer labels [n], got {labels.dtype}{labels.shape}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{where}: expected labels from 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}; "
            "classes are numbered from 0, and num_classes is how many there are"
        )


def _converted(where: str, array: np.ndarray) -> np.ndarray:
    if array.ndim == 0 or array.dtype.kind not in "buif":
        raise TypeError(f"{where}: expected an array of numbers, one row an example, got {array.dtype}{array.shape}")
    return _floats(where, array) if array.dtype.kind == "f" else _integers(where, array)


def _floats(where: str, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):  # told below
            array = array.astype(np.float32)
    if not all(np.isfinite(array[rows]).all() for rows in blocks(len(array))):
        raise ValueError(f"{where}: expected finite numbers, got NaN, infinity, or more than float32 can hold")
    return array


def _integers(where: str, array: np.ndarray) -> np.ndarray:
    """JAX would cut 64 bits to 32 without a word about what no longer fits."""
    if array.dtype.itemsize < 8:
        return array
    if array.size and (array.max() > _INT32.max or array.min() < _INT32.min):
        raise ValueError(f"{where}: expected integers that int32 can hold, got {array.min()} to {array.max()}")
    return array.astype(np.int32)


def _read_only(array: np.ndarray) -> np.ndarray:
    """A data set's fingerprint is taken once: nobody changes the examples through it afterwards."""
    view = array.view()
    view.flags.writeable = False
    return view
