"""What a run is asked to do: one frozen dataclass of nine parts, each checked when made.

Every field has a name of its own among all parts, which is also its flag: `configure` makes a configuration of names
alone, and each function below takes the parts that it needs. Free of jax, so that `--help` is instant.

>>> config = configure(dataset="fashion_mnist", mode="relaxed", batch_size=128)
>>> config.training.batch_size, config.sampling.mode
(128, 'relaxed')
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from isgd_jax.app.fields import Amount, Count, InPython, Number, Part, Positive, Range, Share, must
from isgd_jax.app.gone import without_gone
from isgd_jax.errors import ArgumentError

__all__ = [
    "MAY_CHANGE_ON_RESUME",
    "PER_HOST",
    "Config",
    "DataConfig",
    "HostsConfig",
    "ModelConfig",
    "RecordingConfig",
    "RefreshConfig",
    "SamplingConfig",
    "ScoringConfig",
    "TrainingConfig",
    "WorkersConfig",
    "configure",
]

Switch = Literal["on", "off"]

VERSION = 2
"""Of a configuration in JSON: 2 is nested. Without a version it is flat, as 0.1 wrote it."""

SCORERS = ("grad_norm", "loss", "logit_bound")
_BY_SCORE = ("stratified", "independent", "systematic", "without_replacement")
FITTING: dict[str, tuple[str, ...]] = {"uniform": ("shuffled", "uniform"), "presample": ("stratified",)}
FITTING |= dict.fromkeys(("exact", "relaxed", "static"), _BY_SCORE)
"""The samplers of each mode, its default first."""


@dataclass(frozen=True)
class DataConfig(Part):
    """The data set, and where it is kept.

    Attributes:
        dataset: Name of the data set: digits (embedded), fashion_mnist, or another that `isgd_jax.app.data.load` knows.
        data_dir: Where prepared data sets are kept. Default: TFDS's own folder, or $TFDS_DATA_DIR.
        raw_dir: Where the original files of the data set already lie, when they need not be downloaded.
        hold: Where the training set is: on the device; in the memory of the host; or on disk, written once beside the
            prepared data set as memory-mapped arrays. From host and disk a thread fetches the drawn examples ahead of
            the steps.
    """

    dataset: str = "digits"
    data_dir: str | None = None
    raw_dir: str | None = None
    hold: Literal["device", "host", "disk"] = "device"


@dataclass(frozen=True)
class ModelConfig(Part):
    """The model and its loss.

    Attributes:
        model: mlp, cnn, or pkg.module:factory of your own; factory(num_classes) returns a model with Linen's init and
            apply.
        hidden: Widths of the hidden layers (mlp only).
        initializer: he: scaled to the fan-in; paper: normal with standard deviation 0.01 (mlp only).
        loss: pkg.module:fn of your own, fn(outputs, example) -> scalar. Default: softmax cross-entropy with the label.
    """

    model: str = "mlp"
    hidden: tuple[Count, ...] = (512, 512, 512, 512)
    initializer: InPython[Literal["he", "paper"]] = "he"
    loss: str | None = None


@dataclass(frozen=True)
class TrainingConfig(Part):
    """The optimizer, the batch, and how far to go.

    Attributes:
        optimizer: The Optax optimizer behind the reweighting.
        learning_rate: Learning rate of the optimizer; with --schedule cosine, the initial one.
        schedule: constant, or cosine decay to 0 over the run.
        momentum: Momentum, with --optimizer nesterov.
        weight_decay: Of adamw: decoupled, so outside the weighted part of the gradient.
        batch_size: Examples drawn in a step (M).
        steps: Updates to make.
        epochs: If given, make as many updates as this many passes over the data set have batches, instead of --steps.
        seed: Random seed, of the initial parameters and of all draws.
    """

    optimizer: Literal["sgd", "nesterov", "adam", "adamw"] = "nesterov"
    learning_rate: Positive = 0.001
    schedule: Literal["constant", "cosine"] = "constant"
    momentum: Annotated[float, Range("at least 0 and below 1", lambda x: 0 <= x < 1)] = 0.95
    weight_decay: Amount = 0.0
    batch_size: Count = 32
    steps: Count = 3000
    epochs: Positive | None = None
    seed: Annotated[int, Range("between 0 and 2**32 - 1", lambda x: 0 <= x < 2**32)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        must(self, "weight_decay", self.weight_decay == 0 or self.optimizer == "adamw",
             "0 unless optimizer=adamw, whose decay is decoupled")  # fmt: skip

    def num_steps(self, num_examples: int) -> int:
        """Updates to make on a data set of ``num_examples``."""
        if self.epochs is None:
            return self.steps
        return max(1, round(self.epochs * num_examples / self.batch_size))


@dataclass(frozen=True)
class SamplingConfig(Part):
    """How examples are drawn, and what of them is estimated.

    Attributes:
        mode: uniform: plain SGD; exact: all scores at the current parameters, every refresh; relaxed: a share of them;
            static: scores of your own, for ever (--static-scores); presample: no table, each step scores candidates.
        sampler: How indices are drawn. uniform mode: shuffled (epochs; its default) or uniform (with replacement).
            Modes with scores: stratified (the default), independent, systematic, without_replacement, or pkg.module:fn
            of your own, fn(key, law, *, num_draws) -> Draw. presample: stratified.
        order: The line along which stratified and systematic draws cut: neighbors should have similar gradients.
            label-score: labels, and scores within them (auto, the default; where there are no labels, score). cells: of
            sketches of the last layer's gradients, refreshed with the scores: less variance, and a dearer refresh.
        mixture: Share of uniform draws in the proposal: the largest weight is 1/mixture. auto: the share that the draws
            so far show to be best, between 0.2 and 0.5, and 0.3 until they show anything.
        calibrate: Draw by what old scores have turned out to be worth, once two periods have taught it: √E[norm² |
            score, age].
        gate: Uniform draws while the scores do harm. Each switch is logged with its reason.
        additive: Constant added to every score, as in the paper (it used 1 and 10).
        candidates: Candidates scored for each draw (presample mode).
        static_scores: A .npy file with one number of at least 0 for each training example (static mode).
        example_weights: A .npy file with a weight a_n for each training example: the gradient is then that of sum(a_n
            L_n).
        augment: pkg.module:fn of your own, fn(key, example) -> example: another picture of an example, at each draw.
        score_memory: With --augment: the share of the old mean square that a score keeps when a fresh one arrives.
    """

    mode: Literal["uniform", "exact", "relaxed", "static", "presample"] = "exact"
    sampler: str = "auto"
    order: InPython[Literal["auto", "index", "label", "score", "label-score", "cells"]] = "auto"
    mixture: float | Literal["auto"] = "auto"
    calibrate: InPython[Switch] = "on"
    gate: InPython[Switch] = "on"
    additive: InPython[Amount] = 0.0
    candidates: InPython[Count] = 4
    static_scores: str | None = None
    example_weights: str | None = None
    augment: str | None = None
    score_memory: InPython[Annotated[float, Range("at least 0 and below 1", lambda x: 0 <= x < 1)]] = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        must(self, "mixture", self.mixture == "auto" or 0 < self.mixture <= 1 or self.mixture == 0 < self.additive,
             "above 0 and at most 1, or auto (or 0 with additive above 0): an example could starve")  # fmt: skip
        fitting, may_be_own = ("auto", *FITTING[self.mode]), self.mode in ("exact", "relaxed", "static")
        must(self, "sampler", self.sampler in fitting or (may_be_own and ":" in self.sampler),
             f"one of {', '.join(fitting)}{', or pkg.module:fn,' * may_be_own} with mode={self.mode}")  # fmt: skip
        must(self, "order", self.order != "cells" or self.is_scored,
             "another than cells except with mode=exact and mode=relaxed, which sketch the gradients")  # fmt: skip
        must(self, "static_scores", (self.static_scores is not None) == (self.mode == "static"),
             "a file with mode=static, and left out otherwise")  # fmt: skip

    @property
    def is_scored(self) -> bool:
        """Whether an engine scores examples for a table."""
        return self.mode in ("exact", "relaxed")

    @property
    def sampler_in_use(self) -> str:
        """The sampler, with `auto` resolved."""
        return FITTING[self.mode][0] if self.sampler == "auto" else self.sampler


@dataclass(frozen=True)
class ScoringConfig(Part):
    """What scores an example.

    Attributes:
        scorer: grad_norm: the exact norm of its gradient; loss; logit_bound: the bound from its logits; or
            pkg.module:fn of your own, fn(loss_fn) -> scorer, where scorer(params, batch) -> scores [b].
        chunk_size: Examples scored in one call on one device.
    """

    scorer: str = "grad_norm"
    chunk_size: Count = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        must(self, "scorer", self.scorer in SCORERS or ":" in self.scorer,
             f"one of {', '.join(SCORERS)}, or pkg.module:fn")  # fmt: skip


@dataclass(frozen=True)
class RefreshConfig(Part):
    """When scores are measured, and when they are too old.

    Attributes:
        refresh_every: Steps between two refreshes of scores and proposal (K). In between, the proposal is frozen.
        refresh_share: Share of the data set scored anew at each refresh, in turn (relaxed mode, inline; exact scores
            all of it).
        score_budget: In place of refresh_share: the share of all examples differentiated, drawn ones and scored ones,
            that scoring may be (relaxed mode, inline).
        publish_every: Steps between two publications of the parameters to workers (relaxed mode). Default: --refresh-
            every.
        refetch_every: Chunks that a worker scores between two looks for newer parameters (relaxed mode).
        max_age: Scores older than this many steps are not trusted: their examples get the mean trusted score.
        max_age_seconds: The same by the clock. It makes a run depend on the speed of the machine; each refresh is
            recorded.
        min_trusted: Below this share of trusted scores the proposal is uniform.
        replay: Folder of an earlier relaxed run: its schedule is followed, and the same parameters come out, bit for
            bit.
    """

    refresh_every: Count = 100
    refresh_share: Share = 0.25
    score_budget: InPython[Annotated[float, Range("above 0 and below 1", lambda x: 0 < x < 1)] | None] = None
    publish_every: InPython[Count | None] = None
    refetch_every: InPython[Count] = 1
    max_age: Number | None = None
    max_age_seconds: InPython[Positive | None] = None
    min_trusted: InPython[Annotated[float, Range("between 0 and 1", lambda x: 0 <= x <= 1)]] = 0.1
    replay: str | None = None

    @property
    def publishes_every(self) -> int:
        """Steps between two publications, with the default resolved."""
        return self.publish_every or self.refresh_every


@dataclass(frozen=True)
class WorkersConfig(Part):
    """Who scores.

    Attributes:
        engine: inline: all devices, between steps; local: the devices of this host that do not train, meanwhile;
            cluster: actors on a Ray cluster, meanwhile too.
        scorers: Actors that score (--engine cluster), each with an accelerator while there are any, then with a CPU.
        address: Of the Ray cluster (--engine cluster); auto: the one this host belongs to. Default: a Ray of this host
            alone.
        train_devices: Devices of this host that train (local engine), each a part of the batch; the others score.
        chunk_patience: Seconds after which a chunk that a worker has not brought back is handed to another.
    """

    engine: Literal["inline", "local", "cluster"] = "inline"
    scorers: Count = 4
    address: str | None = None
    train_devices: Count = 1
    chunk_patience: InPython[Positive] = 60.0

    def __post_init__(self) -> None:
        super().__post_init__()
        must(self, "address", self.address is None or self.engine == "cluster", "left out unless engine=cluster")
        must(self, "train_devices", self.train_devices == 1 or self.engine == "local", "1 unless engine=local")


@dataclass(frozen=True)
class RecordingConfig(Part):
    """What a run measures and writes.

    Attributes:
        run_dir: Folder of the run. Default: runs/<dataset>-<mode>-<time>.
        log_every: Steps between two lines of progress: loss, variance, ages, held-out loss and error.
        full_train_loss: Also measure loss and error on the whole training set at each of these lines.
        monitor: Estimate the variance of uniform, present and ideal proposals from the draws of training themselves.
        checkpoint_every: Steps between two checkpoints; the last step is always saved.
        tensorboard: Also write TensorBoard events into the folder of the run (needs the extra tensorboard).
    """

    run_dir: str | None = None
    log_every: Count = 100
    full_train_loss: bool = False
    monitor: Switch = "on"
    checkpoint_every: Count = 500
    tensorboard: bool = False


@dataclass(frozen=True)
class HostsConfig(Part):
    """Which processes make a run together; no part of what is saved with it.

    Attributes:
        distributed: Train on several hosts as one: start the same command on each. Needs nothing more on a TPU pod
            slice, Slurm or Open MPI; elsewhere the next three.
        coordinator: host:port of process 0, as the other hosts see it (--distributed). At localhost no other host can
            reach it.
        num_processes: Processes in all, one a host (--distributed).
        process_id: Which of them this is, from 0 (--distributed). Process 0 alone writes the folder of the run.
        shard_params: Keep an equal part of each parameter and of the optimizer's state on each device, for models that
            are too large for one (--distributed).
        heartbeat_timeout: Seconds without a sign of life after which a process counts as lost and the others end
            (--distributed).
        initialization_timeout: Seconds to wait until all processes are there (--distributed).
    """

    distributed: bool = False
    coordinator: str | None = None
    num_processes: Count | None = None
    process_id: Number | None = None
    shard_params: bool = False
    heartbeat_timeout: InPython[Count] = 60
    initialization_timeout: InPython[Count] = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("coordinator", "num_processes", "process_id"):
            must(self, name, getattr(self, name) is None or self.distributed, "left out unless distributed=True")
        must(self, "shard_params", self.distributed or not self.shard_params, "left out unless distributed=True")
        must(self, "coordinator", self.coordinator is None or bool(re.fullmatch(r".+:\d+", self.coordinator)),
             "host:port of process 0")  # fmt: skip
        if self.process_id is not None and self.num_processes is not None:
            must(self, "process_id", self.process_id < self.num_processes,
                 f"below num_processes={self.num_processes}")  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A training run, in parts. Each part checks itself; here is checked what two of them must agree on.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or two fields contradict each other.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)
    recording: RecordingConfig = field(default_factory=RecordingConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)

    def __post_init__(self) -> None:
        sampling, refresh, workers, devices = self.sampling, self.refresh, self.workers, self.workers.train_devices
        is_inline = sampling.mode == "relaxed" and workers.engine == "inline"
        meanwhile = sampling.mode == "relaxed" and workers.engine != "inline"
        must(
            workers, "engine", workers.engine == "inline" or not self.hosts.distributed, "inline with distributed=True"
        )
        must(refresh, "publish_every", meanwhile or refresh.publish_every in (None, refresh.refresh_every),
             f"refresh_every={refresh.refresh_every} unless workers score with mode=relaxed")  # fmt: skip
        must(refresh, "refetch_every", meanwhile or refresh.refetch_every == 1,
             "1 unless workers score with mode=relaxed")  # fmt: skip
        must(refresh, "score_budget", is_inline or refresh.score_budget is None,
             "left out except with mode=relaxed and engine=inline")  # fmt: skip
        must(refresh, "replay", refresh.replay is None or sampling.mode != "uniform",
             "left out with mode=uniform, which has no schedule")  # fmt: skip
        must(self.training, "batch_size", self.training.batch_size % devices == 0,
             f"a multiple of train_devices={devices}")  # fmt: skip
        for other, needs_device in (
            ("mode=presample", sampling.mode == "presample"),
            ("full_train_loss=True", self.recording.full_train_loss),
            ("distributed=True", self.hosts.distributed),
            (f"train_devices={devices}", devices > 1),
        ):
            must(self.data, "hold", self.data.hold == "device" or not needs_device,
                 f"device with {other}, which needs the data there")  # fmt: skip

    def share_scored(self, num_examples: int) -> float:
        """The share of the data set scored at each refresh; 0 where nothing is.

        All of it in exact mode. In relaxed mode ``refresh_share``; with ``score_budget``, as much as takes this part of
        the time, a score thought to cost as much as an example of a step.

        Args:
            num_examples: of the training set.
        """
        refresh = self.refresh
        if self.sampling.mode != "relaxed":
            return 1.0 if self.sampling.is_scored else 0.0
        if refresh.score_budget is None:
            return refresh.refresh_share
        scored = refresh.score_budget / (1 - refresh.score_budget) * refresh.refresh_every * self.training.batch_size
        return min(max(scored, 1) / num_examples, 1.0)

    @property
    def order_in_use(self) -> str:
        """The order, with `auto` resolved."""
        return "label-score" if self.sampling.order == "auto" else self.sampling.order

    def replace(self, **changes: Any) -> "Config":
        """This configuration with other values for some fields, by name alone: ``config.replace(batch_size=64)``.

        Raises:
            TypeError: a field has the wrong type.
            ValueError: there is no such field, it is out of range, or does not fit the others.
        """
        for name in changes:
            if name not in _PART_OF:
                raise ArgumentError(f"there is no field {name!r} in a configuration{_meant(name, _PART_OF)}")
        parts: dict[str, dict[str, Any]] = {}
        for name, value in changes.items():
            parts.setdefault(_PART_OF[name], {})[name] = value
        changed = {part: dataclasses.replace(getattr(self, part), **fields) for part, fields in parts.items()}
        return dataclasses.replace(self, **changed)

    def flat(self) -> dict[str, Any]:
        """The value of each field by its name, without the parts."""
        return {name: getattr(getattr(self, part), name) for name, part in _PART_OF.items()}

    def as_saved(self) -> "Config":
        """Without the places of its processes: others may take the run up."""
        return dataclasses.replace(self, hosts=HostsConfig())

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON has it: its version, and its parts."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`, also after JSON. Flat values without a version, as 0.1 wrote them, are read too.

        Of options that went (`isgd_jax.app.gone`) those that were not chosen are left out.

        Raises:
            TypeError: a field has the wrong type.
            ValueError: the version, a part or a field is unknown, an option that went was chosen, or a value does not
                fit.
        """
        fields = without_gone(values) if "version" not in values else _flattened(values)
        return cls().replace(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def configure(**fields: Any) -> Config:
    """A configuration of fields by name alone, the others as they are by default: ``configure(batch_size=64)``.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: there is no such field, it is out of range, or does not fit the others.
    """
    return Config().replace(**fields)


def _names(part: type) -> tuple[str, ...]:
    return tuple(each.name for each in dataclasses.fields(part))


_PARTS = {each.name: _names(type(getattr(Config(), each.name))) for each in dataclasses.fields(Config)}
_PART_OF = {name: part for part, names in _PARTS.items() for name in names}

PER_HOST = frozenset({"data_dir", "raw_dir", "run_dir", *_PARTS["hosts"]}) - {"shard_params"}
"""Fields in which the processes of a run may differ."""

_WRITES = {"log_every", "checkpoint_every", "tensorboard"}
MAY_CHANGE_ON_RESUME = PER_HOST | _WRITES | {"steps", "epochs", "scorers", "address", "shard_params"}
"""Fields that decide how far a run goes and what it writes, but not the parameters at a given step."""


def _flattened(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of nested values, by name alone."""
    version, fields = values["version"], dict[str, Any]()
    if version != VERSION:
        raise ArgumentError(
            f"the configuration has version {version!r}, this isgd_jax reads version {VERSION} and older: use the "
            "isgd_jax that wrote it, or a newer one"
        )
    for part, inside in values.items():
        if part == "version":
            continue
        if part not in _PARTS:
            raise ArgumentError(f"there is no part {part!r} in a configuration{_meant(part, _PARTS)}")
        if not isinstance(inside, dict):
            raise ArgumentError(f"the part {part!r} of a configuration must be an object of its fields; got {inside!r}")
        for name in inside:
            if name not in _PARTS[part]:
                meant = _meant(name, _PARTS[part]) or ": use the isgd_jax that wrote it, or take it out"
                raise ArgumentError(f"there is no field {name!r} in the part {part!r}{meant}")
        fields |= inside
    return fields


def _meant(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
