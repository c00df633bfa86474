"""Presampling: many candidates scored, few learnt from."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampling_problem as problem
from jax.sharding import NamedSharding, PartitionSpec

import isgd_jax as isgd
from isgd_jax.sampling import candidates
from isgd_jax.sampling.presampler import KEPT

N, M = 9, 4
SCORES = np.r_[0.0, np.geomspace(0.1, 10.0, N - 1)].astype(np.float32)
DATA = {"score": jnp.asarray(SCORES)}


def scorer(params: Any, batch: Any) -> jax.Array:
    return batch["score"] * params


def _sampler(**options: Any) -> isgd.BatchSampler:
    return problem.jitted(isgd.presampling(N, scorer=scorer, **{"batch_size": M} | options))


def _share_of(draws: Any) -> np.ndarray:
    """1/probs over m, by example: [keys, N], of mean 1 for an unbiased estimate."""
    indices, probs = np.asarray(draws.indices), np.asarray(draws.probs)
    found = np.zeros((len(indices), N))
    np.add.at(found, (np.arange(len(indices))[:, None], indices), 1.0 / (probs * indices.shape[1]))
    return found


@pytest.mark.parametrize("way", ["by score", "by chance", "on the host"])
def test_the_mean_is_that_of_the_data_whatever_the_scores(way: str) -> None:
    weights = np.linspace(-1.0, 2.0, N).astype(np.float32)
    sampler = _sampler(gate=way == "by chance", example_weights=weights)
    state, keys = sampler.init(), jax.random.split(jax.random.key(0), 6000)

    def made(key: Any) -> Any:
        if way == "on the host":
            found = sampler.candidates(key, state)
            return sampler.resample(key, state, found, scorer(1.0, {"score": DATA["score"][found.indices]}))
        return sampler.sample(key, state, params=1.0, data=DATA)

    draws = jax.jit(jax.vmap(made))(keys)
    found = _share_of(draws)
    error = found.std(axis=0) / np.sqrt(len(keys))
    assert np.all(np.abs(found.mean(axis=0) - 1.0) < 4.5 * error), "4.5 standard errors by example"
    np.testing.assert_array_equal(draws.target, weights[np.asarray(draws.indices)])
    if way == "by chance":
        np.testing.assert_allclose(draws.probs, 1.0 / N)
    else:  # it does draw by score
        share = np.bincount(np.asarray(draws.indices).reshape(-1), minlength=N)
        assert share[-1] > 3 * share[0]


@pytest.mark.parametrize("way", ["by score", "on the host"])
def test_weights_of_the_target_are_drawn_by_with_the_scores(way: str) -> None:
    """Weights of one over the score: all candidates that have one are alike, and so are the draws of a half."""
    weights = np.where(SCORES > 0, 1 / np.maximum(SCORES, 0.1), 0.0).astype(np.float32)
    sampler = _sampler(example_weights=-weights, uniform_fraction=0.2, batch_size=8, gate=False)
    state, key = sampler.init(), jax.random.key(2)
    if way == "by score":
        draw = sampler.sample(key, state, params=1.0, data=DATA)
    else:
        found = sampler.candidates(key, state)
        draw = sampler.resample(key, state, found, SCORES[found.indices])
    for half in (slice(4), slice(4, 8)):
        picked = np.asarray(draw.probs)[half][SCORES[np.asarray(draw.indices)[half]] > 0]
        assert len(np.unique(SCORES[np.asarray(draw.indices)[half]])) > 1
        np.testing.assert_allclose(picked, picked[0], rtol=1e-5)


@pytest.mark.parametrize("size", [8, 9])
def test_with_more_candidates_than_examples_no_probability_is_above_one_nor_the_mean_off(size: int) -> None:
    """One example has nearly all of the score, and is not always among the candidates more than once."""
    sampler = _sampler(batch_size=size, gate=False)
    state, keys = sampler.init(), jax.random.split(jax.random.key(0), 6000)
    data = {"score": jnp.full(N, 0.01).at[7].set(1000.0)}
    draws = jax.jit(jax.vmap(lambda key: sampler.sample(key, state, params=1.0, data=data)))(keys)
    assert float(jnp.max(draws.probs)) <= 1.0 + 1e-6
    found = _share_of(draws)
    error = found.std(axis=0) / np.sqrt(len(keys))
    assert np.all(np.abs(found.mean(axis=0) - 1.0) < 4.5 * error), "4.5 standard errors by example"
    assert np.mean(np.asarray(draws.indices) == 7) > 3 / N


def test_data_of_another_number_of_examples_are_refused() -> None:
    """Look-ups beyond the last row give the last row, which was scored in the place of others."""
    sampler = _sampler()
    state, key = sampler.init(), jax.random.key(0)
    for rows in (N - 1, N + 1):
        with pytest.raises(ValueError, match=rf"leading axis {N}, one row for each example.*got shape \({rows},\)"):
            sampler.sample(key, state, params=1.0, data={"score": jnp.ones(rows)})


@pytest.mark.devices(4)
def test_data_split_over_an_explicit_mesh_give_the_draws_of_one_device() -> None:
    sampler = problem.jitted(isgd.presampling(8, batch_size=4, scorer=scorer, gate=False))
    state, key, scores = sampler.init(), jax.random.key(0), jnp.asarray(SCORES[:8])
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    alone, several = (
        sampler.sample(key, state, params=1.0, data={"score": x})
        for x in (scores, jax.device_put(scores, NamedSharding(mesh, PartitionSpec("data"))))
    )
    assert not problem.unlike(alone, several, rtol=1e-6)


@pytest.mark.slow
def test_the_two_steps_on_the_host_are_the_one_on_the_device() -> None:
    sampler = _sampler(gate=False)
    state, key = sampler.init(), jax.random.key(4)
    found = sampler.candidates(key, state)
    assert found.indices.shape == (4 * M,)
    apart = sampler.resample(key, state, found, DATA["score"][found.indices])
    whole = sampler.sample(key, state, params=1.0, data=DATA)
    assert not problem.unlike(apart, whole)
    with pytest.raises(ValueError, match="expected 16 scores, one a candidate; got \\(3,\\)"):
        sampler.resample(key, state, found, jnp.ones(3))


@pytest.mark.slow
def test_the_halves_of_a_batch_come_from_candidates_of_their_own() -> None:
    sampler = _sampler(gate=False)
    state = sampler.init()
    for at in range(6):
        found = np.asarray(sampler.candidates(jax.random.key(at), state).indices)
        drawn = np.asarray(sampler.sample(jax.random.key(at), state, params=1.0, data=DATA).indices)
        assert set(drawn[: M // 2]) <= set(found[: 2 * M])
        assert set(drawn[M // 2 :]) <= set(found[2 * M :])


@pytest.mark.slow
def test_halves_are_independent() -> None:
    vectors = jnp.where(jnp.arange(N) < N // 2, 1.0, -1.0) + 0.1
    sampler = _sampler(gate=False)
    state = sampler.init()

    def told(key: Any) -> Any:
        draw = sampler.sample(key, state, params=1.0, data=DATA)
        after = sampler.observe(state, draw, {"w": vectors[draw.indices][:, None]})
        return after.monitor.squares.values[0, 0]

    values = np.asarray(jax.jit(jax.vmap(told))(jax.random.split(jax.random.key(1), 4000)), np.float64)
    truth = float(np.mean(vectors)) ** 2
    assert abs(values.mean() - truth) < 4.5 * values.std() / np.sqrt(4000), "4.5 standard errors"


@pytest.mark.slow
def test_scores_that_are_none_count_as_nothing_known() -> None:
    bad = {"score": jnp.asarray([np.nan, np.inf, -1.0, *np.ones(N - 3)], jnp.float32)}
    sampler = _sampler(gate=False)
    for at in range(5):
        draw = sampler.sample(jax.random.key(at), sampler.init(), params=1.0, data=bad)
        assert np.all(np.isfinite(draw.probs))
        assert np.all(np.asarray(draw.probs) > 0.0)
        assert np.isfinite(draw.expected_speedup)


@pytest.mark.slow
def test_the_gate_scores_only_while_scores_promise_more_than_they_cost() -> None:
    sampler = _sampler(batch_size=32, candidates=2)
    sample, observe = sampler.sample, sampler.observe
    state, key, seen = sampler.init(), jax.random.key(0), []
    for at in range(60):
        draw = sample(jax.random.fold_in(key, at), state, params=1.0, data=DATA)
        after = observe(state, draw)
        mean = KEPT * state.gate.expected_speedup + (1.0 - KEPT) * draw.expected_speedup
        np.testing.assert_allclose(after.gate.expected_speedup, mean, rtol=1e-6)
        seen.append(not np.allclose(draw.probs, 1.0 / N))
        assert seen[-1] == bool(candidates.pays(state.gate.expected_speedup, candidates=2))
        state = after
    assert not seen[0]
    assert any(seen)


@pytest.mark.slow
def test_equal_scores_promise_nothing_so_none_are_made() -> None:
    sampler = _sampler()
    state = sampler.init()
    draw = sampler.sample(jax.random.key(0), state, params=1.0, data={"score": jnp.ones(N)})
    assert float(draw.expected_speedup) == pytest.approx(1.0)
    np.testing.assert_allclose(draw.probs, 1.0 / N)
    assert not bool(sampler.report(state).gate_is_open)
    assert bool(_sampler(gate=False).report(state).gate_is_open)


@pytest.mark.slow
def test_a_batch_of_odd_size_and_of_one() -> None:
    for size in (1, 3):
        sampler = _sampler(batch_size=size, gate=False)
        draw = sampler.sample(jax.random.key(0), sampler.init(), params=1.0, data=DATA)
        assert draw.indices.shape == (size,)
        assert bool(draw.in_halves) == (size > 1)


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("shape", [(24,), (6,), (), (12, 1)])
def test_a_scorer_of_another_shape_is_refused(shape: tuple[int, ...], is_gated: bool) -> None:
    """More scores than candidates were drawn from, and the mean was that of other examples."""
    sampler = isgd.presampling(
        N, batch_size=2 * M, candidates=3, gate=is_gated, scorer=lambda params, batch: jnp.ones(shape)
    )
    with pytest.raises(ValueError, match=r"presampling's scorer must give one score an example: expected \[.*\], got"):
        sampler.sample(jax.random.key(0), sampler.init(), params=1.0, data=DATA)


def test_it_needs_a_scorer_with_parameters_and_data_or_the_two_steps() -> None:
    blind = isgd.presampling(N, batch_size=M)
    with pytest.raises(TypeError, match=r"presampling\(scorer=.*candidates\(\) and resample\(\)"):
        blind.sample(jax.random.key(0), blind.init(), params=1.0, data=DATA)
    sampler = _sampler()
    for given in ({}, {"params": 1.0}, {"data": DATA}):
        with pytest.raises(TypeError, match=r"sample\(params=..., data=...\)"):
            sampler.sample(jax.random.key(0), sampler.init(), **given)


def test_data_may_be_of_numpy() -> None:  # which cannot be taken from by traced indices
    sampler = isgd.presampling(40, batch_size=4, scorer=lambda params, batch: params * batch, gate=False)
    data = {"params": np.float32(1.0), "data": np.arange(40, dtype=np.float32)}
    found = jax.eval_shape(lambda key: sampler.sample(key, sampler.init(), **data), jax.random.key(0))
    assert found.indices.shape == (4,)
