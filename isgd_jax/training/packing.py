"""The small arrays of a state as one array, from one jitted step to the next.

To hand an array to a program and to take another one back costs a CPU some 5 µs, as much as a small operation, and the
state of a sampler has thirty arrays that every step changes, most of them single numbers.

Guarantees:

* what is unpacked is what was packed, bit for bit, whatever the numbers;
* a packed step computes what the step of the whole state does.

Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from isgd_jax.gradients.captured import CapturingJit

__all__ = ["LARGEST", "Held", "Packing"]

LARGEST = 1024
"""Numbers that an array may have to be packed: copying more of them costs what handing it on does."""

Packed = list[Any]
"""The small arrays, as 32-bit words [w]; and the others as they are."""

_WORDS = tuple(map(jnp.dtype, (jnp.float32, jnp.int32, jnp.uint32, jnp.bool_)))


class Packing:
    """How states of one structure, shapes and types are packed.

    Args:
        state: a pytree of arrays that lie on one device.

    >>> state = {"step": jnp.int32(3), "is_open": jnp.asarray(True), "table": jnp.zeros(5_000)}
    >>> packing = Packing(state)
    >>> [x.shape for x in packing.pack(state)]
    [(2,), (5000,)]
    >>> jax.tree.map(jnp.array_equal, packing.unpack(packing.pack(state)), state) == dict.fromkeys(state, True)
    True
    """

    def __init__(self, state: Any) -> None:
        leaves, structure = jax.tree.flatten(state)
        self._structure: Any = structure
        self._shapes = [jnp.shape(x) for x in leaves]
        self._dtypes = [jnp.result_type(x) for x in leaves]
        self._is_small = [_is_small(x) for x in leaves]
        self._join, self._split = jax.jit(_joined), jax.jit(self._parts)

    def pack(self, state: Any) -> Packed:
        """A state, packed; the large arrays are the same ones."""
        return self._packed(state, self._join)

    def unpack(self, packed: Packed) -> Any:
        """The state again; the large arrays are the same ones."""
        return self._whole(packed, self._split)

    def step(self, function: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Packed, Any]]:
        """``(state, *given) -> (state, result)`` of packed states, jitted; what it is given of the state is donated.

        Args:
            function: pure; the state it returns is of this packing. Large arrays that it captures are arguments of the
                program (`CapturingJit`).
        """

        def packed_step(packed: Packed, *given: Any) -> tuple[Packed, Any]:
            after, result = function(self._whole(packed, self._parts), *given)
            return self._packed(after, _joined), result

        return CapturingJit(packed_step, donate_argnums=(0,))

    def _packed(self, state: Any, join: Callable[[list[Any]], Any]) -> Packed:
        leaves, structure = jax.tree.flatten(state)
        if structure != self._structure:
            raise AssertionError(f"packed for {self._structure}, got {structure}")
        both = list(zip(leaves, self._is_small, strict=True))
        return [join([x for x, is_small in both if is_small]), *(x for x, is_small in both if not is_small)]

    def _whole(self, packed: Packed, split: Callable[[Any], list[Any]]) -> Any:
        words, *large = packed
        small, others = iter(split(words)), iter(large)
        return jax.tree.unflatten(self._structure, [next(small if is_it else others) for is_it in self._is_small])

    def _parts(self, words: Any) -> list[Any]:
        """The small arrays of their words."""
        parts, at = [], 0
        for shape, dtype, is_small in zip(self._shapes, self._dtypes, self._is_small, strict=True):
            if is_small:
                size = math.prod(shape)
                parts.append(_from_words(words[at : at + size], dtype).reshape(shape))
                at += size
        return parts


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


def _is_small(x: Any) -> bool:
    return jnp.result_type(x) in _WORDS and 0 < math.prod(jnp.shape(x)) <= LARGEST


def _joined(small: list[Any]) -> Any:
    """The words of small arrays, one after the other."""
    return jnp.concatenate([_as_words(x) for x in small]) if small else jnp.zeros(0, jnp.int32)


def _as_words(x: Any) -> Any:
    words = x.astype(jnp.int32) if x.dtype == jnp.bool_ else lax.bitcast_convert_type(x, jnp.int32)
    return words.reshape(-1)


def _from_words(words: Any, dtype: Any) -> Any:
    return words != 0 if dtype == jnp.bool_ else lax.bitcast_convert_type(words, dtype)
