"""Data that JAX cannot hold are refused before they are scored: on a device they would be other numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax.engines import inline
from isgd_jax.engines.chunks import Chunks, check_held, num_rows
from isgd_jax.errors import ArgumentError, ArgumentTypeError
from isgd_jax.training.problem import Problem

INT32 = np.iinfo(np.int32)


@pytest.mark.parametrize(
    "array",
    [
        np.array([INT32.min, INT32.max], np.int64),
        np.array([0, 2**32 - 1], np.uint64),
        np.array([1e38, -1e38]),
        np.array([np.nan, np.inf, 1.0]),
        np.ones(3, jnp.bfloat16),
        np.ones((3, 0)),
        np.array([True]),
        np.ones(3, np.complex64),
        jnp.arange(3),
    ],
    ids=lambda x: f"{x.dtype}",
)
def test_what_fits_is_taken_and_keeps_its_numbers(array: Any) -> None:
    assert num_rows({"x": array}) == len(array)
    on_device = np.asarray(jax.device_put(array)).astype(np.asarray(array).dtype)
    if np.asarray(array).dtype != np.float64:
        np.testing.assert_array_equal(on_device, array)


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.array([0, INT32.max + 1]), ArgumentError, r"data\['x'\] must fit into int32, .* from 0 to 2147483648"),
        (np.array([INT32.min - 1, 0]), ArgumentError, "must fit into int32"),
        (np.array([2**32], np.uint64), ArgumentError, "must fit into uint32"),
        (np.array([1e300, np.nan]), ArgumentError, r"must fit into float32, .*1e\+300"),
        (np.array([-1e300, np.inf]), ArgumentError, "must fit into float32"),
        (np.ma.array([1.0, 2.0], mask=[0, 1]), ArgumentTypeError, r"without a mask: say what to put, .filled"),
        pytest.param(
            np.ones(2, np.longdouble),
            ArgumentTypeError,
            "must hold numbers that JAX has, got float",
            marks=pytest.mark.skipif(np.dtype(np.longdouble) == np.float64, reason="this machine has no longer floats"),
        ),
        (np.arange(3, dtype=">i8"), ArgumentTypeError, r"in this machine's byte order, got >i8: .astype\('int64'\)"),
        (np.array(["a", "b"]), ArgumentTypeError, "must hold numbers that JAX has"),
        (np.array([1, None]), ArgumentTypeError, "must hold numbers that JAX has, got object"),
        (np.array(["2020"], "datetime64[D]"), ArgumentTypeError, "must hold numbers that JAX has"),
        (np.ones((0, 2)), ArgumentError, "must have at least one example"),
        (np.float32(1), ArgumentError, "one common leading axis"),
    ],
)
def test_what_does_not_is_refused_by_name(array: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        num_rows({"x": array})


def test_with_64_bits_they_are_taken() -> None:
    with jax.enable_x64(True):
        check_held({"x": np.array([2**40]), "y": np.array([1e300])})


def test_engines_and_problems_look_at_their_data() -> None:
    large = {"x": np.array([2**40, 1])}
    with pytest.raises(ArgumentError, match="must fit into int32"):
        inline(lambda params, batch: batch["x"] * 1.0, large)
    with pytest.raises(ArgumentError, match="must fit into int32"):
        Problem(lambda params, example: params * example["x"], params=jnp.ones(()), train=large)


def test_a_short_chunk_of_random_keys_ends_with_its_last_key_again() -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    found = Chunks(5, 3).batch({"key": keys, "x": np.arange(5)}, 1)
    assert jnp.array_equal(jax.random.key_data(found["key"]), jax.random.key_data(keys)[jnp.array([3, 4, 4])])
    np.testing.assert_array_equal(found["x"], [3, 4, 4])


@pytest.mark.parametrize("size", [0, -1])
def test_chunks_of_nothing_are_refused(size: int) -> None:
    with pytest.raises(ArgumentError, match="at least one example each"):
        Chunks(3, size)
    with pytest.raises(ArgumentError, match="at least one example each"):
        inline(lambda params, batch: batch, np.ones(3, np.float32), chunk_size=size)


@pytest.mark.parametrize("count", [1, 2**31 - 1, 2**31, 2**40])
def test_examples_beyond_int32_are_counted(count: int) -> None:
    chunks = Chunks(count, 2**20)
    assert len(chunks) == -(-count // min(count, 2**20))
    assert chunks.ids(len(chunks) - 1)[-1] == count - 1
