"""What a line of progress measures: held-out loss and error, √Tr Cov of the proposals, and the ages of the scores."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from isgd_jax import evaluate, laws, monitor, samplers, step, table, task
from isgd_jax.config import Config
from isgd_jax.parallel import OneDevice
from isgd_jax.rundir import Record
from isgd_jax.typing import Batch

Measure = Callable[[step.TrainState, samplers.Law], Record]
"""More to measure: numbers by name, from the state and the law in use."""


class Measures:
    """The functions that measure, built once.

    Args:
        measure: what to measure besides.
    """

    def __init__(
        self,
        config: Config,
        work: task.Task,
        place: OneDevice,
        *,
        measure: Measure,
    ) -> None:
        self._config, self._place, self._measure = config, place, measure
        self._test_data = jax.device_put(dict(work.test))
        self._evaluate = evaluate.make_evaluate(work)
        self._report = jax.jit(monitor.report)

    def at(self, at: int, state: step.TrainState, law_source: laws.Laws, train_data: Batch) -> Record:
        """Everything, after step ``at``, which the state has reached."""
        measured: Record = {}
        params, train = self._place.local((state.params, train_data))
        splits = {"test": self._test_data} | ({"train": train} if self._config.full_train_loss else {})
        for name, split in splits.items():
            fit = self._evaluate(params, split)
            measured |= {f"{name}_loss": _finite(fit.loss), f"{name}_error": _finite(fit.error)}
        measured |= self._bands(state)
        more = self._measure(state, law_source.proposal)
        return measured | _ages(at, state) | {name: _plain(value) for name, value in more.items()}

    def _bands(self, state: step.TrainState) -> Record:
        """√Tr Cov under the proposals with 95 % bands, from the draws of training."""
        measured: Record = {}
        watched = self._place.local(state.watch.monitor)
        bands, is_known = jax.device_get(self._report(watched))._asdict(), int(watched.steps.seen) > 0
        for name in ("uniform", "stale", "ideal", "drawn"):
            for bound, value in bands[name]._asdict().items():
                field = f"sd_{name}" if bound == "value" else f"sd_{name}_{bound}"
                measured[field] = _finite(math.sqrt(max(value, 0.0))) if is_known else None
        measured["variance_ratio"] = _finite(bands["stale"].value / bands["uniform"].value) if is_known else None
        return measured


def _ages(at: int, state: step.TrainState) -> Record:
    versions = np.asarray(state.table.versions)
    ages = at - versions[versions != table.NEVER]
    mean, late = (float(ages.mean()), float(np.quantile(ages, 0.95))) if len(ages) else (None, None)
    return {"age_mean": mean, "age_p95": late}


def _plain(value: Any) -> Any:
    """What a user measured, as JSON has it."""
    return _finite(value) if isinstance(value, (float, np.floating)) else value


def _finite(number: Array | np.generic | float) -> float | None:
    """The number, or None where there is none: JSON knows neither NaN nor infinity."""
    return float(number) if np.isfinite(number) else None
