import jax
import jax.numpy as jnp
import numpy as np
import pytest

from isgd_jax.gradients.sketches import project
from isgd_jax.sampling import clusters, samplers


@pytest.fixture(scope="module")
def blobs() -> tuple[jax.Array, np.ndarray]:
    """Directions around 6 far-apart axes, and which axis each belongs to."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 6, 600)
    return jnp.asarray(np.eye(8)[group] + 0.05 * rng.normal(size=(600, 8)), jnp.float32), group


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blobs", "all alike", "zeros"])
def test_an_order_is_a_permutation(blobs: tuple[jax.Array, np.ndarray], name: str) -> None:
    sketches = {"blobs": blobs[0], "all alike": jnp.ones((600, 8)), "zeros": jnp.zeros((600, 8))}[name]
    for scores in (jnp.ones(600), jnp.zeros(600), jnp.zeros(600).at[3].set(1e30)):
        order = clusters.by_cells(jax.random.key(0), sketches, scores, num_cells=16, rounds=3)
        np.testing.assert_array_equal(np.sort(order), np.arange(600))


@pytest.mark.slow
def test_cells_keep_similar_directions_together(blobs: tuple[jax.Array, np.ndarray]) -> None:
    order = clusters.by_cells(jax.random.key(0), blobs[0], jnp.ones(600), num_cells=24)
    changes = np.sum(np.diff(blobs[1][np.asarray(order)]) != 0)
    assert changes == 5  # the chain leaves each of the 6 groups once


def test_a_chain_walks_along_a_line() -> None:
    places = jnp.asarray([3.0, 0.0, 2.0, 1.0, 4.0])
    assert clusters.chain(places[:, None]).tolist() == [4, 0, 2, 3, 1]


def test_where_a_chain_begins_is_no_matter_of_rounding() -> None:
    """Unit vectors, as cells of one example are, each with another last bit on other devices: one walk."""
    rng = np.random.default_rng(0)
    places = rng.normal(size=(16, 8))
    places /= np.linalg.norm(places, axis=1, keepdims=True)
    rounded = places * (1.0 + 2e-7 * rng.choice([-1.0, 0.0, 1.0], size=(20, 16, 1)))
    walks = np.asarray(jax.jit(jax.vmap(clusters.chain))(jnp.asarray(rounded, jnp.float32)))
    np.testing.assert_array_equal(walks, np.broadcast_to(walks[0], walks.shape))


def test_sketches_preserve_inner_products_of_directions() -> None:
    rng = np.random.default_rng(0)
    grads = {"w": jnp.asarray(rng.normal(size=(40, 20, 5)), jnp.float32), "b": jnp.ones((40, 5))}
    found = project(jax.random.key(0), grads, dims=512)
    flat = np.concatenate([np.asarray(grads["b"]), np.asarray(grads["w"]).reshape(40, -1)], axis=1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    # Errors have a standard deviation of sqrt(1/512) = 0.044 for products and 0.063 for norms: 4.7 of those.
    np.testing.assert_allclose(np.asarray(found @ found.T), flat @ flat.T, atol=0.3)


def test_a_gradient_of_zero_has_the_sketch_zero() -> None:
    assert not np.any(np.asarray(project(jax.random.key(0), {"w": jnp.zeros((3, 4))}, dims=8)))


def test_more_cells_than_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="num_cells"):
        clusters.by_cells(jax.random.key(0), jnp.ones((4, 2)), jnp.ones(4), num_cells=5)


@pytest.mark.slow
def test_an_order_by_cells_lowers_the_variance(blobs: tuple[jax.Array, np.ndarray]) -> None:
    directions, masses = blobs[0], jnp.full(600, 1 / 600)

    def variance(order: jax.Array | None) -> float:
        law = samplers.prepare(masses, order)
        draw = jax.vmap(lambda key: samplers.stratified(key, law, num_draws=24).indices)
        means = jnp.mean(directions[draw(jax.random.split(jax.random.key(1), 2000))], axis=1)
        return float(jnp.sum(jnp.var(means, axis=0)))

    assert variance(clusters.by_cells(jax.random.key(0), directions, masses, num_cells=24)) < 0.2 * variance(None)
