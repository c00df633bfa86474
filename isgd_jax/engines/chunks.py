"""A data set cut into chunks of one fixed shape, and what a scorer finds of one: the same on every engine."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from isgd_jax.errors import ArgumentError, ArgumentTypeError, check_unmasked
from isgd_jax.types import Batch

__all__ = [
    "Chunks",
    "Scored",
    "as_scored",
    "check_held",
    "is_key",
    "joined",
    "num_rows",
    "unpadded",
    "what_is_wrong",
]

_OF_NUMPY = tuple(map(np.dtype, (np.float16, np.float32, np.float64, np.complex64, np.complex128)))
_OF_JAX = ("bfloat16", *(name for name in dir(jnp) if name.startswith("float8_")))


class Chunks:
    """Consecutive runs of examples, all of ``size``; the last one may be shorter, and is padded before it is scored.

    Guarantees:
        * every example is in exactly one chunk, and chunk ``c`` is the same examples in every process;
        * every batch has the same shape, so that a scorer is compiled once and gives the same bits on every engine.

    Args:
        num_examples: of the data set, at least one.
        size: examples in a chunk, at least one; of more than there are, all are one chunk.

    Raises:
        ArgumentTypeError: one of them is no whole number.
        ArgumentError: one of them is below 1.
    """

    def __init__(self, num_examples: int, size: int) -> None:
        for value in (num_examples, size):
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise ArgumentTypeError(
                    f"chunks need whole numbers, got {num_examples!r} examples in chunks of {size!r}"
                )
        if num_examples < 1 or size < 1:
            raise ArgumentError(
                f"chunks need at least one example each, got {num_examples} examples in chunks of {size}"
            )
        self.num_examples: int = operator.index(num_examples)
        self.size: int = min(operator.index(size), self.num_examples)

    def __len__(self) -> int:
        return -(-self.num_examples // self.size)

    def ids(self, chunk: int) -> np.ndarray:
        """The examples of a chunk."""
        start = chunk * self.size
        return np.arange(start, min(start + self.size, self.num_examples))

    def batch(self, data: Batch, chunk: int) -> Batch:
        """The rows of a chunk, ``size`` of them; of a short last chunk the last example again is harmless padding.

        Args:
            data: a pytree of arrays with the leading axis of the data set; slices of NumPy arrays are views, not
                copies.
            chunk: 0 to ``len(self) - 1``.
        """
        start = chunk * self.size

        def rows(leaf: Any) -> Any:
            taken = leaf[start : start + self.size]
            count = len(taken)
            return taken if count == self.size else taken[np.minimum(np.arange(self.size), count - 1)]

        return jax.tree.map(rows, data)


class Scored(NamedTuple):
    """What a scorer found of a chunk, in host memory: ``scores`` [c] and, if it makes them, ``sketches`` [c, dims]."""

    scores: np.ndarray
    sketches: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return sum(part.nbytes for part in self if part is not None)


def joined(leaves: Sequence[Any]) -> Any:
    """The rows of all these arrays, one after the other: in host memory, but for random keys, which NumPy has not."""
    return jnp.concatenate(leaves) if is_key(leaves[0]) else np.concatenate(leaves)


def is_key(leaf: Any) -> bool:
    """Whether an array is one of typed random keys."""
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def num_rows(data: Batch) -> int:
    """Examples of a data set.

    Args:
        data: a pytree of arrays with one common leading axis.

    Raises:
        ArgumentError: its leaves are not arrays with one common leading axis, or it has no examples.
        ArgumentTypeError, ArgumentError: as `check_held`.
    """
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if len(sizes) != 1 or sizes == {()}:
        raise ArgumentError(
            "data must be a pytree of arrays with one common leading axis, one row per example; "
            f"got leading axes {sorted(sizes)}"
        )
    (count,) = sizes.pop()
    if not count:
        raise ArgumentError("data must have at least one example; got arrays of no rows")
    check_held(data)
    return count


def check_held(data: Batch) -> None:
    """See that JAX can hold the numbers of arrays in host memory: where it cannot, it changes some without a word.

    64-bit integers lose their upper half on the way to a device, and masks of masked arrays are dropped.

    Args:
        data: a pytree of arrays; those of JAX are held already.

    Raises:
        ArgumentTypeError: an array is masked, or of no type that JAX has.
        ArgumentError: numbers of 64 bits do not fit into 32, while ``jax_enable_x64`` is off.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if isinstance(leaf, jax.Array):
            continue
        name = f"data{jax.tree_util.keystr(path)}"
        check_unmasked(name, leaf)
        array = np.asarray(leaf)
        dtype = array.dtype
        if not dtype.isnative:
            raise ArgumentTypeError(
                f"{name} must be in this machine's byte order, got {dtype.str}: .astype({dtype.name!r})"
            )
        is_held = dtype.kind in "biu" or dtype in _OF_NUMPY or dtype.name in _OF_JAX
        if not is_held:
            raise ArgumentTypeError(f"{name} must hold numbers that JAX has, got {dtype}; such as .astype(np.float32)")
        _check_fits(name, array, np.dtype(jax.dtypes.canonicalize_dtype(dtype)))


