"""A batch, a few examples at a time: the same result, for less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["by_slices"]


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
