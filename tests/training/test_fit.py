"""The loop on problems of every kind, each against something that is known about its end."""

import functools
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import linear_loss, linear_problem
from sampling_problem import jitted, unchecked

import isgd_jax as isgd
from isgd_jax.training.callbacks import History
from isgd_jax.training.data_parallel import DataParallel, local_copy

N, M = 40, 8


def linear(**changes: Any) -> isgd.Problem:
    params, data = linear_problem(N)
    return isgd.Problem(**({"loss_fn": linear_loss, "params": params, "train": data} | changes))


def chain(num_examples: int = N, learning_rate: Any = 0.02) -> Any:
    return optax.chain(isgd.importance_weighting(num_examples), optax.sgd(learning_rate))


@functools.cache
def default_sampler(size: int) -> isgd.BatchSampler:
    """The same one for the same size: its functions are traced once, whatever program they are a part of."""
    return jitted(isgd.importance_sampler(size, batch_size=M))


def quiet(problem: isgd.Problem, sampler: Any = None, tx: Any = None, **options: Any) -> isgd.FitResult:
    size = problem.num_examples
    sampler = sampler or default_sampler(size)
    settings: dict[str, Any] = {"num_steps": 30, "key": jax.random.key(0), "callbacks": [], "refresh_every": 10}
    settings["make_refresher"] = functools.partial(isgd.refresher, clock=lambda: 0.0)
    settings["step_cost"] = 1.0 if options.get("engine") is None else None  # what it measures differs from run to run
    return isgd.fit(problem, sampler, tx or chain(size), **settings | options)


def test_without_records_a_loss_that_is_none_is_told_at_the_end() -> None:
    with pytest.warns(UserWarning, match="the training loss became nan, and parameters with it: lower the"):
        quiet(linear(), tx=chain(N, jnp.nan), num_steps=3)


def test_a_loss_that_no_update_has_lost_is_told_apart() -> None:
    run: Any = SimpleNamespace(problem=linear(), step=1, num_steps=1)
    history = History()
    history.begin(run)
    with pytest.raises(FloatingPointError, match=r"became nan at step 0: no update made it so; look for the examples"):
        history.stepped(run, SimpleNamespace(loss=jnp.nan))


