"""The probe: against closed forms, against the definition, and its words against numbers worked by hand."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import blobs, linear_loss, linear_problem, small_config

from isgd_jax.app import checkpoints, data, optimizers, task
from isgd_jax.app.commands import probe as command
from isgd_jax.app.html import probe_page
from isgd_jax.app.probe import Period, Trial, findings, measure, periods, probe, trial, verdict
from isgd_jax.app.run import fit
from isgd_jax.app.run_dir import RunDir
from isgd_jax.gradients.all_examples import norms_and_mean_gradient
from isgd_jax.gradients.per_example import stacked_per_example_grads

pytestmark = pytest.mark.slow


def rows(params: Any, data: Any) -> np.ndarray:
    """All gradients, one a row, by definition."""
    grads = jax.jit(stacked_per_example_grads(linear_loss))(params, data)
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(grads)], axis=1)


@pytest.mark.parametrize("num_examples", [40, measure.CHUNK + 3])
def test_the_spread_of_norms_by_definition(num_examples: int) -> None:
    params, data = linear_problem(num_examples)
    grads = rows(params, data).astype(np.float64)
    norms = np.linalg.norm(grads, axis=1)
    found = measure.spread(linear_loss, params, data)
    gram = grads @ grads.T
    between = (gram.sum() - np.trace(gram)) / (num_examples * (num_examples - 1))  # the mean over pairs: unbiased
    assert found.norms == pytest.approx(norms, rel=1e-4)
    assert found.second_moment_ratio == pytest.approx((norms**2).mean() / norms.mean() ** 2, rel=1e-4)
    assert found.mean_grad_norm_sq == pytest.approx(max(between, 0.0), rel=1e-3, abs=1e-4 * (norms**2).mean())
    whole = measure.spread(linear_loss, params, data, is_whole=True)
    assert whole.mean_grad_norm_sq == pytest.approx(np.square(grads.mean(0)).sum(), rel=1e-3)
    assert found.uniform - found.ideal == pytest.approx(norms.var(), rel=1e-3)
    assert found.quantiles[0.5] == pytest.approx(np.median(norms), rel=1e-4)


def work(tmp_path: Path, **changes: Any) -> tuple[Any, task.Task]:
    config = small_config(tmp_path, **changes)
    return config, task.make(config.model, blobs())


def probed_of(config: Any, made: task.Task, **options: Any) -> measure.Probed:
    return findings.probed_of(config.training, config.scoring, made, **options)


def test_a_plain_step_is_that_of_the_optimiser_alone(tmp_path: Path, key: jax.Array) -> None:
    config, made = work(tmp_path)
    steps = measure.Steps(probed_of(config, made))
    params = made.init(key)
    data = jax.device_put(dict(made.train))
    ours, _ = steps.plain(params, steps.tx.init(params), data, key)
    indices = jax.random.randint(key, (config.training.batch_size,), 0, made.num_examples)
    batch = jax.tree.map(lambda x: x[indices], data)
    grads = jax.grad(lambda p: jnp.mean(jax.vmap(made.loss_fn, (None, 0))(p, batch)))(params)
    plain = optax.sgd(config.training.learning_rate, momentum=config.training.momentum, nesterov=True)
    updates, _ = plain.update(grads, plain.init(params), params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, optax.apply_updates(params, updates)
    )


def test_scores_do_not_age_while_the_parameters_stand_still(tmp_path: Path, key: jax.Array) -> None:
    """At rate 1e-20 every age is worth what fresh scores are: STALE by its formula, on the mixed probabilities."""
    config, made = work(tmp_path, learning_rate=1e-20)
    sample = dict(made.train)
    found = measure.ageing(
        probed_of(config, made, mixture=0.2), made.init(key), None, sample=sample, ages=[3, 9], key=key
    )
    found_norms, mean = norms_and_mean_gradient(made.loss_fn, made.init(key), sample)
    norms = np.asarray(found_norms)
    probs = 0.8 * norms / norms.sum() + 0.2 / len(norms)
    square = float(optax.tree.vdot(mean, mean))
    expected = ((norms**2 / probs).sum() / len(norms) ** 2 - square) / ((norms**2).mean() - square)
    assert list(found) == [0, 3, 9]
    assert list(found.values()) == pytest.approx([expected] * 3, rel=1e-4)


def test_scores_age_when_the_parameters_move(tmp_path: Path, key: jax.Array) -> None:
    config, made = work(tmp_path, learning_rate=0.05)
    params = made.init(key)
    probed, sample = probed_of(config, made, mixture=0.1), dict(made.train)
    found = measure.ageing(probed, params, None, sample=sample, ages=[40], key=key)
    assert found[40] > found[0]


def test_periods_by_hand() -> None:
    """Ages 0 to 3 lie on the line from 0.2 to 0.6: 0.2, 0.3, 0.4, 0.5, in the mean 0.35."""
    (found,) = periods({0: 0.2, 4: 0.6}, update=2.0, reweighted_update=3.0, score_all=4.0)
    assert found == (4, pytest.approx(0.35), pytest.approx(2.0), pytest.approx(1.5))
    assert found.at_equal_time == pytest.approx(0.7)
    assert found.at_equal_time_elsewhere == pytest.approx(0.525)


LOW, HIGH = (0.10, 0.11, 0.10), (0.20, 0.22, 0.21)
POOR, RICH, EVEN = Trial(100, 150, HIGH, LOW), Trial(100, 150, LOW, HIGH), Trial(100, 150, LOW, LOW[::-1])


@pytest.mark.parametrize(
    ("period", "tried", "expected"),
    [
        (Period(100, 0.95, 2.0, 1.2), RICH, "pays here: it came to a lower loss in the same time"),
        (Period(100, 0.3, 1.5, 1.1), EVEN, "can pay here, scoring included"),
        (Period(100, 0.3, 1.5, 1.1), None, "can pay here, scoring included"),
        (Period(100, 0.3, 1.5, 1.1), POOR, "only if other devices do the scoring"),
        (Period(100, 0.3, 9.0, 1.1), POOR, "only if other devices do the scoring"),
        (Period(100, 0.9, 1.2, 1.08), POOR, "hardly pays"),
        (Period(100, 0.95, 2.0, 1.2), POOR, "does not pay here"),
    ],
)
def test_the_verdict_in_words(period: Period, tried: Trial | None, expected: str) -> None:
    words = verdict(1.2, 1.3, [period], tried, num_updates=10, losses=(2.3, 1.0))
    assert expected in words[0]
    said = " ".join(words)
    assert ("importance sampling was ahead" in said) == (tried is RICH)
    assert ("plain SGD was ahead" in said) == (tried is POOR)
    assert ("a tie" in said) == (tried is EVEN)


def test_what_a_trial_found() -> None:
    """Differences 0.10, 0.11, 0.11: a mean of 0.107 with Student's interval of half 0.0143."""
    assert RICH.gain == pytest.approx((0.10667, 0.09232, 0.12101), abs=1e-5)
    assert RICH.pays
    assert RICH.is_sure
    assert not POOR.pays
    assert POOR.is_sure
    assert not EVEN.is_sure
    diverged = Trial(100, 150, (0.1, float("inf"), 0.3), LOW)
    assert not diverged.pays
    assert not diverged.is_sure
    assert Trial(100, 150, (0.2, float("inf"), 0.3), LOW).is_sure
    assert not Trial(100, 150, (float("inf"),) * 3, (float("inf"),) * 3).pays


