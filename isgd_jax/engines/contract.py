"""What training knows of scoring: the three methods of an engine, and what an engine may say of itself besides.

An engine decides who scores, where and when. Whoever trains calls ``publish`` and ``collect``; everything else is
optional, and looked up by the small protocols below: ``isinstance(engine, Reports)``.
"""

from types import TracebackType
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from isgd_jax.types import Params

__all__ = [
    "Chunked",
    "ClosesOnExit",
    "Engine",
    "EngineStats",
    "FullEngine",
    "Reports",
    "Resumable",
    "ScoredChunk",
    "Self",
    "Timed",
    "WorkersGone",
]


class ScoredChunk(NamedTuple):
    """What an engine reports: the examples ``ids`` [c] have ``scores`` [c], measured at parameter ``version``.

    ``sketches`` [c, dims] come with the scores where the scorer returns ``(scores, sketches)``.
    """

    ids: np.ndarray
    scores: np.ndarray
    version: int
    sketches: np.ndarray | None = None


class EngineStats(NamedTuple):
    """What an engine has done since it began: totals, so that whoever looks twice knows the rates between."""

    scored: dict[str, int]
    """Examples scored, by worker; all zero where nothing was ever scored."""
    workers: int
    """Workers alive."""
    bytes_moved: int
    """Parameters handed to workers and scores brought back, between devices or over the network."""
    again: int
    """Chunks handed out again: their worker was late or gone."""
    refused: int
    """Results that could not be right, and were not used."""

    @property
    def num_scored(self) -> int:
        """Examples scored by all workers together."""
        return sum(self.scored.values())


class WorkersGone(ConnectionError):
    """No worker is left to score what was waited for: waiting would be for ever."""


@runtime_checkable
class Engine(Protocol):
    """Scores examples with the parameters it was given last.

    Guarantees:
        * a chunk carries the version of the parameters it was scored with, which may be older than those published;
        * ``publish`` copies: the caller may donate its own parameters;
        * ``collect()`` never waits for a worker; ``collect(wait=True)`` returns when every score carries the
          published version, which is the paper's exact mode;
        * closing twice is harmless.
    """

    def publish(self, params: Params, version: int) -> None:
        """Score with these parameters from now on.

        Args:
            params: any pytree of arrays; copied, so the caller may donate its own at once.
            version: parameter updates made so far. It comes back with every score. One that is lower than the last
                begins another run: what was scored before is forgotten. The same again is of the same parameters.
        """
        ...

    def collect(self, *, wait: bool = False) -> list[ScoredChunk]:
        """The chunks scored since the last call; each is told once.

        Args:
            wait: until every chunk has been scored with the published version.

        Raises:
            RuntimeError: nothing was published yet.
            WorkersGone: ``wait``, and nobody is left who could score.
            OSError: ``wait``, and the published parameters could not be handed on.
        """
        ...

    def close(self) -> None:
        """Release what the engine holds."""
        ...


@runtime_checkable
class Reports(Protocol):
    """An engine that has something to tell a person or a monitor."""

    def notices(self) -> list[str]:
        """What a person should hear of, once: workers lost or refused, all workers gone, scores that are no scores."""
        ...

    def stats(self) -> EngineStats:
        """Totals since it began."""
        ...


@runtime_checkable
class Resumable(Protocol):
    """An engine whose turn is saved with a run. Publish anew after a restore."""

    def state(self) -> dict[str, int]:
        """Whose turn is next."""
        ...

    def restore(self, state: dict[str, int]) -> None:
        """Go on from a saved `state`; scores that were not collected are forgotten, and measured again."""
        ...


@runtime_checkable
class Timed(Protocol):
    """An engine that can say beforehand what it costs."""

    def seconds_per_collect(self, params: Params, *, wait: bool = False) -> float:
        """What one publish and ``collect(wait=wait)`` are expected to cost training, measured; compilation left out.

        It scores once or twice to measure, so it is asked before the run and not in it.

        Args:
            params: as they will be published; their values do not matter, their shapes do.
            wait: whether training waits for all scores.
        """
        ...


@runtime_checkable
class Chunked(Protocol):
    """An engine whose chunks all have one size, the last one aside: what takes them can be compiled once."""

    @property
    def chunk_size(self) -> int:
        """Examples in a chunk."""
        ...


@runtime_checkable
class FullEngine(Engine, Reports, Resumable, Timed, Chunked, Protocol):
    """All of these at once: what the engines of this library are."""


Self = TypeVar("Self", bound="ClosesOnExit")


class ClosesOnExit:
    """Makes an engine a context manager: ``with engine: ...`` closes it, whatever happens inside."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release what is held."""
        raise NotImplementedError
