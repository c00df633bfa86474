"""What a data set is once it is in memory, and how to make one of arrays or of any random-access source."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from isgd_jax.app.data import checks, inputs
from isgd_jax.app.data.checks import LABEL, Arrays
from isgd_jax.app.data.inputs import Inputs, Statistics
from isgd_jax.app.data.sources import read
from isgd_jax.app.data.spill import spilled
from isgd_jax.errors import ArgumentError
from isgd_jax.types import Source

__all__ = ["Dataset", "fingerprint", "from_arrays", "from_source"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Guarantees:
      - every array of a split has one row an example, in an order that never changes;
      - splits have the same keys, types and shapes; 64 bits have become 32, everything else is as it came, but that
        whole labels are int32;
      - ``num_classes`` is a number only where ``label`` is int32 in ``[0, num_classes)``;
      - two data sets have the same ``fingerprint`` only if their training examples are the same, in the same order.

    Attributes:
      name: what it is called.
      train: the training examples, arrays [n, ...] by name.
      test: examples that are held out.
      num_classes: how many classes ``label`` has; None where labels are not whole numbers, or there are none.
      inputs: which arrays the model reads, and what is done to them before.
      fingerprint: of the training examples.
      valid: more that are held out, for choosing between models.
    """

    name: str
    train: Arrays
    test: Arrays
    num_classes: int | None
    inputs: Inputs
    fingerprint: str
    valid: Arrays | None = None

    def __len__(self) -> int:
        """The number of training examples."""
        return len(next(iter(self.train.values())))

    @property
    def input_key(self) -> str:
        """The name of the one input.

        Raises:
          ValueError: there are several; `inputs` has them all.
        """
        return self.inputs.only

    @property
    def statistics(self) -> dict[str, Statistics]:
        """``(mean, std)`` of each input that is standardized, from the training examples."""
        return dict(self.inputs.statistics)

    def standardize(self, x: Any) -> Any:
        """Examples as the model sees them; `Inputs.standardize`, meant for the inside of the step."""
        return self.inputs.standardize(x)


def from_arrays(
    train: Mapping[str, Any],
    test: Mapping[str, Any],
    *,
    valid: Mapping[str, Any] | None = None,
    name: str = "arrays",
    num_classes: int | np.integer | None = None,
    input_key: str | Iterable[str] | None = None,
    per_coordinate: bool | None = None,
    standardize: Iterable[str] | None = None,
) -> Dataset:
    """A data set of arrays in memory, each split a flat dict of them.

    Floating inputs and uint8 images are standardized when the model reads them; other whole numbers, such as tokens,
    and booleans, such as masks, are not. ``label`` may be a class [n], numbers of a regression [n] or [n, k], tokens
    [n, t], or be left out: a loss reads of an example what it wants, as it came.

        >>> made = from_arrays({"image": np.ones([3, 2]), "label": np.array([0, 1, 2])},
        ...                    {"image": np.ones([1, 2]), "label": np.array([2])})
        >>> made.num_classes, made.input_key, len(made)
        (3, 'image', 3)

    Args:
      train: the training examples: arrays [n, ...] by name, at least two rows.
      test: examples that are held out, with the same keys, types and shapes.
      valid: more of them.
      name: what the data set is called in messages and records.
      num_classes: how many classes there are; by default one more than the largest training label,
        if labels are whole numbers [n].
      input_key: what the model reads: one name or several. Everything but ``label``, if it is not given. A model of one
        input is given an array, of several a dict.
      per_coordinate: standardize each coordinate by itself, or all of an input alike. If it is not given, tables [n, d]
        of floating numbers are standardized column by column, everything else alike.
      standardize: names of the inputs that are standardized, in place of the floating ones and those of uint8.

    Raises:
      TypeError: an array is masked, or of a type that is no input; or ``num_classes`` is no whole number.
      ValueError: arrays of a split differ in length, splits in shapes, a label is outside [0, num_classes), values are
        not finite, or would not be once standardized.
    """
    splits = {"train": train, "test": test} | ({} if valid is None else {"valid": valid})
    checked = {split: checks.converted(split, arrays) for split, arrays in splits.items()}
    _check_choice(checked["train"])
    names = inputs.input_names(checked["train"], input_key)
    classes = checks.class_count(checked["train"].get(LABEL), num_classes)
    for split, arrays in checked.items():
        checks.check_like_train(split, arrays, checked["train"])
        if classes is not None:
            checks.check_labels(split, arrays[LABEL], num_classes=classes)
    measured = inputs.measure(checked["train"], names, standardized=standardize, per_coordinate=per_coordinate)
    for split, arrays in checked.items():
        inputs.check_standardized(split, arrays, measured)
    return Dataset(
        name=name,
        train=checked["train"],
        test=checked["test"],
        valid=checked.get("valid"),
        num_classes=classes,
        inputs=measured,
        fingerprint=fingerprint(checked["train"]),
    )


def from_source(
    train: Source, test: Source, *, valid: Source | None = None, spill: Path | None = None, **options: Any
) -> Dataset:
    """Like `from_arrays`, from objects with ``__len__`` and ``__getitems__``, such as ``tfds.data_source`` gives.

    Args:
      train: its items are dicts of arrays or numbers, all with the same keys and shapes. Read once, here.
      test: the same, held out.
      valid: more of them.
      spill: a folder of its own, for a training set larger than memory: written there once, and mapped from there.
      options: those of `from_arrays`.

    Raises:
      TypeError: a source has not both methods, or its items are no dicts; or as `from_arrays`.
      ValueError: a source is empty, or its items differ in keys, types or shapes; or as `from_arrays`.
      OSError: ``spill`` cannot be written.
    """
    held_out = None if valid is None else read(valid)
    return from_arrays(read(train) if spill is None else spilled(train, spill), read(test), valid=held_out, **options)


def fingerprint(arrays: Arrays) -> str:
    """SHA-256 over names, types, shapes and bytes: which example is number 17 is part of it.

    It is what a checkpoint, a worker and a replay are compared by. Arrays that are mapped are read once, whole.

    Args:
        arrays: of the training set, as `isgd_jax.app.data.checks.converted` made them.

    Returns:
        64 hexadecimal digits; the order of the names does not matter.
    """
    digest = hashlib.sha256()
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _check_choice(train: Arrays) -> None:
    if len(next(iter(train.values()))) < 2:
        raise ArgumentError("train: expected at least 2 examples, got 1: there is nothing to choose from")
