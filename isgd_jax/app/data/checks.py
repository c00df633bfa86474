"""What is asked of arrays before they are a data set; each failure is one sentence."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from isgd_jax.errors import ArgumentError, ArgumentTypeError

__all__ = [
    "LABEL",
    "Arrays",
    "blocks",
    "check_batch_size",
    "check_labels",
    "check_like_train",
    "class_count",
    "converted",
    "held",
    "is_floating",
]

Arrays: TypeAlias = Mapping[str, np.ndarray]
"""A split: a flat dict of arrays with one leading axis, the examples; inputs, and ``label`` if there is one."""

LABEL = "label"
"""The key of what is to be predicted."""

_INT32 = np.iinfo(np.int32)
_BFLOAT16 = np.dtype(jnp.bfloat16)


def blocks(count: int, *, rows: int = 256) -> Iterator[slice]:
    """Slices that cover ``count`` rows in order; so few that a float64 copy of them stays in the processor's cache."""
    return (slice(start, start + rows) for start in range(0, count, rows))


def is_floating(dtype: np.dtype) -> bool:
    """Whether numbers of this type are floating; bfloat16, which NumPy knows as raw bytes, is one of them."""
    return dtype.kind == "f" or dtype == _BFLOAT16


def converted(split: str, arrays: Any) -> dict[str, np.ndarray]:
    """A split as JAX will hold it; views that cannot be written through.

    Args:
        split: its name, for messages.
        arrays: a flat dict of arrays [n, ...].

    Returns:
        The same keys; every array as `held` has it.

    Raises:
        TypeError: this is no dict of arrays, or an array is of a type that JAX does not hold.
        ValueError: the arrays differ in length, are empty, or have numbers that do not fit.
    """
    if not isinstance(arrays, Mapping) or not arrays:
        came = f"a {type(arrays).__name__}" if not isinstance(arrays, Mapping) else "no array"
        raise ArgumentTypeError(f"{split}: expected a flat dict of arrays, the model's inputs and 'label', got {came}")
    made = {key: held(f"{split}[{key!r}]", array) for key, array in arrays.items()}
    lengths = {key: len(array) for key, array in made.items()}
    if len(set(lengths.values())) > 1:
        raise ArgumentError(f"{split}: expected arrays of one length, got {lengths}")
    if not next(iter(lengths.values())):
        raise ArgumentError(f"{split}: expected at least one example, got none")
    if LABEL in made:
        made[LABEL] = _label(f"{split}[{LABEL!r}]", made[LABEL])
    return {key: _read_only(array) for key, array in made.items()}


def held(where: str, array: Any) -> np.ndarray:
    """An array [n, ...] as JAX will hold it: in this machine's byte order, 64 bits as 32.

    Raises:
        TypeError: it is masked, not of numbers, or of numbers that JAX does not have.
        ValueError: it has an axis of size 0, or numbers that are not finite or do not fit.
    """
    if np.ma.isMaskedArray(array):
        raise ArgumentTypeError(
            f"{where}: expected an array without a mask, got a masked one; say what to put: .filled(value)"
        )
    if isinstance(array, Mapping):
        raise ArgumentTypeError(f"{where}: expected an array, got a dict; a split is a flat dict, join the keys")
    array = _native(where, np.asarray(array))
    if array.size == 0 and len(array):
        raise ArgumentError(f"{where}: expected at least one number an example, got the shape {array.shape}")
    return _floats(where, array) if is_floating(array.dtype) else _integers(where, array)


def check_like_train(split: str, arrays: Arrays, train: Arrays) -> None:
    """A model that takes a training example takes this split's.

    Args:
        split: its name, for messages.
        arrays: of the split, as `converted` made them.
        train: those of the training set.

    Raises:
        ValueError: keys, types or shapes differ from those of ``train``.
    """
    got, expected = ({key: (array.dtype.name, array.shape[1:]) for key, array in of.items()} for of in (arrays, train))
    if got != expected:
        raise ArgumentError(f"{split}: expected the keys, types and shapes of train, {expected}, got {got}")


