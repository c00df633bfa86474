"""Importance sampling changes how fast a minimum is reached, not which: against oracles in float64.

Weights that change the target move the minimum of a strictly convex loss, and on separable data they turn the direction
for a long while (Byrd & Lipton 2019, "What is the effect of importance weighting in deep learning?"). Draws by score
weighted by 1/(N q) change no target.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import root

import isgd_jax as isgd

pytestmark = pytest.mark.slow

N, M, RIDGE = 60, 8, 0.02


def data(margin: float) -> dict[str, np.ndarray]:
    """Two classes of points in the plane, with outliers along one axis; ``margin`` keeps them apart."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(8 * N, 2)) * np.exp(rng.normal(size=(8 * N, 1)))
    side = x @ np.array([0.8, 0.6]) + (0.7 * rng.normal(size=8 * N) if margin == 0.0 else 0.0)
    kept = np.flatnonzero(np.abs(side) > margin)[:N]
    return {"x": x[kept].astype(np.float32), "y": np.sign(side[kept]).astype(np.float32)}


def gradient(w: np.ndarray, train: dict[str, np.ndarray], share: np.ndarray, ridge: float) -> np.ndarray:
    """Of sum(share * log(1 + exp(-y w·x))) + ridge/2 |w|²."""
    x, y = train["x"].astype(np.float64), train["y"].astype(np.float64)
    return -(share * y / (1.0 + np.exp(y * (x @ w)))) @ x + ridge * w


def descended(train: dict[str, np.ndarray], share: np.ndarray, rate: float, num_steps: int) -> np.ndarray:
    """Full gradient descent without a ridge, in float64."""
    w = np.zeros(2)
    for _ in range(num_steps):
        w = w - rate * gradient(w, train, share, 0.0)
    return w


def drawn(train: dict[str, np.ndarray], ridge: float, rate: Any, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """By `fit`, with few uniform draws; the parameters, and the probabilities that were drawn with at the end."""

    def loss_fn(w: jax.Array, example: Any) -> jax.Array:
        return jax.nn.softplus(-example["y"] * (example["x"] @ w)) + 0.5 * ridge * jnp.sum(w * w)

    sampler = isgd.importance_sampler(N, batch_size=M, uniform_fraction=0.05)
    tx = optax.chain(isgd.importance_weighting(N), optax.scale_by_schedule(lambda count: -rate(count)))
    result = isgd.fit(
        isgd.Problem(loss_fn, jnp.zeros(2), train),
        sampler,
        tx,
        num_steps=num_steps,
        key=jax.random.key(0),
        callbacks=[],
        refresh_every=25,
        step_cost=1.0,
    )
    masses = np.asarray(result.state.sampler.proposal.law.masses, np.float64)
    return np.asarray(result.params, np.float64), masses / masses.sum()


@jax.numpy_dtype_promotion("standard")  # optax's own arithmetic mixes types
def test_the_minimum_of_a_strictly_convex_loss_is_that_of_all_examples_alike() -> None:
    """Within 2 % of its norm; the minimum of what is drawn, unweighted, is five times as far."""
    train, num_steps = data(0.0), 2400
    w, probs = drawn(train, RIDGE, optax.cosine_decay_schedule(0.5, num_steps), num_steps)
    alike = np.full(N, 1.0 / N)
    minimum, biased = (root(gradient, np.zeros(2), (train, share, RIDGE)).x for share in (alike, probs))
    assert np.linalg.norm(gradient(minimum, train, alike, RIDGE)) < 1e-9
    size = np.linalg.norm(minimum)
    assert np.linalg.norm(w - minimum) < 0.02 * size
    assert np.linalg.norm(biased - minimum) > 0.1 * size
    assert probs.max() > 3.0 / N


def angle(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.arccos(np.clip(one @ other / np.linalg.norm(one) / np.linalg.norm(other), -1.0, 1.0)))


def test_on_separable_data_the_direction_is_that_of_gradient_descent() -> None:
    """After as many steps at the same rate, within a hundredth; unweighted draws would have turned it further."""
    train, num_steps, rate = data(0.15), 800, 0.5
    w, probs = drawn(train, 0.0, lambda count: rate, num_steps)
    alike = np.full(N, 1.0 / N)
    plain, biased = (descended(train, share, rate, num_steps) for share in (alike, probs))
    assert np.all(train["y"] * (train["x"] @ w) > 0)
    assert angle(w, plain) < 0.01
    assert abs(np.linalg.norm(w) / np.linalg.norm(plain) - 1.0) < 0.02
    assert angle(biased, plain) > 0.03
