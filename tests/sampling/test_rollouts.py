"""Numbers of rollouts against closed forms: the least variance, whole counts, an unbiased estimate, what is learnt."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from sampling_problem import unchecked
from scipy import optimize

import isgd_jax as isgd
from isgd_jax import rollouts
from isgd_jax.types import Draw

N = 6
RNG = np.random.default_rng(0)
DEVIATION = RNG.lognormal(0.0, 1.0, N)
MEAN = 0.5 * RNG.lognormal(0.0, 1.0, N)
SECOND = DEVIATION**2 + MEAN**2
COSTS = np.linspace(1.0, 8.0, N)
TARGET = np.array([0.3, -0.2, 0.1, 0.1, 0.2, 0.1])


def f32(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _variance(counts: np.ndarray) -> float:
    """Of the estimate, where each count is rounded by a coin of its own; its share of whole counts is left out."""
    parts = np.where(counts >= 1.0, DEVIATION**2 / counts, SECOND / counts - MEAN**2)
    return float(np.sum(TARGET**2 * parts))


def test_counts_without_floors_are_the_closed_form() -> None:
    counts = rollouts.expected_counts(f32(DEVIATION**2), num_rollouts=60, costs=f32(COSTS), floors=1e-3)
    wanted = DEVIATION / np.sqrt(COSTS)
    np.testing.assert_allclose(counts, 60 * wanted / wanted.sum(), rtol=1e-5)


@pytest.mark.parametrize(("num_rollouts", "floor"), [(12, 1.0), (12, 2.0), (9, 0.5), (3, 0.1)])
def test_counts_have_the_least_variance_with_floors_and_below_one(num_rollouts: int, floor: float) -> None:
    given = {"second_moments": f32(SECOND), "target": f32(TARGET), "floors": floor}
    counts = np.asarray(rollouts.expected_counts(f32(DEVIATION**2), num_rollouts=num_rollouts, **given), np.float64)
    assert counts.sum() == pytest.approx(num_rollouts, rel=1e-5)
    assert counts.min() >= floor * (1 - 1e-5)
    best = min(
        optimize.minimize(
            _variance, start, bounds=[(floor, num_rollouts)] * N, method="SLSQP", options={"maxiter": 500},
            constraints={"type": "eq", "fun": lambda x: x.sum() - num_rollouts},
        ).fun
        for start in (np.full(N, num_rollouts / N), counts)
    )  # fmt: skip
    assert _variance(counts) <= best * (1 + 1e-4)


def test_counts_of_a_draw_are_whole_and_the_estimate_is_unbiased_with_its_variance() -> None:
    # 20,000 steps with normal rollouts. Counts are the floor or the ceiling and right on average, the estimate is
    # right within 4.5 standard errors, and its variance is that of the closed form within 5 %: of the floors' term in
    # it the rounding of counts above one has its share, at most TARGET² MEAN² / (4 m²).
    counts = rollouts.expected_counts(
        f32(DEVIATION**2), num_rollouts=9, second_moments=f32(SECOND), target=f32(TARGET), floors=0.4
    )
    steps = 20_000

    @jax.vmap
    def step(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        drawn = rollouts.draw(key, counts, num_rollouts=9, target=f32(TARGET))
        at = drawn.indices
        noise = jax.random.normal(jax.random.fold_in(key, 1), at.shape)
        found = jnp.mean(drawn.target / drawn.probs * (f32(MEAN)[at] + f32(DEVIATION)[at] * noise))
        return jnp.bincount(at, length=N), found

    whole, found = jax.jit(step)(jax.random.split(jax.random.key(0), steps))
    expected, whole = np.asarray(counts, np.float64), np.asarray(whole)
    assert np.all((whole >= np.floor(expected)) & (whole <= np.ceil(expected)))
    np.testing.assert_array_equal(whole.sum(axis=1), 9)
    assert np.all(np.abs(whole.mean(axis=0) - expected) <= 4.5 * 0.5 / np.sqrt(steps))
    error = float(found.std()) / np.sqrt(steps)
    assert abs(float(found.mean()) - float(TARGET @ MEAN)) <= 4.5 * error
    most = _variance(expected) + np.sum((TARGET * MEAN)[expected >= 1] ** 2 / (4 * expected[expected >= 1] ** 2))
    assert float(found.var()) <= 1.05 * most


def _draw(indices: Any) -> Draw:
    indices = jnp.asarray(indices, jnp.int32)
    return Draw(indices, jnp.full(indices.shape, 1.0 / N), jnp.ones(indices.shape, bool))


@functools.partial(jax.jit, static_argnames="memory")
def _learnt(stats: Any, indices: jax.Array, vectors: jax.Array, *, version: int, memory: float = 0.5) -> Any:
    products = rollouts.pair_products(vectors @ vectors.T, indices)
    drawn, norms = _draw(indices), jnp.sqrt(jnp.sum(vectors**2, axis=1))
    return rollouts.observe(stats, drawn, norms, products, version=version, memory=memory)


def _observed(stats: Any, indices: np.ndarray, vectors: np.ndarray, **options: Any) -> Any:
    return _learnt(stats, jnp.asarray(indices, jnp.int32), f32(vectors), **options)


def test_pilots_teach_moments_and_allocate_within_five_percent_of_the_least() -> None:
    rng = np.random.default_rng(1)
    indices, stats = np.repeat(np.arange(N), 8), rollouts.create(N)
    mean = MEAN[:, None] * np.eye(N, 4)
    for version in range(60):
        vectors = mean[indices] + DEVIATION[indices, None] / 2 * rng.normal(size=(len(indices), 4))
        stats = _observed(stats, indices, vectors, version=version, memory=0.9)
    known = rollouts.moments(stats, version=60)
    np.testing.assert_allclose(known.second, SECOND, rtol=0.25)
    np.testing.assert_allclose(known.variance, DEVIATION**2, rtol=0.35)
    given = {"num_rollouts": 24, "target": f32(TARGET), "floors": 0.5}
    found = rollouts.expected_counts(known.variance, second_moments=known.second, **given)
    best = rollouts.expected_counts(f32(DEVIATION**2), second_moments=f32(SECOND), **given)
    assert _variance(np.asarray(found)) <= 1.05 * _variance(np.asarray(best))
    old = rollouts.moments(stats, version=200, max_age=100)  # none is trusted: all are alike
    np.testing.assert_allclose(rollouts.expected_counts(old.variance, num_rollouts=12), np.full(N, 2.0), rtol=1e-5)


def test_scores_and_products_are_of_the_last_rollouts_once_a_step() -> None:
    stats = _observed(rollouts.create(N), np.array([0, 0, 1]), np.array([[3.0], [5.0], [2.0]]), version=0)
    np.testing.assert_allclose(stats.scores[:3], [np.sqrt(17.0), 2.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose([stats.products[0], stats.pairs[0], stats.pairs[1]], [30.0, 2.0, 0.0])
    again = _observed(stats, np.array([0, 0]), np.array([[1.0], [1.0]]), version=11)
    np.testing.assert_allclose(again.scores[0], np.sqrt(0.5 * 17.0 + 0.5), rtol=1e-6)
    np.testing.assert_allclose([again.products[0], again.pairs[0]], [0.5 * 30.0 + 2.0, 0.5 * 2.0 + 2.0])
    spoilt = _observed(stats, np.array([0, 0, 1]), np.array([[np.nan], [1.0], [np.inf]]), version=12, memory=0.0)
    np.testing.assert_allclose(spoilt.scores[:2], [1.0, 2.0])
    np.testing.assert_allclose(spoilt.pairs[:2], [0.0, 0.0])
    np.testing.assert_array_equal(spoilt.version[:3], [12, 0, -1])
    nothing = rollouts.moments(rollouts.create(N), version=0)
    np.testing.assert_allclose(rollouts.expected_counts(nothing.variance, num_rollouts=12), np.full(N, 2.0), rtol=1e-5)


def test_prompts_without_variance_keep_their_floors_and_the_rest_is_shared() -> None:
    counts = rollouts.expected_counts(f32([0.0, 0.0, 1.0, 3e38, 0.0, 0.0]), num_rollouts=20, floors=0.5)
    np.testing.assert_allclose(counts[jnp.array([0, 1, 4, 5])], 0.5, rtol=1e-2)
    flat = rollouts.expected_counts(jnp.zeros(N), num_rollouts=3, floors=0.1)
    np.testing.assert_allclose(flat, np.full(N, 0.5), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"floors": 3.0}, "floors sum to 18, more than the 12"),
        ({"floors": 0.0}, "prompt 0 is not"),
        ({"costs": f32([1, 1, 0, 1, 1, 1])}, "costs must be finite as float32 and above 0, got 0.0 at 2"),
        ({"variance": f32([1, -1, 1, 1, 1, 1])}, "variance must be .* got -1.0 at 1"),
        ({"target": jnp.ones(3)}, r"target must have one number a prompt, \[6\]"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with unchecked(), pytest.raises(ValueError, match=message):
        rollouts.expected_counts(**{"variance": jnp.ones(N), "num_rollouts": 12, **changes})


def test_what_cannot_be_seen_is_nan_and_so_are_the_draws() -> None:
    compiled = jax.jit(lambda x, floor: rollouts.expected_counts(x, num_rollouts=12, floors=floor))
    np.testing.assert_allclose(compiled(jnp.ones(N), jnp.ones(N)), 2.0)
    assert jnp.all(jnp.isnan(compiled(jnp.ones(N), jnp.full(N, 3.0))))
    counts = compiled(jnp.ones(N).at[0].set(-1.0), jnp.ones(N))
    drawn = jax.jit(lambda key, counts: rollouts.draw(key, counts, num_rollouts=12))(jax.random.key(0), counts)
    assert jnp.all(jnp.isnan(drawn.probs))


@pytest.mark.slow
def test_lazy_gradients_tell_the_same_as_the_definition() -> None:
    def loss_fn(params: jax.Array, example: dict[str, jax.Array]) -> jax.Array:
        return -example["reward"] * jax.nn.log_softmax(example["x"] @ params)[example["action"]]

    indices = jnp.array([0, 0, 2, 2, 2, 5])
    keys = jax.random.split(jax.random.key(0), 2)
    batch = {
        "x": jax.random.normal(keys[0], (N, 3))[indices],
        "reward": jnp.arange(6.0) - 2.0,
        "action": jnp.arange(6) % 4,
    }
    params = jax.random.normal(keys[1], (3, 4))
    grads = isgd.per_example_grads(loss_fn)(params, batch)
    rows = np.asarray(isgd.stack(grads)).reshape(6, -1)
    sums = np.stack([rows[np.asarray(indices) == i].sum(axis=0) for i in np.asarray(indices)])
    wanted = np.sum(rows * (sums - rows), axis=1)
    np.testing.assert_allclose(rollouts.pair_products(isgd.gram(grads), indices), wanted, rtol=1e-4, atol=1e-5)


def test_a_floor_may_be_any_number() -> None:  # such as a share of NumPy's, which was taken for an array
    variance = np.array([1.0, 4.0, 9.0], np.float32)
    for floor in (np.float32(0.25), jnp.float32(0.25)):
        with unchecked():
            found = rollouts.expected_counts(variance, num_rollouts=np.uint8(12), floors=floor)
        wanted = rollouts.expected_counts(variance, num_rollouts=12, floors=0.25)
        assert found.tolist() == wanted.tolist()


@pytest.mark.devices(4)
def test_what_was_seen_and_norms_may_come_split_over_an_explicit_mesh() -> None:
    """As norms do where the batch of rollouts is split; what was seen comes out as it came."""

    @jax.jit
    def step(stats: Any, norms: Any) -> Any:
        counts = jnp.linspace(1.0, 2.0, 8)
        draw = rollouts.draw(jax.random.key(0), counts, num_rollouts=12)
        products = rollouts.pair_products(jnp.ones((12, 12), jnp.float32), draw.indices)
        stats = rollouts.observe(stats, draw, norms, products, version=1)
        return stats, rollouts.moments(stats, version=2)

    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    split = NamedSharding(mesh, PartitionSpec("data"))
    given = rollouts.create(8), jnp.linspace(0.5, 3.0, 12)
    alone, several = step(*given), step(*jax.device_put(given, split))
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(several), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert several[0].scores.sharding == split
