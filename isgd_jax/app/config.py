"""What a run is asked to do: one frozen dataclass, checked when made. Free of jax, so that `--help` is instant."""

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from isgd_jax.errors import ArgumentError, ArgumentTypeError

Mode = Literal["uniform", "exact", "relaxed", "static", "presample"]
SCORERS = ("grad_norm", "loss", "logit_bound")
OrderName = Literal["auto", "index", "label", "score", "label-score", "cells"]
Switch = Literal["on", "off"]
EngineName = Literal["inline", "local", "cluster"]
OptimizerName = Literal["sgd", "nesterov", "adam", "adamw"]
ScheduleName = Literal["constant", "cosine"]

TUPLES = ("hidden",)
"""Fields that JSON has as lists."""

PLACES = ("distributed", "coordinator", "num_processes", "process_id", "heartbeat_timeout", "initialization_timeout")
"""Fields that say which processes make a run together; they are no part of what is saved with it."""

PER_HOST = frozenset({"data_dir", "raw_dir", "run_dir", *PLACES})
"""Fields in which the processes of a run may differ."""

MAY_CHANGE_ON_RESUME = PER_HOST | {
    "steps",
    "epochs",
    "log_every",
    "checkpoint_every",
    "scorers",
    "address",
    "tensorboard",
}
"""Fields that decide how far a run goes and what it writes, but not the parameters at a given step."""

_BY_SCORE = ("stratified", "independent", "systematic", "without_replacement")
FITTING: dict[str, tuple[str, ...]] = {
    "uniform": ("shuffled", "uniform"),
    "exact": _BY_SCORE,
    "relaxed": _BY_SCORE,
    "static": _BY_SCORE,
    "presample": ("stratified",),
}
"""The samplers of each mode, its default first."""

GONE = {
    "coin": "--coin went in 0.2: every step draws from the proposal; use --mixture for a share of uniform draws",
    "held_out_by": "--held-out-by went in 0.2: leave it out; the trainer measures held-out data, every --log-every "
    "steps",
    "power": "--power went in 0.2: proposals are made of the scores themselves; raise --mixture to trust them less",
    "priorities": "--priorities went in 0.2: leave it out; workers score the training set alone",
    "probe_every": "--probe-every went in 0.2: leave it out; --monitor on (the default) estimates the same from the "
    "draws of training",
    "probe_size": "--probe-size went in 0.2: leave it out; --monitor on (the default) draws no examples of its own",
    "refresh_when": "--refresh-when went in 0.2: scores are refreshed every --refresh-every steps; raise that where "
    "scoring takes more time than it gains",
    "rescore": "--rescore went in 0.2: chunks are scored in turn, as it was by default; leave it out",
    "sampler poisson": "--sampler poisson went in 0.2: use stratified (the default) or independent; a loop of your own "
    "can draw with samplers.poisson",
}
"""Options of earlier versions, and values of options (`name value`), with what to do instead."""

_UNCHOSEN: dict[str, Any] = {
    "coin": 1.0,
    "held_out_by": "trainer",
    "power": 1.0,
    "probe_every": None,
    "refresh_when": "always",
    "rescore": "turn",
}
"""What options that went were unless chosen. Runs that have it are as runs are now, and are still read. The size of
something that went along with it (`priorities`, `probe_size`) decided nothing by itself, and is not asked for."""


