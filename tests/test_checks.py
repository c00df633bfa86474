"""The checks that tests run under: types and shapes of arguments, made when a function is first called."""

import jax.numpy as jnp
import jaxtyping
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
