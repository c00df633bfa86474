"""A data set cut into chunks of one fixed shape, and what a scorer finds of one: the same on every engine."""

from typing import Any, NamedTuple

import jax
import numpy as np

from isgd_jax.errors import ArgumentError
from isgd_jax.types import Batch


class Chunks:
    """Consecutive runs of examples, all of ``size``; the last one may be shorter, and is padded before it is scored.

    Guarantees:
        * every example is in exactly one chunk, and chunk ``c`` is the same examples in every process;
        * every batch has the same shape, so that a scorer is compiled once and gives the same bits on every engine.
    """

    def __init__(self, num_examples: int, size: int) -> None:
        if num_examples < 1 or size < 1:
            raise ArgumentError(
                f"chunks need at least one example each, got {num_examples} examples in chunks of {size}"
            )
        self.num_examples = num_examples
        self.size = min(size, num_examples)

    def __len__(self) -> int:
        return -(-self.num_examples // self.size)

    def ids(self, chunk: int) -> np.ndarray:
        """The examples of a chunk."""
        start = chunk * self.size
        return np.arange(start, min(start + self.size, self.num_examples))

    def batch(self, data: Batch, chunk: int) -> Batch:
        """The rows of a chunk; the last example again is harmless padding."""
        start = chunk * self.size

        def rows(leaf: Any) -> Any:
            taken = leaf[start : start + self.size]
            short = self.size - len(taken)
            return np.concatenate([taken, np.repeat(taken[-1:], short, axis=0)]) if short else taken

        return jax.tree.map(rows, data)


class Scored(NamedTuple):
    """What a scorer found of a chunk, in host memory: ``scores`` [c] and, if it makes them, ``sketches`` [c, dims]."""

    scores: np.ndarray
    sketches: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return sum(part.nbytes for part in self if part is not None)


def num_rows(data: Batch) -> int:
    """Examples of a data set.

    Raises:
        ValueError: its leaves are not arrays with one common leading axis.
    """
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if len(sizes) != 1 or sizes == {()}:
        raise ArgumentError(
            "data must be a pytree of arrays with one common leading axis, one row per example; "
            f"got leading axes {sorted(sizes)}"
        )
    return sizes.pop()[0]


def unpadded(found: Any, count: int) -> Any:
    """What a scorer returned, in host memory and without padding: the first ``count`` rows of each of its arrays.

    What is no array with rows is left as it is, for `what_is_wrong` to refuse.
    """
    return jax.tree.map(lambda x: rows[:count] if (rows := np.asarray(x)).ndim else rows, found)


def what_is_wrong(found: Any, count: int) -> str | None:
    """Why these cannot be the scores, or ``(scores, sketches)``, of ``count`` examples; None if they can.

    Values are not judged: whoever keeps the scores sets aside single ones that are not finite.
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
