"""What arrived when: which chunk, scored at which version, came in before which step, and what the clock said.

Workers are as fast as they are, so a run with workers that nobody waits for is not a function of its seed alone. It is
one of its seed and its arrivals, which `isgd_jax.engines.replay` lets come in again.
"""

from collections.abc import Sequence
from typing import NamedTuple

from isgd_jax.engines.contract import ScoredChunk

__all__ = ["Arrivals", "Run", "Schedule", "as_runs"]

Run = tuple[int, int, int]
"""A version, and the first and last of consecutive chunks that were scored with it."""


class Arrivals(NamedTuple):
    """What came in before a step, and the reading of the clock that decided which scores were too old."""

    runs: list[Run]
    clock: float


class Schedule(NamedTuple):
    """The arrivals of a whole run, by step."""

    chunk_size: int
    arrivals: dict[int, Arrivals]

    @property
    def versions(self) -> set[int]:
        """The versions that some chunk was scored with: these parameters must be published again."""
        return {version for arrivals in self.arrivals.values() for version, _, _ in arrivals.runs}

    def chunks_of(self, version: int) -> list[int]:
        """All chunks that were ever scored with this version."""
        runs = [run for arrivals in self.arrivals.values() for run in arrivals.runs]
        return sorted({chunk for v, first, last in runs if v == version for chunk in range(first, last + 1)})


def as_runs(chunks: Sequence[ScoredChunk], chunk_size: int) -> list[Run]:
    """The chunks in short, for the file that a replay reads. Their order is given up: they are different examples.

    >>> import numpy as np
    >>> chunks = [ScoredChunk(np.arange(at, at + 4), np.ones(4), 7) for at in (8, 4)]
    >>> as_runs(chunks, 4)
    [(7, 1, 2)]

    Args:
        chunks: that arrived together.
        chunk_size: of their engine; a chunk is known by its first example over it.
    """
    runs: list[Run] = []
    for version, chunk in sorted((c.version, int(c.ids[0]) // chunk_size) for c in chunks):
        if runs and runs[-1][0] == version and runs[-1][2] == chunk - 1:
            runs[-1] = (version, runs[-1][1], chunk)
        else:
            runs.append((version, chunk, chunk))
    return runs
