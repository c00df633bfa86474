"""The training run: `fit` takes a configuration and leaves a folder; what it is made of is in the rooms below."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from isgd_jax import assembly, data, distributed, gate, models, report, schedule, shared_checkpoints, step, task
from isgd_jax.clock import Clock, middle_seconds
from isgd_jax.config import Config
from isgd_jax.engines.choose import MakeJob
from isgd_jax.engines.rates import Rates
from isgd_jax.feed import Feed
from isgd_jax.jobs import job_elsewhere
from isgd_jax.parallel import AllDevices, OneDevice
from isgd_jax.progress import Measure, Measures
from isgd_jax.rundir import Record, RunDir, Unwritten
from isgd_jax.signals import Stop, stop_on_signals
from isgd_jax.tensorboard import require_tensorboard, with_events
from isgd_jax.typing import Batch, Params

STEPS_IN_FLIGHT = 8
"""Steps dispatched ahead of the device: more gains nothing, and before JAX 0.12 a loop without a fence can hang."""

ENOUGH = 0.5
"""In place of the number of a signal, when it was `until` that asked to stop."""

REHEARSED = 4
"""Updates that the plan times together."""

FORMAT = "2"
"""Of the state in a checkpoint: one of version 0.1, which has none, is refused by name."""

Observer = Callable[[Record], None]


class Result(NamedTuple):
    """What a run leaves."""

    params: Params
    run_dir: Path
    step: int
    stopped_by: int | None
    """The number of the signal that ended the run early, if one did."""


def fit(
    config: Config,
    *,
    dataset: data.Dataset | None = None,
    model: models.Model | None = None,
    loss: task.OutputLoss | None = None,
    resume: bool = False,
    observe: Observer = lambda record: None,
    until: Callable[[Record], bool] = lambda record: False,
    measure: Measure = lambda state, law: {},
) -> Result:
    """Train, and leave a folder with the configuration, metrics, figures and checkpoints of the run.

    Args:
        config: what to do. With ``resume``, ``config.run_dir`` is the folder of the run to go on with.
        dataset: takes the place of ``config.dataset``.
        model: takes the place of ``config.model``; anything with Linen's ``init`` and ``apply``.
        loss: takes the place of ``config.loss``; ``(outputs, example) -> scalar``.
        resume: go on from the newest checkpoint, or from the first step if there is none yet. The parameters are bit
            for bit those of a run without a break, unless scores are distrusted by the clock (``max_age_seconds``).
        observe: called with each record: the plan, refreshes, progress, warnings.
        until: called with each line of progress; the run ends early at the first for which it is true.
        measure: what to measure besides, at each line of progress; its time counts as measuring, not as training.

    Raises:
        ValueError: the configuration does not fit the data, the model or the checkpoint.
        FloatingPointError: the loss is no longer finite; the checkpoints from before stay.
        FileExistsError: a new run would write into the folder of an old one.
    """
    clock = Clock()
    make_job = job_elsewhere(config, dataset, model, loss)
    if config.tensorboard:
        require_tensorboard()
    if resume and not config.distributed:
        RunDir(Path(str(config.run_dir))).check_resumable(config)
    if config.replay is not None:
        RunDir(Path(config.replay)).check_replayable(config)
    if dataset is None:
        with clock.spending("data"):
            dataset = data.load(
                config.dataset, data_dir=config.data_dir, raw_dir=config.raw_dir, on_disk=config.hold == "disk"
            )
    if config.batch_size > len(dataset):
        raise ValueError(
            f"--batch-size must be at most {len(dataset)}, the training examples of {dataset.name}; "
            f"got {config.batch_size}"
        )
    with distributed.joined(config, dataset.fingerprint):
        place = _place(config)
        work = task.make(config, dataset, model=model, loss=loss)
        run = _run_dir(config, resume, place)
        trainer = Trainer(config, work, place, run, clock, observe, until, measure, make_job)
        try:
            if resume:
                trainer.resume()
                run.write_config(config)
            with stop_on_signals() as stop:
                return trainer.train(stop)
        finally:
            trainer.close()


def _place(config: Config) -> OneDevice:
    """Where steps are made."""
    if config.train_devices > 1:
        devices, wanted = jax.local_devices(), config.train_devices
        if wanted >= len(devices):
            raise ValueError(f"--train-devices {wanted} leaves no device to score: this host has {len(devices)}")
        return AllDevices(config.batch_size, devices[:wanted])
    return AllDevices(config.batch_size) if config.distributed else OneDevice()


def _run_dir(config: Config, resume: bool, place: OneDevice) -> RunDir:
    """The folder of the run, new or old; of several processes one writes there."""
    if not place.writes:
        return Unwritten(Path(str(config.run_dir)))
    if not resume:
        return RunDir.create(config)
    run = RunDir(Path(str(config.run_dir)))
    run.check_resumable(config)
    return run


class Trainer:
    """One run in memory: its state, where its laws come from, and where its records go."""

    def __init__(
        self,
        config: Config,
        work: task.Task,
        place: OneDevice,
        run: RunDir,
        clock: Clock,
        observe: Observer,
        until: Callable[[Record], bool],
        measure: Measure,
        make_job: MakeJob,
    ) -> None:
        self.config, self.work, self.place, self.run, self.clock = config, work, place, run, clock
        self.observe, self.until = observe if place.writes else lambda record: None, until
        if config.tensorboard and place.writes:
            self.observe = with_events(run.path, observe)
        self.asked = 0.0  # the signal that asked to stop, or ENOUGH
        self.reached = False
        self.num_steps = config.num_steps(work.num_examples)
        self.step = 0
        self.reading = 0.0  # of the clock at the last refresh: it decides, so it is kept and replayed
        self.train_data: Batch = dict(work.train) if config.hold != "device" else place.spread(dict(work.train))
        _, self.draw_key, _ = assembly.keys(config)
        replayed = None
        if config.replay is not None:
            replayed = schedule.read(RunDir(Path(config.replay)), work.fingerprint)
            replayed.check_covers(self.num_steps, config.refresh_every)
        parts = assembly.assemble(
            config, work, self.train_data, num_steps=self.num_steps, place=place, replayed=replayed, make_job=make_job
        )
        self.state, self.engine, self.laws, self.updates, self.remarks = parts
        self.feed = None if config.hold == "device" else Feed(self.train_data, self.updates, self.draw_key)
        self.rates = Rates(self.engine)
        self.trusted_share: float | None = None
        self.measures = Measures(config, work, place, measure=measure)
        identity = {"format": FORMAT, "data set": work.fingerprint}
        self.checkpoints = shared_checkpoints.of_run(run.checkpoints, identity=identity)
        self.infos: list[step.StepInfo] = []
        self.noted = 0  # the last step of which a move of the gate has been recorded
        self.mark = (0, 0.0, dict(self.clock.spent))  # step, clock and time spent at the last line of progress

    def resume(self) -> None:
        """Take up the newest checkpoint, and forget the records written after it.

        A run that was killed before its first checkpoint begins anew: its first parameters come from the seed.
        """
        if self.checkpoints.latest_step() is None:
            self.run.forget_after(-1)
            self._record("resumed")
            return
        saved, notes = self.checkpoints.restore({"state": self.state, "law": self.laws.law})
        self.state, self.laws.law = self.place.spread((saved["state"], saved["law"]))
        if self.feed is not None:
            self.feed.notes = notes["feed"]
        self.engine.restore(notes["engine"])
        self.reading = notes["reading"]
        self.clock.go_on_from(notes["seconds"], notes["spent"])
        self.step = self.noted = int(self.state.step)
        self.run.forget_after(self.step)
        self._record("resumed")

    def train(self, stop: Stop) -> Result:
        """Make the updates, until the last one or until a signal asks to stop; save; draw the figures."""
        self.run.write_environment([str(device) for device in jax.devices()], self.work.fingerprint)
        if self.step < self.num_steps:
            self.observe(self._plan())
        else:
            flag = "--steps" if self.config.epochs is None else "--epochs"
            self._warn(f"nothing is left to do: {self.step:,} updates were made; {flag} N asks for more")
        self._warn(*self.remarks)
        self._set_mark()
        if self.step == 0:
            self._log()
        while self.step < self.num_steps and not self._is_over(stop):
            self._advance()
        self._warn(*self.engine.notices())
        self._save()
        self.checkpoints.wait()
        self._record("stopped" if self.asked >= 1 else "finished", spent=self._spent(), num_steps=self.num_steps)
        if self.place.writes:
            report.draw(self.run)
            self.observe({"event": "wrote", "paths": [str(path) for path in sorted(self.run.path.iterdir())]})
        return Result(self.state.params, self.run.path, self.step, int(self.asked) or None)

    def close(self) -> None:
        """Release the engine and the checkpoint folder."""
        self.engine.close()
        if self.feed is not None:
            self.feed.close()
        self.checkpoints.close()

    def _is_over(self, stop: Stop) -> bool:
        """Whether a signal asked to stop, or what was wanted is reached; looked at where all processes can agree."""
        if self.place.num_processes == 1 or self.step % STEPS_IN_FLIGHT == 0:
            self.asked = self.place.agree(max(float(stop.signum or 0), ENOUGH if self.reached else 0.0))
        return self.asked > 0

    def _advance(self) -> None:
        """One step, and what falls due after it."""
        self.state, refresh = self.laws.before(self.step, self.state, self.place.clock(self.clock))
        if refresh is not None:
            self.reading, self.trusted_share = refresh.clock, refresh.trusted_share
            self._record("refresh", **refresh._asdict())
            self._warn_of_rejected(refresh.rejected)
            self._warn(*self.engine.notices())
        self.state, info = self._update(self.state)
        self.infos.append(info)
        self.step += 1
        if self.step % STEPS_IN_FLIGHT == 0:
            jax.block_until_ready(info.loss)
        if self.step % self.config.log_every == 0 or self.step == self.num_steps:
            self._log()
        if self.step % self.config.checkpoint_every == 0:
            self._save()

    def _update(self, state: step.TrainState) -> tuple[step.TrainState, step.StepInfo]:
        law, seconds = self.laws.law, jnp.float32(self.reading)
        if self.feed is not None:
            choice, batch = self.feed.next(self.step, state, law, self.laws.steps_left(self.step))
            return self.updates.update_drawn(state, law, choice, batch, self.draw_key, seconds)
        return self.updates.update(state, law, self.train_data, self.draw_key, seconds)

    def _rehearse(self) -> step.TrainState:
        """A few updates that are forgotten, one dispatched behind the other as in training."""
        state = jax.tree.map(jnp.copy, self.state)  # a step takes over the state that it is given
        for _ in range(REHEARSED):
            state, _ = self._update(state)
        return state

    def _log(self) -> None:
        """Measure, and write one line of progress."""
        step_before, clock_before, _ = self.mark
        stepped = self._drain()
        elapsed = self.clock() - clock_before
        self.clock.spent.update(self._spent())
        with self.clock.spending("measuring"):
            measured = self.measures.at(self.step, self.state, self.laws, self.train_data)
        rate = (self.step - step_before) / elapsed if self.step > step_before else None
        shares = self.clock.shares("scoring", "updating", "measuring")
        training = {"train_seconds": round(self.clock.spent["scoring"] + self.clock.spent["updating"], 3)}
        watched = self.rates.since_last() | {"trusted_share": self.trusted_share}
        record = self._record("progress", steps_per_second=rate, **training, **stepped, **measured, **shares, **watched)
        self.reached = self.until(record)
        self._set_mark()

    def _spent(self) -> dict[str, float]:
        """What time was spent on; all since the last line of progress that nothing else has claimed was updating."""
        _, clock_before, spent_before = self.mark
        elsewhere = sum(self.clock.spent.values()) - sum(spent_before.values())
        return dict(self.clock.spent) | {
            "updating": self.clock.spent["updating"] + self.clock() - clock_before - elsewhere
        }

    def _set_mark(self) -> None:
        self.mark = (self.step, self.clock(), dict(self.clock.spent))

    def _drain(self) -> Record:
        """Fetch what the steps left on the device since the last call, and see that the loss is finite."""
        infos = jax.device_get(self.infos)
        self.infos.clear()
        self._note_switches(infos)
        for i, info in enumerate(infos):
            if not np.isfinite(info.loss):
                raise FloatingPointError(
                    f"the training loss became {info.loss} at step {self.step - len(infos) + i}: lower --learning-rate "
                    f"(it was {self.config.learning_rate}); checkpoints from before stay in {self.run.checkpoints}"
                )
        if not infos:
            return {"loss": None, "max_weight": None}
        self._warn_of_rejected(sum(int(info.rejected) for info in infos))
        losses, weights = [float(info.loss) for info in infos], [float(info.max_weight) for info in infos]
        return {"loss": math.fsum(losses) / len(losses), "max_weight": max(weights)}

    def _note_switches(self, infos: list[step.StepInfo]) -> None:
        """Record each move of the gate, once: from the steps of ``infos``, the last of which is the present one."""
        for at, info in enumerate(infos, start=self.step - len(infos) + 1):
            if self.config.gate == "on" and at > self.noted and bool(info.verdict.switched):
                ratio = info.verdict.ratio
                self._record("gate", at=at, is_open=bool(info.is_open), reason=gate.reason(bool(info.is_open), ratio))
        self.noted = self.step

    def _save(self) -> None:
        infos = jax.device_get(self.infos)
        self._note_switches(infos)
        if not all(np.isfinite(info.loss) for info in infos):
            self._drain()  # says at which step the loss was lost, and saves nothing
        spent = self._spent()
        with self.clock.spending("saving"):
            self._write_checkpoint(spent)

    def _write_checkpoint(self, spent: dict[str, float]) -> None:
        notes: Record = {"engine": self.engine.state(), "reading": self.reading}
        notes |= {"feed": None if self.feed is None else self.feed.notes}
        notes |= {"seconds": self.clock(), "spent": spent}
        self.checkpoints.save(self.step, {"state": self.state, "law": self.laws.law}, notes)

    def _warn_of_rejected(self, count: int) -> None:
        if count:
            self._warn(f"{count} scores were not finite and were set aside; what was known of these examples stays")

    def _warn(self, *texts: str) -> None:
        for text in texts:
            self._record("warning", text=text)

    def _record(self, event: str, **values: Any) -> Record:
        record = {"event": event, "step": self.step, "seconds": round(self.clock(), 3), **values}
        self.run.append(record)
        self.observe(record)
        return record

    def _plan(self) -> Record:
        """What is about to be done, with the cost of scoring measured on this machine."""
        with self.clock.spending("planning"):
            (updates,) = middle_seconds(self._rehearse, repeats=1)
            refresh = self.laws.seconds_per_refresh(self.state)
        return {
            "event": "plan",
            "run_dir": str(self.run.path),
            "num_examples": self.work.num_examples,
            "num_params": sum(leaf.size for leaf in jax.tree.leaves(self.state.params)),
            "devices": [str(device) for device in jax.devices()],
            "first_step": self.step,
            "num_steps": self.num_steps,
            "config": self.config.to_dict(),
            "sampler": self.config.sampler_in_use,
            "seconds_per_update": updates / REHEARSED,
            "seconds_per_refresh": refresh,
            "share_scored": self.config.share_scored(self.work.num_examples),
        }
