"""What a configuration is made into: targets, static scores, augmentation."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import blobs, small_config

from isgd_jax import assembly
from isgd_jax.app import task
from isgd_jax.app.clock import Clock
from isgd_jax.app.run import fit

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("hardly_optimised")]


def flipped(key: jax.Array, example: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Another picture: the features, or their reverse."""
    is_flipped = jax.random.bernoulli(key)
    return {**example, "features": jnp.where(is_flipped, example["features"][::-1], example["features"])}


def mean_update(config: Any, runs: int, *, learning_rate: float) -> tuple[Any, Any, Any]:
    """The first update of many runs that differ in their draws alone, divided by the rate: mean gradient and error."""
    work = task.make(config, blobs())
    train = jax.device_put(dict(work.train))
    parts = assembly.assemble(config, work, train, num_steps=1)
    state, _ = parts.laws.before(0, parts.state, Clock())

    @jax.jit
    def one(key: jax.Array) -> Any:
        after, _ = parts.updates.update.__wrapped__(state, parts.laws.law, train, key, jnp.float32(0))
        return jax.tree.map(lambda a, b: (a - b) / learning_rate, state.params, after.params)

    found = jax.lax.map(one, jax.random.split(jax.random.key(5), runs), batch_size=100)
    return jax.tree.map(lambda x: (jnp.mean(x, 0), jnp.std(x, 0) / runs**0.5), found), work, state


def test_weighted_targets_are_unbiased(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=90).astype(np.float32)
    np.save(tmp_path / "a.npy", weights)
    config = small_config(tmp_path / "run", example_weights=str(tmp_path / "a.npy"), optimizer="sgd", learning_rate=0.1)
    found, work, state = mean_update(config, 2000, learning_rate=0.1)

    def target(params: Any) -> jax.Array:
        return jnp.vdot(weights, jax.vmap(work.loss_fn, (None, 0))(params, dict(work.train)), precision="highest")

    for (mean, error), true in zip(
        jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, tuple)), jax.tree.leaves(jax.grad(target)(state.params)),
        strict=True,
    ):  # fmt: skip
        assert float(jnp.max(jnp.abs(mean - true) / (error + 1e-6))) < 5  # some 100 numbers


def test_augmented_draws_are_unbiased_for_the_augmented_loss(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", augment="test_assembly:flipped", optimizer="sgd", learning_rate=0.1)
    found, work, state = mean_update(config, 2000, learning_rate=0.1)
    train = dict(work.train)
    pictures = [train, {**train, "features": train["features"][:, ::-1]}]

    def target(params: Any) -> jax.Array:
        return jnp.mean(jnp.stack([jax.vmap(work.loss_fn, (None, 0))(params, picture) for picture in pictures]))

    for (mean, error), true in zip(
        jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, tuple)), jax.tree.leaves(jax.grad(target)(state.params)),
        strict=True,
    ):  # fmt: skip
        assert float(jnp.max(jnp.abs(mean - true) / (error + 1e-6))) < 5


def test_static_scores_are_the_law(tmp_path: Path) -> None:
    scores = np.arange(90.0)
    np.save(tmp_path / "scores.npy", scores)
    config = small_config(tmp_path / "run", mode="static", static_scores=str(tmp_path / "scores.npy"), mixture=0.2)
    work = task.make(config, blobs())
    parts = assembly.assemble(config, work, jax.device_put(dict(work.train)), num_steps=1)
    masses = np.zeros(90)
    masses[np.asarray(parts.laws.proposal.order)] = parts.laws.proposal.masses
    np.testing.assert_allclose(masses, 0.8 * scores / scores.sum() + 0.2 / 90, rtol=1e-5)


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


def test_a_run_with_augmentation_learns_and_plans_what_its_scoring_costs(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    config = small_config(tmp_path / "run", augment="test_assembly:flipped", steps=20)
    result = fit(config, dataset=blobs(), observe=seen.append)
    assert result.step == 20
    assert seen[0]["event"] == "plan"
    assert seen[0]["seconds_per_refresh"] > 0


def test_a_run_with_weighted_examples_outlives_its_first_refreshes(tmp_path: Path) -> None:
    """The state of the transform is donated at each step; the weights themselves are needed at each refresh."""
    np.save(tmp_path / "weights.npy", np.linspace(-1.0, 2.0, 90))
    config = small_config(tmp_path / "run", example_weights=str(tmp_path / "weights.npy"), refresh_every=10, steps=20)
    assert fit(config, dataset=blobs()).step == 20
