"""Scoring a batch a few examples at a time: the same scores, for less memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients.slices import by_slices

Scoring = Callable[[Any, Any], Any]
"""``(params, batch) -> [b]``, or a pytree of such arrays, each row depending on one example alone."""

_ALLOWANCE = 1.5
"""How much more temporary memory than the ordinary gradient an automatic size may take."""


def in_microbatches(
    score: Scoring, size: int | Literal["auto"] | None, reference: Callable[[Any, Any], Any] | None = None
) -> Scoring:
    """``score``, on ``size`` examples at a time; "auto": as many as fit in 1.5 times the memory of ``reference``."""
    if size not in (None, "auto") and (not isinstance(size, int) or size < 1):
        raise ArgumentError(f'microbatch_size must be a positive integer, "auto" or None, got {size!r}')
    fitting: dict[Any, int] = {}

    def scored(params: Any, batch: Any) -> Any:
        if size != "auto":
            return _sliced(score, size)(params, batch)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, batch))
        key = str(jax.tree.flatten(shapes))
        if key not in fitting:
            fitting[key] = _fitting_size(score, reference, *shapes)
        return _sliced(score, fitting[key])(params, batch)

    return scored


def _fitting_size(score: Scoring, reference: Any, params: Any, batch: Any) -> int:
    """The largest of b, b/2, b/4, ... whose compiled program stays within the allowance."""
    budget = _ALLOWANCE * _temporary_bytes(reference, params, batch)
    size = jax.tree.leaves(batch)[0].shape[0]
    while size > 1 and _temporary_bytes(_sliced(score, size), params, batch) > budget:
        size = -(-size // 2)
    return size


def _sliced(score: Scoring, size: int | None) -> Scoring:
    return lambda params, batch: by_slices(partial(score, params), batch, size)


def _temporary_bytes(function: Callable[[Any, Any], Any], params: Any, batch: Any) -> int:
    """What XLA says it needs beside arguments and results; nothing runs."""
    analysis = jax.jit(function).lower(params, batch).compile().memory_analysis()
    return analysis.temp_size_in_bytes if analysis else 0  # some backends do not say
