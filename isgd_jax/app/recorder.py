"""What a run of the command does beside its steps: it plans, measures, records, saves, and stops when asked to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from isgd_jax.app import build, data, plots, resuming, shared_checkpoints
from isgd_jax.app.clock import Clock, middle_seconds
from isgd_jax.app.progress import Measure, Measures
from isgd_jax.app.records import Record
from isgd_jax.app.run_dir import RunDir
from isgd_jax.app.signals import Stop
from isgd_jax.app.since_line import SinceLine
from isgd_jax.app.tensorboard import with_events
from isgd_jax.engines import arrivals
from isgd_jax.engines.contract import Reports, Resumable, Timed
from isgd_jax.engines.rates import Rates
from isgd_jax.errors import DivergedError
from isgd_jax.sampling.gates import is_open
from isgd_jax.sampling.state import FORMAT as SAMPLER_FORMAT
from isgd_jax.sampling.state import BatchSampler, SamplerState
from isgd_jax.training.background import Refresher, refresher
from isgd_jax.training.callbacks import Callback
from isgd_jax.training.data_parallel import agree, local_copy
from isgd_jax.training.loop import STEPS_IN_FLIGHT, Run
from isgd_jax.training.train_step import StepInfo
from isgd_jax.types import Params
from isgd_jax.variance import gate

__all__ = ["FORMAT", "Hooks", "Observer", "Recorder"]

ENOUGH = 0.5
"""In place of the number of a signal, when it was `until` that asked to stop."""

NOBODY_SCORES: Record = {
    "scores_per_second": 0.0,
    "scores_per_second_by_worker": {},
    "workers": 0,
    "bytes_moved": 0,
    "chunks_again": 0,
    "results_refused": 0,
}
"""The figures of an engine where there is none."""

REHEARSED = 4
"""Updates that the plan times together."""

FORMAT = f"5, sampler {SAMPLER_FORMAT}"
"""Of the state in a checkpoint, that of the sampler's own included: another one is refused by name, and so is one of
version 0.1, which has none."""

Observer = Callable[[Record], None]


class Hooks(NamedTuple):
    """What the caller of `fit` has a say in while it goes on."""

    observe: Observer
    """Called with each record."""
    until: Callable[[Record], bool]
    """Whether what was wanted is reached, of a line of progress."""
    measure: Measure
    """What to measure besides."""


class Recorder(Callback):
    """What a run of the command does beside its steps: it plans, measures, records, saves, and stops when asked to.

    Guarantees:
        * What is recorded after a checkpoint is forgotten when the run goes on from it.
        * Of several processes, one writes and shows; all stop at the same step.
        * Nothing is saved of a run whose loss is no longer finite.

    Args:
        parts: of the run.
        folder: where it writes.
        hooks: of the caller.
        clock: of the run.
        stop: set by a signal.
        resume: whether to go on from the newest checkpoint.
    """

    def __init__(
        self, parts: build.Parts, folder: RunDir, hooks: Hooks, clock: Clock, *, stop: Stop, resume: bool
    ) -> None:
        config, work, writes = parts.config, parts.work, jax.process_index() == 0
        self._config, self._work, self._parts, self._folder = config, work, parts, folder
        self._clock, self._stop, self._resume, self._until = clock, stop, resume, hooks.until
        self._observe = hooks.observe if writes else lambda record: None
        if config.recording.tensorboard and writes:
            self._observe = with_events(folder.path, hooks.observe)
        self._measures = Measures(config, work, measure=hooks.measure)
        self._rates = Rates(parts.engine) if isinstance(parts.engine, Reports) else None
        self._checkpoints = shared_checkpoints.of_run(
            folder.checkpoints,
            identity={"data set": work.fingerprint, "format": FORMAT} | resuming.files_of_numbers(config),
        )
        self._infos: list[StepInfo] = []
        self._since_line = SinceLine()
        self._step = self._noted = 0  # steps made, and the last of which a move of the gate has been recorded
        self._logged = 0  # the last of which a line of progress was written
        self._quarantined = 0
        self._trusted_share: float | None = None
        self._was_open, self._reached = True, False
        self._mark = (0, 0.0, dict(clock.spent))  # step, clock and time spent at the last line of progress

    def make_refresher(self, engine: Any, sampler: BatchSampler, **options: Any) -> Refresher:
        """The refresher of the configuration, whose clock is agreed upon by all processes.

        Args:
            engine: who scores, or None.
            sampler: that takes the scores.
            options: what `isgd_jax.training.loop.fit` would ask for; the configuration decides instead.
        """
        config, replayed = self._config, self._parts.replayed
        clock = (lambda: agree(self._clock())) if replayed is None else lambda: replayed.arrivals[self._step].clock
        made = refresher(
            engine,
            sampler,
            every=config.refresh.refresh_every,
            publish_every=config.refresh.publishes_every,
            wait=config.sampling.mode == "exact" and replayed is None,
            published=self._parts.published,
            clock=clock,
            publish_at=None if replayed is None else lambda step: step in replayed.versions,
            warn=self._warn,
        )
        return ClockedRefresher(made, self._clock)

    def begin(self, run: Run) -> None:
        """Take up a checkpoint, write what the run is, and tell the plan; the first line of progress is of step 0.

        Written are ``inputs.json``, ``environment.json`` and, of a resumed run, ``config.json``. To plan, a few steps
        and a refresh are compiled and timed; their results are thrown away.

        Raises:
            ArgumentError: the checkpoint is of another model, optimizer or data set.
            DamagedFileError: there are checkpoints, and all are damaged.
        """
        is_restored = self._resume and self._restore(run)
        if self._resume:
            self._folder.write_config(self._config)
        self._folder.write(data.INPUTS_FILE, self._work.inputs.to_json())
        self._folder.write_environment(
            [str(device) for device in jax.devices()], self._work.fingerprint, num_classes=self._work.num_classes
        )
        if self._step < run.num_steps:
            self._observe(self._plan(run))
        else:
            more = "steps" if self._config.training.epochs is None else "epochs"
            self._warn(f"nothing is left to do: {self._step:,} updates were made; {more}=N asks for more")
        self._warn(*self._parts.remarks)
        self._set_mark()
        if not is_restored:  # a checkpoint of step 0 was saved after its line of progress
            self._log(run)
        self._ask(run)

    def refreshed(self, run: Run) -> None:
        """Record which scores arrived, and when: what a replay follows."""
        found, engine = run.refresher.last, self._parts.engine
        if found is None or engine is None:
            return
        proposal = local_copy(run.state.sampler.proposal)
        self._trusted_share = float(proposal.trusted_share)
        size = getattr(engine, "chunk_size", 1)
        self._record(
            "refresh",
            clock=found.seconds,
            chunk_size=size,
            arrived=arrivals.as_runs(found.chunks, size),
            scored=sum(len(chunk.ids) for chunk in found.chunks),
            rejected=self._newly_quarantined(run),
            trusted_share=self._trusted_share,
            is_uniform=bool(proposal.is_uniform),
        )
        self._warn(*_notices(engine))

    def stepped(self, run: Run, info: StepInfo) -> None:
        """Keep what the step left on the device; every so often write a line of progress, save, and ask to go on."""
        self._infos.append(info)
        self._step = run.step
        if run.step % self._config.recording.log_every == 0 or run.step == run.num_steps:
            self._log(run)
        if run.step % self._config.recording.checkpoint_every == 0:
            self._save(run)
        if jax.process_count() == 1 or run.step % STEPS_IN_FLIGHT == 0:
            self._ask(run)

    def end(self, run: Run) -> None:
        """Save the last step, and draw the figures.

        Raises:
            OSError: the last checkpoint, a record or a figure cannot be written; what was written before stays.
        """
        self._warn(*_notices(self._parts.engine))
        self._save(run)
        self._checkpoints.wait()
        stopped = run.stopped is not None and run.stopped >= 1
        self._record("stopped" if stopped else "finished", spent=self._spent(), num_steps=run.num_steps)
        if jax.process_index() == 0:
            plots.draw(self._folder)
            self._observe({"event": "wrote", "paths": [str(path) for path in self._folder.files()]})

    def close(self) -> None:
        """Let the checkpoints go, also after an error."""
        self._checkpoints.close()

    def _restore(self, run: Run) -> bool:
        """Take up the newest checkpoint, and forget the records written after it; whether there was one.

        A run that was killed before its first checkpoint begins anew: its first parameters come from the seed.
        """
        if self._checkpoints.latest_step() is None:
            self._folder.forget_after(-1)
            self._record("resumed")
            return False
        saved, notes, remarks = self._checkpoints.restore({"state": run.state})
        run.state = jax.device_put(saved["state"]) if run.parallel is None else run.parallel.placed(saved["state"])
        if isinstance(self._parts.engine, Resumable):
            self._parts.engine.restore(notes["engine"])
        self._clock.go_on_from(notes["seconds"], notes["spent"])
        self._since_line = SinceLine(**notes.get("since_line", {}))
        run.step = self._step = self._noted = int(local_copy(run.state.sampler.clock.step))
        self._quarantined = int(local_copy(run.state.sampler.quarantined))
        self._was_open = bool(local_copy(is_open(run.state.sampler)))
        proposal = local_copy(run.state.sampler.proposal)
        if self._parts.engine is not None and int(proposal.refreshes) > 0:
            self._trusted_share = float(proposal.trusted_share)
        self._folder.forget_after(self._step)
        self._logged = notes.get("logged", 0)
        lost = self._lost_lines(self._logged)
        self._record("resumed")
        self._warn(*remarks, *lost)
        return True

    def _lost_lines(self, logged: int) -> list[str]:
        """What to say where lines of progress are gone that were written before the checkpoint; at most one sentence.

        Args:
            logged: the update of the last of them.
        """
        there = max((record["step"] for record in self._folder.records("progress")), default=0)
        if there >= logged or jax.process_index() != 0:
            return []
        return [
            f"{self._folder.metrics.name} ends at update {there:,}, before the line of update {logged:,} that the "
            "checkpoint knows of: what is missing between them is missing in figures and comparisons too"
        ]

    def _ask(self, run: Run) -> None:
        """Whether a signal asked to stop, or what was wanted is reached; all processes agree."""
        asked = agree(max(float(self._stop.signum or 0), ENOUGH if self._reached else 0.0))
        if asked > 0:
            run.stop(asked)

    def _log(self, run: Run) -> None:
        """Measure, and write one line of progress."""
        step_before, clock_before, _ = self._mark
        stepped = self._drain(run)
        elapsed = self._clock() - clock_before
        self._clock.spent.update(self._spent())
        with self._clock.spending("measuring"):
            measured = self._measures.at(run.state, run.data, run.parallel)
        rate = (self._step - step_before) / elapsed if self._step > step_before else None
        shares = self._clock.shares("scoring", "updating", "measuring")
        training = {"train_seconds": round(self._clock.spent["scoring"] + self._clock.spent["updating"], 3)}
        watched = NOBODY_SCORES if self._rates is None else self._rates.since_last()
        watched = watched | {"trusted_share": self._trusted_share, "gate_is_open": self._was_open}
        record = self._record("progress", steps_per_second=rate, **training, **stepped, **measured, **shares, **watched)
        self._reached, self._logged = self._until(record), self._step
        self._set_mark()
        if self._step == run.num_steps and record["test_loss"] is None:
            raise self._diverged("held-out loss", None, self._step)

    def _spent(self) -> dict[str, float]:
        """What time was spent on; all since the last line of progress that nothing else has claimed was updating."""
        _, clock_before, spent_before = self._mark
        elsewhere = sum(self._clock.spent.values()) - sum(spent_before.values())
        return dict(self._clock.spent) | {
            "updating": self._clock.spent["updating"] + self._clock() - clock_before - elsewhere
        }

    def _set_mark(self) -> None:
        self._mark = (self._step, self._clock(), dict(self._clock.spent))

    def _drain(self, run: Run) -> Record:
        """Fetch what the steps left on the device since the last call, and see that the loss is finite."""
        infos = jax.device_get(self._infos)
        self._infos.clear()
        self._note_switches(infos)
        for i, info in enumerate(infos):
            if not np.isfinite(info.loss):
                raise self._diverged("training loss", float(info.loss), self._step - len(infos) + i)
        if infos:
            self._newly_quarantined(run)
        self._since_line.add(infos)
        line, self._since_line = self._since_line.line(), SinceLine()
        return line

    def _diverged(self, what: str, value: float | None, step: int) -> DivergedError:
        """Record that a loss is not finite after ``step`` updates; checkpoints that give such a loss go."""
        self._checkpoints.discard_from(step)
        newest = self._checkpoints.latest_step()
        kept = (
            "no checkpoint was saved before"
            if newest is None
            else f"the checkpoint of step {newest} in {self._folder.checkpoints}, with a finite loss, stays"
        )
        became = "is not finite" if value is None else f"became {value}"
        rate = self._config.training.learning_rate
        text = f"the {what} {became} at step {step}: lower learning_rate (it was {rate}); {kept}"
        self._record("diverged", text=text)
        return DivergedError(text)

    def _note_switches(self, infos: list[StepInfo]) -> None:
        """Record each move of the gate, once: from the steps of ``infos``, the last of which is the present one."""
        was_open = self._was_open
        for at, info in enumerate(infos, start=self._step - len(infos) + 1):
            now_open = bool(info.gate_is_open)
            if at > self._noted and now_open != was_open and info.gate_ratio is not None:
                self._record("gate", at=at, is_open=now_open, reason=gate.reason(now_open, info.gate_ratio))
            if at > self._noted:
                was_open = now_open
        self._was_open, self._noted = was_open, self._step

    def _save(self, run: Run) -> None:
        infos = jax.device_get(self._infos)
        self._note_switches(infos)
        if not all(np.isfinite(info.loss) for info in infos):
            self._drain(run)  # says at which step the loss was lost, and saves nothing
        spent, engine = self._spent(), self._parts.engine
        with self._clock.spending("saving"):
            notes: Record = {"engine": engine.state() if isinstance(engine, Resumable) else None}
            notes |= {"seconds": self._clock(), "spent": spent, "since_line": self._since_line.notes(infos)}
            notes["logged"] = self._logged
            self._folder.check_held()  # where it was removed Orbax would make it anew
            self._checkpoints.save(self._step, {"state": run.state}, notes)

    def _newly_quarantined(self, run: Run) -> int:
        """How many scores have been set aside since the last look; a person hears of them."""
        total = int(local_copy(run.state.sampler.quarantined))
        count, self._quarantined = total - self._quarantined, total
        if count:
            self._warn(f"{count} scores were not finite and were set aside; what was known of these examples stays")
        return count

    def _warn(self, *texts: str) -> None:
        for text in texts:
            self._record("warning", text=text)

    def _record(self, event: str, **values: Any) -> Record:
        record = {"event": event, "step": self._step, "seconds": round(self._clock(), 3), **values}
        self._folder.append(record)
        self._observe(record)
        return record

    def _plan(self, run: Run) -> Record:
        """What is about to be done, with the cost of scoring measured on this machine."""

        with self._clock.spending("planning"):
            (seconds,) = middle_seconds(lambda: run.rehearse(REHEARSED), repeats=1)
            refresh = 0.0 if self._parts.engine is None else self._seconds_per_refresh(run)
        return {
            "event": "plan",
            "run_dir": str(self._folder.path),
            "num_examples": self._work.num_examples,
            "num_params": sum(leaf.size for leaf in jax.tree.leaves(run.state.params)),
            "devices": [str(device) for device in jax.devices()],
            "first_step": self._step,
            "num_steps": run.num_steps,
            "config": self._config.flat(),
            "sampler": self._config.sampling.sampler_in_use,
            "seconds_per_update": seconds / REHEARSED,
            "seconds_per_refresh": refresh,
            "share_scored": self._config.share_scored(self._work.num_examples),
        }

    def _seconds_per_refresh(self, run: Run) -> float:
        """Of scoring, of recording what is scored, and of making the proposal."""
        engine, size = self._parts.engine, self._work.num_examples
        # What is done once a refresh and what is done for each chunk: the difference is a chunk's.
        once, with_a_chunk = middle_seconds(
            lambda: run.refresher.rehearse(run.state.sampler, chunks=0),
            lambda: run.refresher.rehearse(run.state.sampler, chunks=1),
            repeats=3,
        )
        each = (
            max(0.0, with_a_chunk - once) * self._config.share_scored(size) * size / getattr(engine, "chunk_size", size)
        )
        params = self._parts.published(run.state.params, 0)
        wait = self._config.sampling.mode == "exact"
        collecting = engine.seconds_per_collect(params, wait=wait) if isinstance(engine, Timed) else 0.0
        return collecting + once + each


class ClockedRefresher(Refresher):
    """A refresher whose time counts as scoring."""

    def __init__(self, made: Refresher, clock: Clock) -> None:
        vars(self).update(vars(made))
        self._spent_on = clock

    def __call__(self, step: int, params: Params, state: SamplerState) -> SamplerState:
        if self.engine is None:
            return super().__call__(step, params, state)
        with self._spent_on.spending("scoring"):
            return jax.block_until_ready(super().__call__(step, params, state))


def _notices(engine: Any) -> list[str]:
    """What a person should hear of an engine."""
    return engine.notices() if isinstance(engine, Reports) else []