@pytest.mark.devices(2)
def test_one_engine_serves_one_run_after_the_other() -> None:
    """Both runs are those of an engine that scores between the steps."""
    made, found, results = linear(), dict[str, list[int]](), dict[str, list[Any]]()
    for name, make in (("inline", isgd.engines.inline), ("local", isgd.engines.local)):
        found[name], results[name] = [], []
        with make(made.scorer(), made.train, chunk_size=16, devices=jax.devices()[1:2]) as engine:
            for seed, steps in ((0, 25), (1, 5), (2, 25)):  # the second publishes at the first step alone
                waits = functools.partial(isgd.refresher, wait=True, clock=lambda: 0.0)
                options = {"num_steps": steps, "key": jax.random.key(seed), "make_refresher": waits}
                results[name].append(quiet(made, engine=engine, **options).state)
                found[name].append(engine.stats().num_scored)
    assert found["local"] == found["inline"] == [3 * N, 4 * N, 7 * N]
    chex.assert_trees_all_equal(results["local"], results["inline"])


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # optax's own arithmetic mixes types
def test_a_regression_on_diabetes_reaches_least_squares_and_says_how_it_goes(capsys: pytest.CaptureFixture) -> None:
    """The loss of ordinary least squares, 0.241 of a variance of 0.5, to 5 %; no labels, no standardizing, no model."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.load_diabetes(return_X_y=True)
    x, y = x / x.std(axis=0), (y - y.mean()) / y.std()
    data = {"x": x.astype(np.float32), "y": y.astype(np.float32)}
    best = 0.5 * np.linalg.lstsq(x, y, rcond=None)[1][0] / len(y)
    params = {"w": jnp.zeros(10), "b": jnp.zeros(())}
    problem = isgd.Problem(linear_loss, params, data, held_out={"all": data})
    sampler = isgd.importance_sampler(len(y), batch_size=32)
    rate = optax.cosine_decay_schedule(0.1, 300)
    result = isgd.fit(problem, sampler, chain(len(y), rate), num_steps=300, key=jax.random.key(0))

    assert best < result.history[-1]["all_loss"] < 1.05 * best
    assert [record["step"] for record in result.history] == [100, 200, 300]
    assert result.step == int(result.state.sampler.clock.step) == 300
    assert result.stopped is None
    chex.assert_trees_all_equal(result.params, result.state.params)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("step  72/300 | a step that learns from norms takes ")
    assert lines[-1].startswith("step 300/300 | loss 0.2")
    assert "| all_loss 0.2" in lines[-1]
    assert "| worth a batch of " in lines[-1]

    told = {"num_steps": 300, "key": jax.random.key(0), "step_cost": None}  # each step learns, and tells the variance
    learnt = isgd.fit(problem, sampler, chain(len(y), rate), **told)
    assert learnt.history[-1]["variance_ratio"] < 1.0


@pytest.mark.slow
def test_a_model_of_tokens_with_padding_learns_and_leaves_the_padding_alone() -> None:
    """The next token is the last one plus 1. Padding is in no loss, so its row of the embedding stays bit for bit."""
    rng, vocabulary, length = np.random.default_rng(0), 12, 9
    starts, lengths = rng.integers(1, vocabulary, size=64), rng.integers(2, length + 1, size=64)
    tokens = 1 + (starts[:, None] - 1 + np.arange(length)) % (vocabulary - 1)
    tokens = np.where(np.arange(length) < lengths[:, None], tokens, 0).astype(np.int32)

    def loss_fn(params: Any, example: jax.Array) -> jax.Array:
        before, after = example[:-1], example[1:]
        logits = params["embedding"][before] @ params["out"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, after)
        is_token = after > 0
        return jnp.sum(jnp.where(is_token, losses, 0.0)) / jnp.sum(is_token, dtype=jnp.int32).astype(jnp.float32)

    def init(key: jax.Array) -> Any:
        first, second = jax.random.split(key)
        return {
            "embedding": jax.random.normal(first, (vocabulary, 16)),
            "out": 0.1 * jax.random.normal(second, (16, vocabulary)),
        }

    problem = isgd.Problem(loss_fn, init, tokens, held_out={"all": tokens})
    result = quiet(problem, tx=chain(64, 0.5), num_steps=150, callbacks=[History(every=150)])
    assert result.history[-1]["all_loss"] < 0.2
    start = problem.init(jax.random.split(jax.random.key(0), 4)[0])
    chex.assert_trees_all_equal(result.params["embedding"][0], start["embedding"][0])


@pytest.mark.slow
def test_two_inputs_of_different_kinds() -> None:
    """An image and a category, each of which tells half of the target."""
    rng = np.random.default_rng(0)
    data = {"image": rng.normal(size=(64, 3, 3)).astype(np.float32), "kind": rng.integers(4, size=64)}
    data["y"] = (data["image"].mean(axis=(1, 2)) + data["kind"]).astype(np.float32)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        found = jnp.sum(params["filter"] * example["image"]) + params["kinds"][example["kind"]]
        return 0.5 * jnp.square(found - example["y"])

    problem = isgd.Problem(loss_fn, {"filter": jnp.zeros((3, 3)), "kinds": jnp.zeros(4)}, data)
    result = quiet(problem, tx=chain(64, 0.1), num_steps=300)
    np.testing.assert_allclose(result.params["filter"], 1 / 9, atol=0.02)
    np.testing.assert_allclose(result.params["kinds"], np.arange(4), atol=0.05)


@pytest.mark.slow
def test_a_random_loss_has_a_new_key_for_each_draw() -> None:
    """The gradient is uniform on 0 to 1: after 50 steps of 8 draws the mean is 25, its deviation 0.7.

    Also with an engine, whose scores then are what is drawn by. One key for all would deviate by 14.
    """

    def loss_fn(params: Any, example: Any, key: jax.Array) -> jax.Array:
        return -params * jax.random.uniform(key) * example

    problem = isgd.Problem(loss_fn, jnp.zeros(()), np.ones(N, np.float32), needs_key=True)
    with isgd.engines.inline(problem.scorer(), problem.train) as engine:
        options: dict[str, Any] = {"tx": chain(N, 1.0), "num_steps": 50, "engine": engine}
        first, again = (quiet(problem, **options) for _ in range(2))
        other = quiet(problem, **options | {"key": jax.random.key(1)})
    assert float(first.params) == pytest.approx(25.0, abs=4 * 0.72)
    assert float(first.params) == float(again.params) != float(other.params)
    scores = np.asarray(first.state.sampler.table.scores)
    assert len(np.unique(scores)) == N
    assert np.all((scores > 0) & (scores < 1))


@pytest.mark.slow
def test_given_parameters_on_a_frozen_base() -> None:
    """A head on random features is least squares in them; the base and the caller's parameters stay as they were."""
    rng = np.random.default_rng(0)
    base = {"w": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), "columns": jnp.arange(4)}
    features = rng.normal(size=(N, 4)).astype(np.float32)
    hidden = np.tanh(features @ np.asarray(base["w"]))
    data = {"x": features, "y": (hidden @ np.arange(6.0)).astype(np.float32)}

    def loss_fn(params: Any, frozen: Any, example: Any) -> jax.Array:
        out = jnp.tanh(example["x"][frozen["columns"]] @ frozen["w"]) @ params["head"]
        return 0.5 * jnp.square(out - example["y"])

    given, kept = {"head": jnp.ones(6)}, jax.tree.map(np.array, base)
    problem = isgd.Problem(loss_fn, given, data, frozen=base, held_out={"all": data})
    with isgd.engines.inline(problem.scorer(), data) as engine:
        result = quiet(problem, tx=chain(N, 0.2), num_steps=300, engine=engine, callbacks=[History(every=300)])
    assert result.history[0]["all_loss"] < 0.05
    assert set(result.params) == {"head"}
    chex.assert_trees_all_equal(given, {"head": jnp.ones(6)})
    chex.assert_trees_all_equal(jax.tree.map(np.array, base), kept)


