"""What every engine promises; each engine that is added is entered in ENGINES."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import linear_loss, linear_problem

from isgd_jax import scorers
from isgd_jax.engines.chunks import Chunks
from isgd_jax.engines.inline import Inline
from isgd_jax.engines.local import Job, local
from isgd_jax.engines.rates import Rates
from isgd_jax.typing import Engine, ScoredChunk, Scorer

NUM_EXAMPLES = 40


def inline(scorer: Scorer, data: Any, **options: Any) -> Inline:
    return Inline(scorer, data, devices=jax.local_devices()[:1], **options)


def on_three_devices(scorer: Scorer, data: Any, *, chunk_size: int, chunks_per_collect: int | None = None) -> Engine:
    job = Job(scorer, data, Chunks(NUM_EXAMPLES, chunk_size))
    return local(job, jax.local_devices()[1:4], exact=chunks_per_collect is None)


ENGINES: dict[str, Callable[..., Engine]] = {"inline": inline, "all devices": Inline, "local": on_three_devices}
"""What they are called with: ``(scorer, data, chunk_size=..., chunks_per_collect=None)``; None is the exact mode."""


@pytest.fixture(params=list(ENGINES))
def build(request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(scorer: Scorer | None = None, **options: Any) -> Engine:
        _, data = linear_problem(NUM_EXAMPLES)
        scorer = scorer or scorers.grad_norm(linear_loss)
        made.append(ENGINES[request.param](scorer, jax.tree.map(np.asarray, data), **({"chunk_size": 16} | options)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def merged(chunks: list[ScoredChunk]) -> dict[int, float]:
    return {int(i): float(s) for chunk in chunks for i, s in zip(chunk.ids, chunk.scores, strict=True)}


def expected(params: Any) -> np.ndarray:
    _, data = linear_problem(NUM_EXAMPLES)
    return np.asarray(scorers.grad_norm(linear_loss)(params, data))


Build = Callable[..., Engine]


def test_it_is_an_engine(build: Build) -> None:
    assert isinstance(build(), Engine)


def test_exact_mode_gives_every_score_at_the_published_version(build: Build) -> None:
    params, _ = linear_problem(NUM_EXAMPLES)
    engine = build()
    for version in (7, 9):
        engine.publish(params, version)
        chunks = engine.collect()
        assert {chunk.version for chunk in chunks} == {version}
        scores = merged(chunks)
        assert sorted(scores) == list(range(NUM_EXAMPLES))
        np.testing.assert_allclose([scores[i] for i in range(NUM_EXAMPLES)], expected(params), rtol=1e-6)


def test_exact_scores_are_the_same_bits_on_every_engine() -> None:
    params, data = linear_problem(NUM_EXAMPLES)
    found = []
    for make in ENGINES.values():
        engine = make(scorers.grad_norm(linear_loss), jax.tree.map(np.asarray, data), chunk_size=16)
        engine.publish(params, 0)
        found.append(merged(engine.collect()))
        engine.close()
    assert found[0] == found[1] == found[2]


def test_the_trainer_may_donate_what_it_published(build: Build) -> None:
    params, _ = linear_problem(NUM_EXAMPLES)
    before = expected(params)
    engine = build()
    mine = jax.tree.map(jnp.copy, params)
    engine.publish(mine, 0)
    jax.block_until_ready(jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(mine))
    scores = merged(engine.collect())
    np.testing.assert_allclose([scores[i] for i in range(NUM_EXAMPLES)], before, rtol=1e-6)


def test_every_call_of_the_scorer_has_one_shape(build: Build) -> None:
    params, _ = linear_problem(NUM_EXAMPLES)
    shapes = set()

    def scorer(params: Any, batch: Any) -> jax.Array:
        shapes.add(batch["y"].shape)
        return jnp.abs(jnp.asarray(batch["y"]))

    engine = build(scorer)
    engine.publish(params, 0)
    engine.collect()
    assert shapes == {(16,)}


def test_collecting_before_publishing_is_an_error(build: Build) -> None:
    with pytest.raises(RuntimeError, match="call publish"):
        build().collect()


def test_it_counts_what_it_did(build: Build) -> None:
    params, _ = linear_problem(NUM_EXAMPLES)
    engine = build()
    assert sum(engine.stats().scored.values()) == 0
    engine.publish(params, 0)
    engine.collect()
    stats = engine.stats()
    assert sum(stats.scored.values()) == NUM_EXAMPLES
    assert stats.workers >= 1
    assert stats.bytes_moved >= 4 * NUM_EXAMPLES
    assert (stats.again, stats.refused) == (0, 0)


def test_closing_twice_is_harmless(build: Build) -> None:
    engine = build()
    engine.close()
    engine.close()


def test_inline_chunks_come_in_turn_and_go_round() -> None:
    params, data = linear_problem(NUM_EXAMPLES)
    engine = inline(scorers.grad_norm(linear_loss), jax.tree.map(np.asarray, data), chunk_size=16, chunks_per_collect=2)
    engine.publish(params, 0)
    first, second = engine.collect(), engine.collect()
    assert [int(chunk.ids[0]) for chunk in first + second] == [0, 16, 32, 0]
    assert engine.state() == {"next": 1}


def test_the_saved_state_resumes_the_turn() -> None:
    params, data = linear_problem(NUM_EXAMPLES)
    engine = inline(scorers.grad_norm(linear_loss), jax.tree.map(np.asarray, data), chunk_size=16, chunks_per_collect=1)
    engine.restore({"next": 2})
    engine.publish(params, 0)
    assert [chunk.ids.tolist() for chunk in engine.collect()] == [list(range(32, 40))]


def test_rates_are_the_difference_between_two_looks() -> None:
    params, data = linear_problem(NUM_EXAMPLES)
    engine, clock = inline(scorers.grad_norm(linear_loss), jax.tree.map(np.asarray, data), chunk_size=16), [0.0]
    rates = Rates(engine, now=lambda: clock[0])
    engine.publish(params, 0)
    engine.collect()
    clock[0] = 4.0
    seen = rates.since_last()
    assert (seen["scores_per_second"], seen["scores_per_second_by_worker"]) == (10.0, {"inline": 10.0})
    assert (seen["workers"], seen["bytes_moved"]) == (1, 4 * NUM_EXAMPLES)
    clock[0] = 5.0
    assert rates.since_last()["scores_per_second"] == 0.0
