"""Frozen weights that a loss captures: passed to programs, not written into them; and losses that take them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import isgd_jax as isgd
from isgd_jax.engines import scorers
from isgd_jax.gradients.captured import LARGE, CapturingJit
from isgd_jax.training.train_step import TrainState, make_steps

B, N, WIDTH = 8, 16, 256
FROZEN = jax.random.normal(jax.random.key(5), (WIDTH, WIDTH)) / WIDTH**0.5
BAKED = 2 * FROZEN.nbytes
"""Characters of a program's text that holds it."""


def passed_loss(params, frozen, x):
    return jnp.sum(jnp.sin(jnp.tanh(x @ frozen) @ params["w"] + params["b"]))


def captured_loss(params, x):
    return passed_loss(params, FROZEN, x)


def make():
    one, two = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(one, (WIDTH, 4)), "b": jnp.ones(4)}
    return params, jax.random.normal(two, (B, WIDTH))


def text(program, *args):
    return len(program.lower(*args).as_text())


@pytest.mark.devices(4)
def test_a_program_of_ours_holds_none_of_what_is_captured():
    assert FROZEN.nbytes > LARGE
    params, batch = make()
    score = CapturingJit(scorers.grad_norm(captured_loss))
    expected = jax.jit(scorers.grad_norm(passed_loss))(params, FROZEN, batch)
    np.testing.assert_allclose(score(params, batch), expected, rtol=1e-6)
    assert text(score, params, batch) < BAKED / 4
    assert score._cache_size() == 1
    there = jax.devices()[3]  # where the arguments go, it goes too
    found = score(*jax.device_put((params, batch), there))
    assert found.devices() == {there}
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_under_a_jit_of_the_caller_s_own_it_is_held_once_as_by_the_ordinary_gradient():
    params, batch = make()

    def ordinary(params, batch):
        return jax.grad(lambda p: jnp.mean(jax.vmap(captured_loss, (None, 0))(p, batch)))(params)

    theirs = text(jax.jit(ordinary), params, batch)
    for size in (None, 3):
        ours = text(jax.jit(scorers.grad_norm(captured_loss, microbatch_size=size)), params, batch)
        assert theirs < ours < theirs + BAKED / 4
    assert text(jax.jit(CapturingJit(scorers.grad_norm(captured_loss))), params, batch) < theirs + BAKED / 4


@pytest.mark.slow
def test_steps_of_training_hold_none_of_it():
    params, batch = make()
    problem = isgd.Problem(captured_loss, params=params, train=jnp.concatenate([batch, batch]))
    sampler, tx = isgd.importance_sampler(N, batch_size=B), optax.chain(isgd.importance_weighting(N), optax.sgd(0.1))
    steps, key = make_steps(problem, sampler, tx), jax.random.key(1)

    def state():
        return TrainState(problem.init(key), tx.init(params), sampler.init())

    assert text(steps.step, state(), None, problem.train, key, jnp.float32(0)) < BAKED / 2
    given = isgd.Problem(passed_loss, params=params, train=problem.train, frozen=FROZEN)
    other = make_steps(given, sampler, tx)
    found, _ = steps.step(state(), None, problem.train, key, jnp.float32(0))
    expected, _ = other.step(state(), FROZEN, problem.train, key, jnp.float32(0))
    np.testing.assert_allclose(found.params["w"], expected.params["w"], rtol=1e-5)


@pytest.mark.devices(8)
def test_many_devices_are_given_it_once(monkeypatch):
    params, batch = make()
    many = isgd.sharded(scorers.grad_norm(captured_loss))
    expected = jax.jit(scorers.grad_norm(passed_loss))(params, FROZEN, batch)
    np.testing.assert_allclose(many(params, batch), expected, rtol=1e-5)
    put, moved = jax.device_put, []
    monkeypatch.setattr(jax, "device_put", lambda x, *to, **how: moved.append(x) or put(x, *to, **how))
    many(params, batch)
    assert not any(x is FROZEN for x in jax.tree.leaves(moved))
    found = isgd.sharded(scorers.grad_norm(passed_loss))(params, FROZEN, batch)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_every_entry_point_takes_a_loss_with_frozen_arguments():
    params, batch = make()
    stacked = jax.jit(isgd.stacked_per_example_grads(captured_loss))(params, batch)
    expected = isgd.norms(stacked)
    twice = jax.tree.map(lambda x: jnp.full_like(x, 2.0), params)
    sketch = isgd.last_layer_sketch(passed_loss, params, FROZEN, batch[0], dims=16)
    bound = scorers.logit_bound(lambda p, frozen, x: jnp.tanh(x @ frozen) @ p["w"], lambda logits, x: jnp.sum(logits))

    @jax.jit
    def ask(params, frozen, batch):
        return {
            "slices": scorers.grad_norm(passed_loss, microbatch_size=3)(params, frozen, batch),
            "only": scorers.grad_norm(passed_loss, select=scorers.under("w"))(params, frozen, batch),
            "adam": scorers.preconditioned_norm(passed_loss)((params, twice), frozen, batch),
            "loss": scorers.loss(passed_loss)(params, frozen, batch),
            "bound": bound(params, frozen, batch),
            "sketched": scorers.grad_norm(passed_loss, sketch=sketch)(params, frozen, batch),
            "sketch": sketch.of_batch(params, frozen, batch),
        }

    asked = ask(params, FROZEN, batch)
    np.testing.assert_allclose(asked["slices"], expected, rtol=1e-5)
    np.testing.assert_allclose(asked["only"], isgd.norms(stacked["w"]), rtol=1e-5)
    np.testing.assert_allclose(asked["adam"], 2 * expected, rtol=1e-5)
    np.testing.assert_allclose(asked["loss"], jax.vmap(lambda x: captured_loss(params, x))(batch), atol=1e-4)
    np.testing.assert_allclose(asked["bound"], np.full(B, 2.0), rtol=1e-6)
    found, rows = asked["sketched"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(rows, asked["sketch"], rtol=1e-4, atol=1e-5)
    for data in (batch, np.asarray(batch)):
        norms, mean = isgd.norms_and_mean_gradient(passed_loss, params, data, frozen=FROZEN, batch_size=3)
        np.testing.assert_allclose(norms, expected, rtol=1e-5)
        np.testing.assert_allclose(mean["w"], np.mean(stacked["w"], axis=0), rtol=1e-4, atol=1e-5)
    assert {leaf.path for leaf in isgd.explain(passed_loss, params, FROZEN, batch).leaves} == {"w", "b"}
    of_batch = isgd.per_example_grads(isgd.from_batch_loss(lambda p, f, x: passed_loss(p, f, x[0])))
    np.testing.assert_allclose(jax.jit(lambda *a: isgd.norms(of_batch(*a)))(params, FROZEN, batch), expected, rtol=1e-5)


@pytest.mark.slow
def test_frozen_weights_of_a_problem_are_no_parameters_of_its_scorer():
    params, batch = make()
    frozen = {"f": FROZEN, "count": jnp.arange(3)}
    problem = isgd.Problem(lambda p, f, x: passed_loss(p, f["f"], x), params=params, train=batch, frozen=frozen)
    told = problem.published(jax.random.key(0))(params, 0)
    chex.assert_trees_all_equal(told, (params, None))  # an engine is not sent what stays as it is
    expected = jax.jit(scorers.grad_norm(captured_loss))(params, batch)
    for make_scorer in (None, scorers.grad_norm):
        np.testing.assert_allclose(jax.jit(problem.scorer(make_scorer))(told, batch), expected, rtol=1e-5)
