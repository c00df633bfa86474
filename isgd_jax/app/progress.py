"""What a line of progress measures: held-out loss and error, √Tr Cov of the proposals, and the ages of the scores."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

from isgd_jax.app import evaluation, task
from isgd_jax.app.config import Config
from isgd_jax.app.records import MEASURED, Record
from isgd_jax.errors import ArgumentError, ArgumentTypeError
from isgd_jax.sampling import score_table
from isgd_jax.training.data_parallel import DataParallel, local_copy
from isgd_jax.training.train_step import TrainState
from isgd_jax.types import Batch
from isgd_jax.variance import monitor

__all__ = ["Measure", "Measures"]

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

    def at(self, state: TrainState, train_data: Batch, parallel: DataParallel | None = None) -> Record:
        """Everything that a line of progress has, of the state as it is; it waits for the device.

        Args:
            state: after the last step. Parameters that lie in parts over devices stay so, in ``measure`` too.
            train_data: of which the loss is measured with ``full_train_loss`` alone: a sweep of the data.
            parallel: the devices that train, if there are several.

        Returns:
            Numbers by name; None for what was not measured or is not finite, since JSON knows no NaN.

        Raises:
            ArgumentTypeError, ArgumentError: what the user's ``measure`` returned are no numbers, or have names of the
                run's own; told at the first line, before the first update.
        """
        measured: Record = {}
        if parallel is not None and parallel.shard_params:
            here, train = state._replace(sampler=local_copy(state.sampler)), train_data
            self._test_data = parallel.replicate(self._test_data)  # copied once: then it is there
        else:
            here, train = local_copy((state, train_data))
        splits = {"test": self._test_data} | ({"train": train} if self._config.recording.full_train_loss else {})
        for name, split in splits.items():
            fit = self._evaluate(here.params, split)
            measured |= {f"{name}_loss": _finite(fit.loss), f"{name}_error": _finite(fit.error)}
        measured |= self._bands(here)
        return measured | _ages(here) | _checked(self._measure(here))

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


def _checked(more: Any) -> Record:
    """What a user measured, as JSON has it; it is seen before the first update that it can be written.

    Raises:
        ArgumentTypeError: it is no dict of numbers, or of what else JSON can hold.
        ArgumentError: a name is one of the run's own.
    """
    if not isinstance(more, Mapping):
        raise ArgumentTypeError(f"measure= must return a dict of numbers by name; got a {type(more).__name__}")
    checked = {}
    for name, value in more.items():
        if not isinstance(name, str) or name in MEASURED | {"event", "step"} or name.startswith(("sd_", "share_")):
            raise ArgumentError(f"measure= must return names that the run does not use itself; got {name!r}")
        checked[name] = _plain(value)
        try:
            json.dumps(checked[name], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ArgumentTypeError(f"measure= must return numbers; got {value!r} as {name!r}") from error
    return checked


def _plain(value: Any) -> Any:
    """A number of Python, NumPy or JAX as JSON has it; None for one that is not finite."""
    if isinstance(value, (np.generic, jax.Array)) and np.ndim(value) == 0:
        value = value.item()
    return _finite(value) if isinstance(value, float) else value


def _finite(number: Array | np.generic | float) -> float | None:
    """The number, or None where there is none: JSON knows neither NaN nor infinity."""
    return float(number) if np.isfinite(number) else None
