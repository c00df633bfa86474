"""Random-access sources: read whole, every item asked the same questions."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from isgd_jax.app.data.checks import blocks
from isgd_jax.errors import ArgumentError, ArgumentTypeError
from isgd_jax.types import Source

__all__ = ["check_source", "gathered", "read", "stacked"]

_READ_TOGETHER = 4096
"""Items asked for at once."""


def read(source: Any) -> dict[str, np.ndarray]:
    """Brings a source into memory: its items, all with the same keys and shapes, stacked key by key.

    For a moment it takes twice the memory of the arrays: `isgd_jax.app.data.spill` is for what is larger.

    Args:
      source: with ``__len__`` and ``__getitems__``; 4,096 items are asked for at a time, in order.

    Raises:
      TypeError: the source has not both methods, or its items are no dicts.
      ValueError: it is empty, or its items differ in keys or shapes.
    """
    stacks = [stack for _, stack in stacked(source)]
    try:
        return {key: np.concatenate([stack[key] for stack in stacks]) for key in stacks[0]}
    except ValueError as error:
        raise ArgumentError(f"expected items with arrays of the same shapes: {error}") from error


def check_source(source: Any) -> None:
    """Something can be read.

    Raises:
      TypeError: the source has not both methods.
      ValueError: it is empty.
    """
    if not isinstance(source, Source):
        raise ArgumentTypeError(f"expected an object with __len__ and __getitems__, got {type(source).__name__}")
    if not len(source):
        raise ArgumentError("the source is empty: expected at least one example")


def stacked(source: Any) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
    """The items of a source in order, some thousand together: their rows, and arrays [rows, ...] by key.

    Raises:
      TypeError: the source has not both methods, or its items are no dicts.
      ValueError: it is empty, or its items differ in keys, or in shapes within these rows.
    """
    check_source(source)
    keys: list[str] | None = None
    for rows in blocks(len(source), rows=_READ_TOGETHER):
        stack = gathered(source, [*range(len(source))[rows]], keys=keys)
        keys = list(stack)
        yield rows, stack


def gathered(source: Source, indices: list[int], *, keys: list[str] | None = None) -> dict[str, np.ndarray]:
    """Items of a source, stacked key by key.

    Args:
      source: what to read.
      indices: which items.
      keys: what every item must have; by default the keys of the first.

    Raises:
      TypeError: the items are no dicts.
      ValueError: they are not as many as were asked for, or differ in keys or shapes.
    """
    items = source.__getitems__(indices)
    if len(items) != len(indices):
        raise ArgumentError(
            f"expected __getitems__ to give the {len(indices)} items it was asked for, got {len(items)}"
        )
    for index, item in zip(indices, items, strict=True):
        if not isinstance(item, Mapping):
            raise ArgumentTypeError(f"expected the items of a source to be dicts of arrays, got {type(item).__name__}")
        keys = list(item) if keys is None else keys
        if set(item) != set(keys):
            raise ArgumentError(
                f"expected items with the same keys, {sorted(keys)}, got {sorted(item)} in item {index}"
            )
    try:
        return {key: np.stack([np.asarray(item[key]) for item in items]) for key in keys or ()}
    except ValueError as error:
        raise ArgumentError(f"expected items with arrays of the same shapes: {error}") from error
