"""What tests tell the processes that they start, and their own, before jax is imported."""

import os
from importlib import metadata
from pathlib import Path

from packaging.version import Version

# On any machine: a TPU is one process's alone, and a GPU is one device where tests want eight. To run some of them on
# an accelerator, name it: JAX_PLATFORMS=cuda.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# For XLA's optimizations, as users compile, ask by 0: `make test-optimized`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

QUICK_TO_COMPILE = {"--xla_cpu_use_fusion_emitters=false": "0.11.1", "--xla_cpu_parallel_codegen_split_count=1": None}
"""What makes XLA compile quickly for the CPU, with the jaxlib that first lacked it.

A test runs many small programs once or twice, so that what counts is the time to compile them: without XLA's newer
emitters of fusions, hardly optimized, as one module of LLVM in place of 32, a step of training compiles several times
as fast. A process whose XLA does not know one of its flags ends at once."""


def quick_to_compile(jaxlib: str) -> list[str]:
    """The flags that this version of jaxlib knows; none where XLA is to optimize."""
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0":
        return []
    release = Version(jaxlib).release  # without what marks a nightly build, which is as far as the release to come
    return [flag for flag, gone in QUICK_TO_COMPILE.items() if gone is None or release < Version(gone).release]


def forced(devices: int) -> str:
    """XLA_FLAGS of a process with so many CPU devices."""
    flags = quick_to_compile(metadata.version("jaxlib"))
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *flags])


QUICK_TO_RUN = f"""
import gc, sys
gc.set_threshold(20_000, 20, 20)  # to look for garbage among all that is imported takes a tenth of the time
sys.path.append({str(Path(__file__).parent)!r})
import programs
sys.path.pop()
"""
"""With what a process begins that runs much code of the documentation: it lowers and loads programs as the tests do."""
