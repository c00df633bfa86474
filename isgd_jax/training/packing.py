"""The small arrays of a state as one array, from one jitted step to the next.

To hand an array to a program and to take another one back costs a CPU some 5 µs, as much as a small operation, and the
state of a sampler has thirty arrays that every step changes, most of them single numbers. Steps that need a part of the
state alone are given no more.

Guarantees:

* what is unpacked is what was packed, bit for bit, whatever the numbers;
* a packed step computes what the step of the whole state does.

Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from isgd_jax.gradients.captured import CapturingJit

__all__ = ["LARGEST", "Held", "Packed", "PackedStep", "Packing"]

LARGEST = 1024
"""Numbers that an array may have to be packed: copying more of them costs what handing it on does."""

_WORDS = tuple(map(jnp.dtype, (jnp.float32, jnp.int32, jnp.uint32, jnp.bool_)))

Kinds = tuple[tuple[tuple[int, ...], Any], ...]
"""Shapes and types of small arrays."""

Arrays = list[Any]
"""The small arrays of a part, as 32-bit words [w]; and the others as they are."""


class Packed(NamedTuple):
    """A state, packed in two parts."""

    moving: Arrays
    """What every step takes."""
    standing: Arrays
    """What some steps can do without."""


class Packing:
    """How states of one structure, shapes and types are packed.

    Args:
        state: a pytree of arrays that lie on one device.
        moving: the part of a state that steps take which leave the rest as it is; all of it by default.

    >>> state = {"step": jnp.int32(3), "is_open": jnp.asarray(True), "table": jnp.zeros(5_000)}
    >>> packing = Packing(state)
    >>> [x.shape for x in packing.pack(state).moving]
    [(2,), (5000,)]
    >>> jax.tree.map(jnp.array_equal, packing.unpack(packing.pack(state)), state) == dict.fromkeys(state, True)
    True
    """

    def __init__(self, state: Any, moving: Callable[[Any], Any] | None = None) -> None:
        leaves, structure = jax.tree.flatten(state)
        self._structure: Any = structure
        places = range(len(leaves))
        taken = set(places if moving is None else jax.tree.leaves(moving(jax.tree.unflatten(structure, places))))
        self._moving = _Part(leaves, [at for at in places if at in taken])
        self._standing = _Part(leaves, [at for at in places if at not in taken])

    def pack(self, state: Any) -> Packed:
        """A state, packed; the large arrays are the same ones."""
        leaves = self._leaves(state)
        return Packed(self._moving.packed(leaves), self._standing.packed(leaves))

    def unpack(self, packed: Packed) -> Any:
        """The state again; the large arrays are the same ones."""
        leaves = self._nowhere()
        self._moving.fill(leaves, packed.moving)
        self._standing.fill(leaves, packed.standing)
        return jax.tree.unflatten(self._structure, leaves)

    def step(self, function: Callable[..., tuple[Any, Any]]) -> PackedStep:
        """``(state, *given) -> (state, result)`` of packed states, jitted; what it is given of the state is donated.

        Args:
            function: pure; the state it returns is of this packing. Large arrays that it captures are arguments of the
                program (`CapturingJit`).
        """
        return self._stepped(function, [self._moving, self._standing])

    def moving_step(self, function: Callable[..., tuple[Any, Any]]) -> PackedStep:
        """The same of a function that neither reads nor changes what stands: the program is not given it.

        Args:
            function: pure; in the place of each array that stands its state has None, or an object of no meaning.
        """
        return self._stepped(function, [self._moving])

    def _stepped(self, function: Callable[..., tuple[Any, Any]], parts: Sequence[_Part]) -> PackedStep:
        def packed_step(packed: list[Arrays], *given: Any) -> tuple[list[Arrays], Any]:
            leaves = self._nowhere()
            for part, arrays in zip(parts, packed, strict=True):
                part.fill(leaves, arrays, traced=True)
            after, result = function(jax.tree.unflatten(self._structure, leaves), *given)
            leaves = self._leaves(after)
            return [part.packed(leaves, traced=True) for part in parts], result

        return PackedStep(CapturingJit(packed_step, donate_argnums=(0,)), len(parts))

    def _nowhere(self) -> list[Any]:
        return [_NOWHERE] * self._structure.num_leaves

    def _leaves(self, state: Any) -> list[Any]:
        leaves, structure = jax.tree.flatten(state)
        if structure != self._structure:
            raise AssertionError(f"packed for {self._structure}, got {structure}")
        return leaves


class PackedStep:
    """A step of packed states.

    Args:
        program: ``(parts, *given) -> (parts, result)``, jitted.
        count: how many of the parts it takes; the others stay as they are.
    """

    def __init__(self, program: Any, count: int) -> None:
        self._program, self._count = program, count

    def __call__(self, packed: Packed, *given: Any) -> tuple[Packed, Any]:
        """The state after the step, and the step's result."""
        taken, result = self._program(list(packed[: self._count]), *given)
        return Packed(*taken, *packed[self._count :]), result

    def _cache_size(self) -> int:
        """How many programs were compiled."""
        return self._program._cache_size()


