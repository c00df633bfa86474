"""The clock of a run, and what its time was spent on."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

__all__ = ["Clock", "account", "middle_seconds"]


class Clock:
    """Seconds since the run began, the time before a resume included; it also keeps account of named tasks."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self.spent = defaultdict[str, float](float)

    def go_on_from(self, elapsed: float, spent: dict[str, float]) -> None:
        """Add the time of an earlier part of the run, and what it was spent on.

        Args:
            elapsed: seconds of the run up to its checkpoint.
            spent: of them, by task.
        """
        self._began -= elapsed
        for task, seconds in spent.items():
            self.spent[task] += seconds

    def __call__(self) -> float:
        return time.monotonic() - self._began

    @contextmanager
    def spending(self, on: str) -> Iterator[None]:
        """Count the time inside as spent on a task, an error included.

        Args:
            on: the task. The caller sees to it that the device has finished by the end: JAX returns before it has.
        """
        start = self()
        try:
            yield
        finally:
            self.spent[on] += self() - start

    def shares(self, *tasks: str) -> dict[str, float]:
        """The share of each task in the time spent on all of them so far, as ``share_<task>``."""
        total = sum(self.spent[task] for task in tasks)
        return {f"share_{task}": self.spent[task] / total if total else 0.0 for task in tasks}


def account(spent: Mapping[str, float], seconds: float) -> list[tuple[str, float, float]]:
    """Where the seconds of a run went, the most first.

    >>> account({"updates": 6.0, "scoring": 3.0}, 10.0)
    [('updates', 6.0, 0.6), ('scoring', 3.0, 0.3), ('starting, and the rest', 1.0, 0.1)]

    Args:
        spent: seconds by task.
        seconds: of the whole run.

    Returns:
        Task, seconds, share of the whole; what no task counted is the last.
    """
    counted = [("planning and compiling" if task == "planning" else task, spent[task]) for task in spent]
    counted = sorted(counted, key=lambda item: -item[1])
    rest = max(0.0, seconds - sum(amount for _, amount in counted))
    total = max(seconds, 1e-9)
    return [(task, amount, amount / total) for task, amount in [*counted, ("starting, and the rest", rest)]]


def middle_seconds(*runs: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of one call of each, compilation left out: medians, taken in turn so that a busy spell strikes all.

    Each is called once unseen before it is timed: a large call leaves the next one caches and memory to fill again.

    Args:
        runs: functions without arguments, whose results are waited for. One that donates must keep its own state.
        repeats: of the round; each costs two calls of every function.
    """
    for run in runs:
        jax.block_until_ready(run())  # compiles
    return [float(x) for x in np.median([[_seconds(run) for run in runs] for _ in range(repeats)], axis=0)]


def _seconds(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())
    began = time.monotonic()
    jax.block_until_ready(run())
    return time.monotonic() - began
