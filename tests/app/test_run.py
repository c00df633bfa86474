"""`fit` from configuration to folder, on a problem of a second or two."""

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import blobs, small_config

from isgd_jax.app import console, data, task
from isgd_jax.app.progress import _checked
from isgd_jax.app.recorder import FORMAT
from isgd_jax.app.records import Record
from isgd_jax.app.run import Result, fit
from isgd_jax.app.run_dir import RunDir
from isgd_jax.engines import scorers
from isgd_jax.engines.local_engine import DeviceWorker
from isgd_jax.errors import RunInUseError
from isgd_jax.sampling import samplers
from isgd_jax.sampling.state import FORMAT as SAMPLER_FORMAT
from isgd_jax.training.train_step import TrainState
from isgd_jax.variance import second_moments

pytestmark = pytest.mark.slow

MODES = [
    {"mode": "uniform", "optimizer": "adamw", "schedule": "cosine"},
    *(
        pytest.param({"mode": "uniform", "optimizer": name, "schedule": "cosine"}, marks=pytest.mark.soak)
        for name in ("sgd", "adam")
    ),
    pytest.param({"mode": "uniform", "sampler": "uniform"}, marks=pytest.mark.soak),
    {"mode": "exact"},
    pytest.param({"mode": "exact", "sampler": "independent"}, marks=pytest.mark.soak),
    {"mode": "relaxed", "refresh_share": 0.3, "order": "cells"},
    {"mode": "presample", "scorer": "loss"},
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[Record]]:
    """A run in exact mode that nothing disturbs, off the main thread, and what it told: who changes it takes a copy."""
    found, told = list[Result](), list[Record]()
    config = small_config(tmp_path_factory.mktemp("whole") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isgd_jax.app.recorder.plots", SimpleNamespace(draw=lambda run: None))
        thread = threading.Thread(target=lambda: found.append(fit(config, dataset=blobs(), observe=told.append)))
        thread.start()
        thread.join(timeout=120)
    return found[0], told


def copy_of(run: Result, folder: Path) -> Path:
    """The same run in another folder."""
    shutil.copytree(run.run_dir, folder, ignore=shutil.ignore_patterns(".lock"))
    return folder


def progress(folder: Path) -> list[Record]:
    return list(RunDir(folder).records("progress"))


@pytest.mark.parametrize("changes", MODES, ids=lambda changes: "-".join(map(str, changes.values())))
@jax.numpy_dtype_promotion("standard")  # optax's own arithmetic mixes types
def test_each_mode_learns_leaves_its_folder_and_resumes_bit_exact(
    tmp_path: Path, changes: dict[str, Any], whole: tuple[Result, list[Record]]
) -> None:
    """Stopped in the middle of a refresh period and of an epoch, and gone on with; a relaxed run is replayed too."""
    is_exact = changes == {"mode": "exact"}
    is_killed = changes["mode"] in ("relaxed", "presample")
    saved = changes | {"checkpoint_every": 23} if is_killed else changes
    run = whole[0] if is_exact else fit(small_config(tmp_path / "whole", **saved), dataset=blobs())
    lines = progress(run.run_dir)
    assert [line["step"] for line in lines] == [0, 10, 20, 30, 40]
    assert lines[-1]["test_loss"] < 0.8 * lines[0]["test_loss"]
    names = {path.name for path in run.run_dir.iterdir()}
    is_scored = changes["mode"] in ("exact", "relaxed")
    assert names == {"config.json", "environment.json", "inputs.json", "metrics.jsonl", "checkpoints", ".lock"}
    for line in lines[1:]:
        assert 0 < line["sd_ideal"] <= line["sd_uniform"] * 1.2
    for line in lines:
        assert (line["age_mean"] is None) == (not is_scored or line["step"] == 0)

    def enough(record: Record) -> bool:
        return record["step"] == 20

    # A schedule is made for all the steps there will be: such a run is told to stop; others have fewer to make, or are
    # what a kill after step 23 leaves of the whole one.
    if is_killed:
        shutil.rmtree(copy_of(run, tmp_path / "broken") / "checkpoints" / "40")
    else:
        stop: dict[str, Any] = {"until": enough} if "schedule" in changes else {}
        broken = changes if "schedule" in changes else changes | {"steps": 23}
        stopped = fit(small_config(tmp_path / "broken", **broken), dataset=blobs(), **stop)
        assert stopped.step == (20 if "schedule" in changes else 23)
    told: list[Record] = []
    resumed = fit(small_config(tmp_path / "broken", **saved), dataset=blobs(), resume=True, observe=told.append)
    (plan,) = (record for record in told if record["event"] == "plan")
    assert plan["first_step"] == (20 if "schedule" in changes else 23)
    assert resumed.step == 40
    chex.assert_trees_all_equal(resumed.params, run.params)
    steps = [line["step"] for line in progress(resumed.run_dir)]
    assert steps == sorted(set(steps))
    if changes["mode"] == "relaxed":
        again = fit(small_config(tmp_path / "again", **changes, replay=str(resumed.run_dir)), dataset=blobs())
        chex.assert_trees_all_equal(again.params, resumed.params)
        assert arrivals(again.run_dir) == arrivals(resumed.run_dir)
        assert sum(len(arrived) for _, arrived in arrivals(again.run_dir)) > 0
        replayed = {"replay": str(again.run_dir)}
        for other, message in (
            ({"seed": 1}, "seed=1, but the run was started with 0"),
            ({"steps": 41}, "the schedule to replay ends at step 40, before --steps 41"),
        ):
            name = f"no-{next(iter(other))}"
            with pytest.raises(ValueError, match=message):
                fit(small_config(tmp_path / name, **changes | other, **replayed), dataset=blobs())
        with pytest.raises(ValueError, match="was made on another data set"):
            fit(small_config(tmp_path / "no-data", **changes, **replayed), dataset=blobs(seed=1))


@pytest.mark.figures
def test_a_run_ends_with_its_figures(tmp_path: Path) -> None:
    """Of scores, where there are any: `test_cli.py: test_train_on_digits_from_plan_to_figures`."""
    run = fit(small_config(tmp_path / "run", mode="uniform"), dataset=blobs())
    assert {path.name for path in run.run_dir.glob("*.png")} == {"loss.png", "error.png", "variance.png"}


def test_a_run_goes_on_to_more_steps_and_then_has_nothing_left_to_do(
    tmp_path: Path, whole: tuple[Result, list[Record]]
) -> None:
    folder = copy_of(whole[0], tmp_path / "run")
    fit(small_config(folder, steps=50), dataset=blobs(), resume=True)
    told: list[Record] = []
    again = fit(RunDir(folder).read_config(), dataset=blobs(), resume=True, observe=told.append)
    assert again.step == 50
    assert [record["text"] for record in told if record["event"] == "warning"] == [
        "nothing is left to do: 50 updates were made; steps=N asks for more"
    ]
    assert not any(record["event"] == "plan" for record in told)


def test_a_signal_saves_and_leaves(tmp_path: Path, whole: tuple[Result, list[Record]]) -> None:
    for signum, at in ((signal.SIGTERM, 20), (signal.SIGINT, 0)):
        folder = tmp_path / signum.name

        def interrupt(record: Record, signum: int = signum, at: int = at) -> None:
            if record["event"] == "progress" and record["step"] == at:
                os.kill(os.getpid(), signum)

        stopped = fit(small_config(folder), dataset=blobs(), observe=interrupt)
        assert stopped.stopped_by == signum
        assert at <= stopped.step < at + 20
        assert [record["event"] for record in RunDir(stopped.run_dir).records()][-1] == "stopped"
    resumed = fit(small_config(folder), dataset=blobs(), resume=True)  # after either signal the same is done
    chex.assert_trees_all_equal(resumed.params, whole[0].params)
    steps = [record["step"] for record in RunDir(resumed.run_dir).records() if record["event"] == "progress"]
    assert steps == sorted(set(steps)), "also step 0, whose line stood before its checkpoint, is told once"


def test_it_runs_off_the_main_thread(whole: tuple[Result, list[Record]]) -> None:
    assert [record["event"] for record in RunDir(whole[0].run_dir).records()][-1] == "finished"


def test_a_second_resume_is_refused_before_anything_is_made_for_it(tmp_path: Path) -> None:
    """Such as a Ray; here a file of scores, which is not there, would be read."""
    config = small_config(tmp_path / "run", mode="static", static_scores=str(tmp_path / "nowhere.npy"))
    with RunDir.create(config).alone(), pytest.raises(RunInUseError):
        fit(config, dataset=blobs(), resume=True)


def test_a_lost_loss_ends_the_run_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    def fragile(outputs: jax.Array, example: Any) -> jax.Array:
        return jnp.where(outputs[0] > 30.0, jnp.nan, -outputs[0])

    with pytest.raises(FloatingPointError, match=r"the training loss became nan at step \d+: lower") as lost:
        fit(small_config(tmp_path / "run", mode="uniform", checkpoint_every=1), dataset=blobs(), loss=fragile)
    for line in RunDir(tmp_path / "run").records():
        assert "NaN" not in json.dumps(line)
    at = int(re.findall(r"at step (\d+)", str(lost.value))[0])
    steps = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert max(steps) == at - 1, "the newest checkpoint is the last whose loss was finite"
    assert f"the checkpoint of step {at - 1} in" in str(lost.value)


def test_a_loss_that_is_lost_by_the_last_update_is_told_and_not_saved(tmp_path: Path) -> None:
    """No step comes after it that could show it: the held-out loss does."""
    config = small_config(tmp_path / "run", mode="uniform", steps=1, checkpoint_every=1, learning_rate=3e38)
    with pytest.raises(FloatingPointError, match=r"held-out loss is not finite at step 1: .* no checkpoint was saved"):
        fit(config, dataset=blobs())
    assert not any(record["event"] == "finished" for record in RunDir(tmp_path / "run").records())
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.usefixtures("failed_reads")
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    tmp_path: Path, whole: tuple[Result, list[Record]]
) -> None:
    folder = copy_of(whole[0], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "40" / "record")
    told: list[Record] = []
    resumed = fit(small_config(folder), dataset=blobs(), resume=True, observe=told.append)
    chex.assert_trees_all_equal(resumed.params, whole[0].params)
    warnings = [record["text"] for record in told if record["event"] == "warning"]
    assert any(text.startswith("the checkpoint of step 40 is damaged") and "of step 30" in text for text in warnings)


