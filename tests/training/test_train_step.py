"""The jitted step against oracles: a linear model, whose gradients and their norms are known by hand."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import linear_loss, linear_problem
from sampling_problem import jitted

import isgd_jax as isgd
from isgd_jax.sampling import score_table
from isgd_jax.sampling.gates import with_gate
from isgd_jax.training.problem import Problem
from isgd_jax.training.train_step import LOOK_EVERY, Steps, TrainState, check_chain, make_steps

N, M = 40, 8
SKEWED = np.arange(1.0, N + 1.0)


def chain(learning_rate: float = 0.01) -> Any:
    return optax.chain(isgd.importance_weighting(N), optax.sgd(learning_rate))


def problem(**changes: Any) -> Problem:
    params, data = linear_problem(N)
    return Problem(**({"loss_fn": linear_loss, "params": params, "train": data} | changes))


def prepared(sampler: isgd.BatchSampler, *, tx: Any = None, **options: Any) -> tuple[TrainState, Any, Steps]:
    """The state before the first step, the data, and the functions."""
    made, tx = problem(), tx or chain()
    params = made.init(jax.random.key(0))
    return TrainState(params, tx.init(params), sampler.init()), made.train, make_steps(made, sampler, tx, **options)


@functools.cache
def scored() -> isgd.BatchSampler:
    """The same one for all: its functions are traced once, whatever program they are a part of."""
    return jitted(isgd.importance_sampler(N, batch_size=M, sampler="independent"))


def copied(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


@pytest.mark.slow
def test_it_traces_once_in_200_steps_and_their_refreshes(key: jax.Array) -> None:
    chex.clear_trace_counter()
    params, data = linear_problem(N)
    made = problem(loss_fn=chex.assert_max_traces(linear_loss, n=2))  # one by one, and together where the gate is shut
    sampler, tx = isgd.importance_sampler(N, batch_size=M), chain()
    steps, refresher = make_steps(made, sampler, tx), isgd.refresher(None, sampler, every=10, clock=lambda: 0.0)
    state = TrainState(made.init(key), tx.init(params), sampler.init())
    for at in range(200):
        state = state._replace(sampler=refresher(at, state.params, state.sampler))
        state, info = steps.step(state, None, data, key, jnp.float32(at))
    assert int(state.sampler.clock.step) == 200
    assert int(state.sampler.proposal.refreshes) == 20
    assert steps.step._cache_size() == 1
    assert np.isfinite(float(info.loss))


@pytest.mark.slow
def test_one_backward_pass_gives_update_and_fresh_scores(key: jax.Array) -> None:
    sampler = scored()
    state, data, steps = prepared(sampler)
    before = copied(state)
    after, info = steps.step(state, None, data, key, jnp.float32(2.5))
    draw = sampler.sample(key, before.sampler)
    params = before.params
    residual = data["x"] @ params["w"] + params["b"] - data["y"]
    norms = jnp.abs(residual) * jnp.sqrt(jnp.sum(data["x"] ** 2, axis=1) + 1)
    drawn, weights = draw.indices, 1 / (N * draw.probs)
    gradient = jnp.mean((weights * residual[drawn])[:, None] * data["x"][drawn], axis=0)
    chex.assert_trees_all_close(after.params["w"], params["w"] - 0.01 * gradient, rtol=1e-5)
    chex.assert_trees_all_close(info.loss, jnp.mean(weights * 0.5 * residual[drawn] ** 2), rtol=1e-5)
    table = after.sampler.table
    chex.assert_trees_all_close(table.scores[drawn], norms[drawn], rtol=1e-5)
    assert set(table.versions[drawn].tolist()) == {0}
    assert set(table.seconds[drawn].tolist()) == {2.5}
    untouched = jnp.setdiff1d(jnp.arange(N), drawn)
    assert set(table.versions[untouched].tolist()) == {score_table.NEVER}


@pytest.mark.slow
def test_scores_of_ones_own_take_the_place_of_norms_and_those_that_are_none_are_counted(key: jax.Array) -> None:
    def broken(losses: jax.Array, grads: object) -> jax.Array:
        return losses.at[0].set(jnp.nan)

    sampler = jitted(isgd.importance_sampler(N, batch_size=M, monitor=False))  # whole strata: no index is drawn twice
    state, data, steps = prepared(sampler, fresh_scores=broken)
    losses = jax.vmap(linear_loss, (None, 0))(state.params, data)
    drawn = sampler.sample(key, state.sampler).indices
    after, _ = steps.step(state, None, data, key, jnp.float32(0))
    assert int(after.sampler.quarantined) == 1
    chex.assert_trees_all_close(after.sampler.table.scores[drawn[1:]], losses[drawn[1:]], rtol=1e-5)
    assert int(after.sampler.table.versions[drawn[0]]) == score_table.NEVER


def test_the_draw_depends_on_key_and_step_alone(key: jax.Array) -> None:
    state, data, steps = prepared(scored())
    first, _ = steps.step(copied(state), None, data, key, jnp.float32(0))
    again, _ = steps.step(copied(state), None, data, key, jnp.float32(9))
    chex.assert_trees_all_equal(first.params, again.params)
    clock = state.sampler.clock._replace(step=jnp.int32(1))
    moved = state._replace(sampler=state.sampler._replace(clock=clock))
    later, _ = steps.step(copied(moved), None, data, key, jnp.float32(0))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(first.params, later.params)


def test_uniform_probabilities_recover_sgd(key: jax.Array) -> None:
    sampler = jitted(isgd.uniform_draws(N, batch_size=M))
    state, data, steps = prepared(sampler)
    plain, tx = copied(state).params, optax.sgd(0.01)
    opt_state = tx.init(plain)
    for _ in range(5):
        drawn = sampler.sample(key, state.sampler).indices
        batch = jax.tree.map(lambda x, drawn=drawn: x[drawn], data)
        grads = jax.grad(lambda p, b=batch: jnp.mean(jax.vmap(linear_loss, (None, 0))(p, b)))(plain)
        updates, opt_state = tx.update(grads, opt_state)
        plain = optax.apply_updates(plain, updates)
        state, _ = steps.step(state, None, data, key, jnp.float32(0))
    chex.assert_trees_all_close(state.params, plain, rtol=1e-5)


def shut(state: TrainState, step: int) -> TrainState:
    clock = state.sampler.clock._replace(step=jnp.int32(step))
    return copied(state._replace(sampler=with_gate(state.sampler, False)._replace(clock=clock)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stratified", "poisson"])
def test_while_the_gate_is_shut_the_update_is_that_of_the_ordinary_gradient_and_costs_no_norms(
    key: jax.Array, name: Any
) -> None:
    sampler = jitted(isgd.importance_sampler(N, batch_size=M, sampler=name, example_weights=SKEWED / SKEWED.sum()))
    state, data, steps = prepared(sampler)
    state = shut(state, LOOK_EVERY + 1)
    before = copied(state)
    after, info = steps.step(state, None, data, key, jnp.float32(0))
    drawn = sampler.sample(key, before.sampler)
    batch, weights = jax.tree.map(lambda x: x[drawn.indices], data), drawn.target / drawn.probs
    weights = weights if drawn.mask is None else jnp.where(drawn.mask, weights, 0.0)

    def mean_loss(params: Any) -> jax.Array:
        return jnp.mean(weights * jax.vmap(linear_loss, (None, 0))(params, batch))

    loss, gradient = jax.value_and_grad(mean_loss)(before.params)
    expected = jax.tree.map(lambda x, g: x - 0.01 * g, before.params, gradient)
    chex.assert_trees_all_close(after.params, expected, rtol=1e-6)
    chex.assert_trees_all_close(info.loss, loss, rtol=1e-6)
    moved = before.sampler._replace(clock=after.sampler.clock)
    chex.assert_trees_all_equal(after.sampler, moved)
    assert int(after.sampler.clock.step) == LOOK_EVERY + 2


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # optax's own arithmetic mixes types
def test_while_the_gate_is_shut_nothing_is_lost_in_float16_and_integers_stay(key: jax.Array) -> None:
    """Gradients of 1e-5: a 64th of one is no float16. The update is that of an open gate."""

    def loss_fn(params: Any, example: Any) -> jax.Array:
        small = jnp.float16(1e-5) * (params["w"] - example["x"].astype(jnp.float16))
        return small.astype(jnp.float32) + 0.0 * params["n"].astype(jnp.float32)

    size, made = 64, {"w": jnp.float16(0.0), "n": jnp.int32(3)}
    problem = Problem(loss_fn, made, {"x": jnp.zeros(size)})
    sampler, tx = (
        isgd.importance_sampler(size, batch_size=size),
        optax.chain(isgd.importance_weighting(size), optax.scale(-1e3)),
    )
    steps = make_steps(problem, sampler, tx)
    found = []
    for change in (copied, lambda state: shut(state, LOOK_EVERY + 1)):
        state = change(TrainState(problem.init(key), tx.init(made), sampler.init()))
        found.append(steps.step(state, None, problem.train, key, jnp.float32(0))[0].params)
    np.testing.assert_allclose(np.float32(found[1]["w"]), np.float32(found[0]["w"]), rtol=2e-3)
    np.testing.assert_allclose(np.float32(found[1]["w"]), -0.01, rtol=5e-3)
    assert int(found[0]["n"]) == int(found[1]["n"]) == 3


@pytest.mark.slow
def test_a_shut_gate_looks_again_every_fourth_step_and_opens(key: jax.Array) -> None:
    """Scores proportional to the norms, and a learning rate of 0: whatever shut the gate, the scores help."""
    data = problem().train
    norms = jnp.abs(data["x"].sum(axis=1) - data["y"]) * jnp.sqrt(jnp.sum(data["x"] ** 2, axis=1) + 1)
    sampler = jitted(isgd.importance_sampler(N, batch_size=M, uniform_fraction=0.1, calibrate=False, monitor=False))
    state, data, steps = prepared(sampler, tx=chain(0.0))
    scores = sampler.refresh(sampler.record(state.sampler, jnp.arange(N), norms, version=0))
    state, looked, opened = shut(state._replace(sampler=scores), 0), [], []
    for at in range(12 * LOOK_EVERY):
        seen = np.asarray(state.sampler.gate.window.values)
        state, info = steps.step(state, None, data, key, jnp.float32(0))
        looked += [at] if np.any(state.sampler.gate.window.values != seen) else []
        opened += [bool(info.gate_is_open)]
    first = opened.index(True)
    assert looked[:4] == [0, 4, 8, 12]
    assert first % LOOK_EVERY == 0
    assert looked[looked.index(first) :] == list(range(first, 12 * LOOK_EVERY))
    assert all(opened[first:])


def test_the_reported_loss_is_unbiased() -> None:
    """mean(weight * loss) averages to the mean loss, although hard examples are drawn more often.

    300 keys; within 4 standard errors. The raw mean of what is drawn would be half as large again.
    """
    made, tx = problem(), chain()
    losses = np.asarray(jax.vmap(linear_loss, (None, 0))(made.params, made.train))
    sampler = isgd.fixed(losses, batch_size=M, sampler="independent")
    steps, state = make_steps(made, sampler, tx), TrainState(made.params, tx.init(made.params), sampler.init())

    def reported(key: jax.Array) -> jax.Array:
        return steps.step.__wrapped__(state, None, made.train, key, jnp.float32(0))[1].loss

    found = jax.jit(jax.vmap(reported))(jax.random.split(jax.random.key(1), 300))
    assert abs(float(jnp.mean(found)) - losses.mean()) < 4 * float(jnp.std(found)) / 300**0.5
    assert np.sum(losses**2) / np.sum(losses) > 1.5 * losses.mean()


@pytest.mark.slow
def test_draws_made_ahead_are_those_that_the_steps_would_make(key: jax.Array) -> None:
    state, data, steps = prepared(jitted(isgd.fixed(SKEWED, batch_size=M)))
    ahead = steps.draw_ahead(state.sampler, key, num_steps=6)
    here, there = state, copied(state)
    for at in range(6):
        draw = jax.tree.map(lambda x, at=at: x[at], ahead)
        batch = jax.tree.map(lambda x, draw=draw: x[draw.indices], data)
        here, _ = steps.step(here, None, data, key, jnp.float32(0))
        there, _ = steps.step_drawn(there, None, draw, batch, key, jnp.float32(0))
    chex.assert_trees_all_close(here, there, rtol=1e-6)


def test_the_state_is_donated(key: jax.Array) -> None:
    state, data, steps = prepared(scored())
    steps.step(state, None, data, key, jnp.float32(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.sampler.table)))


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))])
def test_a_chain_that_does_not_reweight_is_refused(tx: Any) -> None:
    params, _ = linear_problem(N)
    with pytest.raises(ValueError, match="the optimizer must begin with the reweighting"):
        check_chain(tx, params, M)


def test_a_chain_that_reweights_passes() -> None:
    params, _ = linear_problem(N)
    check_chain(chain(), params, M)


def test_a_chain_that_knows_the_weights_of_the_examples_too_is_refused() -> None:
    """The sampler says what is estimated: ``target``."""
    params, _ = linear_problem(N)
    with pytest.raises(ValueError, match="the weights of the examples were given twice"):
        check_chain(optax.chain(isgd.importance_weighting(N, jnp.ones(N)), optax.sgd(0.1)), params, M)
