"""Samplers whose proposal never changes: epochs, uniform draws, scores of one's own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_problem as problem

import isgd_jax as isgd

N, M = 11, 4


def _walk(sampler: isgd.BatchSampler, steps: int, seed: int = 0) -> np.ndarray:
    """The indices of so many steps, [steps, m]."""
    sample, observe = jax.jit(sampler.sample), jax.jit(sampler.observe)
    state, drawn = sampler.init(jax.random.key(seed)), []
    for at in range(steps):
        draw = sample(jax.random.key(at), state)
        drawn.append(np.asarray(draw.indices))
        state = observe(state, draw)
    return np.stack(drawn)


def test_an_epoch_takes_every_example_at_most_once() -> None:
    drawn = _walk(isgd.shuffled_epochs(N, batch_size=M), 8)
    epochs = drawn.reshape(4, -1)  # of 2 batches: 3 examples are left out of each
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 2 * M
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4, "another order each time"


def test_over_the_permutations_each_example_is_equally_likely_at_each_step() -> None:
    sampler = isgd.shuffled_epochs(N, batch_size=M)

    def both(key: Any) -> Any:
        state = sampler.init(key)
        return jnp.concatenate([sampler.sample(key, state, ahead=at).indices for at in (0, 1)])

    keys = 3000
    drawn = np.asarray(jax.jit(jax.vmap(both))(jax.random.split(jax.random.key(0), keys)))
    for half in (drawn[:, :M], drawn[:, M:]):
        share = np.bincount(half.reshape(-1), minlength=N) / keys
        error = np.sqrt(M / N * (1 - M / N) / keys)
        assert np.all(np.abs(share - M / N) < 4.5 * error), "4.5 standard errors of a share"


def test_the_permutation_depends_on_seed_and_epoch_alone() -> None:
    sampler = isgd.shuffled_epochs(N, batch_size=M)
    one, again, other = _walk(sampler, 6), _walk(sampler, 6), _walk(sampler, 6, seed=1)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    state = sampler.init()
    first, second = (sampler.sample(jax.random.key(at), state).indices for at in (1, 2))
    np.testing.assert_array_equal(first, second)  # the key of the step does not matter


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["epochs", "uniform", "fixed"])
def test_draws_made_ahead_are_those_that_would_be_made_in_turn(kind: str) -> None:
    sampler = {
        "epochs": isgd.shuffled_epochs(N, batch_size=M, steps_per_update=3, example_weights=np.ones(N, np.float32)),
        "uniform": isgd.uniform_draws(N, batch_size=M, steps_per_update=3),
        "fixed": isgd.fixed(np.arange(N), batch_size=M, steps_per_update=3),
    }[kind]
    sample, observe = jax.jit(sampler.sample), jax.jit(sampler.observe)
    state = sampler.init()
    state = observe(state, sample(jax.random.key(9), state))  # not from the beginning
    keys = jax.random.split(jax.random.key(3), 9)  # over the end of several epochs
    ahead = [sample(key, state, ahead=jnp.int32(at)) for at, key in enumerate(keys)]
    for key, early in zip(keys, ahead, strict=True):
        draw = sample(key, state)
        assert not problem.unlike(draw, early, rtol=0.0)
        state = observe(state, draw)
    assert [int(draw.version) for draw in ahead] == [(1 + at) // 3 for at in range(9)]
    assert [bool(draw.in_halves) for draw in ahead] == [(1 + at) % 4 == 0 for at in range(9)]


def test_plain_draws_are_the_plain_mean_and_carry_example_weights() -> None:
    weights = np.linspace(-1.0, 1.0, N).astype(np.float32)
    for make in (isgd.shuffled_epochs, isgd.uniform_draws):
        plain, weighted = make(N, batch_size=M), make(N, batch_size=M, example_weights=weights)
        draw = plain.sample(jax.random.key(0), plain.init())
        np.testing.assert_allclose(draw.target / draw.probs, 1.0)
        draw = weighted.sample(jax.random.key(0), weighted.init())
        np.testing.assert_array_equal(draw.target, weights[np.asarray(draw.indices)])
        np.testing.assert_allclose(draw.probs, 1.0 / N)


@pytest.mark.slow
def test_fixed_draws_by_its_scores_and_never_learns_others() -> None:
    scores = np.arange(N, dtype=np.float64)
    sampler = isgd.fixed(scores, batch_size=M, uniform_fraction=0.2)
    state = sampler.init()
    exact = 0.8 * scores / scores.sum() + 0.2 / N
    np.testing.assert_allclose(isgd.samplers.probabilities(state.proposal.law), exact, rtol=1e-5)
    draw = sampler.sample(jax.random.key(0), state)
    after = sampler.observe(state, draw, norms=jnp.full(M, 50.0))
    for part in ("table", "proposal"):
        assert not problem.unlike(getattr(after, part), getattr(state, part), rtol=0.0)
    assert sampler.refresh(after) is after
    assert not sampler.is_scored


def test_without_a_monitor_they_learn_nothing_and_draw_no_halves() -> None:
    for sampler in (
        isgd.shuffled_epochs(N, batch_size=M, monitor=False),
        isgd.uniform_draws(N, batch_size=M, monitor=False),
        isgd.fixed(np.arange(N), batch_size=M, monitor=False, gate=False),
    ):
        state = sampler.init()
        draw = sampler.sample(jax.random.key(0), state)
        assert not bool(draw.in_halves)
        after = sampler.observe(state, draw, norms=jnp.ones(M))
        assert not problem.unlike(after._replace(clock=state.clock), state, rtol=0.0)


@pytest.mark.slow
def test_the_monitor_of_uniform_draws_against_all_gradients() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(N, 3)) + 1.0
    sampler, table = isgd.uniform_draws(N, batch_size=M), jnp.asarray(vectors, jnp.float32)

    def told(key: Any, state: Any) -> Any:
        draw = sampler.sample(key, state)
        after = sampler.observe(state, draw, {"w": table[draw.indices]}).monitor
        return after.steps.values[0, 0], after.squares.values[0, 0], after.batches.values[0, 0]

    keys = 4000
    found = jax.jit(jax.vmap(told, (0, None)))(jax.random.split(jax.random.key(1), keys), sampler.init())
    mean, second = vectors.mean(axis=0), np.mean(np.sum(vectors**2, axis=1))
    for values, truth in zip(found, (second, mean @ mean, second - mean @ mean), strict=True):
        values = np.asarray(values, np.float64)
        assert abs(values.mean() - truth) < 4.5 * values.std() / np.sqrt(keys), "4.5 standard errors"


def test_they_take_no_scores() -> None:
    for sampler in (isgd.shuffled_epochs(N, batch_size=M), isgd.fixed(np.ones(N), batch_size=M)):
        with pytest.raises(TypeError, match="proposal never changes, so it takes no scores"):
            sampler.record(sampler.init(), np.arange(2), np.ones(2, np.float32), version=0)