def check_batch_size(batch_size: int, num_examples: int, *, of: str = "") -> None:
    """No more examples in a batch than there are.

    Args:
        batch_size: as it was asked for.
        num_examples: of the training set.
        of: its name, for the message, where it is known.

    Raises:
        ValueError: there are fewer.
    """
    if batch_size > num_examples:
        named = f" of {of}" if of else ""
        raise ArgumentError(
            f"batch_size must be at most {num_examples}, the training examples{named}; got {batch_size}"
        )


def check_labels(where: str, labels: np.ndarray, *, num_classes: int) -> None:
    """Whole numbers in ``[0, num_classes)``, of any shape.

    Args:
        where: the split and its key, for messages.
        labels: at least one.
        num_classes: how many there are.

    Raises:
        TypeError: they are not whole numbers.
        ValueError: one of them is outside.
    """
    if labels.dtype.kind not in "iu":
        raise ArgumentTypeError(f"{where}: expected integer labels, got {labels.dtype}{labels.shape}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ArgumentError(
            f"{where}: expected labels from 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}; "
            "classes are numbered from 0, and num_classes is how many there are"
        )


def class_count(labels: np.ndarray | None, given: Any) -> int | None:
    """How many classes there are: ``given``, else one more than the largest of integer labels [n], else None.

    Raises:
        TypeError: ``given`` is no whole number, or the labels are not.
        ValueError: there are no classes, or more than int32 can count.
    """
    if given is None:
        if labels is None or labels.ndim != 1 or labels.dtype.kind != "i":
            return None
        if labels.max() == _INT32.max:
            raise ArgumentError(f"expected labels that number classes from 0, got one of {labels.max()}")
        return int(labels.max()) + 1
    if isinstance(given, bool) or not isinstance(given, (int, np.integer)):
        raise ArgumentTypeError(f"expected num_classes to be a whole number, got {given!r}")
    if not 1 <= given <= _INT32.max:
        raise ArgumentError(f"expected num_classes from 1 to {_INT32.max}, got {given}")
    if labels is None or labels.dtype.kind != "i":
        came = "no 'label'" if labels is None else f"labels of {labels.dtype}"
        raise ArgumentTypeError(f"num_classes={given} expects integer labels, got {came}; leave num_classes out")
    return int(given)


def _native(where: str, array: np.ndarray) -> np.ndarray:
    """In this machine's byte order; files of FITS, IDX and PGM come in the other one."""
    dtype = array.dtype
    is_number = dtype.kind in "bui" or dtype == _BFLOAT16 or (dtype.kind == "f" and dtype.itemsize <= 8)
    if array.ndim == 0 or not is_number:
        cure = "; convert it with .astype(np.float32)" if dtype.kind == "f" and array.ndim else ""
        raise ArgumentTypeError(
            f"{where}: expected an array of numbers, whole or floating of at most 64 bits, one row an example, "
            f"got {dtype}{array.shape}{cure}"
        )
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _floats(where: str, array: np.ndarray) -> np.ndarray:
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):  # told below
            array = array.astype(np.float32)
    if not all(np.isfinite(array[rows]).all() for rows in blocks(len(array))):
        raise ArgumentError(f"{where}: expected finite numbers, got NaN, infinity, or more than float32 can hold")
    return array


def _integers(where: str, array: np.ndarray) -> np.ndarray:
    """JAX would cut 64 bits to 32 without a word about what no longer fits."""
    return array if array.dtype.itemsize < 8 else _int32(where, array)


def _label(where: str, labels: np.ndarray) -> np.ndarray:
    """Whole numbers become int32."""
    return labels if is_floating(labels.dtype) else _int32(where, labels)


def _int32(where: str, array: np.ndarray) -> np.ndarray:
    if array.size and array.dtype.kind != "b" and (array.max() > _INT32.max or array.min() < _INT32.min):
        raise ArgumentError(f"{where}: expected integers that int32 can hold, got {array.min()} to {array.max()}")
    return array.astype(np.int32, copy=False)


def _read_only(array: np.ndarray) -> np.ndarray:
    """A data set's fingerprint is taken once: nobody changes the examples through it afterwards."""
    view = array.view()
    view.flags.writeable = False
    return view
