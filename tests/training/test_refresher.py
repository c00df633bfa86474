"""What keeps a sampler's state fresh, with an engine that is handed in."""

import functools
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import linear_loss, linear_problem
from sampling_problem import jitted, unchecked

import isgd_jax as isgd
from isgd_jax.engines.contract import ScoredChunk
from isgd_jax.engines.inline_engine import InlineEngine
from isgd_jax.sampling import score_table
from isgd_jax.training.background import QUIET_REFRESHES

N, M = 40, 8


class Notebook:
    """An engine that notes what it is told, and hands out what it was given to hand out."""

    chunk_size = 16

    def __init__(self, *to_collect: list[ScoredChunk]) -> None:
        self.published: list[tuple[Any, int]] = []
        self.waits: list[bool] = []
        self._chunks = list(to_collect)

    def publish(self, params: Any, version: int) -> None:
        self.published.append((params, version))

    def collect(self, *, wait: bool = False) -> list[ScoredChunk]:
        self.waits.append(wait)
        return self._chunks.pop(0) if self._chunks else []

    def close(self) -> None:
        """Nothing is held."""


def chunk(first: int, size: int, *, version: int = 0, score: float = 2.0) -> ScoredChunk:
    return ScoredChunk(np.arange(first, first + size), np.full(size, score, np.float32), version)


@functools.cache
def sampler(**options: Any) -> isgd.BatchSampler:
    """The same one for the same options, its functions compiled whole, and traced once whoever calls them."""
    return jitted(isgd.importance_sampler(N, batch_size=M, **options))


def run(refresher: Any, state: Any, steps: range, params: Any = None) -> Any:
    """The loop of a caller who learns nothing from its draws."""
    observe = refresher.sampler.observe
    draw = refresher.sampler.sample(jax.random.key(0), state)
    for step in steps:
        state = observe(refresher(step, {"at": step} if params is None else params, state), draw)
    return state


def inline(chunks_per_collect: int | None = None) -> tuple[InlineEngine, Any]:
    params, data = linear_problem(N)
    scorer = isgd.scorers.grad_norm(linear_loss)
    host = jax.tree.map(np.asarray, data)
    return InlineEngine(scorer, host, chunk_size=16, chunks_per_collect=chunks_per_collect), params


@pytest.mark.slow
def test_the_proposal_stays_as_it_is_between_two_refreshes() -> None:
    made = sampler()
    refresher = isgd.refresher(Notebook([chunk(0, 16)]), made, every=5)
    state = refresher(0, None, made.init())
    assert int(state.proposal.refreshes) == 1
    draw, after = made.sample(jax.random.key(0), state), state
    for step in range(1, 5):
        after = made.observe(after, draw)
        assert not refresher.is_due(step)
        assert refresher.steps_left(step) == 5 - step
        assert refresher(step, None, after) is after
    chex.assert_trees_all_equal(after.proposal, state.proposal)
    assert refresher.is_due(5)
    assert refresher.steps_left(5) == 5
    assert int(refresher(5, None, made.observe(after, draw)).proposal.refreshes) == 2


def test_what_was_scored_is_recorded_and_drawn_by_at_once() -> None:
    """A chunk longer than the engine's size, and a short one, with scores that are none: one program takes all."""
    bad = ScoredChunk(np.arange(36, 39), np.array([1.0, np.nan, 3.0], np.float32), 0)
    refresher = isgd.refresher(Notebook([chunk(0, 20), bad]), sampler(calibrate=False, uniform_fraction=0.1), every=5)
    state = refresher(0, None, refresher.sampler.init())
    known = [*range(20), 36, 38]
    assert np.flatnonzero(np.asarray(state.table.versions) != score_table.NEVER).tolist() == known
    assert state.table.scores[np.array([0, 19, 36, 38])].tolist() == [2.0, 2.0, 1.0, 3.0]
    assert int(state.quarantined) == 1
    assert refresher.last is not None
    assert (refresher.last.step, int(refresher.last.quarantined), len(refresher.last.chunks)) == (0, 1, 2)
    order = np.asarray(state.proposal.law.order)
    masses = np.zeros(N)
    masses[order] = np.asarray(state.proposal.law.masses)
    assert masses[38] == max(masses)
    assert masses[36] == min(masses)
    assert refresher._record._cache_size() == 1


@pytest.mark.slow
def test_it_publishes_when_due_and_where_a_loop_begins_or_goes_on() -> None:
    engine = Notebook()
    refresher = isgd.refresher(engine, sampler(), every=6, publish_every=4, warn=lambda text: None)
    state = run(refresher, refresher.sampler.init(), range(14))
    assert [version for _, version in engine.published] == [0, 4, 8, 12]
    assert [params["at"] for params, _ in engine.published] == [0, 4, 8, 12]
    assert engine.waits == [False] * 3
    resumed = isgd.refresher(Notebook(), sampler(), every=6, publish_every=4)
    run(resumed, state, range(14, 17))
    assert [version for _, version in resumed.engine.published] == [14, 16]


def test_publications_follow_a_replay_and_say_what_the_scorer_takes() -> None:
    engine = Notebook()
    refresher = isgd.refresher(
        engine,
        sampler(),
        every=6,
        published=lambda params, step: (params, step),
        publish_at={0, 5}.__contains__,
    )
    run(refresher, refresher.sampler.init(), range(8), "parameters")
    assert engine.published == [(("parameters", 0), 0), (("parameters", 5), 5)]