class _Part:
    """Some of the leaves of a state.

    Args:
        leaves: of a state, all of them.
        places: of those that belong to it.
    """

    def __init__(self, leaves: list[Any], places: list[int]) -> None:
        self._small = [at for at in places if _is_small(leaves[at])]
        self._large = [at for at in places if not _is_small(leaves[at])]
        self._kinds = tuple((jnp.shape(leaves[at]), jnp.result_type(leaves[at])) for at in self._small)

    def packed(self, leaves: list[Any], *, traced: bool = False) -> Arrays:
        """These leaves, packed."""
        small = [leaves[at] for at in self._small]
        return [(_joined if traced else _join)(small), *(leaves[at] for at in self._large)]

    def fill(self, leaves: list[Any], arrays: Arrays, *, traced: bool = False) -> None:
        """Put these leaves into their places."""
        words, *large = arrays
        small = (_apart if traced else _split)(words, self._kinds)
        for at, value in zip((*self._small, *self._large), (*small, *large), strict=True):
            leaves[at] = value


class Held:
    """A state from step to step: packed for the next one, whole for whoever looks at it.

    Args:
        state: the first one.
        packing: of such states; None where steps take them whole.
    """

    def __init__(self, state: Any, packing: Packing | None = None) -> None:
        self._packing, self._state = packing, state
        self._packed: Packed | None = None

    @property
    def state(self) -> Any:
        """The whole of it; the next step takes its large arrays over."""
        if self._state is None and self._packing is not None and self._packed is not None:
            self._state = self._packing.unpack(self._packed)
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._state, self._packed = state, None

    def advance(self, step: Callable[..., tuple[Any, Any]], *given: Any) -> Any:
        """Make a step.

        Args:
            step: of whole states, or made of one by `Packing.step` where they are packed.
            given: its further arguments.

        Returns:
            The step's result.
        """
        if self._packing is None:
            self._state, result = step(self._state, *given)
            return result
        packed = self._packing.pack(self._state) if self._packed is None else self._packed
        self._state = None  # its large arrays are donated now
        self._packed, result = step(packed, *given)
        return result

    def ready(self) -> Any:
        """What a step leaves, to wait for."""
        return self._state if self._packed is None else self._packed

    def copy(self) -> Held:
        """A state of its own."""
        return Held(jax.tree.map(jnp.copy, self.state), self._packing)


class _Nowhere:
    """In the place of an array that a step is not given: whoever computes with it fails."""


_NOWHERE = _Nowhere()


def _is_small(x: Any) -> bool:
    return jnp.result_type(x) in _WORDS and 0 < math.prod(jnp.shape(x)) <= LARGEST


def _joined(small: list[Any]) -> Any:
    """The words of small arrays, one after the other."""
    return jnp.concatenate([_as_words(x) for x in small]) if small else jnp.zeros(0, jnp.int32)


def _apart(words: Any, kinds: Kinds) -> list[Any]:
    """The small arrays of their words."""
    each = lax.split(words, [math.prod(shape) for shape, _ in kinds]) if kinds else []
    return [_from_words(own, dtype).reshape(shape) for own, (shape, dtype) in zip(each, kinds, strict=True)]


# One program for all states of these shapes: to compile one takes half a second, as many results as it has.
_join, _split = jax.jit(_joined), jax.jit(_apart, static_argnums=1)


def _as_words(x: Any) -> Any:
    words = x.astype(jnp.int32) if x.dtype == jnp.bool_ else lax.bitcast_convert_type(x, jnp.int32)
    return words.reshape(-1)


def _from_words(words: Any, dtype: Any) -> Any:
    return words != 0 if dtype == jnp.bool_ else lax.bitcast_convert_type(words, dtype)
