import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from problems import linear_loss, linear_problem

from isgd_jax import step
from isgd_jax.reweight import importance_weighting
from isgd_jax.sampling import samplers, score_table

NUM_EXAMPLES, NUM_DRAWS = 40, 8


def make(fresh_scores: step.FreshScores | None = step.norms_as_scores) -> tuple[step.TrainState, dict, object]:
    params, data = linear_problem(NUM_EXAMPLES)
    tx = optax.chain(importance_weighting(NUM_EXAMPLES), optax.sgd(0.01))
    state = step.init_state(params, tx, NUM_EXAMPLES)
    update = step.make_update(linear_loss, tx, samplers.independent, num_draws=NUM_DRAWS, fresh_scores=fresh_scores)
    return state, data, update


def uniform() -> samplers.Law:
    return samplers.prepare(jnp.full(NUM_EXAMPLES, 1 / NUM_EXAMPLES))


def skewed() -> samplers.Law:
    weights = jnp.arange(1.0, NUM_EXAMPLES + 1.0)
    return samplers.prepare(weights / weights.sum())


def copied(state: step.TrainState) -> step.TrainState:
    return jax.tree.map(jnp.copy, state)


def test_it_traces_once(key: jax.Array) -> None:
    chex.clear_trace_counter()
    params, data = linear_problem(NUM_EXAMPLES)
    counted = chex.assert_max_traces(linear_loss, n=1)
    tx = optax.chain(importance_weighting(NUM_EXAMPLES), optax.sgd(0.01))
    update = step.make_update(counted, tx, samplers.stratified, num_draws=NUM_DRAWS)
    state = step.init_state(params, tx, NUM_EXAMPLES)
    for clock, law in enumerate([uniform(), skewed(), uniform(), skewed()]):
        state, _ = update(state, law, data, key, jnp.float32(clock))
    assert int(state.step) == 4


@pytest.mark.slow
def test_one_backward_pass_gives_update_and_fresh_scores(key: jax.Array) -> None:
    state, data, update = make()
    params = copied(state).params
    after, _ = update(state, skewed(), data, key, jnp.float32(2.5))
    drawn = samplers.independent(jax.random.fold_in(key, 0), skewed(), num_draws=NUM_DRAWS).indices
    residual = data["x"] @ params["w"] + params["b"] - data["y"]
    by_hand = jnp.abs(residual) * jnp.sqrt(jnp.sum(data["x"] ** 2, axis=1) + 1)
    chex.assert_trees_all_close(after.table.scores[drawn], by_hand[drawn], rtol=1e-5)
    assert set(after.table.versions[drawn].tolist()) == {0}
    assert set(after.table.seconds[drawn].tolist()) == {2.5}
    untouched = jnp.setdiff1d(jnp.arange(NUM_EXAMPLES), drawn)
    assert set(after.table.versions[untouched].tolist()) == {score_table.NEVER}


def test_without_fresh_scores_the_table_is_left_alone(key: jax.Array) -> None:
    state, data, update = make(fresh_scores=None)
    after, info = update(state, skewed(), data, key, jnp.float32(0))
    assert set(after.table.versions.tolist()) == {score_table.NEVER}
    assert int(info.rejected) == 0


def test_the_draw_depends_on_key_and_step_alone(key: jax.Array) -> None:
    state, data, update = make()
    first, _ = update(copied(state), skewed(), data, key, jnp.float32(0))
    again, _ = update(copied(state), skewed(), data, key, jnp.float32(9))
    chex.assert_trees_all_equal(first.params, again.params)
    later, _ = update(copied(state)._replace(step=jnp.int32(1)), skewed(), data, key, jnp.float32(0))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(first.params, later.params)


def test_uniform_probabilities_recover_sgd(key: jax.Array) -> None:
    state, data, update = make()
    plain, tx = copied(state).params, optax.sgd(0.01)
    opt_state = tx.init(plain)
    for i in range(5):
        drawn = samplers.independent(jax.random.fold_in(key, i), uniform(), num_draws=NUM_DRAWS).indices
        batch = jax.tree.map(lambda x, drawn=drawn: x[drawn], data)
        grads = jax.grad(lambda p, b=batch: jnp.mean(jax.vmap(linear_loss, (None, 0))(p, b)))(plain)
        updates, opt_state = tx.update(grads, opt_state)
        plain = optax.apply_updates(plain, updates)
        state, _ = update(state, uniform(), data, key, jnp.float32(0))
    chex.assert_trees_all_close(state.params, plain, rtol=1e-5)


def test_the_reported_loss_is_unbiased(key: jax.Array) -> None:
    """mean(s·L) averages to the mean loss, although hard examples are drawn more often (raw mean: far above)."""
    state, data, update = make(fresh_scores=None)
    losses = jax.vmap(linear_loss, (None, 0))(state.params, data)
    law = samplers.prepare(losses / losses.sum() * 0.9 + 0.1 / NUM_EXAMPLES)
    frozen = copied(state)
    reported = [
        update(copied(frozen), law, data, jax.random.fold_in(key, i), jnp.float32(0))[1].loss for i in range(300)
    ]
    mean, error = jnp.mean(jnp.stack(reported)), jnp.std(jnp.stack(reported)) / 300**0.5
    assert abs(mean - losses.mean()) < 4 * error
    assert jnp.sum(law.masses * losses) > 1.5 * losses.mean()


def test_scores_that_are_not_finite_are_counted(key: jax.Array) -> None:
    def broken(losses: jax.Array, grads: object) -> jax.Array:
        return losses.at[0].set(jnp.nan)

    state, data, update = make(fresh_scores=broken)
    _, info = update(state, skewed(), data, key, jnp.float32(0))
    assert int(info.rejected) == 1
