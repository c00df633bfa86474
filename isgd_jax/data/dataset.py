"""What a data set is once it is in memory, and how to make one of arrays or of any random-access source."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from isgd_jax.typing import Source

Arrays: TypeAlias = Mapping[str, np.ndarray]
"""A split: named arrays with one leading axis, the examples. ``label`` is one of them."""

_ROWS = 4096  # rows worked on at a time: float64 copies of a whole split would not fit beside it


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Guarantees:
      - every array of a split has one row an example, in an order that never changes;
      - ``label`` is int32 in ``[0, num_classes)``; uint8 images stay uint8, float64 becomes float32;
      - ``mean`` and ``std`` are float32 statistics of the training split's input, scalars or one number a coordinate,
        and no ``std`` is zero;
      - two data sets have the same ``fingerprint`` only if their training examples are the same, in the same order.
    """

    name: str
    train: Arrays
    test: Arrays
    num_classes: int
    mean: np.ndarray
    std: np.ndarray
    fingerprint: str
    input_key: str = "image"
    valid: Arrays | None = None

    def __len__(self) -> int:
        """The number of training examples."""
        return len(self.train["label"])

    def standardise(self, inputs: Any) -> Any:
        """``(inputs - mean) / std`` in float32, for NumPy and JAX arrays; meant for the inside of the step."""
        return (inputs.astype(np.float32) - self.mean) / self.std


def from_arrays(
    train: Mapping[str, Any],
    test: Mapping[str, Any],
    *,
    valid: Mapping[str, Any] | None = None,
    name: str = "arrays",
    num_classes: int | None = None,
    input_key: str | None = None,
    per_coordinate: bool = False,
) -> Dataset:
    """A data set of arrays in memory: a dict a split, ``label`` [n] and the model's input [n, ...] among its keys.

    ``input_key`` names the input when there is more than one array beside ``label``. ``num_classes`` is one more than
    the largest training label unless given. ``per_coordinate`` standardises each coordinate of the input by itself,
    as the paper does with SVHN, instead of all alike.

        >>> made = from_arrays({"image": np.ones([3, 2]), "label": np.array([0, 1, 2])},
        ...                    {"image": np.ones([1, 2]), "label": np.array([2])})
        >>> made.num_classes, made.input_key, len(made)
        (3, 'image', 3)
    """
    splits = {"train": train, "test": test} | ({} if valid is None else {"valid": valid})
    checked = {split: _checked(split, arrays) for split, arrays in splits.items()}
    key = input_key or _only_input(checked["train"])
    classes = num_classes or int(checked["train"]["label"].max()) + 1
    for split, arrays in checked.items():
        _check_like_train(split, arrays, checked["train"], key)
        _check_labels(split, arrays["label"], classes)
    mean, std = _statistics(checked["train"][key], per_coordinate=per_coordinate)
    return Dataset(
        name=name,
        train=checked["train"],
        test=checked["test"],
        valid=checked.get("valid"),
        num_classes=classes,
        mean=mean,
        std=std,
        fingerprint=fingerprint(checked["train"]),
        input_key=key,
    )


def from_source(train: Source, test: Source, *, valid: Source | None = None, **options: Any) -> Dataset:
    """Like `from_arrays`, from objects with ``__len__`` and ``__getitems__``, such as ``tfds.data_source`` gives.

    An item is a dict of arrays or numbers, ``label`` among them. Everything is read once, here.
    """
    held_out = None if valid is None else read(valid)
    return from_arrays(read(train), read(test), valid=held_out, **options)


def read(source: Any) -> dict[str, np.ndarray]:
    """Brings a source into memory: its items stacked, key by key.

    Keys whose items are not numbers all of one shape (names, ragged lists) cannot be stacked, and are a ValueError.
    """
    if not isinstance(source, Source):
        raise TypeError(f"expected an object with __len__ and __getitems__, got {type(source).__name__}")
    if not len(source):
        raise ValueError("the source is empty: expected at least one example")
    blocks = [_stacked(source.__getitems__(list(rows))) for rows in _slices(len(source))]
    return {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}


