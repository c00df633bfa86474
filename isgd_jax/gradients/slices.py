"""A batch, a few examples at a time: the same result, for less memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

__all__ = ["Slices", "by_slices", "rows_and_sums", "slices_of"]


def by_slices(function: Callable[[Any], Any], batch: Any, size: int | None) -> Any:
    """``function(batch)``, called on ``size`` examples at a time.

    Two programs at most: one for slices of ``size``, run in turn by `jax.lax.map`, and one for what is left over.

    Args:
        function: of a batch; the rows of the arrays it returns must depend on one example each.
        batch: a pytree with one leading axis b.
        size: examples at a time; None, or b and more, calls the function once.
    """
    b = jax.tree.leaves(batch)[0].shape[0]
    if size is None or size >= b:
        return function(batch)
    count = b // size
    whole = jax.tree.map(lambda x: x[: count * size].reshape(count, size, *x.shape[1:]), batch)
    rows = jax.tree.map(lambda x: x.reshape(count * size, *x.shape[2:]), lax.map(function, whole))
    if count * size == b:
        return rows
    rest = function(jax.tree.map(lambda x: x[count * size :], batch))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), rows, rest)


class Slices(NamedTuple):
    """How a batch is cut. All slices are of one size: some have examples of others of their part too, which count
    nothing there."""

    starts: np.ndarray
    parts: np.ndarray
    """Which part of the batch each belongs to."""
    counts: np.ndarray
    """Whether an example counts [slices, size]; each example of the batch does so once, in order."""


def slices_of(b: int, size: int, cuts: Sequence[int] = ()) -> Slices:
    """Cut a batch, and each part of it, into slices of at most ``size``.

    >>> slices_of(7, 3).starts, slices_of(7, 3).counts[-1]
    (array([0, 3, 4], dtype=int32), array([False, False,  True]))

    Args:
        b: examples of the batch.
        size: of a slice.
        cuts: where parts begin, but for the first.
    """
    ends = [*cuts, b]
    begins = [0, *cuts]
    lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
    most = min(size, *lengths)  # none has an example of another part: 0 times NaN is NaN
    size = -(-max(lengths) // -(-max(lengths) // most))
    starts, parts, counts = [], [], []
    for part, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        for first in range(begin, end, size):
            start = min(end - size, first)
            places = np.arange(start, start + size)
            starts.append(start)
            parts.append(part)
            counts.append(places >= first)
    return Slices(np.asarray(starts, np.int32), np.asarray(parts, np.int32), np.asarray(counts))


def rows_and_sums(
    of_slice: Callable[[Any, Array], tuple[Any, Any]], batch: Any, weights: Array, slices: Slices, zeros: Any
) -> tuple[Any, list[Any]]:
    """What a function gives of each example, in a row, and the sums that it gives of each part of a batch.

    Of the batch no more than a slice is copied.

    Args:
        of_slice: ``(examples, weights) -> (rows, sums)``: arrays with one row an example, and sums over the examples in
            which each counts by its weight.
        batch: a pytree with one leading axis b.
        weights: of each example [b]; 0 for those that do not count in a slice.
        slices: how to cut the batch.
        zeros: what sums begin with; they are kept in its types.

    Returns:
        Rows [b, ...], and the sums of each part.
    """
    size = slices.counts.shape[1]
    shares = jnp.where(slices.counts, weights[slices.starts[:, None] + np.arange(size)], 0.0)
    num_parts = int(slices.parts[-1]) + 1

    def add(totals: Any, some: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        start, part, own = some
        rows, sums = of_slice(jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), batch), own)
        return jax.tree.map(lambda total, new: total.at[part].add(new.astype(total.dtype)), totals, sums), rows

    totals = jax.tree.map(lambda x: jnp.stack([x] * num_parts), zeros)
    totals, rows = lax.scan(add, totals, (jnp.asarray(slices.starts), jnp.asarray(slices.parts), shares))
    counted = np.flatnonzero(slices.counts)

    def in_a_row(x: Array) -> Array:
        x = x.reshape(slices.counts.size, *x.shape[2:])
        return x if slices.counts.all() else x[counted]

    parts = [jax.tree.map(lambda x, part=part: x[part], totals) for part in range(num_parts)]
    return jax.tree.map(in_a_row, rows), parts
