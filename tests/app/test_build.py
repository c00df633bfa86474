"""From a configuration to the parts of a run: what only the command can ask for."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import blobs, small_config

from isgd_jax.app import build, task
from isgd_jax.app.run import fit
from isgd_jax.app.run_dir import RunDir
from isgd_jax.engines import scorers
from isgd_jax.sampling import samplers
from isgd_jax.training.train_step import TrainState, make_steps
from isgd_jax.types import Draw

CALLS: list[str] = []


def by_halves(key: jax.Array, law: Any, /, *, num_draws: int) -> Draw:
    """Half the draws by the law, half uniform: each index with its own expected count."""
    CALLS.append("sampler")
    first = samplers.independent(key, law, num_draws=num_draws // 2)
    second = samplers.uniform(jax.random.fold_in(key, 1), law, num_draws=num_draws - num_draws // 2)
    indices = jnp.concatenate([first.indices, second.indices])
    share = (num_draws // 2) / num_draws
    probs = share * samplers.probabilities_of(law, indices) + (1 - share) / law.masses.shape[0]
    return Draw(indices, probs, jnp.ones(num_draws, bool))


def squared_loss(loss_fn: Any) -> Any:
    """A scorer of one's own, made of the loss."""
    CALLS.append("scorer")
    plain = scorers.loss(loss_fn)
    return lambda params, batch: jnp.square(plain(params, batch))


@pytest.mark.slow
def test_a_sampler_and_a_scorer_of_ones_own_are_used(tmp_path: Path) -> None:
    CALLS.clear()
    config = small_config(
        tmp_path / "run", steps=40, sampler="test_build:by_halves", scorer="test_build:squared_loss", gate="off"
    )
    found = fit(config, dataset=blobs())
    assert {"sampler", "scorer"} <= set(CALLS)
    lines = list(RunDir(found.run_dir).records("progress"))
    assert lines[-1]["test_loss"] < 0.9 * lines[0]["test_loss"]
    assert np.isfinite(lines[-1]["sd_stale"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampler": "best"},
            "sampler must be one of auto, stratified, .*, or pkg.module:fn, with mode=exact; got 'best'",
        ),
        (
            {"sampler": "a:b", "mode": "uniform"},
            "sampler must be one of auto, shuffled, uniform with mode=uniform; got",
        ),
        ({"scorer": "best"}, "scorer must be one of grad_norm, loss, logit_bound, or pkg.module:fn; got 'best'"),
    ],
)
def test_a_name_that_is_none_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(tmp_path / "run", **changes)