def test_presampling_scores_with_the_frozen_arrays_of_the_problem() -> None:
    """Passed or captured, the run is the same; a scorer of other arguments is refused before the first step."""
    params, data = linear_problem(N)
    frozen = {"scale": jnp.linspace(0.1, 3.0, 4)}

    def loss_fn(params: Any, frozen: Any, example: Any) -> jax.Array:
        return linear_loss(params, example | {"x": example["x"] * frozen["scale"]})

    def captures(params: Any, example: Any) -> jax.Array:
        return loss_fn(params, frozen, example)

    def trained(loss_fn: Any, own: Any, **options: Any) -> isgd.FitResult:
        sampler = isgd.presampling(N, batch_size=M, scorer=isgd.scorers.loss(own), gate=False, monitor=False)
        return quiet(isgd.Problem(loss_fn, params, data, **options), sampler, num_steps=3)

    passed, captured = trained(loss_fn, loss_fn, frozen=frozen), trained(captures, captures)
    chex.assert_trees_all_close(passed.params, captured.params, rtol=1e-6)
    with pytest.raises(ValueError, match=r"presampling's scorer must take \(params, frozen, batch\) and give one"):
        trained(loss_fn, linear_loss, frozen=frozen)
    with pytest.raises(ValueError, match=r"presampling's scorer must take \(params, batch\) and give one"):
        trained(captures, loss_fn)


