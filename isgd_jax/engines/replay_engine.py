"""An engine that does again, bit for bit, what the workers of an earlier run did."""

from collections.abc import Sequence

import jax

from isgd_jax.engines.arrivals import Schedule
from isgd_jax.engines.contract import ClosesOnExit, EngineStats, ScoredChunk
from isgd_jax.engines.inline_engine import InlineEngine
from isgd_jax.types import Batch, Params, Scorer, SketchingScorer

__all__ = ["ReplayEngine", "replay"]


class ReplayEngine(ClosesOnExit):
    """Scores what the schedule says will be scored with these parameters, and lets it arrive when it did.

    Guarantees:
        * each `collect` gives the chunks, at the versions, that arrived before that step in the schedule;
        * no parameters are kept: what is scored with a version is scored when it is published.

    Args:
        inline: who scores; its chunks are those of the schedule.
        schedule: of the earlier run.
    """

    def __init__(self, inline: InlineEngine, schedule: Schedule) -> None:
        self._inline, self._schedule = inline, schedule
        self._held: dict[tuple[int, int], ScoredChunk] = {}
        self._steps = iter(sorted(schedule.arrivals))

    @property
    def num_examples(self) -> int:
        """Of the training set."""
        return self._inline.num_examples

    @property
    def chunk_size(self) -> int:
        """Examples in a chunk."""
        return self._inline.chunk_size

    def publish(self, params: Params, version: int) -> None:
        """Score all that will arrive with this version.

        Args:
            params: to score with now; those of a version that no score of the schedule carries are not needed.
            version: as in the earlier run.
        """
        wanted = self._schedule.chunks_of(version)
        self._inline.publish(params, version)
        for chunk, scored in zip(wanted, self._inline.score(wanted), strict=True):
            self._held[version, chunk] = scored

    def collect(self, *, wait: bool = False) -> list[ScoredChunk]:
        """What arrived at this refresh, whether the earlier run waited for it or not.

        Raises:
            RuntimeError: the schedule is over, or a version that it names was not published.
        """
        step = next(self._steps, None)
        if step is None:
            raise RuntimeError(f"the schedule that is replayed has {len(self._schedule.arrivals)} refreshes, no more")
        wanted = [
            (v, chunk) for v, first, last in self._schedule.arrivals[step].runs for chunk in range(first, last + 1)
        ]
        missing = sorted({version for version, chunk in wanted if (version, chunk) not in self._held})
        if missing:
            raise RuntimeError(f"the schedule has scores of versions {missing} at step {step}: publish these before")
        return [self._held.pop(key) for key in wanted]

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

    def seconds_per_collect(self, params: Params, *, wait: bool = False) -> float:
        """The mean over the refreshes of the schedule."""
        chunks = sum(last - first + 1 for a in self._schedule.arrivals.values() for _, first, last in a.runs)
        return self._inline.seconds_per_collect(params) * chunks / len(self._schedule.arrivals)

    def close(self) -> None:
        """Forget what is held."""
        self._held.clear()
        self._inline.close()


def replay(
    scorer: Scorer | SketchingScorer,
    data: Batch,
    schedule: Schedule,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> ReplayEngine:
    """An engine that gives the chunks of an earlier run again, at the refreshes at which they arrived.

    Args:
        scorer: that of the earlier run.
        data: its training set.
        schedule: which chunks arrived when: `Schedule`.
        devices: who scores; all local ones by default.

    Raises:
        ValueError: the data have no common leading axis.
    """
    return ReplayEngine(InlineEngine(scorer, data, chunk_size=schedule.chunk_size, devices=devices), schedule)
