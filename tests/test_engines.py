"""What every engine promises; each engine that is added is entered in ENGINES."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import linear_loss, linear_problem

from isgd_jax import scorers
from isgd_jax.engines.inline import Inline
from isgd_jax.typing import Engine, ScoredChunk

ENGINES = [Inline]
NUM_EXAMPLES = 40


@pytest.fixture(params=ENGINES)
def engine_type(request: pytest.FixtureRequest) -> type:
    return request.param


def build(engine_type: type, **options: Any) -> Any:
    _, data = linear_problem(NUM_EXAMPLES)
    options = {"chunk_size": 16} | options
    return engine_type(scorers.grad_norm(linear_loss), jax.tree.map(np.asarray, data), **options)


def merged(chunks: list[ScoredChunk]) -> dict[int, float]:
    return {int(i): float(s) for chunk in chunks for i, s in zip(chunk.ids, chunk.scores, strict=True)}


def expected(params: Any) -> np.ndarray:
    _, data = linear_problem(NUM_EXAMPLES)
    return np.asarray(scorers.grad_norm(linear_loss)(params, data))


def test_it_is_an_engine(engine_type: type) -> None:
    assert isinstance(build(engine_type), Engine)


def test_exact_mode_gives_every_score_at_the_published_version(engine_type: type) -> None:
    params, _ = linear_problem(NUM_EXAMPLES)
    engine = build(engine_type)
    engine.publish(params, 7)
    chunks = engine.collect()
    assert {chunk.version for chunk in chunks} == {7}
    scores = merged(chunks)
    assert sorted(scores) == list(range(NUM_EXAMPLES))
    np.testing.assert_allclose([scores[i] for i in range(NUM_EXAMPLES)], expected(params), rtol=1e-6)


def test_chunks_come_in_turn_and_go_round(engine_type: type) -> None:
    params, _ = linear_problem(NUM_EXAMPLES)
    engine = build(engine_type, chunks_per_collect=2)
    engine.publish(params, 0)
    first, second = engine.collect(), engine.collect()
    assert [int(chunk.ids[0]) for chunk in first + second] == [0, 16, 32, 0]
    assert engine.cursor == 1


def test_the_cursor_resumes_the_turn(engine_type: type) -> None:
    params, _ = linear_problem(NUM_EXAMPLES)
    engine = build(engine_type, chunks_per_collect=1, cursor=2)
    engine.publish(params, 0)
    assert [chunk.ids.tolist() for chunk in engine.collect()] == [list(range(32, 40))]


def test_the_trainer_may_donate_what_it_published(engine_type: type) -> None:
    params, _ = linear_problem(NUM_EXAMPLES)
    before = expected(params)
    engine = build(engine_type)
    mine = jax.tree.map(jnp.copy, params)
    engine.publish(mine, 0)
    jax.block_until_ready(jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(mine))
    scores = merged(engine.collect())
    np.testing.assert_allclose([scores[i] for i in range(NUM_EXAMPLES)], before, rtol=1e-6)


def test_every_call_of_the_scorer_has_one_shape(engine_type: type) -> None:
    params, data = linear_problem(NUM_EXAMPLES)
    shapes = set()

    def scorer(params: Any, batch: Any) -> jax.Array:
        shapes.add(batch["y"].shape)
        return jnp.abs(jnp.asarray(batch["y"]))

    engine = engine_type(scorer, jax.tree.map(np.asarray, data), chunk_size=16)
    engine.publish(params, 0)
    engine.collect()
    assert shapes == {(16,)}


def test_collecting_before_publishing_is_an_error(engine_type: type) -> None:
    with pytest.raises(RuntimeError, match="call publish"):
        build(engine_type).collect()


def test_closing_twice_is_harmless(engine_type: type) -> None:
    engine = build(engine_type)
    engine.close()
    engine.close()