def flipped(key: jax.Array, example: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Another picture: the features, or their reverse."""
    is_flipped = jax.random.bernoulli(key)
    return {**example, "features": jnp.where(is_flipped, example["features"][::-1], example["features"])}


def mean_update(config: Any, runs: int) -> tuple[Any, Any, Any]:
    """The first update of many runs, of SGD with rate 0.1, that differ in their draws alone: mean gradient and error.

    They draw by the scores of all examples.
    """
    work = task.make(config.model, blobs())
    train = jax.device_put(dict(work.train))
    parts = build.build(config, work)
    assert parts.engine is not None
    params = parts.problem.init(jax.random.key(0))
    parts.engine.publish(parts.published(params, 0), 0)
    sampler = parts.sampler.init()
    for chunk in parts.engine.collect(wait=True):
        sampler = parts.sampler.record(sampler, chunk.ids, chunk.scores, version=0, sketches=chunk.sketches)
    state = TrainState(params, parts.tx.init(params), parts.sampler.refresh(sampler))
    assert float(jnp.std(state.sampler.proposal.law.masses)) > 0
    step = make_steps(parts.problem, parts.sampler, parts.tx).step.__wrapped__

    @jax.jit
    def one(key: jax.Array) -> Any:
        after, _ = step(state, None, train, key, jnp.float32(0))
        return jax.tree.map(lambda a, b: (a - b) / 0.1, params, after.params)

    found = jax.lax.map(one, jax.random.split(jax.random.key(5), runs), batch_size=100)
    return jax.tree.map(lambda x: (jnp.mean(x, 0), jnp.std(x, 0) / runs**0.5), found), work, params


def assert_mean(found: Any, target: Any, params: Any) -> None:
    """Some 100 numbers, each within 5 standard errors of the gradient of the target."""
    pairs = jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, tuple))
    for (mean, error), true in zip(pairs, jax.tree.leaves(jax.grad(target)(params)), strict=True):
        assert float(jnp.max(jnp.abs(mean - true) / (error + 1e-6))) < 5


def test_weighted_targets_are_unbiased(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=90).astype(np.float32)
    np.save(tmp_path / "a.npy", weights)
    config = small_config(tmp_path / "run", example_weights=str(tmp_path / "a.npy"), optimizer="sgd", learning_rate=0.1)
    found, work, params = mean_update(config, 2000)

    def target(params: Any) -> jax.Array:
        return jnp.vdot(weights, jax.vmap(work.loss_fn, (None, 0))(params, dict(work.train)), precision="highest")

    assert_mean(found, target, params)


def test_augmented_draws_are_unbiased_for_the_augmented_loss(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", augment="test_build:flipped", optimizer="sgd", learning_rate=0.1)
    found, work, params = mean_update(config, 2000)
    train = dict(work.train)
    pictures = [train, {**train, "features": train["features"][:, ::-1]}]

    def target(params: Any) -> jax.Array:
        return jnp.mean(jnp.stack([jax.vmap(work.loss_fn, (None, 0))(params, picture) for picture in pictures]))

    assert_mean(found, target, params)


def masses_of(config: Any) -> np.ndarray:
    """The probabilities of the first draw, by example."""
    law = build.make_sampler(config, task.make(config.model, blobs())).init().proposal.law
    masses = np.zeros(90)
    masses[np.asarray(law.order)] = law.masses
    return masses


def test_static_scores_are_what_is_drawn_by(tmp_path: Path) -> None:
    scores = np.arange(90.0)
    np.save(tmp_path / "scores.npy", scores)
    config = small_config(tmp_path / "run", mode="static", static_scores=str(tmp_path / "scores.npy"), mixture=0.2)
    np.testing.assert_allclose(masses_of(config), 0.8 * scores / scores.sum() + 0.2 / 90, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["label", "label-score"])
def test_neighbours_on_the_line_share_their_label(tmp_path: Path, order: str) -> None:
    """By label alone the line never moves; else by score within a label, and the largest score is the label's last."""
    config = small_config(tmp_path / "run", order=order)
    work = task.make(config.model, blobs())
    sampler = build.make_sampler(config, work)
    state = sampler.record(sampler.init(), np.arange(90), np.linspace(2.0, 1.0, 90, dtype=np.float32), version=0)
    lines = [np.asarray(at.proposal.law.order) for at in (sampler.init(), sampler.refresh(state))]
    labels = np.asarray(work.train["label"])
    for line in lines:
        assert (np.diff(labels[line]) >= 0).all()
    assert np.array_equal(*lines) == (order == "label")
    if order == "label-score":
        first = lines[1][: np.sum(labels == 0)]
        assert (np.diff(first) < 0).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(89), "expected 90 numbers, one for each training example, got float64"),
        (np.full(90, -1.0), "expected finite numbers of at least 0"),
        (np.full(90, np.nan), "expected finite numbers"),
    ],
)
def test_a_wrong_file_is_found_before_the_first_step(tmp_path: Path, values: np.ndarray, message: str) -> None:
    np.save(tmp_path / "scores.npy", values)
    config = small_config(tmp_path / "run", mode="static", static_scores=str(tmp_path / "scores.npy"))
    with pytest.raises(ValueError, match=message):
        fit(config, dataset=blobs())


@pytest.mark.slow
def test_a_run_with_augmentation_learns_and_plans_what_its_scoring_costs(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    config = small_config(tmp_path / "run", augment="test_build:flipped", steps=20)
    result = fit(config, dataset=blobs(), observe=seen.append)
    assert result.step == 20
    assert seen[0]["event"] == "plan"
    assert seen[0]["seconds_per_refresh"] > 0


@pytest.mark.slow
def test_a_run_with_weighted_examples_outlives_its_first_refreshes(tmp_path: Path) -> None:
    """The sampler's state is donated at each step; the weights themselves are needed at each refresh."""
    np.save(tmp_path / "weights.npy", np.linspace(-1.0, 2.0, 90))
    config = small_config(tmp_path / "run", example_weights=str(tmp_path / "weights.npy"), refresh_every=10, steps=20)
    assert fit(config, dataset=blobs()).step == 20


def test_a_worker_in_another_folder_finds_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders beside the trainer, at home, and named by the environment are those of the trainer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", "prepared")

    def folders(**named: str) -> tuple[str | None, str | None]:
        made: Any = build.job_elsewhere(small_config("run", **named), None, None, None)
        assert made.func is build.worker_job
        return made.args[0].data.data_dir, made.args[0].data.raw_dir

    assert folders(data_dir="data") == (str(tmp_path / "data"), None)
    assert folders(data_dir="~/data", raw_dir="raw") == (str(Path.home() / "data"), str(tmp_path / "raw"))
    assert folders() == (str(tmp_path / "prepared"), None)


@pytest.mark.slow
def test_a_data_set_of_ones_own_is_sent_along() -> None:
    job, fingerprint = build.job_elsewhere(small_config("run"), blobs(), None, None)()
    np.testing.assert_array_equal(job.data["features"], blobs().train["features"])
    assert fingerprint == blobs().fingerprint