@jax.numpy_dtype_promotion("standard")  # optax's own arithmetic mixes types
@pytest.mark.slow
def test_class_weights_are_the_weights_of_examples() -> None:
    """The minimum of sum(a_n (p - y_n)^2) is the weighted mean; the plain mean is half the range away."""
    label = np.arange(N) % 4 == 0
    y = label + np.random.default_rng(0).normal(scale=0.1, size=N)
    weights = np.where(label, 0.75 / label.sum(), 0.25 / (~label).sum())
    problem = isgd.Problem(lambda p, y: 0.5 * jnp.square(p - y), jnp.zeros(()), y.astype(np.float32))
    sampler = isgd.importance_sampler(N, batch_size=M, example_weights=weights.astype(np.float32))
    result = quiet(problem, sampler, chain(N, optax.cosine_decay_schedule(0.2, 150)), num_steps=150)
    assert float(result.params) == pytest.approx(np.sum(weights * y), abs=0.03)
    assert abs(y.mean() - np.sum(weights * y)) > 0.3


@pytest.mark.slow
def test_data_in_a_file_are_trained_on_as_those_on_the_device(tmp_path: Path) -> None:
    """Draws are made ahead and fetched by a thread; the gate, asked once a block, has no reason to shut here."""
    data = linear_problem(N)[1]
    files = {}
    for name, array in data.items():
        np.save(tmp_path / f"{name}.npy", array)
        files[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
        assert isinstance(files[name], np.memmap)
    here, there = quiet(linear()), quiet(linear(train=files, hold="host"))
    chex.assert_trees_all_close(here.params, there.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(here.state.sampler.table, there.state.sampler.table, rtol=1e-4, atol=1e-5)


class From(isgd.Callback):
    """Goes on from a saved state."""

    def __init__(self, state: Any, step: int) -> None:
        self._state, self._step = state, step

    def begin(self, run: Any) -> None:
        run.state, run.step = self._state, self._step


@pytest.mark.slow
@pytest.mark.devices(4)
@pytest.mark.parametrize(("before", "after"), [(4, 2), (4, None), (None, 4)])
def test_a_run_goes_on_on_other_devices(before: int | None, after: int | None) -> None:
    """From the arrays of the run before, parameters in parts on both: the state is moved to where the run trains."""

    def run(num_devices: int | None, **given: Any) -> Any:
        devices = None if num_devices is None else jax.devices()[:num_devices]
        return quiet(linear(), devices=devices, shard_params=devices is not None, **given)

    whole = run(None)
    resumed = run(after, callbacks=[From(run(before, num_steps=17).state, 17)])
    chex.assert_trees_all_close(resumed.params, whole.params, rtol=1e-5, atol=1e-6)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(resumed.params)} == {after or 1}


@pytest.mark.slow
@pytest.mark.parametrize("hold", ["device", pytest.param("host", marks=pytest.mark.slow)])
def test_a_run_goes_on_from_its_saved_state_bit_for_bit(hold: str, tmp_path: Path) -> None:
    """Broken off between two refreshes, with momentum, saved by Orbax."""
    ocp = pytest.importorskip("orbax.checkpoint")
    train = jax.tree.map(np.asarray, linear_problem(N)[1])
    problem, tx = linear(train=train, hold=hold), optax.chain(isgd.importance_weighting(N), optax.sgd(0.02, 0.9))
    whole = quiet(problem, tx=tx)
    broken = quiet(problem, tx=tx, num_steps=17)
    with warnings.catch_warnings(), ocp.StandardCheckpointer() as checkpointer:
        warnings.simplefilter("ignore")
        checkpointer.save(tmp_path / "state", broken.state)
        checkpointer.wait_until_finished()
        saved = checkpointer.restore(tmp_path / "state", broken.state)
    resumed = quiet(problem, tx=tx, callbacks=[From(saved, 17)])
    assert resumed.step == 30
    chex.assert_trees_all_equal(resumed.state, whole.state)


class Keeper(isgd.Callback):
    """Keeps every state, and whether its gate is open."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def stepped(self, run: Any, info: Any) -> None:
        self.states.append(jax.tree.map(jnp.copy, run.state))


def test_a_run_goes_on_bit_for_bit_where_the_gate_has_moved_within_a_block_of_draws_made_ahead() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(400, 3)) * np.where(np.arange(400) < 40, 30, 1)[:, None]).astype(np.float32)
    problem = isgd.Problem(lambda w, e: jnp.sum((w - e) ** 2), jnp.zeros(3), x, hold="host")
    harmful = isgd.fixed(1 / np.linalg.norm(x, axis=1), batch_size=64, uniform_fraction=0.2)
    tx = optax.chain(isgd.importance_weighting(400), optax.sgd(1e-3))
    run = functools.partial(
        isgd.fit, problem, harmful, tx, num_steps=40, key=jax.random.key(0), refresh_every=1000, step_cost=None
    )
    kept = Keeper()
    whole = run(callbacks=[kept])
    shut = next(at for at, state in enumerate(kept.states) if not state.sampler.gate.is_open)
    assert shut < 31  # within the first block of 32
    resumed = run(callbacks=[From(kept.states[shut], shut + 1)])
    chex.assert_trees_all_equal(resumed.state, whole.state)


@pytest.mark.parametrize("devices", [pytest.param(4, id="4 devices")])
@pytest.mark.slow
@pytest.mark.devices(4)
def test_on_four_devices_the_losses_are_those_of_one(devices: int) -> None:
    one, four = (
        quiet(linear(), devices=used, callbacks=[History(every=1)]) for used in (None, jax.devices()[:devices])
    )
    losses = [[record["loss"] for record in run.history] for run in (one, four)]
    assert len(losses[0]) == 30
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    chex.assert_trees_all_close(one.params, jax.device_get(four.params), rtol=1e-5, atol=1e-6)
    assert len(four.params["w"].sharding.device_set) == devices
    parts = [np.asarray(part.data) for part in four.params["w"].addressable_shards]
    assert all(np.array_equal(part, parts[0]) for part in parts)  # the same bits everywhere


@pytest.mark.slow
@pytest.mark.devices(4)
def test_with_shard_params_no_device_holds_all_of_them_and_the_run_is_that_of_one() -> None:
    """Parameters, momentum and norms of an engine's scores; the state can be saved and placed again."""
    made, devices = linear(), jax.devices()[:4]
    tx = optax.chain(isgd.importance_weighting(made.num_examples), optax.sgd(0.01, momentum=0.9))
    runs = []
    for options in ({}, {"devices": devices, "shard_params": True}):
        engine = isgd.engines.inline(made.scorer(), made.train, chunk_size=16, devices=devices)
        with engine:
            run = quiet(made, tx=tx, engine=engine, refresh_every=10, callbacks=[History(every=1)], **options)
        runs.append(run)
    one, four = runs
    losses = [[record["loss"] for record in run.history] for run in (one, four)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    chex.assert_trees_all_close(jax.device_get(one.params), jax.device_get(four.params), rtol=1e-5, atol=1e-6)
    for leaf in (four.params["w"], optax.tree.get(four.state.opt_state, "trace")["w"]):
        assert {part.data.size for part in leaf.addressable_shards} == {1}
    assert four.params["b"].is_fully_replicated  # a scalar cannot be cut
    parallel = DataParallel(M, devices, shard_params=True)
    again = parallel.place(jax.device_get(four.params))
    assert again["w"].sharding.is_equivalent_to(four.params["w"].sharding, again["w"].ndim)
    chex.assert_trees_all_equal(jax.device_get(local_copy(again)), jax.device_get(four.params))
    assert not any(x.is_deleted() for x in jax.tree.leaves(made.params)), "the caller's own"


def test_parts_need_devices_to_be_on() -> None:
    with pytest.raises(ValueError, match="shard_params=True needs devices="):
        quiet(linear(), shard_params=True)


@pytest.mark.devices(3)
def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 devices that train"):
        DataParallel(M, jax.devices()[:3])


class Watch(isgd.Callback):
    """Notes what it hears; stops where it is told to."""

    def __init__(self, stop_at: int | None = None, fail_at: int | None = None) -> None:
        self.heard: list[str] = []
        self._stop_at, self._fail_at = stop_at, fail_at

    def begin(self, run: Any) -> None:
        self.heard.append("begin")

    def refreshed(self, run: Any) -> None:
        self.heard.append(f"refreshed {run.step}")

    def stepped(self, run: Any, info: Any) -> None:
        self.heard.append(f"stepped {run.step}")
        if run.step == self._fail_at:
            raise RuntimeError("a callback failed")
        if run.step == self._stop_at:
            run.stop("enough")

    def end(self, run: Any) -> None:
        self.heard.append("end")

    def close(self) -> None:
        self.heard.append("close")


@pytest.mark.slow
def test_callbacks_hear_of_everything_in_time_order_and_may_stop_the_run() -> None:
    watch = Watch(stop_at=3)
    result = quiet(linear(), callbacks=[watch], refresh_every=2)
    assert (result.step, result.stopped) == (3, "enough")
    assert watch.heard == [
        "begin", "refreshed 0", "stepped 1", "stepped 2", "refreshed 2", "stepped 3", "end", "close",
    ]  # fmt: skip


def test_callbacks_are_closed_when_a_run_fails() -> None:
    watch = Watch(fail_at=1)
    with pytest.raises(RuntimeError, match="a callback failed"):
        quiet(linear(), callbacks=[watch])
    assert watch.heard[-2:] == ["stepped 1", "close"]


@pytest.mark.slow
def test_a_loss_that_is_no_number_any_more_is_told_with_its_step() -> None:
    with pytest.raises(FloatingPointError, match=r"the training loss became (nan|inf) at step \d+: lower the learning"):
        quiet(linear(), tx=chain(N, 1e12), callbacks=[History(every=30)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampler": isgd.uniform_draws(N + 1, batch_size=M)},
            "draws from 41 examples, the problem has 40",
        ),
        ({"num_steps": -1}, "num_steps must be 0 or more, got -1"),
        ({"num_steps": 2**31}, r"num_steps must be 0 to 2\^31 - 1, got 2147483648"),
        ({"refresh_every": 2**31}, r"every must be 1 to 2\^31 - 1, got 2147483648"),
        ({"tx": optax.sgd(0.1)}, "the optimizer must begin with the reweighting"),
        (
            {"problem": linear(hold="host"), "sampler": isgd.presampling(N, batch_size=M)},
            'presampling scores candidates inside the step: hold="device"',
        ),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quiet(**{"problem": linear()} | changes)


def test_a_single_callback_is_refused() -> None:
    with unchecked(), pytest.raises(TypeError, match="callbacks must be a list of them, got one Watch"):
        quiet(linear(), callbacks=Watch())


def test_held_out_data_of_another_structure_are_refused_before_the_first_step() -> None:
    train = linear_problem(N)[1]
    other = {"z": train["x"]}
    with pytest.raises(ValueError, match=r"loss cannot be measured on held_out\['later'\], which must be made as the"):
        quiet(linear(held_out={"later": other}))
    with pytest.raises(ValueError, match=r"rows of an example of held_out\['later'\] must be a scalar, got \(2,\)"):
        quiet(linear(held_out={"later": train}, metrics={"rows": lambda params, example: jnp.ones(2)}))
    with pytest.raises(ValueError, match=r"all of an example of held_out\['later'\] must be a scalar, got a dict"):
        quiet(linear(held_out={"later": train}, metrics={"all": lambda params, example: {"loss": jnp.ones(())}}))
    with pytest.raises(
        ValueError, match=r"turn of an example of held_out\['later'\] must be a real number, got complex64"
    ):
        quiet(linear(held_out={"later": train}, metrics={"turn": lambda params, example: jnp.complex64(1j)}))
    with unchecked(), pytest.raises(TypeError, match=r"held_out names its sets, .* got a list"):
        linear(held_out=[train])


def test_what_is_no_key_is_refused() -> None:
    for key, got in ((0, "a int"), (jax.random.split(jax.random.key(0), 2), r"keys of shape \(2,\)")):
        with unchecked(), pytest.raises(TypeError, match=rf"key must be one key, .* got {got}"):
            quiet(linear(), key=key)


def test_no_steps_leave_the_parameters_as_they_were() -> None:
    chex.assert_trees_all_equal(quiet(linear(), num_steps=0).params, linear_problem(N)[0])
