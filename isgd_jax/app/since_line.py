"""What the steps since the last line of progress have left, also those that were made before a run was broken off."""

import math
from collections.abc import Sequence
from typing import Any

from isgd_jax.app.records import Record
from isgd_jax.training.train_step import StepInfo

__all__ = ["SinceLine"]


class SinceLine:
    """Losses and largest weight of the steps since the last line; kept with a checkpoint, so that the first line after
    it is that of a run without a break."""

    def __init__(self, losses: Sequence[float] = (), max_weight: float = 0.0) -> None:
        self._losses, self._max_weight = list(losses), max_weight

    def add(self, infos: Sequence[StepInfo]) -> None:
        """Count in more steps.

        Args:
            infos: what they left, on the host.
        """
        weights = [float(info.max_weight) for info in infos]
        self._max_weight = max([*weights, self._max_weight] if self._losses else weights, default=0.0)
        self._losses += [float(info.loss) for info in infos]

    def line(self) -> Record:
        """What a line of progress says of them; None of each where there was no step."""
        if not self._losses:
            return {"loss": None, "max_weight": None}
        return {"loss": math.fsum(self._losses) / len(self._losses), "max_weight": self._max_weight}

    def notes(self, infos: Sequence[StepInfo]) -> dict[str, Any]:
        """The arguments that make the same again, as JSON has them.

        Args:
            infos: of steps that are not counted in yet, and are to be.
        """
        whole = SinceLine(self._losses, self._max_weight)
        whole.add(infos)
        return {"losses": whole._losses, "max_weight": whole._max_weight}
