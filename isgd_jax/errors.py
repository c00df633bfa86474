"""Mistakes that a person can mend: what was expected, what came, what to do.

The command prints these in one sentence; everything else that is raised is a fault of the program, and keeps its
traceback. Each is also one of Python's own errors, so ``except ValueError`` catches what it always did.

Also the checks of arguments that several folders share. Values are looked at where they can be seen: not while a
function is traced, so what is checked here and only here is told eagerly, and shows as NaN inside ``jax.jit``.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "CannotImportError",
    "DamagedFileError",
    "DivergedError",
    "IsgdError",
    "ReferenceNotFoundError",
    "RunInUseError",
    "Wrong",
    "check_array",
    "check_unmasked",
    "check_whole",
    "first_wrong",
    "seen",
]


class IsgdError(Exception):
    """The root of this library's own errors."""


class ArgumentError(IsgdError, ValueError):
    """A value is out of range, or does not fit the others."""


class ArgumentTypeError(IsgdError, TypeError):
    """A value is of the wrong type, or is missing."""


class ReferenceNotFoundError(IsgdError, AttributeError):
    """A module has no such name: ``pkg.module:name``."""


class CannotImportError(IsgdError, ImportError):
    """A module or an extra is not installed."""


class DamagedFileError(ArgumentError):
    """A file is not what was written: cut short, changed, or of another kind."""


class RunInUseError(IsgdError, RuntimeError):
    """Another process is writing to the folder of the run."""


class DivergedError(IsgdError, FloatingPointError):
    """The loss is no longer finite."""


def check_whole(name: str, value: object, *, least: int, most: int | None = 2**31 - 1) -> int:
    """The value of the argument ``name`` as an int, refused if it is no count: True, 1.5 and NaN are none.

    >>> check_whole("batch_size", 0, least=1)
    Traceback (most recent call last):
    isgd_jax.errors.ArgumentError: batch_size must be 1 or more, got 0

    Args:
        name: of the argument, as the caller knows it; the error begins with it.
        value: anything that Python can take for an index, NumPy's integers too.
        least: the smallest that is allowed.
        most: the largest, by default what int32 holds, in which devices count; None where there is none.

    Raises:
        ArgumentTypeError: it is no whole number.
        ArgumentError: it is less than ``least``, or more than ``most``.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise ArgumentTypeError(f"{name} must be a whole number, got {value!r}")
    if number < least or (most is not None and number > most):
        most_in_words = "2^31 - 1" if most == 2**31 - 1 else most
        upper = "or more" if most is None or (most == 2**31 - 1 and number < least) else f"to {most_in_words}"
        raise ArgumentError(f"{name} must be {least} {upper}, got {number}")
    return number


def check_unmasked(name: str, values: object) -> None:
    """Refuse a masked array as the argument ``name``: NumPy and JAX drop the mask, and what it hid would count.

    Raises:
        ArgumentTypeError: it is masked.
    """
    if np.ma.isMaskedArray(values):
        raise ArgumentTypeError(f"{name} must be an array without a mask: say what to put, .filled(value)")


def check_array(name: str, values: object) -> None:
    """Refuse what is no array as the argument ``name``, such as a list, and a masked one.

    Raises:
        ArgumentTypeError: it is none.
    """
    check_unmasked(name, values)
    if not hasattr(values, "shape") or not hasattr(values, "dtype"):
        raise ArgumentTypeError(f"{name} must be an array, np.asarray(...), got {type(values).__name__}")


class Wrong(NamedTuple):
    """The first value that is not as it should be, and its index in the flattened array."""

    value: Any
    at: int


def seen(values: Any) -> np.ndarray | None:
    """The values on the host; None while they are traced, or lie on devices of other processes.

    It waits for the device and reads: for arguments that are looked at once, not for what a step makes.
    """
    import jax  # here, so that a command can refuse its arguments before JAX is set up

    if isinstance(values, jax.core.Tracer):
        return None
    if isinstance(values, jax.Array) and not values.is_fully_addressable:
        return None
    with jax.transfer_guard("allow"):
        return np.asarray(values)


def first_wrong(is_right: Callable[[np.ndarray], Any], values: Any) -> Wrong | None:
    """The first value that is not right; None where all are, or where they cannot be seen.

    >>> first_wrong(lambda x: x > 0, np.array([1.0, -2.0, 0.0]))
    Wrong(value=np.float64(-2.0), at=1)

    Args:
        is_right: ``values -> booleans``, of the values' shape or one that broadcasts to it.
        values: an array, or what NumPy makes one of.
    """
    found = seen(values)
    if found is None:
        return None
    right = np.broadcast_to(np.asarray(is_right(found)), found.shape).reshape(-1)
    if right.all():
        return None
    at = int(np.argmin(right))
    return Wrong(found.reshape(-1)[at], at)