def _check_fits(name: str, array: np.ndarray, held: np.dtype) -> None:
    if not array.size or array.dtype.itemsize <= held.itemsize or array.dtype.kind not in "iuf":
        return
    limits = np.iinfo(held) if array.dtype.kind in "iu" else jnp.finfo(held)
    finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
    if finite.size and (finite.min() < limits.min or finite.max() > limits.max):
        raise ArgumentError(
            f"{name} must fit into {held}, which {array.dtype} becomes on a device; got numbers from {finite.min()} "
            f"to {finite.max()}: scale them, or set jax_enable_x64"
        )


def unpadded(found: Any, count: int, size: int) -> Any:
    """What a scorer returned, in host memory and without padding. It waits for the device.

    Args:
        found: arrays, on any device.
        count: rows of each array that are not padding.
        size: rows that the scorer was given. Where it returned fewer or more, nobody knows which row is whose.

    Raises:
        ArgumentError: it is not what can be scores of ``size`` examples.
    """
    whole = jax.tree.map(np.asarray, found)
    wrong = what_is_wrong(whole, size)
    if wrong is not None:
        raise ArgumentError(f"the scorer returned what cannot be scores: {wrong}")
    return jax.tree.map(lambda rows: rows[:count], whole)


def what_is_wrong(found: Any, count: int) -> str | None:
    """Why these cannot be the scores, or ``(scores, sketches)``, of ``count`` examples; None if they can.

    Values are not judged: whoever keeps the scores sets aside single ones that are not finite.

    >>> import numpy as np
    >>> what_is_wrong(np.ones((3, 1), np.float32), 3)
    'expected [3] floating-point scores, got float32[3, 1]'

    Args:
        found: what a scorer returned, in host memory.
        count: examples that were scored.
    """
    if isinstance(found, tuple):
        if len(found) != 2:
            return f"expected scores or (scores, sketches), got a tuple of {len(found)}"
        scores, sketches = found
    else:
        scores, sketches = found, None
    if not _is_float(scores) or scores.shape != (count,):
        return f"expected [{count}] floating-point scores, got {_described(scores)}"
    if sketches is not None and not (_is_float(sketches) and sketches.ndim == 2 and len(sketches) == count):
        return f"expected [{count}, dims] floating-point sketches, got {_described(sketches)}"
    return None


def as_scored(found: Any) -> Scored:
    """What is right, as a pair."""
    return Scored(*found) if isinstance(found, tuple) else Scored(found)


def _is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray) and (np.issubdtype(x.dtype, np.floating) or x.dtype.name == "bfloat16")


def _described(x: Any) -> str:
    return f"{x.dtype}{list(x.shape)}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"
