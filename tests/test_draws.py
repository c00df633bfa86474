"""How a step draws: in halves, by the gate, by candidates; always without bias."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from isgd_jax import candidates, draws, step
from isgd_jax.reweight import importance_weighting
from isgd_jax.sampling import proposal, samplers
from isgd_jax.variance import gate

N, DRAWS = 24, 5
NORMS = jnp.asarray(np.random.default_rng(0).lognormal(0, 1, N), jnp.float32)


def state(*, at: int = 0, is_open: bool = True) -> step.TrainState:
    tx = optax.chain(importance_weighting(N), optax.sgd(0.1))
    made = step.init_state({"w": jnp.zeros(3)}, tx, N, num_draws=DRAWS)
    shut = made.watch.gate._replace(is_open=jnp.asarray(is_open))
    return made._replace(step=jnp.int32(at), watch=made.watch._replace(gate=shut))


def frozen(sampler: str = "stratified") -> proposal.Frozen:
    law = samplers.prepare(proposal.smooth(NORMS, mixture=0.2)[0])
    law = samplers.capped(law, num_draws=DRAWS) if sampler == "systematic" else law
    return proposal.Frozen(law, jnp.float32(0.2), NORMS, jnp.zeros(N, jnp.int32))


def mean_of(choose: draws.Choose, law: Any, at: step.TrainState, data: Any = None, runs: int = 20_000) -> np.ndarray:
    """z of the weighted mean of N indicator gradients over many draws: each must be 1 in the mean."""

    def one(key: jax.Array) -> jax.Array:
        draw = choose(key, law, at, data).draw
        return jnp.zeros(N).at[draw.indices].add(jnp.where(draw.mask, 1 / (DRAWS * draw.probs), 0.0)) / 1.0

    found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), runs)), np.float64)
    return (found.mean(axis=0) - 1) / (found.std(axis=0) / np.sqrt(runs) + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("sampler", ["stratified", "systematic", "poisson"])
def test_draws_are_unbiased(sampler: str, at: int, is_open: bool) -> None:
    # 24 examples, each within 4.5 standard errors of 20,000 batches: in halves or whole, gate open or shut.
    choose = draws.make_choose(
        getattr(samplers, sampler), num_draws=DRAWS, is_watched=True, is_apart=False, is_gated=True
    )
    assert np.all(np.abs(mean_of(choose, frozen(sampler), state(at=at, is_open=is_open))) < 4.5)


@pytest.mark.slow
@pytest.mark.parametrize("promise", [1.0, 100.0])
def test_draws_from_candidates_are_unbiased(promise: float) -> None:
    choose = candidates.make_choose(
        samplers.uniform, lambda params, batch: batch, num_draws=DRAWS, candidates=4, mixture=0.1, is_gated=True
    )
    at = state()
    at = at._replace(watch=at.watch._replace(promise=jnp.float32(promise)))
    assert np.all(np.abs(mean_of(choose, samplers.prepare(jnp.ones(N) / N), at, NORMS)) < 4.5)


@pytest.mark.slow
def test_candidates_are_scored_only_while_they_promise_enough() -> None:
    choose = candidates.make_choose(
        samplers.uniform, lambda params, batch: batch, num_draws=DRAWS, candidates=4, mixture=0.1, is_gated=True
    )
    law, at = samplers.prepare(jnp.ones(N) / N), state()
    by_chance = choose(jax.random.key(0), law, at, NORMS).draw
    np.testing.assert_allclose(by_chance.probs, 1 / N, rtol=1e-6)
    eager = at._replace(watch=at.watch._replace(promise=jnp.float32(100.0)))
    assert float(jnp.std(choose(jax.random.key(0), law, eager, NORMS).draw.probs)) > 0


@pytest.mark.slow
def test_the_halves_of_a_watched_step_are_drawn_apart() -> None:
    """Stratified halves: 2 and 3 strata, so that the first two draws alone cover the whole line."""
    choose = draws.make_choose(samplers.stratified, num_draws=DRAWS, is_watched=True, is_apart=False, is_gated=False)
    law = samplers.prepare(jnp.full(1000, 1e-3))
    watched, whole = (choose(jax.random.key(3), law, state(at=at), None) for at in (4, 5))
    assert bool(watched.is_apart)
    assert not bool(whole.is_apart)
    assert [int(i) // 500 for i in watched.draw.indices[:2]] == [0, 1]
    assert [int(i) // 200 for i in whole.draw.indices] == [0, 1, 2, 3, 4]


def test_a_shut_gate_still_hears_of_the_proposal() -> None:
    choose = draws.make_choose(samplers.stratified, num_draws=DRAWS, is_watched=True, is_apart=False, is_gated=True)
    law = frozen()
    choice = choose(jax.random.key(0), law, state(is_open=False), None)
    np.testing.assert_allclose(choice.draw.probs, 1 / N, rtol=1e-6)
    np.testing.assert_allclose(choice.proposed, samplers.probabilities(law.law)[choice.draw.indices], rtol=1e-6)


def test_the_reason_of_the_gate_names_the_numbers() -> None:
    band = gate.Band(jnp.float32(1.5), jnp.float32(1.2), jnp.float32(1.8))
    assert gate.reason(False, band) == "STALE/UNIFORM is 1.50 [1.20, 1.80]: the scores do harm, draws are uniform"