def test_a_trial_is_plain_sgd_and_importance_sampling_for_as_long_from_the_same_place(
    tmp_path: Path, key: jax.Array
) -> None:
    config, made = work(tmp_path, learning_rate=0.05)
    probed, params, sample = probed_of(config, made), made.init(key), dict(made.train)
    cost = measure.Costs(update=1.0, reweighted_update=1.5, score_example=0.1, score_all=9.0)
    found = trial.try_both(probed, params, None, sample=sample, steps=30, costs=cost, key=key)
    assert (found.steps, found.plain_steps) == (30, 45)
    start = measure.mean_loss(probed, params, sample)
    assert max(*found.losses, *found.plain_losses) < start
    assert len(set(found.losses)) == len(set(found.plain_losses)) == trial.KEYS
    jax.tree.map(np.testing.assert_array_equal, params, made.init(key))
    still = probed._replace(optimizer=optax.set_to_zero())
    none = trial.try_both(still, params, None, sample=sample, steps=3, costs=cost, key=key)
    assert [*none.losses, *none.plain_losses] == pytest.approx([start] * 6, rel=1e-6)


def test_updates_fade_to_nothing_by_a_cosine() -> None:
    tx = trial.fading(4)
    state, shares = tx.init({"w": jnp.zeros(())}), []
    for _ in range(4):
        updates, state = tx.update({"w": jnp.ones(())}, state)
        shares.append(float(updates["w"]))
    assert shares == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5], abs=1e-6)


def test_a_trial_is_as_long_as_asked_or_as_there_is_time() -> None:
    def costs(step: float) -> measure.Costs:
        return measure.Costs(step / 1.5, step, step, step)

    assert trial.steps_in_time(7, 1_000, costs(100.0)) == 7
    assert trial.steps_in_time(None, 1_000, costs(1e-4)) == 1_000
    assert trial.steps_in_time(None, 1_000, costs(0.1)) == 100
    assert trial.steps_in_time(None, 1_000, costs(10.0)) == 50


@pytest.mark.parametrize(("num_updates", "losses"), [(0, (2.3, 2.3)), (50, (2.3, 2.2)), (50, (2.3, 4.0))])
def test_of_a_model_that_is_still_unlearnt_it_says_ask_again_later(
    num_updates: int, losses: tuple[float, float]
) -> None:
    """Whatever the numbers promise."""
    words = verdict(9.0, 9.0, [Period(100, 0.1, 1.1, 1.0)], RICH, num_updates=num_updates, losses=losses)
    assert words[0].startswith(f"Ask again later: after {num_updates} updates the loss is {losses[1]:.3g}, of 2.3 at")


