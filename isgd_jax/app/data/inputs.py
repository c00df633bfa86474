"""What is done to a model's inputs before it sees them, kept with a run so that predictions see the same.

Guarantees:
  - inputs of floating numbers and of uint8 are standardized; other whole numbers, such as tokens, stay what they are;
  - a table, that is floating numbers [n, d], is standardized column by column, everything else as a whole, unless said
    otherwise;
  - what is read back from a run's folder gives bit for bit the numbers that the run was trained on.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from isgd_jax.app.data.checks import LABEL, Arrays, blocks, is_floating
from isgd_jax.errors import ArgumentError

__all__ = [
    "INPUTS_FILE",
    "Inputs",
    "Statistics",
    "check_standardized",
    "input_names",
    "is_measured",
    "measure",
    "read_inputs",
]

INPUTS_FILE = "inputs.json"
"""In the folder of a run, beside config.json."""

_FORMAT = 1


class Statistics(NamedTuple):
    """Mean and standard deviation of an input of the training set, in its own units; float32, and no ``std`` is 0.

    Scalars where the input was standardized as a whole, arrays of the shape of one example where it was by coordinate.
    """

    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of a model, by name, and what is done to them.

    Attributes:
      shapes: shape of one example of each input.
      dtypes: type of each input as the training set had it, by its name in NumPy.
      statistics: of the inputs that are standardized; the others stay as they are.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    statistics: Mapping[str, Statistics]

    def standardize(self, x: Any) -> Any:
        """``(x - mean) / std`` in float32 of every input that is standardized; NumPy and JAX arrays, inside jit too.

        Args:
          x: one example or a batch, a dict that has all inputs; or, of a model with one input, that input alone.

        Returns:
          A new dict with the same keys, what is not standardized as it was (``label`` too); or the one input.

        Raises:
          ValueError: an input is missing, has another shape than it was standardized by, or must be named.
        """
        if not isinstance(x, Mapping):
            return self.apply(self.only, x)
        missing = sorted(set(self.shapes) - set(x))
        if missing:
            raise ArgumentError(f"expected the inputs {', '.join(sorted(self.shapes))}, got the keys {sorted(x)}")
        return dict(x) | {key: self.apply(key, x[key]) for key in self.shapes}

    def of(self, example: Mapping[str, Any]) -> Any:
        """What the model is given of an example or a batch: its one input, or a dict of its inputs; standardized.

        Raises:
          ValueError: as `standardize` does.
        """
        standardized = self.standardize({key: value for key, value in example.items() if key in self.shapes})
        return standardized[self.only] if len(self.shapes) == 1 else standardized

    def apply(self, key: str, x: Any) -> Any:
        """The input ``key`` alone, standardized if it is one that is.

        Raises:
          ValueError: it is standardized by coordinate, and has another shape.
        """
        if key not in self.statistics:
            return x
        mean, std = self.statistics[key]
        x = x if hasattr(x, "astype") else np.asarray(x)
        if mean.ndim and (x.ndim < mean.ndim or x.shape[x.ndim - mean.ndim :] != mean.shape):
            raise ArgumentError(f"expected {key!r} to be of shape {mean.shape} or [n, ...] of it, got {x.shape}")
        # As many axes as x has: JAX can be told to refuse what NumPy broadcasts.
        axes = (1,) * (x.ndim - mean.ndim) if mean.ndim else ()
        return (x.astype(np.float32) - mean.reshape(axes + mean.shape)) / std.reshape(axes + std.shape)

    @property
    def only(self) -> str:
        """The name of the one input.

        Raises:
          ValueError: there are several.
        """
        if len(self.shapes) > 1:
            raise ArgumentError(f"there are several inputs, {', '.join(self.shapes)}: expected a dict that names each")
        return next(iter(self.shapes))

    def to_json(self) -> str:
        """As `read_inputs` reads it; every number as it is, bit for bit."""
        inputs = {
            key: {"shape": list(shape), "dtype": self.dtypes[key]}
            | {name: array.tolist() for name, array in self._statistics_of(key).items()}
            for key, shape in self.shapes.items()
        }
        return json.dumps({"format": _FORMAT, "inputs": inputs}, allow_nan=False) + "\n"

    def _statistics_of(self, key: str) -> dict[str, np.ndarray]:
        return self.statistics[key]._asdict() if key in self.statistics else {}


def measure(
    train: Arrays,
    names: Iterable[str],
    *,
    standardized: Iterable[str] | None,
    per_coordinate: bool | None,
) -> Inputs:
    """The inputs of a training set.

    Args:
      train: its arrays [n, ...].
      names: those that the model reads.
      standardized: those of them to standardize; None: the floating ones and those of uint8.
      per_coordinate: each coordinate by itself, or all of an input alike; None: by itself in tables [n, d] of floating
        numbers.

    Raises:
      ValueError: what is to be standardized is no input.
    """
    names = tuple(names)
    chosen = [key for key in names if is_measured(train[key].dtype)] if standardized is None else list(standardized)
    if not set(chosen) <= set(names):
        raise ArgumentError(f"standardize={chosen}: expected names of the inputs {', '.join(names)}")
    apart = {key: _is_table(train[key]) if per_coordinate is None else per_coordinate for key in chosen}
    return Inputs(
        shapes={key: train[key].shape[1:] for key in names},
        dtypes={key: train[key].dtype.name for key in names},
        statistics={key: _statistics(train[key], per_coordinate=apart[key]) for key in chosen},
    )


def is_measured(dtype: np.dtype) -> bool:
    """Whether numbers of this type are quantities, or pixels, and no names of something."""
    return is_floating(dtype) or dtype == np.uint8


def check_standardized(split: str, arrays: Arrays, inputs: Inputs) -> None:
    """Standardized numbers are numbers still: finite in float32.

    Args:
      split: its name, for messages.
      arrays: of the split, not standardized yet; whole columns are read once, in blocks.
      inputs: mean and standard deviation of the training set.

    Raises:
      ValueError: some are too large, beside the mean and the standard deviation, for float32.
    """
    for key in inputs.statistics:
        if not is_floating(arrays[key].dtype):
            continue
        # Standardizing is monotone: what the extremes of each coordinate become bounds all others.
        ends = _ends(arrays[key])
        with np.errstate(over="ignore", invalid="ignore"):
            becomes = inputs.apply(key, ends)
        if not np.isfinite(becomes).all():
            raise ArgumentError(
                f"{split}[{key!r}]: numbers from {float(ends.min()):g} to {float(ends.max()):g} are infinite in "
                "float32 once they are standardized; scale them down"
            )


def read_inputs(run_dir: str | os.PathLike[str]) -> Inputs:
    """What a run did to its inputs, from the run's folder.

        >>> inputs = data.read_inputs("runs/mine")  # doctest: +SKIP
        >>> logits = model.apply({"params": params}, inputs.standardize(x))  # doctest: +SKIP

    Args:
      run_dir: the folder that `isgd_jax.app.run.fit` or ``isgd train`` left.

    Raises:
      FileNotFoundError: there is no such file in it: no run's folder, or one from before version 0.2.
      ValueError: the file is damaged, or of a later version.
    """
    path = Path(run_dir) / INPUTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} has no {INPUTS_FILE}: it is no run's folder, or from before version 0.2")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ArgumentError(f"its format is {content['format']!r}, expected {_FORMAT}")
        found = content["inputs"]
        shapes = {key: tuple(map(int, one["shape"])) for key, one in found.items()}
        return Inputs(
            shapes=shapes,
            dtypes={key: np.dtype(one["dtype"]).name for key, one in found.items()},
            statistics={key: _read_statistics(one, shapes[key]) for key, one in found.items() if "mean" in one},
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else error
        raise ArgumentError(f"{path} cannot be read ({reason}): it is damaged, or from another version") from error


def input_names(train: Arrays, input_key: str | Iterable[str] | None) -> tuple[str, ...]:
    """The names of the inputs: those given, else every array but ``label``.

    Raises:
      ValueError: there is no input, one of them is not there, or ``label`` is to be one.
    """
    given = (input_key,) if isinstance(input_key, str) else input_key
    names = tuple(key for key in train if key != LABEL) if given is None else tuple(given)
    if not names:
        raise ArgumentError(f"expected an input beside 'label', got the keys {sorted(train)}")
    if LABEL in names:
        raise ArgumentError(f"input_key={input_key!r}: 'label' is what is to be predicted; give the input another name")
    for key in names:
        if key not in train:
            raise ArgumentError(f"expected the input {key!r}, got the keys {sorted(train)}")
    return names


def _statistics(array: np.ndarray, *, per_coordinate: bool) -> Statistics:
    """Summed in float64 around the mean: a one-pass variance would cancel."""
    axes = 0 if per_coordinate else tuple(range(array.ndim))
    count = len(array) if per_coordinate else array.size
    mean = sum(_summable(array[rows]).sum(axes, dtype=np.float64) for rows in blocks(len(array))) / count
    std = np.sqrt(sum(np.square(_summable(array[rows]) - mean).sum(axes) for rows in blocks(len(array))) / count)
    # A constant's mean is off by a rounding, and so its std; what float32 has only as denormals, devices take for 0.
    least = np.maximum(np.abs(mean) * np.finfo(np.float32).eps, np.finfo(np.float32).tiny)
    return Statistics(np.asarray(mean, np.float32), np.asarray(np.where(std > least, std, 1), np.float32))


def _summable(rows: np.ndarray) -> np.ndarray:
    """NumPy cannot sum bfloat16 in float64."""
    return rows if rows.dtype.kind != "V" else rows.astype(np.float32)


def _is_table(array: np.ndarray) -> bool:
    return array.ndim == 2 and is_floating(array.dtype)


def _ends(array: np.ndarray) -> np.ndarray:
    """The least and the largest number of each coordinate [2, ...]."""
    least = largest = array[0]
    for rows in blocks(len(array)):
        least = np.minimum(least, array[rows].min(axis=0))
        largest = np.maximum(largest, array[rows].max(axis=0))
    return np.stack([least, largest])


def _read_statistics(one: Mapping[str, Any], shape: tuple[int, ...]) -> Statistics:
    with np.errstate(over="ignore"):  # told below
        mean, std = (np.asarray(one[name], np.float32) for name in ("mean", "std"))
    if mean.shape not in ((), shape) or std.shape != mean.shape:
        raise ArgumentError(f"mean {mean.shape} and std {std.shape} are not of the shape {shape}")
    if not np.isfinite(mean).all() or not np.isfinite(std).all() or not (std > 0).all():
        raise ArgumentError("mean and std are not finite, or std is not positive")
    return Statistics(mean, std)