def fingerprint(arrays: Arrays) -> str:
    """SHA-256 over names, types, shapes and bytes: which example is number 17 is part of it."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _stacked(items: list[Any]) -> dict[str, np.ndarray]:
    if not isinstance(items[0], Mapping):
        raise TypeError(f"expected the items of a source to be dicts of arrays, got {type(items[0]).__name__}")
    try:
        return {key: np.stack([np.asarray(item[key]) for item in items]) for key in items[0]}
    except (KeyError, ValueError) as error:
        raise ValueError(f"expected items with the same keys, and arrays of the same shapes: {error}") from error


def _slices(count: int) -> Iterator[range]:
    return (range(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))


def _checked(split: str, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not isinstance(arrays, Mapping) or "label" not in arrays:
        came = f"the keys {sorted(arrays)}" if isinstance(arrays, Mapping) else f"a {type(arrays).__name__}"
        raise TypeError(f"{split}: expected a dict with 'label' and the model's input, got {came}")
    converted = {key: _converted(f"{split}[{key!r}]", np.asarray(array)) for key, array in arrays.items()}
    lengths = {key: len(array) for key, array in converted.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{split}: expected arrays of one length, got {lengths}")
    if not lengths["label"]:
        raise ValueError(f"{split}: expected at least one example, got none")
    return converted


def _converted(where: str, array: np.ndarray) -> np.ndarray:
    """JAX has no 64-bit numbers by default: halve them here, once, where an overflow can still be told."""
    if array.ndim == 0 or array.dtype.kind not in "buif":
        raise TypeError(f"{where}: expected an array of numbers, one row an example, got {array.dtype}{array.shape}")
    if array.dtype.kind == "f":
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        if not all(np.isfinite(array[rows.start : rows.stop]).all() for rows in _slices(len(array))):
            raise ValueError(f"{where}: expected finite numbers, got NaN or infinity (or beyond float32)")
    elif array.dtype.kind in "iu" and array.dtype.itemsize > 4:
        if array.size and (array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min):
            raise ValueError(f"{where}: expected integers that int32 can hold, got {array.min()} to {array.max()}")
        array = array.astype(np.int32)
    return array.astype(np.int32) if where.endswith("['label']") and array.dtype.kind in "iu" else array


def _only_input(arrays: Arrays) -> str:
    keys = [key for key in arrays if key != "label"]
    if len(keys) != 1:
        raise ValueError(f"expected one input beside 'label', got {keys}; name the model's input with input_key")
    return keys[0]


def _check_like_train(split: str, arrays: Arrays, train: Arrays, input_key: str) -> None:
    if input_key not in arrays:
        raise ValueError(f"{split}: expected the input {input_key!r}, got the keys {sorted(arrays)}")
    got, expected = ({key: (array.dtype.name, array.shape[1:]) for key, array in of.items()} for of in (arrays, train))
    if got != expected:
        raise ValueError(f"{split}: expected the keys, types and shapes of train, {expected}, got {got}")


def _check_labels(split: str, labels: np.ndarray, num_classes: int) -> None:
    if labels.ndim != 1 or labels.dtype != np.int32:
        raise TypeError(f"{split}: expected integer labels [n], got {labels.dtype}{labels.shape}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"{split}: expected labels from 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}; "
            "number the classes from 0, or say num_classes"
        )


def _statistics(inputs: np.ndarray, *, per_coordinate: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, summed in float64 around the mean: a one-pass variance would cancel."""
    axes = 0 if per_coordinate else tuple(range(inputs.ndim))
    count = len(inputs) if per_coordinate else inputs.size
    blocks = [slice(rows.start, rows.stop) for rows in _slices(len(inputs))]
    mean = sum(inputs[rows].sum(axes, dtype=np.float64) for rows in blocks) / count
    square = sum(np.square(inputs[rows] - mean).sum(axes) for rows in blocks) / count
    std = np.sqrt(square)
    return np.asarray(mean, np.float32), np.asarray(np.where(std > 0, std, 1), np.float32)
