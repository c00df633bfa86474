"""What the workers of an engine do a second: the difference between two looks at its totals."""

import time
from collections.abc import Callable
from typing import Any

from isgd_jax.engines.contract import Reports

__all__ = ["Rates"]


class Rates:
    """Looks at an engine now and then.

    Args:
        engine: whose totals are read.
        now: the clock, in seconds.
    """

    def __init__(self, engine: Reports, *, now: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._now = engine, now
        self._last, self._at = engine.stats(), now()

    def since_last(self) -> dict[str, Any]:
        """Scores a second in all and by worker, workers alive, and what moved or went wrong since the last call."""
        stats, at = self._engine.stats(), self._now()
        before, elapsed = self._last, max(at - self._at, 1e-9)
        by_worker = {name: (total - before.scored.get(name, 0)) / elapsed for name, total in stats.scored.items()}
        self._last, self._at = stats, at
        return {
            "scores_per_second": sum(by_worker.values()),
            "scores_per_second_by_worker": by_worker,
            "workers": stats.workers,
            "bytes_moved": stats.bytes_moved - before.bytes_moved,
            "chunks_again": stats.again - before.again,
            "results_refused": stats.refused - before.refused,
        }
