"""The training run: `fit` takes a configuration and leaves a folder; what it is made of is in the rooms below."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from isgd_jax.app import build, checkpoints, data, models, multihost, resuming, schedule, task
from isgd_jax.app.clock import Clock
from isgd_jax.app.config import Config, TrainingConfig
from isgd_jax.app.data.dataset import fingerprint
from isgd_jax.app.progress import Measure
from isgd_jax.app.recorder import Hooks, Observer, Recorder
from isgd_jax.app.records import Record
from isgd_jax.app.run_dir import RunDir, Unwritten
from isgd_jax.app.signals import stop_on_signals
from isgd_jax.app.tensorboard import require_tensorboard
from isgd_jax.engines import arrivals
from isgd_jax.errors import ArgumentError
from isgd_jax.training import loop
from isgd_jax.types import Params

__all__ = ["Result", "fit"]

INT32_MAX = 2**31 - 1
"""Steps are counted in int32 on the devices."""


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
    measure: Measure = lambda state: {},
) -> Result:
    """Train, and leave a folder with the configuration, metrics, figures and checkpoints of the run.

    Args:
        config: what to do, as `isgd_jax.app.config.configure` makes it. With ``resume``, its ``run_dir`` is the folder
            of the run to go on with.
        dataset: takes the place of ``config.data.dataset``.
        model: takes the place of ``config.model``; anything with Linen's ``init`` and ``apply``.
        loss: takes the place of ``config.model.loss``; ``(outputs, example) -> scalar``.
        resume: go on from the newest checkpoint, or from the first step if there is none yet. The parameters are bit
            for bit those of a run without a break, unless scores are distrusted by the clock (``max_age_seconds``).
        observe: called with each record: the plan, refreshes, progress, warnings.
        until: called with each line of progress; the run ends early at the first for which it is true.
        measure: what to measure besides, at each line of progress; its time counts as measuring, not as training.

    Raises:
        ValueError: the configuration does not fit the data, the model or the checkpoint.
        FloatingPointError: the loss is no longer finite; the checkpoints from before stay.
        FileExistsError: a new run would write into the folder of an old one.
        RunInUseError: another process is writing to the folder.
    """
    clock, hooks = Clock(), Hooks(observe, until, measure)
    make_job = build.job_elsewhere(config, dataset, model, loss)
    _check_folders(config, resume)
    if dataset is None:
        with clock.spending("data"):
            named = config.data
            dataset = data.load(
                named.dataset, data_dir=named.data_dir, raw_dir=named.raw_dir, on_disk=named.hold == "disk"
            )
    _check_size(config.training, dataset)
    with multihost.joined(config, _fingerprint(config, dataset)):
        work = task.make(config.model, dataset, model=model, loss=loss)
        checkpoints.check_storable(jax.eval_shape(work.init, jax.random.key(0)))
        folder, devices = _run_dir(config, resume), _devices(config)
        with contextlib.ExitStack() as stack:
            stack.enter_context(folder.alone())  # before an engine, such as Ray, is started for nothing
            parts = build.build(config, work, replayed=_replayed(config, work), make_job=make_job)
            if parts.engine is not None:
                stack.callback(parts.engine.close)
            stop = stack.enter_context(stop_on_signals())
            recorder = Recorder(parts, folder, hooks, clock, stop=stop, resume=resume)
            result = loop.fit(
                parts.problem,
                parts.sampler,
                parts.tx,
                num_steps=config.training.num_steps(work.num_examples),
                key=jax.random.key(config.training.seed),
                engine=parts.engine,
                devices=devices,
                shard_params=config.hosts.shard_params,
                callbacks=[recorder],
                fresh_scores=parts.fresh_scores,
                make_refresher=recorder.make_refresher,
            )
    stopped_by = None if result.stopped is None else int(result.stopped) or None
    return Result(result.params, folder.path, result.step, stopped_by)


def _check_folders(config: Config, resume: bool) -> None:
    """What can be refused before the data set is there."""
    if config.recording.tensorboard:
        require_tensorboard()
    if resume and not config.hosts.distributed:
        _check_resumable(RunDir(Path(str(config.recording.run_dir))), config)
    if config.refresh.replay is not None:
        RunDir(Path(config.refresh.replay)).check_replayable(config)


def _check_size(training: TrainingConfig, dataset: data.Dataset) -> None:
    """What a data set of this size must be asked for."""
    data.check_batch_size(training.batch_size, len(dataset), of=dataset.name)
    most = INT32_MAX * training.batch_size / len(dataset)
    if training.epochs is not None and training.epochs > most:
        raise ArgumentError(
            f"epochs must be at most {most:.6g}, which are {INT32_MAX:,} updates on {dataset.name}, as many as are "
            f"counted; got {training.epochs:g}"
        )


def _fingerprint(config: Config, dataset: data.Dataset) -> str:
    """Of the examples; of several processes of the held-out ones too, which each measures, and counts classes in."""
    if not config.hosts.distributed:
        return dataset.fingerprint
    return f"{dataset.fingerprint}, of held-out examples {fingerprint(dataset.test)}"


def _replayed(config: Config, work: task.Task) -> arrivals.Schedule | None:
    """The schedule to follow, if this is a replay."""
    if config.refresh.replay is None:
        return None
    found = schedule.read(RunDir(Path(config.refresh.replay)), work.fingerprint)
    schedule.check_covers(found, config.training.num_steps(work.num_examples), config.refresh.refresh_every)
    return found


def _devices(config: Config) -> list[jax.Device] | None:
    """Those that train, each a part of the batch; None is one device."""
    size, wanted = config.training.batch_size, config.workers.train_devices
    if wanted > 1:
        devices = jax.local_devices()
        if wanted >= len(devices):
            raise ArgumentError(f"train_devices={wanted} leaves no device to score: this host has {len(devices)}")
        return devices[:wanted]
    if not config.hosts.distributed:
        return None
    if size % len(jax.devices()):
        raise ArgumentError(
            f"batch_size must be a multiple of the {len(jax.devices())} devices that train, so that each handles an "
            f"equal part; got {size}"
        )
    return jax.devices()


def _run_dir(config: Config, resume: bool) -> RunDir:
    """The folder of the run, new or old; of several processes one writes there.

    Raises:
        FileExistsError: a new run would write into the folder of an old one.
        ValueError: an old run was started with other settings, or its checkpoints were taken away.
    """
    if jax.process_index() != 0:
        return Unwritten(Path(str(config.recording.run_dir)))
    if not resume:
        return RunDir.create(config)
    run = RunDir(Path(str(config.recording.run_dir)))
    _check_resumable(run, config)
    return run


def _check_resumable(run: RunDir, config: Config) -> None:
    run.check_resumable(config)
    resuming.check_checkpoints_there(run)
