import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax.sampling import double_float
from isgd_jax.sampling.double_float import Pair


def wide(pair: Pair) -> np.ndarray:
    return np.asarray(pair.hi, np.float64) + np.asarray(pair.lo, np.float64)


@pytest.fixture
def numbers() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=10_000) * 10.0 ** rng.uniform(-6, 6, 10_000) for _ in range(2))
    return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)


@pytest.mark.parametrize("compile_it", [False, True])
def test_two_sum_is_exact_and_two_prod_keeps_45_bits(numbers: tuple[jax.Array, jax.Array], compile_it: bool) -> None:
    # Compiled too: a compiler that reassociates or fuses would break them without a word.
    wrap = jax.jit if compile_it else lambda f: f
    a, b = (np.asarray(x, np.float64) for x in numbers)
    total, product = wide(wrap(double_float.two_sum)(*numbers)), wide(wrap(double_float.two_prod)(*numbers))
    np.testing.assert_allclose(product, a * b, rtol=2.0**-45)
    np.testing.assert_allclose(total, a + b, rtol=0, atol=np.abs(a + b).max() * 2.0**-52)
    near = np.abs(np.log2(np.abs(a / b))) < 20  # there float64 holds the true sum
    np.testing.assert_array_equal(total[near], (a + b)[near])


@pytest.mark.parametrize(
    ("ours", "theirs"), [(double_float.add, np.add), (double_float.multiply, np.multiply)], ids=["add", "multiply"]
)
def test_pairs_keep_45_bits(numbers: tuple[jax.Array, jax.Array], ours, theirs) -> None:
    x, y = (double_float.two_sum(jnp.abs(a), jnp.abs(a) * 2.0**-26) for a in numbers)
    np.testing.assert_allclose(wide(jax.jit(ours)(x, y)), theirs(wide(x), wide(y)), rtol=2.0**-45)


def test_division_keeps_45_bits(numbers: tuple[jax.Array, jax.Array]) -> None:
    x, divisor = double_float.two_sum(numbers[0], numbers[0] * 2.0**-26), jnp.abs(numbers[1])
    result = wide(jax.jit(double_float.divide)(x, divisor))
    np.testing.assert_allclose(result, wide(x) / np.asarray(divisor, np.float64), rtol=2.0**-44)


def test_at_least_compares_past_float32() -> None:
    one = double_float.exact(jnp.ones(3))
    other = double_float.two_sum(jnp.ones(3), jnp.asarray([-(2.0**-40), 0.0, 2.0**-40], jnp.float32))
    assert double_float.at_least(one, other).tolist() == [True, True, False]


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 3_000_000])
def test_tree_sum_is_right_whatever_n_is(size: int) -> None:
    values = np.random.default_rng(size).lognormal(0.0, 2.0, size).astype(np.float32)
    total = float(jax.jit(double_float.tree_sum)(jnp.asarray(values)))
    np.testing.assert_allclose(total, values.astype(np.float64).sum(), rtol=5e-7)