def test_scores_that_are_not_finite_are_set_aside_and_said(tmp_path: Path) -> None:
    """A gradient beyond float32 has no norm, its loss has one: the score is quarantined, the run goes on."""

    def loss(outputs: jax.Array, example: Any) -> jax.Array:
        poison = jnp.where(example["features"][0] > 1e6, 1e38, 0.0) * outputs[0]
        return -jax.nn.log_softmax(outputs)[example["label"]] + poison

    arrays = {key: array.copy() for key, array in blobs().train.items()}
    arrays["features"][5] = 2e6
    dataset = data.from_arrays(arrays, blobs().test)
    seen: list[Record] = []
    config = small_config(tmp_path / "run", steps=1, sampler="independent", batch_size=1)
    fit(config, dataset=dataset, loss=loss, observe=seen.append)
    refresh = next(record for record in seen if record["event"] == "refresh")
    assert refresh["rejected"] == 1
    assert any("1 scores were not finite" in record["text"] for record in seen if record["event"] == "warning")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 91}, "batch_size must be at most 90, the training examples of blobs; got 91"),
        ({"model": "nowhere:factory"}, "cannot import 'nowhere'"),
        ({"model": "mpl"}, "unknown model 'mpl'"),
        ({"loss": "json:nothing"}, r"json.__init__.py\) has no 'nothing'"),
        ({"loss": "sys:nothing"}, r"\(built in\) has no 'nothing'"),
        ({"dataset": "digit"}, "did you mean 'digits'"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    dataset = None if "dataset" in changes else blobs()
    with pytest.raises((ValueError, ImportError, AttributeError), match=message):
        fit(small_config(tmp_path / "run", **changes), dataset=dataset)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_scalar_is_found_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must return one floating-point scalar .* it returns float32\[3\]"):
        fit(small_config(tmp_path / "run"), dataset=blobs(), loss=lambda outputs, example: outputs)
    assert not (tmp_path / "run").exists()


def test_a_parameter_that_no_checkpoint_can_hold_is_found_before_anything_is_written(tmp_path: Path) -> None:
    class WithNothing(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3)(x) + jnp.sum(self.param("nothing", nn.initializers.zeros, (0, 3)))

    with pytest.raises(ValueError, match=r"\['nothing'\] is float32\[0, 3\], .* leave it out of the model"):
        fit(small_config(tmp_path / "run"), dataset=blobs(), model=WithNothing())
    assert not (tmp_path / "run").exists()


def test_batch_norm_is_refused(tmp_path: Path) -> None:
    class WithBatchNorm(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3)(nn.BatchNorm(use_running_average=False)(x))

    with pytest.raises(ValueError, match="use LayerNorm or GroupNorm in place of BatchNorm"):
        fit(small_config(tmp_path / "run"), dataset=blobs(), model=WithBatchNorm())
    assert not (tmp_path / "run").exists()


def test_resuming_with_other_data_model_or_format_is_refused_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3)(x)

    fit(small_config(tmp_path / "run", mode="uniform", monitor="off", steps=10), dataset=blobs())
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = small_config(tmp_path / "run", mode="uniform", monitor="off", steps=20)
    with pytest.raises(ValueError, match="the checkpoint is of another data set"):
        fit(again, dataset=blobs(seed=1), resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="the checkpoint is of another model or optimizer"):
        fit(again, dataset=blobs(), model=Other(), resume=True)
    assert f"sampler {SAMPLER_FORMAT}" in FORMAT  # so that a state of the sampler's that means something else counts
    monkeypatch.setattr("isgd_jax.app.recorder.FORMAT", "4")
    with pytest.raises(ValueError, match=f"another format: it has {FORMAT}, this run has 4; go on with .* the version"):
        fit(again, dataset=blobs(), resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_importance_sampling_lowers_the_variance(tmp_path: Path) -> None:
    """With some wrong labels, at the end of training: the proposal in use beats uniform draws, and ideal beats it."""
    config = small_config(tmp_path / "run", steps=100, refresh_every=10)
    work = task.make(config.model, blobs())

    @jax.jit
    def traces(params: Any, law: samplers.Law) -> second_moments.Moments:
        """Of all the data, by the definitions."""
        norms = scorers.grad_norm(work.loss_fn)(params, work.train)
        mean_grad = jax.grad(lambda p: jnp.mean(jax.vmap(work.loss_fn, (None, 0))(p, work.train)))(params)
        moments = second_moments.moments(norms, samplers.probabilities(law))
        return second_moments.trace_covariance(moments, optax.tree.norm(mean_grad, squared=True))

    def measure(state: TrainState) -> Record:
        found = traces(state.params, state.sampler.proposal.law)
        return {name: float(value) for name, value in found._asdict().items()}

    fit(config, dataset=blobs(), measure=measure)
    late = progress(tmp_path / "run")[-4:]
    stale, ideal, uniform = (np.mean([line[of] for line in late]) for of in ("stale", "ideal", "uniform"))
    assert stale < 0.7 * uniform
    assert ideal <= stale


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (None, "must return a dict of numbers by name; got a NoneType"),
        ({"step": 3}, "must return names that the run does not use itself; got 'step'"),
        ({"sd_ideal": 3}, "must return names that the run does not use itself; got 'sd_ideal'"),
        ({"mine": [float("nan")]}, r"must return numbers; got \[nan\] as 'mine'"),
        ({"mine": np.ones(3)}, "must return numbers; got array"),
    ],
)
def test_what_cannot_be_recorded_is_refused_by_name(measured: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        _checked(measured)


def test_numbers_of_numpy_and_jax_are_recorded() -> None:
    measured = {"a": jnp.float32(1.5), "b": np.int64(2), "c": np.float32(np.inf), "d": True, "e": "text"}
    assert _checked(measured) == {"a": 1.5, "b": 2, "c": None, "d": True, "e": "text"}


def test_the_plan_comes_first_and_costs_are_measured(whole: tuple[Result, list[Record]]) -> None:
    plan = whole[1][0]
    assert plan["event"] == "plan"
    assert plan["num_examples"] == 90
    assert plan["num_params"] == 5 * 8 + 8 + 8 * 3 + 3
    assert plan["seconds_per_update"] > 0
    assert plan["seconds_per_refresh"] > 0


LOCAL: dict[str, Any] = {"engine": "local"}


@pytest.fixture
def three_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """One trains and two score: each that scores compiles for itself."""
    three = jax.local_devices()[:3]
    monkeypatch.setattr(jax, "local_devices", lambda: three)


@pytest.mark.usefixtures("three_devices")
def test_exact_mode_gives_the_same_parameters_on_every_engine(
    tmp_path: Path, whole: tuple[Result, list[Record]]
) -> None:
    local = fit(small_config(tmp_path / "local", **LOCAL), dataset=blobs())
    chex.assert_trees_all_equal(local.params, whole[0].params)


def arrivals(folder: Path) -> list[Any]:
    return [(record["step"], record["arrived"]) for record in RunDir(folder).records("refresh")]


@pytest.mark.usefixtures("three_devices")
def test_a_relaxed_run_with_workers_is_replayed_bit_for_bit(tmp_path: Path) -> None:
    """Also one that was stopped in the middle and resumed, with other workers in flight, and distrust by the clock."""
    changes: dict[str, Any] = {
        "mode": "relaxed", "engine": "local", "chunk_size": 10, "publish_every": 3, "refetch_every": 2,
        "max_age_seconds": 0.2, "min_trusted": 0.5, "order": "cells",
    }  # fmt: skip
    fit(small_config(tmp_path / "run", **changes | {"steps": 23}), dataset=blobs())

    def breathe(record: dict[str, Any]) -> None:
        time.sleep(0.2)  # so that workers come to score, however short the steps

    run = fit(small_config(tmp_path / "run", **changes), dataset=blobs(), resume=True, observe=breathe)
    assert sum(len(arrived) for _, arrived in arrivals(run.run_dir)) > 0
    again = fit(small_config(tmp_path / "again", **changes, replay=str(run.run_dir)), dataset=blobs())
    chex.assert_trees_all_equal(again.params, run.params)
    assert arrivals(again.run_dir) == arrivals(run.run_dir)


@pytest.mark.usefixtures("three_devices")
def test_all_workers_gone_training_goes_on_and_the_proposal_becomes_uniform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The devices fail from step 16 on; scores older than 10 steps are not trusted. The run lasts till all is told."""
    failing, told = threading.Event(), list[int]()

    def finish(self: DeviceWorker, started: Any, honest: Any = DeviceWorker.finish) -> np.ndarray:
        if failing.is_set():
            raise RuntimeError("no power")
        return honest(self, started)

    def observe(record: Record) -> None:
        if record["event"] == "refresh" and record["step"] >= 16:
            failing.set()
        if record["event"] == "warning" and "no worker is left" in record["text"]:
            told.append(record["step"])

    monkeypatch.setattr(DeviceWorker, "finish", finish)
    config = small_config(tmp_path / "run", mode="relaxed", steps=100_000, max_age=10, min_trusted=0.9, **LOCAL)
    enough = 60
    result = fit(
        config, dataset=blobs(), observe=observe, until=lambda line: bool(told) and line["step"] >= told[0] + enough
    )
    assert told
    assert told[0] + enough <= result.step < 100_000
    last = list(RunDir(tmp_path / "run").records("refresh"))[-1]
    assert last["is_uniform"]


def test_one_device_says_that_it_scores_inline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = jax.local_devices()[0]
    monkeypatch.setattr(jax, "local_devices", lambda: [first])
    seen: list[Record] = []
    fit(small_config(tmp_path / "run", steps=1, mode="relaxed", **LOCAL), dataset=blobs(), observe=seen.append)
    assert any("it scores inline" in record["text"] for record in seen if record["event"] == "warning")


@pytest.mark.usefixtures("three_devices")
def test_several_devices_train_and_the_others_score(tmp_path: Path) -> None:
    """The batch in parts: the losses of one device, to rounding (which moves draws of the next proposal); the same bits
    each time."""
    changes: dict[str, Any] = {**LOCAL, "steps": 8, "log_every": 8}
    one = fit(small_config(tmp_path / "one", **changes), dataset=blobs())
    two, again = (
        fit(small_config(tmp_path / name, **changes, train_devices=2), dataset=blobs()) for name in ("two", "again")
    )
    chex.assert_trees_all_equal(jax.device_get(two.params), jax.device_get(again.params))
    expected, got = progress(one.run_dir)[-1], progress(two.run_dir)[-1]
    for name in ("loss", "test_loss", "sd_stale", "max_weight"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5)
    with pytest.raises(ValueError, match="train_devices=10 leaves no device to score: this host has 3"):
        fit(small_config(tmp_path / "no", **LOCAL, train_devices=10), dataset=blobs())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mode": "relaxed"}, "25.0% of the examples every 8 updates; expected to take"),
        (
            {"mode": "relaxed", "engine": "local"},
            "by workers meanwhile, with parameters of every 8 updates; taken in every 8",
        ),
    ],
)
def test_the_plan_tells_who_scores(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    plan = {
        "config": small_config(tmp_path, **changes).flat(), "num_examples": 90, "num_params": 3, "devices": ["cpu"],
        "first_step": 0, "num_steps": 40, "seconds_per_update": 0.1, "seconds_per_refresh": 0.1,
        "share_scored": 0.25, "run_dir": "runs/x", "sampler": "systematic",
    }  # fmt: skip
    assert told in dict(console._describe(plan))["scoring"]
