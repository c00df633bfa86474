"""The clock of experiments that share a machine with others."""

import time

import jax

__all__ = ["core_seconds"]


def core_seconds() -> float:
    """Seconds that this process had a core: what others on the machine took is left out.

    On an accelerator, which works while the process waits for it, they are seconds of the wall.
    """
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()
