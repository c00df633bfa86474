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

    The result may be any pytree; the rows of its arrays must depend on one example each.
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
