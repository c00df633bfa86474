"""What a data set is once it is in memory, and how to make one of arrays or of any random-access source."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isgd_jax.data import checks
from isgd_jax.data.checks import Arrays, blocks
from isgd_jax.typing import Source

_READ_TOGETHER = 4096


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

    Raises:
        TypeError: an array is of a type that is no input, or labels are not whole numbers.
        ValueError: arrays of a split differ in length, splits in shapes, a label is outside [0, num_classes), or values
            are not finite.
    """
    splits = {"train": train, "test": test} | ({} if valid is None else {"valid": valid})
    checked = {split: checks.converted(split, arrays) for split, arrays in splits.items()}
    key = _only_input(checked["train"]) if input_key is None else input_key
    classes = int(checked["train"]["label"].max()) + 1 if num_classes is None else num_classes
    for split, arrays in checked.items():
        checks.check_like_train(split, arrays, checked["train"], input_key=key)
        checks.check_labels(split, arrays["label"], num_classes=classes)
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


def from_source(
    train: Source, test: Source, *, valid: Source | None = None, spill: Path | None = None, **options: Any
) -> Dataset:
    """Like `from_arrays`, from objects with ``__len__`` and ``__getitems__``, such as ``tfds.data_source`` gives.

    An item is a dict of arrays or numbers, ``label`` among them. Everything is read once, here; a training set larger
    than memory into the folder ``spill``.
    """
    held_out = None if valid is None else read(valid)
    return from_arrays(read(train) if spill is None else spilled(train, spill), read(test), valid=held_out, **options)


def read(source: Any) -> dict[str, np.ndarray]:
    """Brings a source into memory: its items, all with the same keys and shapes, stacked key by key.

    Raises:
        TypeError: the source has not both methods, or its items are no dicts.
        ValueError: it is empty, or its items differ in keys or shapes.
    """
    if not isinstance(source, Source):
        raise TypeError(f"expected an object with __len__ and __getitems__, got {type(source).__name__}")
    if not len(source):
        raise ValueError("the source is empty: expected at least one example")
    everything = range(len(source))
    stacks = [_stacked(source, [*everything[rows]]) for rows in blocks(len(source), rows=_READ_TOGETHER)]
    return {key: np.concatenate([stack[key] for stack in stacks]) for key in stacks[0]}


def spilled(source: Any, folder: Path) -> dict[str, np.ndarray]:
    """Like `read`, for what is larger than memory: written to ``folder`` once, as arrays that are mapped from disk.

    Each file is complete when it has its name. float64
    becomes float32, as in `from_arrays`, which then copies nothing.
    """
    names = sorted(_stacked(source, [0]))
    if not all(_file(folder, name).is_file() for name in names):
        folder.mkdir(parents=True, exist_ok=True)
        _spill(source, folder)
    found = {name: np.load(_file(folder, name), mmap_mode="r") for name in names}
    if any(len(array) != len(source) for array in found.values()):
        raise ValueError(f"{folder} holds another data set, of another size: delete it and try again")
    return found


def _spill(source: Any, folder: Path) -> None:
    partial: dict[str, np.memmap] = {}
    for rows in blocks(len(source), rows=_READ_TOGETHER):
        ids = range(len(source))[rows]
        for name, values in _stacked(source, [*ids]).items():
            kind = np.dtype(np.float32) if values.dtype == np.float64 else values.dtype
            if name not in partial:
                shape = (len(source), *values.shape[1:])
                partial[name] = np.lib.format.open_memmap(
                    _file(folder, f".{name}.partial"), mode="w+", dtype=kind, shape=shape
                )
            partial[name][rows] = values
    for name, array in partial.items():
        array.flush()
        _file(folder, f".{name}.partial").replace(_file(folder, name))


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def fingerprint(arrays: Arrays) -> str:
    """SHA-256 over names, types, shapes and bytes: which example is number 17 is part of it."""
    digest = hashlib.sha256()
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _stacked(source: Source, indices: list[int]) -> dict[str, np.ndarray]:
    items = source.__getitems__(indices)
    if len(items) != len(indices):
        raise ValueError(f"expected __getitems__ to give the {len(indices)} items it was asked for, got {len(items)}")
    if not isinstance(items[0], Mapping):
        raise TypeError(f"expected the items of a source to be dicts of arrays, got {type(items[0]).__name__}")
    try:
        return {key: np.stack([np.asarray(item[key]) for item in items]) for key in items[0]}
    except (KeyError, ValueError) as error:
        raise ValueError(f"expected items with the same keys, and arrays of the same shapes: {error}") from error


def _only_input(arrays: Arrays) -> str:
    keys = [key for key in arrays if key != "label"]
    if len(keys) != 1:
        raise ValueError(f"expected one input beside 'label', got {keys}; name the model's input with input_key")
    return keys[0]


def _statistics(inputs: np.ndarray, *, per_coordinate: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, summed in float64 around the mean: a one-pass variance would cancel."""
    axes = 0 if per_coordinate else tuple(range(inputs.ndim))
    count = len(inputs) if per_coordinate else inputs.size
    mean = sum(inputs[rows].sum(axes, dtype=np.float64) for rows in blocks(len(inputs))) / count
    std = np.sqrt(sum(np.square(inputs[rows] - mean).sum(axes) for rows in blocks(len(inputs))) / count)
    varies = std > np.abs(mean) * np.finfo(np.float32).eps  # a constant's mean is off by a rounding, and so its std
    return np.asarray(mean, np.float32), np.asarray(np.where(varies, std, 1), np.float32)
