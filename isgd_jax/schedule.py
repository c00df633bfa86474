"""The schedule of a run: which chunk, scored at which version, arrived before which step, and what the clock said.

Workers are as fast as they are, so a relaxed run with workers is not a function of its seed alone. It is one of its
seed and its schedule: the refreshes in metrics.jsonl hold it, and `isgd train --replay` follows it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from isgd_jax.rundir import RunDir
from isgd_jax.typing import ScoredChunk

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

    def check_covers(self, num_steps: int, refresh_every: int) -> None:
        """Refuse to train beyond the end of the schedule.

        Raises:
            ValueError: the earlier run made fewer steps.
        """
        covered = max(self.arrivals) + refresh_every
        if num_steps > covered:
            raise ValueError(f"the schedule to replay ends at step {covered}, before --steps {num_steps}: ask for less")


def as_runs(chunks: Sequence[ScoredChunk], chunk_size: int) -> list[Run]:
    """The chunks in short. Their order is given up: they are different examples."""
    runs: list[Run] = []
    for version, chunk in sorted((c.version, int(c.ids[0]) // chunk_size) for c in chunks):
        if runs and runs[-1][0] == version and runs[-1][2] == chunk - 1:
            runs[-1] = (version, runs[-1][1], chunk)
        else:
            runs.append((version, chunk, chunk))
    return runs


def read(run: RunDir, fingerprint: str) -> Schedule:
    """The schedule of a run, finished or not, on the training set of this fingerprint.

    Raises:
        FileNotFoundError: this is not the folder of a run.
        ValueError: it made no refresh, as in uniform mode, or was made on other data.
    """
    run.read_config()
    if run.fingerprint() not in (None, fingerprint):
        raise ValueError(f"{run.path} was made on another data set: it has {run.fingerprint()}, this is {fingerprint}")
    refreshes = {record["step"]: record for record in run.records("refresh")}
    if not refreshes:
        raise ValueError(f"{run.path} has no schedule to replay: it never refreshed its scores")
    sizes = {record["chunk_size"] for record in refreshes.values()}
    if len(sizes) > 1:
        raise ValueError(f"{run.path} was resumed with chunks of another size, {sorted(sizes)}: it cannot be replayed")
    arrivals = {
        step: Arrivals([(version, first, last) for version, first, last in record["arrived"]], record["clock"])
        for step, record in refreshes.items()
    }
    return Schedule(sizes.pop(), arrivals)
