"""Strictness for every test: shapes and types checked on public functions, no silent promotion, eight CPU devices."""

import os

# Before jax is imported. NPROC: more threads than devices, or collectives can starve each other on a small machine.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("NPROC", "16")

from jaxtyping import install_import_hook

install_import_hook("isgd_jax", "beartype.beartype")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
