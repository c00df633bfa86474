"""What a line of progress measures: held-out loss and error, √Tr Cov of the proposals, and the ages of the scores."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from isgd_jax.app import evaluation, task
from isgd_jax.app.config import Config
from isgd_jax.app.run_dir import Record
from isgd_jax.sampling import score_table
from isgd_jax.training.data_parallel import local_copy
from isgd_jax.training.train_step import TrainState
from isgd_jax.types import Batch
from isgd_jax.variance import monitor

Measure = Callable[[TrainState], Record]
"""More to measure: numbers by name, from the state."""


class Measures:
    """The functions that measure, built once.

    Args:
        measure: what to measure besides.
    """

    def __init__(self, config: Config, work: task.Task, *, measure: Measure) -> None:
        self._config, self._measure = config, measure
        self._test_data = jax.device_put(dict(work.test))
        self._evaluate = evaluation.make_evaluate(work)
        self._report = jax.jit(monitor.report)

    def at(self, state: TrainState, train_data: Batch) -> Record:
        """Everything, of the state as it is."""
        measured: Record = {}
        here, train = local_copy((state, train_data))
        splits = {"test": self._test_data} | ({"train": train} if self._config.full_train_loss else {})
        for name, split in splits.items():
            fit = self._evaluate(here.params, split)
            measured |= {f"{name}_loss": _finite(fit.loss), f"{name}_error": _finite(fit.error)}
        measured |= self._bands(here)
        more = self._measure(here)
        return measured | _ages(here) | {name: _plain(value) for name, value in more.items()}

    def _bands(self, state: TrainState) -> Record:
        """√Tr Cov under the proposals with 95 % bands, from the draws of training."""
        watched = state.sampler.monitor
        is_known = watched is not None and int(watched.steps.seen) > 0
        bands = jax.device_get(self._report(watched)) if is_known else None
        measured: Record = {}
        for name in ("uniform", "stale", "ideal", "drawn"):
            for bound in ("value", "low", "high"):
                field = f"sd_{name}" if bound == "value" else f"sd_{name}_{bound}"
                value = None if bands is None else getattr(getattr(bands, name), bound)
                measured[field] = None if value is None else _finite(math.sqrt(max(value, 0.0)))
        measured["variance_ratio"] = None if bands is None else _ratio(bands.stale.value, bands.uniform.value)
        return measured


def _ages(state: TrainState) -> Record:
    versions = np.asarray(state.sampler.table.versions)
    ages = int(state.sampler.clock.version) - versions[versions != score_table.NEVER]
    mean, late = (float(ages.mean()), float(np.quantile(ages, 0.95))) if len(ages) else (None, None)
    return {"age_mean": mean, "age_p95": late}


def _ratio(above: np.ndarray, below: np.ndarray) -> float | None:
    return float(above / below) if below > 0 else None


def _plain(value: Any) -> Any:
    """What a user measured, as JSON has it."""
    return _finite(value) if isinstance(value, (float, np.floating)) else value


def _finite(number: Array | np.generic | float) -> float | None:
    """The number, or None where there is none: JSON knows neither NaN nor infinity."""
    return float(number) if np.isfinite(number) else None
