"""Raw inputs that come after training, for a model that is trained: the same is asked of them as of a training set."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from isgd_jax.app.data import checks
from isgd_jax.app.data.inputs import Inputs, check_standardized
from isgd_jax.errors import ArgumentError, ArgumentTypeError

__all__ = ["raw_inputs"]


def raw_inputs(x: Any, inputs: Inputs) -> dict[str, np.ndarray]:
    """The inputs [n, ...] of a model by name, of the types that its training set had.

    Args:
        x: the one input, or a dict of the inputs; a ``label`` beside them is left out.
        inputs: those that the model was trained on.

    Raises:
        TypeError: an array is not of numbers, or of another kind of numbers than the run was trained on.
        ValueError: an input is missing, unknown, of another shape or length than the others, or has numbers that are
            not finite or do not fit.
    """
    given = x if isinstance(x, Mapping) else {inputs.only: x}
    unknown = sorted(str(name) for name in given if name not in inputs.shapes and name != checks.LABEL)
    if unknown:
        raise ArgumentError(
            f"expected the inputs {', '.join(inputs.shapes)}, as the run was trained on; got {', '.join(unknown)} "
            "too: leave out what is no input"
        )
    made = {name: _like_trained(name, given, inputs) for name in inputs.shapes}
    lengths = {name: len(array) for name, array in made.items()}
    if len(set(lengths.values())) > 1:
        raise ArgumentError(f"expected inputs of one length, a row for each example; got {lengths}")
    if not next(iter(lengths.values())):
        raise ArgumentError("expected at least one example, got none")
    check_standardized("inputs", made, inputs)
    return made


def _like_trained(name: str, given: Mapping[str, Any], inputs: Inputs) -> np.ndarray:
    """One of the inputs, in the shape and the type of the training set."""
    shape, dtype = tuple(inputs.shapes[name]), np.dtype(inputs.dtypes[name])
    expected = f"expected {name!r} of shape [n, {', '.join(map(str, shape))}], as the run was trained on"
    if name not in given:
        raise ArgumentError(f"{expected}; got nothing")
    if not isinstance(given[name], Mapping) and np.shape(given[name])[1:] != shape:
        raise ArgumentError(f"{expected}; got {list(np.shape(given[name]))}")
    array = checks.held(f"the input {name!r}", given[name])
    if _kind(array.dtype) != _kind(dtype):
        raise ArgumentTypeError(
            f"the input {name!r}: expected {_kind(dtype)} numbers, for the run was trained on {dtype}; got "
            f"{array.dtype}: give it as the training set had it, on the same scale"
        )
    return _as_type(name, array, dtype)


def _kind(dtype: np.dtype) -> str:
    return "floating" if checks.is_floating(dtype) else "true or false as" if dtype.kind == "b" else "whole"


def _as_type(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The numbers in another type of their kind, which must hold them."""
    with np.errstate(over="ignore"):  # told below
        made = array.astype(dtype, copy=False)
    fits = np.isfinite(made).all() if checks.is_floating(dtype) else np.array_equal(made, array)
    if not fits:
        raise ArgumentError(
            f"the input {name!r}: expected numbers that {dtype} can hold, which the run was trained on; got "
            f"{array.min()} to {array.max()}"
        )
    return made
