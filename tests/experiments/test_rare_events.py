"""Rare events: what is told is right, and arms learn what they say."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rare_events as rare
from equal_seconds import race
from selection import contest

SIZE, BATCH, STEPS = 64, 8, 2_000


def problem() -> contest.Problem:
    rng = np.random.default_rng(0)
    labels = (np.arange(SIZE) % 8 == 0).astype(np.int32)
    inputs = rng.normal(size=(SIZE, 3)) + 2.0 * labels[:, None]
    split = {"x": jnp.asarray(inputs, jnp.float32), "y": jnp.asarray(labels)}
    return contest.Problem("toy", (4,), 2, BATCH, split, split, split)


def test_thresholds_and_errors_are_those_of_all_thresholds():
    rng = np.random.default_rng(1)
    labels = (rng.random(200) < 0.2).astype(int)
    probability = np.round(np.clip(0.3 * labels + 0.5 * rng.random(200), 0, 1), 2)
    every = np.unique(probability)

    def f1(at):
        said = probability >= at
        return 2 * np.sum(said & (labels == 1)) / (np.sum(said) + np.sum(labels))

    assert f1(rare.at_best_f1(probability, labels)) == pytest.approx(max(map(f1, every)))
    found = rare.worst_class(probability >= rare.at_least_worst_class(probability, labels), labels)
    assert found == min(rare.worst_class(probability >= at, labels) for at in [*every, np.inf])
    assert rare.worst_class(np.array([True, False, False, True]), np.array([0, 0, 0, 1])) == pytest.approx(1 / 3)
    # Each bin of ten says 0.3 and has a share of 0.1 or 0.5: off by 0.2 in both.
    share = np.repeat(np.tile([0.1, 0.5], rare.BINS // 2), 10)
    truth = np.tile(np.arange(10), rare.BINS) < 10 * share
    assert rare.calibration_error(np.full(len(truth), 0.3), truth) == pytest.approx(0.2)
    assert rare.calibration_error(truth.astype(float), truth) == 0.0
    told = rare.measured((probability, labels), (labels.astype(float), labels))
    assert (told["auc_pr"], told["recall"], told["precision"], told["worst_class"]) == (1.0, 1.0, 1.0, 0.0)
    assert set(rare.measured((np.full(2, np.nan), labels[:2]), (np.zeros(2), labels[:2])).values()) == {None}


def test_the_year_is_split_by_day_and_the_day_is_no_input():
    days = np.array([1.0, 243, 244, 304, 305, 365])
    made = rare.split_by_day(np.stack([days, 10.0 * np.arange(6)], axis=1), np.array([0, 1, 0, 1, 0, 1]))
    assert [split["x"].shape for split in (made.train, made.valid, made.test)] == [(2, 1)] * 3
    np.testing.assert_allclose(made.train["x"][:, 0], [-1.0, 1.0])
    np.testing.assert_allclose(made.test["x"][:, 0], [7.0, 9.0])


def test_the_focal_loss_is_lins():
    toy = problem()
    params, example = toy.init(jax.random.key(0)), jax.tree.map(lambda leaf: leaf[0], toy.train)
    loss = toy.loss_fn(params, example)
    p = jnp.exp(-loss)
    np.testing.assert_allclose(rare.Focal(*toy).loss_fn(params, example), -((1 - p) ** 2) * jnp.log(p), rtol=1e-5)


@pytest.mark.parametrize("name", ["weights", "oversampling", "ours", "ours-weights"])
def test_what_counts_for_how_much(name):
    """The mean count times weight of each example: all alike, by class weights, or half of a batch from each class."""
    toy = problem()
    labels, method, norms = np.asarray(toy.train["y"]), rare.ARMS[name](toy), jnp.arange(1.0, BATCH + 1)
    expected = np.full(SIZE, BATCH / SIZE)
    if name != "ours":
        expected = expected * rare.class_weights(toy)

    @jax.jit
    def run(memory):
        def step(carry, at):
            memory, counts = carry
            if method.refresh_every:
                due = at % method.refresh_every == 0
                memory = jax.lax.cond(due, lambda m: method.refresh(None, m, None, None, at)[0], lambda m: m, memory)
            choice, memory = method.choose(jax.random.fold_in(jax.random.key(1), at), memory, None, None, 0.5)
            memory = method.learn(memory, choice, norms, norms, at)
            return (memory, counts.at[choice.indices].add(choice.weights)), None

        return jax.lax.scan(step, (memory, jnp.zeros(SIZE)), jnp.arange(STEPS))[0][1] / STEPS

    counts = np.asarray(run(method.start(jax.random.key(0), toy.train)[0]))
    # Six standard errors of a Poisson count whose weights are at most ten times their mean; the class sums are sharper.
    assert np.abs(counts - expected).max() < 6 * np.sqrt(10 * expected.max() * expected.max() * SIZE / STEPS / BATCH)
    for label, total in itertools.product((0, 1), [expected]):
        assert counts[labels == label].sum() == pytest.approx(total[labels == label].sum(), rel=0.05)


def test_an_arm_trains_and_is_measured():
    found = rare.Bench(problem()).train("ours-weights", race.Trial(0.1, BATCH, 1.0), 0, race.Meter(1.0, price=1 / 60))
    assert {measure.name for measure in rare.MEASURES} | {"merit"} == set(found)
    assert found["merit"] == pytest.approx(1.0 - found["auc_pr"])
    assert found["auc_pr"] > 0.6  # by chance 0.125
