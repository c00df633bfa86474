"""What watches a run: the interface, and lines of plain text, which is what `fit` prints by itself.

Checkpoints, consoles, figures and records of a folder are callbacks too; they live with the command.
"""

import sys
import time
from typing import IO, TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import numpy as np

from isgd_jax.errors import DivergedError

if TYPE_CHECKING:
    from isgd_jax.training.loop import Run

__all__ = ["Callback", "History", "Log", "LogTo", "PlainProgress", "Record"]

Record = dict[str, Any]


class Callback:
    """Something that happens beside the steps of a run; each method does nothing unless it is written over."""

    def begin(self, run: "Run") -> None:
        """Before the first step. ``run.state`` and ``run.step`` may be set here, to go on from a checkpoint."""

    def refreshed(self, run: "Run") -> None:
        """After a refresh of the proposal, before the step it is for."""

    def stepped(self, run: "Run", info: Any) -> None:
        """After each step; ``run.step`` counts it.

        Args:
            run: whose ``state`` is that after the step. It is put together when it is asked for, so ask seldom, and
                donated to the next: copy what is to be kept.
            info: `StepInfo`, on the device. Reading it waits for the step, so read it seldom.
        """

    def told(self, run: "Run", text: str) -> None:
        """Something that a person should hear, before ``stepped``: what norms cost, and what was decided of it."""

    def end(self, run: "Run") -> None:
        """After the last step, or when a callback has stopped the run (``run.stop(reason)``)."""

    def close(self) -> None:
        """Release what is held; called also when the run ends by an error."""


class History(Callback):
    """Keeps a record of numbers every so many steps: the loss, held-out measurements, what draws are worth.

    A record is a dict: ``step``; ``seconds`` since the run began; ``loss``, the mean over the steps since the last
    record of unbiased estimates of the training loss; each held-out measurement as ``<data>_<metric>``; once the
    monitor knows them, ``variance_ratio``, Tr Cov of a batch as drawn over that of a uniform one, and
    ``equivalent_batch``, the draws of a uniform batch of the same variance; ``scored_share`` and ``mean_age`` (in
    versions) of the scores; ``gate_is_open``; and, once it is known what norms cost, ``step_cost`` and whether
    ``steps_learn`` from them.

    Args:
        every: steps between two records. The last step has one too.

    Raises:
        DivergedError: while the run goes on, at the first record after the loss was not finite.
    """

    def __init__(self, *, every: int = 100) -> None:
        self._every, self._infos = every, list[Any]()
        self._evaluate: Any = None
        self.records: list[Record] = []

    def begin(self, run: "Run") -> None:
        """Start the clock."""
        self._evaluate = run.problem.evaluator()
        self._began = time.monotonic()

    def stepped(self, run: "Run", info: Any) -> None:
        """Keep what the step told, on the device; read it when a record is due."""
        self._infos.append(info)
        if run.step % self._every == 0 or run.step == run.num_steps:
            self.records.append(self._record(run))
            self.recorded(run, self.records[-1])

    def recorded(self, run: "Run", record: Record) -> None:
        """After a record was made."""

    def _record(self, run: "Run") -> Record:
        losses = [float(info.loss) for info in jax.device_get(self._infos)]
        self._infos.clear()
        bad = next((i for i, loss in enumerate(losses) if not np.isfinite(loss)), None)
        if bad is not None:
            at = run.step - len(losses) + bad
            advice = "lower the learning rate"
            if at == 0:  # no update was made yet
                advice = "no update made it so; look for the examples, jax.vmap(loss_fn, (None, 0))(params, data)"
            raise DivergedError(f"the training loss became {losses[bad]} at step {at}: {advice}")
        found = run.sampler.report(run.state.sampler)
        record: Record = {"step": run.step, "seconds": time.monotonic() - self._began}
        record["loss"] = sum(losses) / len(losses)
        for name, data in run.problem.held_out.items():
            means = self._evaluate(run.state.params, data) if run.problem.measured() else {}
            record |= {f"{name}_{what}": float(value) for what, value in means.items()}
        if found.variance is not None and int(found.num_measured):
            known = {
                "variance_ratio": _over(found.variance.drawn.value, found.variance.uniform.value),
                "equivalent_batch": float(found.equivalent_batch),
            }
            record |= {name: value for name, value in known.items() if value > 0.0}  # else it is not known yet
        record |= {"scored_share": float(found.scores.known_share), "mean_age": float(found.scores.mean_age)}
        record["gate_is_open"] = bool(found.gate_is_open)
        gate = run.cost_gate
        if gate is not None and float(gate.step_cost):
            record |= {"step_cost": float(gate.step_cost), "steps_learn": bool(gate.is_open)}
        return record


@runtime_checkable
class Log(Protocol):
    """Where numbers go: the ``log`` of a run of Weights & Biases, say, or two lines around TensorBoard's writer."""

    def __call__(self, values: dict[str, float], /, *, step: int) -> object:
        """Take the numbers of a step by name."""


class LogTo(History):
    """Gives the numbers of each record to a function: the bridge to experiment trackers.

    For Weights & Biases ``LogTo(wandb.init(...).log)``; for TensorBoard::

        LogTo(lambda values, step: [writer.add_scalar(name, value, step) for name, value in values.items()])

    Args:
        log: called as ``log({"loss": 0.3, ...}, step=100)``. The names are those of `History`; the gate is 1 or 0.
        every: steps between two calls. The last step has one too.
    """

    def __init__(self, log: Log, *, every: int = 100) -> None:
        super().__init__(every=every)
        self._log = log

    def recorded(self, run: "Run", record: Record) -> None:
        """Hand the numbers on."""
        self._log({name: float(value) for name, value in record.items() if name != "step"}, step=record["step"])


class PlainProgress(History):
    """A line of text for each record: what `fit` prints unless it is given callbacks.

    Args:
        every: steps between two lines.
        file: where they go; standard output by default.
    """

    def __init__(self, *, every: int = 100, file: IO[str] | None = None) -> None:
        super().__init__(every=every)
        self._file = file

    def told(self, run: "Run", text: str) -> None:
        """Print what is told."""
        place = f"step {run.step:>{len(str(run.num_steps))}}/{run.num_steps}"
        print(f"{place} | {text}", file=self._file or sys.stdout, flush=True)

    def recorded(self, run: "Run", record: Record) -> None:
        """Print the line."""
        parts = [f"step {record['step']:>{len(str(run.num_steps))}}/{run.num_steps}", f"loss {record['loss']:.4g}"]
        parts += [f"{name} {record[name]:.4g}" for name in record if name.split("_")[0] in run.problem.held_out]
        if "variance_ratio" in record:
            parts.append(f"variance {record['variance_ratio']:.2f} of uniform")
        if "equivalent_batch" in record:
            parts.append(f"worth a batch of {record['equivalent_batch']:.0f}")
        if not record["gate_is_open"]:
            parts.append("gate shut")
        if not record.get("steps_learn", True):
            parts.append("few norms")
        parts.append(f"{record['seconds']:.1f} s")
        print(" | ".join(parts), file=self._file or sys.stdout, flush=True)


def _over(above: Any, below: Any) -> float:
    return float(above) / float(below) if float(below) > 0 else float("nan")
