"""Large arrays that a function captures, such as frozen weights, as arguments of its program.

`jax.jit` writes an array that a function closes over into the program: 200 MB of frozen weights are 400 MB of text to
lower and to compile, once for each program. Here the program takes them as arguments, so that compiling it costs what
it costs without them.

Only who calls the outermost `jax.jit` can do so: what is captured under a jit of the caller's own is the caller's to
pass, as a further argument of the loss (`isgd_jax.per_example_grads`).

Source: ours, after `jax.closure_convert`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec

__all__ = ["LARGE", "CapturingJit", "captured", "passing"]

LARGE = 1 << 16
"""Bytes from which on an array is passed; smaller ones stay in the program, where the compiler can fold them."""


def captured(jitted: Any, *args: Any) -> list[Any]:
    """The captured arrays of `LARGE` bytes or more, each once, for arguments of these types.

    Args:
        jitted: of `jax.jit`, which keeps what is traced here for when it is called.
        args: of the function, by position; arrays or `jax.ShapeDtypeStruct`.
    """
    consts = jitted.trace(*args).jaxpr.consts
    large = {id(x): x for x in consts if getattr(x, "nbytes", 0) >= LARGE and not isinstance(x, jax.core.Tracer)}
    return list(large.values())


def passing(jitted: Any, arrays: Sequence[Any]) -> Callable[..., Any]:
    """``(passed, *args)``: a jitted function, with ``passed`` in the places of ``arrays``, which it captures."""

    def call(passed: Sequence[Any], *args: Any) -> Any:
        traced = jitted.trace(*args)  # kept by `jitted`: nothing is traced again
        known = {id(x): value for x, value in zip(arrays, passed, strict=True)}
        opened = traced.jaxpr.replace(consts=[known.get(id(x), x) for x in traced.jaxpr.consts])
        return jax.tree.unflatten(traced.out_tree, jaxpr_as_fun(opened)(*jax.tree.leaves(args)))

    return call


class CapturingJit:
    """`jax.jit` of a function of positional arguments, whose large captured arrays are arguments of the program.

    Guarantees:

    * where nothing large is captured it is `jax.jit`, after one look at the first call;
    * captured arrays are copied to the devices of the arguments once; those that lie on several stay as they are.

    Args:
        function: of pytrees of arrays.
        donate_argnums: as for `jax.jit`; what is captured is never donated.

    >>> import jax.numpy as jnp
    >>> frozen = jnp.ones((200, 200))
    >>> program = CapturingJit(lambda x: jnp.sum(x @ frozen))
    >>> print(program(jnp.ones(200)), len(program.lower(jnp.ones(200)).as_text()) < frozen.size)
    40000.0 True
    """

    def __init__(self, function: Callable[..., Any], *, donate_argnums: tuple[int, ...] = ()) -> None:
        self.__wrapped__ = function
        self._donated = tuple(place + 1 for place in donate_argnums)
        self._jitted: Any = jax.jit(function, donate_argnums=donate_argnums)
        self._arrays: list[Any] | None = None
        self._passing: Any = None
        self._copies: dict[Any, list[Any]] = {}

    def __call__(self, *args: Any) -> Any:
        """What the function returns."""
        if self._arrays == []:
            return self._jitted(*args)
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args)):
            return self._jitted(*args)  # part of a larger program, which is not ours
        arrays = self._of(args)
        return self._passing(self._placed(arrays, args), *args) if arrays else self._jitted(*args)

    def lower(self, *args: Any) -> Any:
        """As `jax.jit` has it: the program of arguments of these types."""
        arrays = self._of(args)
        return self._passing.lower(arrays, *args) if arrays else self._jitted.lower(*args)

    def _cache_size(self) -> int:
        """How many programs were compiled."""
        return (self._passing if self._arrays else self._jitted)._cache_size()

    def _of(self, args: Any) -> list[Any]:
        """What is captured: found at the first call, for it does not depend on the arguments' types."""
        if self._arrays is None:
            self._arrays = captured(self._jitted, *args)
            self._passing = jax.jit(passing(self._jitted, self._arrays), donate_argnums=self._donated)
        return self._arrays

    def _placed(self, arrays: Sequence[Any], args: Any) -> list[Any]:
        """The arrays on the devices of the arguments."""
        where = next((p for p in map(_placement, jax.tree.leaves(args)) if p is not None), None)
        if where not in self._copies:
            spread = [isinstance(x, jax.Array) and len(x.devices()) > 1 for x in arrays]
            self._copies[where] = [
                x if is_spread else jax.device_put(x, where) for x, is_spread in zip(arrays, spread, strict=True)
            ]
        return self._copies[where]


def _placement(x: Any) -> Any:
    """Where an array that is committed to devices wants others to be whole; None where nothing is said."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer) or not x.committed:
        return None
    mesh = getattr(x.sharding, "mesh", None)
    return next(iter(x.devices())) if mesh is None else NamedSharding(mesh, PartitionSpec())