def test_the_remarks_of_a_verdict() -> None:
    table = [Period(10, 0.9, 2.0, 1.0), Period(100, 1.3, 1.2, 1.0)]
    words = " ".join(verdict(1.2, 1.3, table, POOR, num_updates=5, losses=(2.3, 1.0)))
    assert "From 100 updates between refreshes on, stale scores are worse than none" in words
    assert "worse than none" not in " ".join(verdict(1.2, 1.3, table[:1], POOR, num_updates=5, losses=(2.3, 1.0)))


@pytest.mark.usefixtures("failed_reads")
def test_a_checkpoint_is_probed_with_its_own_parameters_and_momentum(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", mode="exact", steps=20)
    result = fit(config, dataset=blobs())
    made = task.make(config.model, blobs())
    probed, first = probed_of(config, made), made.init(jax.random.key(1))
    params, opt_state, step, _ = findings._restored(tmp_path / "run", probed, first)
    assert step == 20
    jax.tree.map(np.testing.assert_array_equal, params, result.params)
    assert float(optax.tree.norm(opt_state)) > 0
    found = probe(probed, run=tmp_path / "run", ages=[2, 5], num_examples=50, trial_steps=40)
    assert (found.num_updates, found.num_examples, list(found.by_age)) == (20, 50, [0, 2, 5])
    assert found.costs.score_all == pytest.approx(90 * found.costs.score_example)
    losses = jax.vmap(made.loss_fn, (None, 0))(params, dict(made.train))
    assert measure.mean_loss(probed, params, dict(made.train)) == pytest.approx(float(losses.mean()), rel=1e-5)
    assert found.losses[0] > found.losses[1]
    assert found.tried is not None
    assert found.tried.steps == 40
    assert found.words[0] in probe_page(found, "blobs")
    with pytest.raises(ValueError, match="the checkpoint is of another data set"):
        probe(probed_of(config, task.make(config.model, blobs(seed=1))), run=tmp_path / "run")
    wider, changed = work(tmp_path / "run", hidden=(9,))
    with pytest.raises(ValueError, match="the checkpoint is of another model or optimizer"):
        probe(probed_of(wider, changed), run=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20" / "record")
    older = probe(probed, run=tmp_path / "run", ages=[2], num_examples=50, trial_steps=0)
    assert older.num_updates == 10
    assert [remark.partition(" is damaged")[0] for remark in older.remarks] == ["the checkpoint of step 20"]
    for name in ("augment", "example_weights"):
        RunDir(tmp_path / "run").write_config(config.replace(**{name: "mine:other"}))
        with pytest.raises(ValueError, match=f"expected a run without {name}=, .* has 'mine:other': compare both ways"):
            probe(probed, run=tmp_path / "run")


def test_a_batch_larger_than_the_training_set_is_refused_as_training_does(tmp_path: Path) -> None:
    config, made = work(tmp_path, batch_size=91)
    with pytest.raises(ValueError, match="batch_size must be at most 90, the training examples; got 91"):
        probe(probed_of(config, made))


def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path: Path) -> None:
    config, made = work(tmp_path, optimizer="adam")
    tx = optimizers.make(config.training, made.num_examples)
    with pytest.raises(ValueError, match="is no array, not"):
        checkpoints.into(tx.init(made.init(jax.random.key(0))), [])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"after": -1}, "after must be 0 or more; got -1"),
        ({"ages": [0]}, "ages must be numbers of steps of at least 1"),
        ({"num_examples": 1}, "examples must be at least 2; got 1"),
        ({"trial_steps": -1}, "trial must be 0 or more; got -1"),
        ({"run": Path("x"), "after": 3}, "leave it out with run="),
    ],
)
def test_what_cannot_be_probed_is_refused_first(options: dict[str, Any], expected: str, tmp_path: Path) -> None:
    config, made = work(tmp_path)
    with pytest.raises(ValueError, match=expected):
        probe(probed_of(config, made), **options)


def test_a_run_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    config, made = work(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        probe(probed_of(config, made), run=tmp_path / "nothing")


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "load", lambda *args, **options: blobs())
    monkeypatch.setattr("isgd_jax.app.probe.probe", lambda *args, **options: pytest.fail("it measured"))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"cannot make the folder .*file: .*file is none; name another"):
        command.run(command.Probe(out=str(tmp_path / "file")))


def test_a_probe_that_is_refused_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", lambda *args, **options: blobs())
    with pytest.raises(ValueError, match="after must be 0 or more; got -1"):
        command.run(command.Probe(out=str(tmp_path / "probes" / "out"), after=-1))
    assert not list(tmp_path.iterdir())