@dataclass(frozen=True)
class Config:
    """A training run.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or two fields contradict each other.
    """

    dataset: str = "digits"
    """Name of the data set: digits (embedded), fashion_mnist, or another that `isgd_jax.app.data.load` knows."""
    data_dir: str | None = None
    """Where prepared data sets are kept. Default: TFDS's own folder, or $TFDS_DATA_DIR."""
    hold: Literal["device", "host", "disk"] = "device"
    """Where the training set is: on the device; in the memory of the host; or on disk, written once beside the prepared
    data set as memory-mapped arrays. From host and disk a thread fetches the drawn examples ahead of the steps."""
    raw_dir: str | None = None
    """Where the original files of the data set already lie, when they need not be downloaded."""

    model: str = "mlp"
    """mlp, cnn, or pkg.module:factory of your own; factory(num_classes) returns a model with Linen's init and apply."""
    hidden: tuple[int, ...] = (512, 512, 512, 512)
    """Widths of the hidden layers (mlp only)."""
    initializer: Literal["he", "paper"] = "he"
    """he: scaled to the fan-in; paper: normal with standard deviation 0.01 (mlp only)."""
    loss: str | None = None
    """pkg.module:fn of your own, fn(outputs, example) -> scalar. Default: softmax cross-entropy with the label."""

    mode: Mode = "exact"
    """uniform: plain SGD; exact: all scores at the current parameters, every refresh; relaxed: a share of them;
    static: scores of your own, for ever (--static-scores); presample: no table, each step scores candidates."""
    sampler: str = "auto"
    """How indices are drawn. uniform mode: shuffled (epochs; its default) or uniform (with replacement).
    Modes with scores: stratified (the default), independent, systematic, without_replacement, or pkg.module:fn of your
    own, fn(key, law, *, num_draws) -> Draw. presample: stratified."""
    order: OrderName = "auto"
    """The line along which stratified and systematic draws cut: neighbours should have similar gradients. cells: of
    sketches of the last layer's gradients, no labels needed, refreshed with the scores (the default of exact mode, and
    of relaxed mode with the inline engine). Elsewhere the default is label-score: nobody waits for sketches."""
    scorer: str = "grad_norm"
    """What scores an example. grad_norm: the exact norm of its gradient; loss; logit_bound: the bound from its logits;
    or pkg.module:fn of your own, fn(loss_fn) -> scorer, where scorer(params, batch) -> scores [b]."""
    engine: EngineName = "inline"
    """Who scores. inline: all devices, between steps; local: the devices of this host that do not train, meanwhile;
    cluster: actors on a Ray cluster, meanwhile too."""
    scorers: int = 4
    """Actors that score (--engine cluster), each with an accelerator while there are any, then with a CPU."""
    address: str | None = None
    """Of the Ray cluster (--engine cluster); auto: the one this host belongs to. Default: a Ray of this host alone."""
    train_devices: int = 1
    """Devices of this host that train (local engine), each a part of the batch; the others score."""
    refresh_every: int = 100
    """Steps between two refreshes of scores and proposal (K). In between, the proposal is frozen."""
    publish_every: int | None = None
    """Steps between two publications of the parameters to workers (relaxed mode). Default: --refresh-every."""
    refetch_every: int = 1
    """Chunks that a worker scores between two looks for newer parameters (relaxed mode)."""
    chunk_patience: float = 60.0
    """Seconds after which a chunk that a worker has not brought back is handed to another."""
    replay: str | None = None
    """Folder of an earlier relaxed run: its schedule is followed, and the same parameters come out, bit for bit."""
    refresh_share: float = 0.25
    """Share of the data set scored anew at each refresh, in turn (relaxed mode, inline; exact scores all of it)."""
    score_budget: float | None = None
    """In place of --refresh-share: the share of all examples differentiated, drawn ones and scored ones, that scoring
    may be (relaxed mode, inline)."""
    chunk_size: int = 2048
    """Examples scored in one call on one device."""
    mixture: float | Literal["auto"] = "auto"
    """Share of the uniform law in the proposal: the largest weight is 1/mixture. auto: the share that the draws so far
    show to be best, between 0.03 and 0.5, and 0.3 until they show anything."""
    calibrate: Switch = "on"
    """Draw by what old scores have turned out to be worth, once two periods have taught it: √E[norm² | score, age]."""
    gate: Switch = "on"
    """Uniform draws while the scores do harm. Each switch is logged with its reason."""
    static_scores: str | None = None
    """A .npy file with one number of at least 0 for each training example (static mode)."""
    example_weights: str | None = None
    """A .npy file with a weight a_n for each training example: the gradient is then that of sum(a_n L_n)."""
    candidates: int = 4
    """Candidates scored for each draw (presample mode)."""
    augment: str | None = None
    """pkg.module:fn of your own, fn(key, example) -> example: another picture of an example, at each draw."""
    score_memory: float = 0.7
    """With --augment: the share of the old mean square that a score keeps when a fresh one arrives."""
    additive: float = 0.0
    """Constant added to every score, as in the paper (it used 1 and 10)."""
    max_age: int | None = None
    """Scores older than this many steps are not trusted: their examples get the mean trusted score."""
    max_age_seconds: float | None = None
    """The same by the clock. It makes a run depend on the speed of the machine; each refresh is recorded."""
    min_trusted: float = 0.1
    """Below this share of trusted scores the proposal is uniform."""

    optimizer: OptimizerName = "nesterov"
    """The Optax optimiser behind the reweighting."""
    learning_rate: float = 0.001
    schedule: ScheduleName = "constant"
    """constant, or cosine decay to 0 over the run."""
    momentum: float = 0.95
    """Of nesterov."""
    weight_decay: float = 0.0
    """Of adamw: decoupled, so outside the weighted part of the gradient."""
    batch_size: int = 32
    """Draws in a step (M)."""
    steps: int = 3000
    """Updates to make."""
    epochs: float | None = None
    """If given, make as many updates as this many passes over the data set have batches, instead of --steps."""

    seed: int = 0
    run_dir: str | None = None
    """Folder of the run. Default: runs/<dataset>-<mode>-<time>."""
    log_every: int = 100
    """Steps between two lines of progress: loss, variance, ages, held-out loss and error."""
    full_train_loss: bool = False
    """Also measure loss and error on the whole training set at each of these lines."""
    monitor: Switch = "on"
    """Estimate the variance of uniform, present and ideal proposals from the draws of training themselves."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; the last step is always saved."""
    tensorboard: bool = False
    """Also write TensorBoard events into the folder of the run (needs the extra tensorboard)."""

    distributed: bool = False
    """Train on several hosts as one: start the same command on each. Needs nothing more on a TPU pod slice, Slurm or
    Open MPI; elsewhere the next three."""
    coordinator: str | None = None
    """host:port of process 0, as the other hosts see it (--distributed). At localhost no other host can reach it."""
    num_processes: int | None = None
    """Processes in all, one a host (--distributed)."""
    process_id: int | None = None
    """Which of them this is, from 0 (--distributed). Process 0 alone writes the folder of the run."""
    heartbeat_timeout: int = 60
    """Seconds without a sign of life after which a process counts as lost and the others end (--distributed)."""
    initialization_timeout: int = 300
    """Seconds to wait until all processes are there (--distributed)."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(Config).items():
            _check_type(name, getattr(self, name), hint)
        for name in (
            "refresh_every",
            "chunk_size",
            "batch_size",
            "steps",
            "log_every",
            "checkpoint_every",
            "candidates",
        ):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("heartbeat_timeout", "initialization_timeout"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1 second")
        for name in ("coordinator", "num_processes", "process_id"):
            given = getattr(self, name)
            _check(name, given, given is None or self.distributed, "left out without --distributed")
        _check("num_processes", self.num_processes, self.num_processes is None or self.num_processes >= 1, "at least 1")
        _check("process_id", self.process_id, self.process_id is None or self.process_id >= 0, "0 or more")
        if self.process_id is not None and self.num_processes is not None:
            _check("process_id", self.process_id, self.process_id < self.num_processes,
                   f"below --num-processes {self.num_processes}")  # fmt: skip
        _check("coordinator", self.coordinator,
               self.coordinator is None or bool(re.fullmatch(r".+:\d+", self.coordinator)),
               "host:port of process 0")  # fmt: skip
        _check("engine", self.engine, self.engine == "inline" or not self.distributed, "inline with --distributed")
        _check("refetch_every", self.refetch_every, self.refetch_every >= 1, "at least 1")
        _check("scorers", self.scorers, self.scorers >= 1, "at least 1")
        _check("address", self.address, self.address is None or self.engine == "cluster",
               "left out without --engine cluster")  # fmt: skip
        _check("chunk_patience", self.chunk_patience, 0 < self.chunk_patience < math.inf, "above 0")
        _check("publish_every", self.publish_every, self.publish_every is None or self.publish_every >= 1, "at least 1")
        free = self.mode == "relaxed" and self.engine != "inline"
        _check("publish_every", self.publish_every, free or self.publish_every in (None, self.refresh_every),
               "--refresh-every unless workers score in relaxed mode")  # fmt: skip
        _check("refetch_every", self.refetch_every, free or self.refetch_every == 1,
               "1 unless workers score in relaxed mode")  # fmt: skip
        _check("train_devices", self.train_devices, self.train_devices >= 1, "at least 1")
        _check("train_devices", self.train_devices, self.train_devices == 1 or self.engine == "local",
               "1 unless --engine local")  # fmt: skip
        _check("batch_size", self.batch_size, self.batch_size % self.train_devices == 0,
               f"a multiple of --train-devices {self.train_devices}")  # fmt: skip
        _check("replay", self.replay, self.replay is None or self.mode != "uniform",
               "left out in uniform mode, which has no schedule")  # fmt: skip
        _check("learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "above 0")
        _check("epochs", self.epochs, self.epochs is None or 0 < self.epochs < math.inf, "above 0")
        _check("mixture", self.mixture, self.mixture == "auto" or 0 < self.mixture <= 1
               or (self.mixture == 0 and self.additive > 0),
               "above 0 and at most 1, or auto (or 0 with --additive above 0): an example could starve")  # fmt: skip
        _check("score_memory", self.score_memory, 0 <= self.score_memory < 1, "at least 0 and below 1")
        _check("additive", self.additive, 0 <= self.additive < math.inf, "0 or more")
        _check("refresh_share", self.refresh_share, 0 < self.refresh_share <= 1, "above 0 and at most 1")
        _check("min_trusted", self.min_trusted, 0 <= self.min_trusted <= 1, "between 0 and 1")
        _check("momentum", self.momentum, 0 <= self.momentum < 1, "at least 0 and below 1")
        _check("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")
        _check("max_age", self.max_age, self.max_age is None or self.max_age >= 0, "0 or more")
        _check("max_age_seconds", self.max_age_seconds, self.max_age_seconds is None or self.max_age_seconds > 0,
               "above 0")  # fmt: skip
        _check("hidden", self.hidden, all(width >= 1 for width in self.hidden), "widths of at least 1")
        _check("seed", self.seed, 0 <= self.seed < 2**32, "between 0 and 2**32 - 1")
        _check("weight_decay", self.weight_decay, self.weight_decay == 0 or self.optimizer == "adamw",
               "0 unless --optimizer adamw, whose decay is decoupled")  # fmt: skip
        fitting = ("auto", *FITTING[self.mode])
        may_be_own = self.mode in ("exact", "relaxed", "static")
        more = ", or pkg.module:fn" if may_be_own else ""
        _check("sampler", self.sampler, self.sampler in fitting or (may_be_own and ":" in self.sampler),
               f"one of {', '.join(fitting)} in {self.mode} mode{more}")  # fmt: skip
        _check("scorer", self.scorer, self.scorer in SCORERS or ":" in self.scorer,
               f"one of {', '.join(SCORERS)}, or pkg.module:fn")  # fmt: skip
        for name, other in (("mode", "presample"), ("full_train_loss", True), ("distributed", True)):
            _check("hold", self.hold, self.hold == "device" or getattr(self, name) != other,
                   f"device with {name.replace('_', '-')} {other}, which needs the data there")  # fmt: skip
        _check("hold", self.hold, self.hold == "device" or self.train_devices == 1, "device with --train-devices")
        _check("score_budget", self.score_budget, self.score_budget is None or 0 < self.score_budget < 1,
               "above 0 and below 1")  # fmt: skip
        is_inline = self.mode == "relaxed" and self.engine == "inline"
        _check("score_budget", self.score_budget, self.score_budget is None or is_inline,
               "left out but in relaxed mode, inline")  # fmt: skip
        _check("order", self.order, self.order != "cells" or self.is_scored,
               "another than cells but in exact and relaxed mode, which sketch the gradients")  # fmt: skip
        _check("static_scores", self.static_scores, (self.static_scores is not None) == (self.mode == "static"),
               "a file in static mode, and in no other")  # fmt: skip

    @property
    def sampler_in_use(self) -> str:
        """The sampler, with `auto` resolved."""
        if self.sampler != "auto":
            return self.sampler
        return FITTING[self.mode][0]

    def share_scored(self, num_examples: int) -> float:
        """The share of the data set scored at each refresh; 0 where nothing is."""
        if self.mode != "relaxed":
            return 1.0 if self.is_scored else 0.0
        if self.score_budget is None:
            return self.refresh_share
        scored = self.score_budget / (1 - self.score_budget) * self.refresh_every * self.batch_size
        return min(max(scored, 1) / num_examples, 1.0)

    @property
    def order_in_use(self) -> str:
        """The order, with `auto` resolved: a trainer that never waits for scores does not make sketches either."""
        is_waiting = self.is_scored and (self.engine == "inline" or self.mode == "exact")
        return ("cells" if is_waiting else "label-score") if self.order == "auto" else self.order

    @property
    def is_scored(self) -> bool:
        """Whether an engine scores examples for a table."""
        return self.mode in ("exact", "relaxed")

    @property
    def publishes_every(self) -> int:
        """Steps between two publications, with the default resolved."""
        return self.publish_every or self.refresh_every

    def num_steps(self, num_examples: int) -> int:
        """Updates to make on a data set of ``num_examples``."""
        if self.epochs is None:
            return self.steps
        return max(1, round(self.epochs * num_examples / self.batch_size))

    def as_saved(self) -> "Config":
        """Without the places of its processes: others may take the run up."""
        places: dict[str, Any] = {
            field.name: field.default for field in dataclasses.fields(self) if field.name in PLACES
        }
        return dataclasses.replace(self, **places)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON has it."""
        return dataclasses.asdict(self) | {name: list(getattr(self, name)) for name in TUPLES}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`. An unknown key is an error, never ignored.

        A key that went (`GONE`) is dropped where it was not chosen, and else refused by what to do instead.
        """
        values = _without_gone(values)
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ArgumentError(f"unknown configuration key {key!r}{hint}")
        lists = {name: tuple(values[name]) for name in TUPLES if isinstance(values.get(name), list)}
        return cls(**(values | lists))


def refuse_gone(arguments: Sequence[str]) -> None:
    """Refuse flags of earlier versions, as ``--name value`` and as ``--name=value``.

    Raises:
        ValueError: one of the arguments is in `GONE`; it says what to do instead.
    """
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, _, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        for key in (name, f"{name} {value or following}"):
            if flag.startswith("--") and key in GONE:
                raise ArgumentError(GONE[key])


def _without_gone(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a run of any version, without those of options that went and had not been chosen.

    Raises:
        ValueError: one of them had been chosen.
    """
    for name, value in values.items():
        if name in GONE and value != _UNCHOSEN.get(name, value):
            raise ArgumentError(GONE[name])
        if f"{name} {value}" in GONE:
            raise ArgumentError(GONE[f"{name} {value}"])
    return {name: value for name, value in values.items() if name not in GONE}


def _check(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise ArgumentError(f"--{name.replace('_', '-')} must be {expected}; got {value!r}")


def _check_type(name: str, value: Any, hint: Any) -> None:
    if not _matches(value, hint):
        readable = getattr(hint, "__name__", None) if get_origin(hint) is None else str(hint).replace("typing.", "")
        raise ArgumentTypeError(
            f"--{name.replace('_', '-')} must be {readable}; got {value!r} of type {type(value).__name__}"
        )


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a field: the few forms of hint used above, and int where float is asked."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_matches(item, get_args(hint)[0]) for item in value)
    if get_args(hint):  # X | None
        return any(_matches(value, part) for part in get_args(hint))
    if hint is bool or isinstance(value, bool):
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, (int, float)) and not math.isnan(value)
    return isinstance(value, hint)
