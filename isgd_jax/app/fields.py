"""Fields that are checked when a part of the configuration is made: their types and their ranges.

Messages speak the names of Python (``batch_size must be at least 1; got 0``); the command puts flags in their place.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

from isgd_jax.errors import ArgumentError, ArgumentTypeError

__all__ = ["Amount", "Count", "InPython", "Number", "Part", "Positive", "Range", "Share", "must"]


@dataclass(frozen=True)
class Range:
    """The numbers that a field may have: metadata of its type, ``Annotated[int, Range(...)]``.

    Args:
        expected: the range in words, as it stands after "must be".
        holds: whether a number lies in it.
    """

    expected: str
    holds: Callable[[float], bool]


_INT32 = Range("at most 2,147,483,647", lambda x: x < 2**31)
"""Steps and examples are counted in int32 on the devices."""
Count = Annotated[int, Range("at least 1", lambda x: x >= 1), _INT32]
"""A whole number of things or steps."""
Number = Annotated[int, Range("0 or more", lambda x: x >= 0), _INT32]
"""A whole number that may be 0."""
Positive = Annotated[float, Range("above 0", lambda x: 0 < x < math.inf)]
Amount = Annotated[float, Range("0 or more", lambda x: 0 <= x < math.inf)]
Share = Annotated[float, Range("above 0 and at most 1", lambda x: 0 < x <= 1)]
"""A part of a whole, never none of it."""

_HALVES = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Surrogates, which JSON can spell and no name can have; the others are bytes of a name that is not in UTF-8."""

T = TypeVar("T")
InPython = Annotated[T, tyro.conf.Fixed, tyro.conf.Suppress]
"""A field without a flag, for the few who tune it: ``configure(order="label")``. `isgd_jax.app.gone` names them all."""


class Part:
    """A dataclass that checks each field against its type, and numbers against the `Range` in it, when it is made.

    Types may be classes, ``Literal``, ``X | Y``, ``tuple[X, ...]``, and these within ``Annotated``. An int will do for
    a float; a bool is no number, and NaN is none.

    Raises:
        TypeError: a value has another type.
        ValueError: a number is out of its range.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, float) and math.isnan(value):
                raise ArgumentTypeError(f"{name} must be a number; got nan")
            if not _matches(value, hint):
                raise ArgumentTypeError(
                    f"{name} must be {_in_words(hint)}; got {value!r} of type {type(value).__name__}"
                )
            must(self, name, not (isinstance(value, str) and "\0" in value), "a text without the character NUL")
            must(self, name, not (isinstance(value, str) and _HALVES.search(value)), "a text without half a character")
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            each = value if isinstance(value, tuple) else (value,)
            numbers = [x for x in each if isinstance(x, (int, float))]
            for allowed in _ranges(hint):
                expected = f"{allowed.expected}{' each' * isinstance(value, tuple)}"
                must(self, name, all(map(allowed.holds, numbers)), expected)


def must(part: Any, name: str, holds: bool, expected: str) -> None:
    """Refuse the field ``name`` of ``part`` unless ``holds``.

    Args:
        part: of the configuration, which has the field.
        name: of the field, as Python knows it; `isgd_jax.app.flags` makes the flag of it.
        holds: what must be true.
        expected: what was expected, as it stands after "must be".

    Raises:
        ValueError: "``name`` must be ``expected``; got" and its value.
    """
    if not holds:
        raise ArgumentError(f"{name} must be {expected}; got {getattr(part, name)!r}")


def _ranges(hint: Any) -> Iterator[Range]:
    """The ranges anywhere in a type."""
    for part in get_args(hint):
        if isinstance(part, Range):
            yield part
        else:
            yield from _ranges(part)


def _in_words(hint: Any) -> str:
    """A type as a message says it."""
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a tuple of {_in_words(get_args(hint)[0])}"
    if get_args(hint):
        return " or ".join(map(_in_words, get_args(hint)))
    return "None" if hint is type(None) else hint.__name__


def _matches(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_matches(item, get_args(hint)[0]) for item in value)
    if get_args(hint):  # X | Y
        return any(_matches(value, part) for part in get_args(hint))
    if hint is bool or isinstance(value, bool):
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and not math.isnan(value)
    return isinstance(value, hint)
