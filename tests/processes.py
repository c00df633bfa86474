"""What tests tell the processes that they start, and their own, before jax is imported."""

import os

# For XLA's optimizations, as users compile, ask by 0: `make test-optimized`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

QUICK_TO_COMPILE = (
    ""
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0"
    else "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
"""A test runs many small programs once or twice, so that what counts is the time to compile them: without XLA's newer
emitters of fusions, hardly optimized, as one module of LLVM in place of 32, a step of training compiles several times
as fast."""


def forced(devices: int) -> str:
    """XLA_FLAGS of a process with so many CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK_TO_COMPILE}".rstrip()
