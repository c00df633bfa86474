import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import linear_loss, linear_problem, small_config

from isgd_jax import laws, step
from isgd_jax.app.clock import Clock
from isgd_jax.engines import scorers
from isgd_jax.engines.inline_engine import InlineEngine
from isgd_jax.reweight import importance_weighting
from isgd_jax.sampling import samplers, score_table

NUM_EXAMPLES = 40


def state() -> step.TrainState:
    params, _ = linear_problem(NUM_EXAMPLES)
    tx = optax.chain(importance_weighting(NUM_EXAMPLES), optax.sgd(0.01))
    return step.init_state(params, tx, NUM_EXAMPLES)


def scored(chunks_per_collect: int | None = None, **changes: object) -> laws.ScoredLaws:
    _, data = linear_problem(NUM_EXAMPLES)
    mode = "exact" if chunks_per_collect is None else "relaxed"
    settings = {"mode": mode, "chunk_size": 16, "refresh_every": 5, "order": "label-score", "mixture": 0.1}
    config = small_config("unused", **settings | changes)
    engine = InlineEngine(
        scorers.grad_norm(linear_loss),
        jax.tree.map(np.asarray, data),
        chunk_size=config.chunk_size,
        chunks_per_collect=chunks_per_collect,
    )
    return laws.ScoredLaws(engine, config, jnp.arange(NUM_EXAMPLES, dtype=jnp.int32) % 3)


def test_an_epoch_draws_each_example_at_most_once_and_the_next_is_another(key: jax.Array) -> None:
    epochs = laws.ShuffledLaws(key, 23, 5)
    drawn: list[int] = []
    for i in range(8):
        epochs.before(i, state(), Clock())
        drawn += laws.shuffled(epochs.law, i, num_draws=5).indices.tolist()
    first, second = drawn[:20], drawn[20:]
    assert len(set(first)) == 20
    assert len(set(second)) == 20
    assert first != second


def test_an_epoch_resumed_in_its_middle_goes_on_the_same(key: jax.Array) -> None:
    whole, resumed = laws.ShuffledLaws(key, 23, 5), laws.ShuffledLaws(key, 23, 5)
    for i in range(7):
        whole.before(i, state(), Clock())
        if i == 4:
            saved = whole.law
    resumed.law = saved
    resumed.before(6, state(), Clock())
    chex.assert_trees_all_equal(whole.law, resumed.law)


def test_the_proposal_is_frozen_between_refreshes() -> None:
    refreshed = scored()
    current, first = refreshed.before(0, state(), Clock())
    law = refreshed.law
    for i in range(1, 5):
        current, refresh = refreshed.before(i, current, Clock())
        assert refresh is None
        assert refreshed.law is law
    _, second = refreshed.before(5, current, Clock())
    assert first is not None
    assert second is not None


def test_exact_mode_scores_everything_at_the_present_version() -> None:
    current, refresh = scored().before(10, state(), Clock())
    assert refresh is not None
    assert refresh.scored == NUM_EXAMPLES
    assert set(current.table.versions.tolist()) == {10}


def test_relaxed_mode_scores_chunk_after_chunk() -> None:
    relaxed = scored(chunks_per_collect=1)
    current, refresh = relaxed.before(0, state(), Clock())
    assert refresh is not None
    assert refresh.scored == 16
    assert (current.table.versions != score_table.NEVER).sum() == 16
    current, _ = relaxed.before(5, current, Clock())
    current, last = relaxed.before(10, current, Clock())
    assert last is not None
    assert last.scored == 8
    assert sorted(set(current.table.versions.tolist())) == [0, 5, 10]


def test_the_proposal_is_uniform_until_enough_is_scored() -> None:
    relaxed = scored(chunks_per_collect=1, min_trusted=0.5)
    current, first = relaxed.before(0, state(), Clock())
    assert first is not None
    assert first.is_uniform
    chex.assert_trees_all_close(relaxed.proposal.masses, jnp.full(NUM_EXAMPLES, 1 / NUM_EXAMPLES))
    _, second = relaxed.before(5, current, Clock())
    assert second is not None
    assert not second.is_uniform


def test_scores_too_old_are_not_trusted() -> None:
    relaxed = scored(chunks_per_collect=1, max_age=4)
    current = state()
    for i in (0, 5, 10):
        current, refresh = relaxed.before(i, current, Clock())
    assert refresh is not None
    assert refresh.trusted_share == pytest.approx(8 / NUM_EXAMPLES)


def test_large_scores_are_drawn_more_often_and_none_starves() -> None:
    exact = scored()
    params, data = linear_problem(NUM_EXAMPLES)
    exact.before(0, state(), Clock())
    norms = np.asarray(scorers.grad_norm(linear_loss)(params, data))
    expected = 0.9 * norms / norms.sum() + 0.1 / NUM_EXAMPLES
    order = np.asarray(exact.proposal.order)
    np.testing.assert_allclose(exact.proposal.masses, expected[order], rtol=1e-5)


@pytest.mark.slow
def test_neighbours_on_the_line_share_their_label() -> None:
    by_label = scored(order="label")
    by_label.before(0, state(), Clock())
    labels = np.arange(NUM_EXAMPLES) % 3
    assert (np.diff(labels[np.asarray(by_label.proposal.order)]) >= 0).all()


@pytest.mark.slow
def test_a_law_made_of_no_scores_is_uniform(key: jax.Array) -> None:
    draw = samplers.independent(key, scored().proposal, num_draws=4)
    chex.assert_trees_all_close(draw.probs, jnp.full(4, 1 / NUM_EXAMPLES))
