"""Scoring a batch a few examples at a time: the same scores, for less memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

Scoring = Callable[[Any, Any], Array]
"""``(params, batch) -> [b]``, each entry depending on one example alone."""

_ALLOWANCE = 1.5
"""How much more temporary memory than the ordinary gradient an automatic size may take."""


def in_microbatches(
    score: Scoring, size: int | Literal["auto"] | None, reference: Callable[[Any, Any], Any] | None = None
) -> Scoring:
    """``score``, called on ``size`` examples at a time; "auto": on as many as fit in 1.5 × the memory of ``reference``."""
    if size not in (None, "auto") and (not isinstance(size, int) or size < 1):
        raise ValueError(f'microbatch_size must be a positive integer, "auto" or None, got {size!r}')
    fitting: dict[Any, int] = {}

    def scored(params: Any, batch: Any) -> Array:
        if size != "auto":
            return _by_slices(score, params, batch, size)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, batch))
        key = str(jax.tree.flatten(shapes))
        if key not in fitting:
            fitting[key] = _fitting_size(score, reference, *shapes)
        return _by_slices(score, params, batch, fitting[key])

    return scored


def _by_slices(score: Scoring, params: Any, batch: Any, size: int | None) -> Array:
    b = jax.tree.leaves(batch)[0].shape[0]
    if size is None or size >= b:
        return score(params, batch)
    whole = b - b % size
    slices = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), batch)
    scores = lax.map(lambda some: score(params, some), slices).reshape(whole)
    if whole == b:
        return scores
    return jnp.concatenate([scores, score(params, jax.tree.map(lambda x: x[whole:], batch))])


def _fitting_size(score: Scoring, reference: Any, params: Any, batch: Any) -> int:
    """The largest of b, b/2, b/4, ... whose compiled program stays within the allowance."""
    budget = _ALLOWANCE * _temporary_bytes(reference, params, batch)
    size = jax.tree.leaves(batch)[0].shape[0]
    while size > 1 and _temporary_bytes(lambda p, x: _by_slices(score, p, x, size), params, batch) > budget:  # noqa: B023
        size = -(-size // 2)
    return size


def _temporary_bytes(function: Callable[[Any, Any], Any], params: Any, batch: Any) -> int:
    """What XLA says it needs beside arguments and results; nothing runs."""
    return jax.jit(function).lower(params, batch).compile().memory_analysis().temp_size_in_bytes
