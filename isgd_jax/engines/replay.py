"""An engine that does again, bit for bit, what the workers of an earlier run did."""

from isgd_jax.engines.inline import Inline
from isgd_jax.schedule import Schedule
from isgd_jax.typing import EngineStats, Params, ScoredChunk


class Replay:
    """Scores what the schedule says will be scored with these parameters, and lets it arrive when it did.

    Guarantees:
        * each `collect` gives the chunks, at the versions, that arrived before that step in the schedule;
        * no parameters are kept: what is scored with a version is scored when it is published.

    Args:
        inline: who scores; its chunks are those of the schedule.
        schedule: of the earlier run.
    """

    def __init__(self, inline: Inline, schedule: Schedule) -> None:
        self._inline, self._schedule = inline, schedule
        self._held: dict[tuple[int, int], ScoredChunk] = {}
        self._steps = iter(sorted(schedule.arrivals))

    @property
    def chunk_size(self) -> int:
        """Examples in a chunk."""
        return self._inline.chunk_size

    def publish(self, params: Params, version: int) -> None:
        """Score all that will arrive with this version."""
        wanted = self._schedule.chunks_of(version)
        self._inline.publish(params, version)
        for chunk, scored in zip(wanted, self._inline.score(wanted), strict=True):
            self._held[version, chunk] = scored

    def collect(self) -> list[ScoredChunk]:
        """What arrived at this refresh."""
        runs = self._schedule.arrivals[next(self._steps)].runs
        return [self._held.pop((version, chunk)) for version, first, last in runs for chunk in range(first, last + 1)]

    def notices(self) -> list[str]:
        """Nobody to hear of."""
        return []

    def stats(self) -> EngineStats:
        """Of the devices that score."""
        return self._inline.stats()

    def state(self) -> dict[str, int]:
        """A replay is not resumed: it gives the same when it is begun anew."""
        return {}

    def restore(self, state: dict[str, int]) -> None:
        """A replay is not resumed."""

    def seconds_per_collect(self, params: Params) -> float:
        """The mean over the refreshes of the schedule."""
        chunks = sum(last - first + 1 for a in self._schedule.arrivals.values() for _, first, last in a.runs)
        return self._inline.seconds_per_collect(params) * chunks / len(self._schedule.arrivals)

    def close(self) -> None:
        """Forget what is held."""
        self._held.clear()
        self._inline.close()
