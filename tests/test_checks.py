"""What tests run under: checks of types and shapes, made when a function is first called, and programs loaded once."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from sampling_problem import unchecked

from isgd_jax.gradients import costs
from isgd_jax.sampling import double_float, samplers


def test_shapes_and_types_are_checked_unless_a_test_wants_the_librarys_own_words() -> None:
    for _ in range(2):
        with pytest.raises(jaxtyping.TypeCheckError):
            samplers.prepare(jnp.ones((2, 2)))
        with pytest.raises(jaxtyping.TypeCheckError):
            double_float.two_sum(jnp.int32(1), jnp.int32(2))
        with pytest.raises(jaxtyping.TypeCheckError):
            costs.examples_at_a_time(8.5, 1, 1)  # of which no annotation names a shape
    with unchecked():
        double_float.two_sum(jnp.int32(1), jnp.int32(2))
        costs.examples_at_a_time(8.5, 1, 1)


def test_programs_alike_but_for_the_function_of_python_that_they_call_call_their_own() -> None:
    def told(number: float) -> float:
        def ask(x: jax.Array) -> jax.Array:
            return jax.pure_callback(lambda _: np.float32(number), jax.ShapeDtypeStruct((), jnp.float32), x)

        return float(jax.jit(ask)(jnp.float32(0.0)))

    assert [told(number) for number in (1.0, 2.0, 3.0)] == [1.0, 2.0, 3.0]