def test_a_version_counts_parameter_updates_where_several_steps_make_one() -> None:
    engine = Notebook()
    refresher = isgd.refresher(engine, sampler(steps_per_update=4), every=8, warn=lambda text: None)
    run(refresher, refresher.sampler.init(), range(17))
    assert [version for _, version in engine.published] == [0, 2, 4]


@pytest.mark.slow
def test_in_exact_mode_every_score_carries_the_version_of_the_refresh() -> None:
    engine, params = inline(1)
    refresher = isgd.refresher(engine, sampler(), every=5, wait=True)
    state = run(refresher, refresher.sampler.init(), range(5), params)
    assert set(state.table.versions.tolist()) == {0}
    state = refresher(5, params, state)
    assert set(state.table.versions.tolist()) == {5}
    chex.assert_trees_all_close(
        state.table.scores, jax.jit(isgd.scorers.grad_norm(linear_loss))(params, linear_problem(N)[1]), rtol=1e-5
    )


def test_else_chunk_after_chunk_each_with_the_version_it_was_scored_with() -> None:
    engine, params = inline(1)
    refresher = isgd.refresher(engine, sampler(), every=5)
    state = run(refresher, refresher.sampler.init(), range(5), params)
    assert np.flatnonzero(np.asarray(state.table.versions) == 0).tolist() == list(range(16))
    state = run(refresher, state, range(5, 11), params)
    assert sorted(set(state.table.versions.tolist())) == [0, 5, 10]
    assert np.sum(np.asarray(state.table.versions) == 10) == 8


def test_steps_that_are_not_those_of_the_state_are_told() -> None:
    refresher = isgd.refresher(None, sampler(), every=5)
    state = refresher(0, None, refresher.sampler.init())
    state = refresher(5, None, state)  # the check is one refresh late, so as not to wait
    with pytest.raises(ValueError, match="had seen 0 parameter updates, expected were 5: call observe once a step"):
        refresher(10, None, state)
    with pytest.raises(ValueError, match="at step 7 the sampler's state had seen 0"):
        isgd.refresher(None, sampler(), every=7)(7, None, sampler().init())


def test_it_warns_once_when_nobody_scores() -> None:
    refresher = isgd.refresher(Notebook(), sampler(), every=2)
    with pytest.warns(UserWarning, match="no worker has scored anything in 4 steps") as told:
        run(refresher, refresher.sampler.init(), range(2 * QUIET_REFRESHES + 6))
    assert len(told) == 1


@pytest.mark.parametrize("engine", [None, Notebook([chunk(0, 16)])], ids=["no engine", "scores came"])
def test_it_does_not_warn_where_nobody_should_score_or_somebody_did(engine: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refresher = isgd.refresher(engine, sampler(), every=2)
        run(refresher, refresher.sampler.init(), range(14))


def test_the_state_is_donated_where_a_refresh_is_due_and_a_rehearsal_leaves_it() -> None:
    refresher = isgd.refresher(Notebook([chunk(0, 16)]), sampler(), every=5)
    state = refresher.sampler.init()
    refresher.rehearse(state, chunks=2)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    refresher(0, None, state)
    assert state.table.scores.is_deleted()


def test_scores_are_distrusted_by_the_clock_that_is_handed_in() -> None:
    now = iter([10.0, 100.0])
    engine = Notebook([chunk(0, 16)], [chunk(16, 16, version=5)])
    made = sampler(max_age_seconds=50.0)
    refresher = isgd.refresher(engine, made, every=5, clock=lambda: next(now))
    state = refresher(0, None, made.init())
    draw = made.sample(jax.random.key(0), state)
    for _ in range(5):
        state = made.observe(state, draw, seconds=jnp.float32(10.0))
    state = refresher(5, None, state)
    assert refresher.last is not None
    assert refresher.last.seconds == 100.0
    assert float(state.proposal.trusted_share) == pytest.approx(16 / N)


@pytest.mark.parametrize("changes", [{"every": 0}, {"publish_every": 0}, {"every": 2**31}])
def test_a_number_of_steps_that_is_none_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"every must be 1 (or more, got 0|to 2\^31 - 1, got 2147483648)"):
        isgd.refresher(None, sampler(), **changes)


def test_an_engine_of_another_number_of_examples_is_refused() -> None:
    """Scores bear ids alone: they would come to whatever example has the number."""
    _, data = linear_problem(N + 3)
    for engine in (
        isgd.engines.inline(isgd.scorers.grad_norm(linear_loss), data, chunk_size=16),
        isgd.engines.local(isgd.scorers.grad_norm(linear_loss), data, chunk_size=16, devices=jax.devices()[:1]),
    ):
        with (
            engine,
            pytest.raises(ValueError, match="the engine scores 43 examples, the sampler draws from 40: give both the"),
        ):
            isgd.refresher(engine, sampler())


def test_numbers_of_numpy_count_steps_as_those_of_python() -> None:  # of eight bits, which cannot count to 256
    with unchecked():
        made = isgd.refresher(
            None, sampler(steps_per_update=np.uint8(2)), every=np.uint8(100), publish_every=np.uint8(50)
        )
    assert [made.is_due(step) for step in (256, 300)] == [False, True]
    assert [made.publishes(step) for step in (300, 350)] == [True, True]
    assert type(made.sampler.steps_per_update) is int
