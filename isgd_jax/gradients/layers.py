"""Layers that stand in one array: the gradient of the array is put together of those of its slices.

A loop in Python takes the slices one by one, by index or by `jnp.unstack`, and `jax.grad` adds up or stacks what each
layer gives, one contraction a layer. As for a scanned layer, the layers' factors are stacked, and the contraction is
one, in which layers are not multiplied with each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from isgd_jax.gradients.contraction import Contraction, Parts, Side, Whole, axes_of, signature
from isgd_jax.gradients.jaxpr import emit
from isgd_jax.gradients.meshes import replicated, spec_of

__all__ = ["side_by_side"]


def side_by_side(slices: Iterable[tuple[int, Parts]], axis: int, shape: tuple[int, ...]) -> Parts | None:
    """The parts of an array that is zero but for its slices.

    Args:
        slices: places along ``axis``, and the parts of the slice there; of one place there may be several, which add.
        axis: that the slices are cut across; each is one thick.
        shape: of the array.

    Returns:
        Contractions with the layers as one more axis; None where a slice stays whole, or where too few slices have
        contractions that are alike, so that most of what is stacked would be zeros.
    """
    thin = (*shape[:axis], 1, *shape[axis + 1 :])
    alike: dict[Any, list[tuple[int, Contraction, list[Any]]]] = {}
    seen: dict[Any, int] = {}
    for place, parts in slices:
        for part in parts:
            split = None if isinstance(part, Whole) else part.reshaped(thin).dims()
            if split is None:
                return None
            key = signature(split[0])
            nth = seen[place, key] = seen.get((place, key), 0) + 1
            alike.setdefault((key, nth), []).append((place, *split))
    if 2 * sum(map(len, alike.values())) < shape[axis] * len(alike):
        return None
    return [_stacked(terms, axis, shape) for terms in alike.values()]


def _stacked(terms: list[tuple[int, Contraction, list[Any]]], axis: int, shape: tuple[int, ...]) -> Contraction:
    (layers,) = axes_of([shape[axis]])
    stack = _Stack(tuple(place for place, _, _ in terms), shape[axis])
    _, first, groups = terms[0]

    def over_all(which: str) -> Side:
        side = getattr(first, which)
        nodes = [getattr(term, which).node for _, term, _ in terms]
        return replace(side, node=emit("stack", stack, *nodes), axes=(layers, *side.axes))

    groups = [(layers, *group) if place == axis else group for place, group in enumerate(groups)]
    out = tuple(a for group in groups for a in group)
    return replace(first, left=over_all("left"), right=over_all("right"), out=out, shape=shape)


@dataclass(frozen=True)
class _Stack:
    """Arrays at their places along a new first axis, zeros elsewhere."""

    places: tuple[int, ...]
    length: int

    def __call__(self, *arrays: Array) -> Array:
        if len(set(map(spec_of, arrays))) > 1:
            arrays = tuple(map(replicated, arrays))
        ordered = sorted(zip(self.places, arrays, strict=True), key=lambda known: known[0])
        ends = [place for place, _ in ordered[1:]] + [self.length]
        first = ordered[0][0]
        rows = []
        for (place, x), end in zip(ordered, ends, strict=True):
            around = (first if place == first else 0, end - place - 1, 0)  # an array of zeros would lie anywhere
            rows.append(lax.pad(x[None], jnp.zeros((), x.dtype), [around, *[(0, 0, 0)] * x.ndim]))
        return lax.concatenate(rows, 0)
