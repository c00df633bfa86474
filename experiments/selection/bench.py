"""Finished runs kept in a file, and methods compiled when first needed."""

import functools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from selection import contest, rivals
from selection.contest import Problem

__all__ = ["Bench", "Key", "Record", "Results", "column"]

Record = dict[str, Any]


class Key(NamedTuple):
    """What was run; with the folder, all that decides a result."""

    problem: str
    method: str
    batch_size: int
    passes: float
    rate: float
    seed: int


class Results:
    """Finished runs, one JSON line each; a run that is there is not run again.

    Raises:
        ValueError: the file was written by a version with other keys or other measurements.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        for line in whole:
            if len(line["key"]) != len(Key._fields) or "top_share" not in line["found"]:
                raise ValueError(f"expected runs with {Key._fields} in {path}, got {line['key']}: move the file away")
        path.write_text("".join(json.dumps(line) + "\n" for line in whole))
        self._found = {Key(*line["key"]): line["found"] for line in whole}

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: Key, make: Callable[[], Record]) -> Record:
        """The run of a key, made if it is not there."""
        if key not in self._found:
            self._found[key] = make()
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "found": self._found[key]}) + "\n")
        return self._found[key]


class Bench:
    """Methods on one problem, compiled when first needed."""

    def __init__(self, problem: Problem, results: Results) -> None:
        self.problem, self.results = problem, results
        self._ready = functools.cache(self._compile)

    def _compile(self, name: str, batch_size: int) -> tuple[Problem, contest.Method, contest.Programs]:
        problem = self.problem._replace(batch_size=batch_size)
        method = rivals.METHODS[name](problem)
        programs = contest.compile_method(problem, method)
        contest.warm_up(programs, method, problem.train)
        return problem, method, programs

    def run(self, name: str, passes: float, rate: float, seed: int, *, batch_size: int | None = None) -> Record:
        """One run, or what it gave when it was made before; by default with the batch of the problem."""
        size = self.problem.batch_size if batch_size is None else batch_size

        def make() -> Record:
            problem, method, programs = self._ready(name, size)
            return contest.run(problem, method, programs, rate=rate, seed=seed, passes=passes)

        return self.results.get(Key(self.problem.name, name, size, passes, rate, seed), make)


def column(runs: Iterable[Record], name: str) -> np.ndarray:
    """A measurement of every run; infinite where the run diverged."""
    return np.array([math.inf if run[name] is None else run[name] for run in runs], np.float64)
