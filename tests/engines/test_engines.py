"""What every engine promises; each engine that is added is entered in ENGINES."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import linear_loss, linear_problem

import isgd_jax as isgd
from isgd_jax.engines import contract, scorers
from isgd_jax.engines.arrivals import Arrivals, Schedule
from isgd_jax.engines.contract import Engine, ScoredChunk
from isgd_jax.engines.inline_engine import InlineEngine
from isgd_jax.engines.rates import Rates
from isgd_jax.types import Scorer

pytestmark = pytest.mark.devices(8)

NUM_EXAMPLES = 40


def on_one_device(scorer: Scorer, data: Any, *, chunk_size: int) -> Engine:
    return isgd.engines.inline(scorer, data, chunk_size=chunk_size, devices=jax.local_devices()[:1])


def on_three_devices(scorer: Scorer, data: Any, *, chunk_size: int) -> Engine:
    return isgd.engines.local(scorer, data, chunk_size=chunk_size, devices=jax.local_devices()[1:4])


ENGINES: dict[str, Callable[..., Any]] = {
    "inline": on_one_device,
    "all devices": isgd.engines.inline,
    "local": on_three_devices,
}
"""What they are called with: ``(scorer, data, chunk_size=...)``."""


@pytest.fixture(params=list(ENGINES))
def build(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make(scorer: Scorer | None = None, **options: Any) -> Any:
        _, data = linear_problem(NUM_EXAMPLES)
        scorer = scorer or scorers.grad_norm(linear_loss)
        made.append(ENGINES[request.param](scorer, on_host(data), **({"chunk_size": 16} | options)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def on_host(data: Any) -> Any:
    return jax.tree.map(np.asarray, data)


def merged(chunks: list[ScoredChunk]) -> dict[int, float]:
    return {int(i): float(s) for chunk in chunks for i, s in zip(chunk.ids, chunk.scores, strict=True)}


def expected(params: Any) -> np.ndarray:
    _, data = linear_problem(NUM_EXAMPLES)
    return np.asarray(jax.jit(scorers.grad_norm(linear_loss))(params, data))


Build = Callable[..., Any]


def test_it_is_an_engine(build: Build) -> None:
    engine = build()
    for protocol in (Engine, contract.Reports, contract.Resumable, contract.Timed, contract.Chunked):
        assert isinstance(engine, protocol)


def test_three_methods_make_an_engine() -> None:
    class Own:
        def publish(self, params: Any, version: int) -> None: ...
        def collect(self, *, wait: bool = False) -> list[ScoredChunk]:
            return []

        def close(self) -> None: ...

    assert isinstance(Own(), Engine)
    assert not isinstance(Own(), contract.Reports | contract.Resumable | contract.Timed | contract.Chunked)


@pytest.mark.slow
def test_waiting_gives_every_score_at_the_published_version(build: Build) -> None:
    params, _ = linear_problem(NUM_EXAMPLES)
    engine = build()
    for version in (7, 9):
        engine.publish(params, version)
        chunks = engine.collect(wait=True)
        assert {chunk.version for chunk in chunks} == {version}
        scores = merged(chunks)
        assert sorted(scores) == list(range(NUM_EXAMPLES))
        np.testing.assert_allclose([scores[i] for i in range(NUM_EXAMPLES)], expected(params), rtol=1e-6)


def test_scores_waited_for_are_the_same_bits_on_every_engine() -> None:
    params, data = linear_problem(NUM_EXAMPLES)
    found = []
    for make in ENGINES.values():
        engine = make(scorers.grad_norm(linear_loss), on_host(data), chunk_size=16)
        engine.publish(params, 0)
        found.append(merged(engine.collect(wait=True)))
        engine.close()
    assert found[0] == found[1] == found[2]


def test_the_trainer_may_donate_what_it_published(build: Build) -> None:
    params, _ = linear_problem(NUM_EXAMPLES)
    before = expected(params)
    engine = build()
    mine = jax.tree.map(jnp.copy, params)
    engine.publish(mine, 0)
    jax.block_until_ready(jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(mine))
    scores = merged(engine.collect(wait=True))
    np.testing.assert_allclose([scores[i] for i in range(NUM_EXAMPLES)], before, rtol=1e-6)


def test_every_call_of_the_scorer_has_one_shape(build: Build) -> None:
    params, _ = linear_problem(NUM_EXAMPLES)
    shapes = set()

    def scorer(params: Any, batch: Any) -> jax.Array:
        shapes.add(batch["y"].shape)
        return jnp.abs(jnp.asarray(batch["y"]))

    engine = build(scorer)
    engine.publish(params, 0)
    engine.collect(wait=True)
    assert shapes == {(16,)}


def test_collecting_before_publishing_is_an_error(build: Build) -> None:
    with pytest.raises(RuntimeError, match="call publish"):
        build().collect()


def test_it_counts_what_it_did(build: Build) -> None:
    params, _ = linear_problem(NUM_EXAMPLES)
    engine = build()
    assert sum(engine.stats().scored.values()) == 0
    engine.publish(params, 0)
    engine.collect(wait=True)
    stats = engine.stats()
    assert sum(stats.scored.values()) == NUM_EXAMPLES
    assert stats.workers >= 1
    assert stats.bytes_moved >= 4 * NUM_EXAMPLES
    assert (stats.again, stats.refused) == (0, 0)


def test_numbers_of_python_are_parameters(build: Build) -> None:
    engine = build(lambda params, batch: jnp.abs(batch["y"]) * params["scale"])
    engine.publish({"scale": 2.0}, 0)
    found = np.concatenate([chunk.scores for chunk in engine.collect(wait=True)])
    np.testing.assert_allclose(found, 2.0 * np.abs(on_host(linear_problem(NUM_EXAMPLES)[1])["y"]), rtol=1e-6)


@pytest.mark.parametrize("name", list(ENGINES))
def test_data_may_hold_random_keys(name: str) -> None:
    def noisy(params: Any, batch: Any) -> jax.Array:
        return params * jax.vmap(jax.random.uniform)(batch["key"]) + batch["x"]

    data = {"key": jax.random.split(jax.random.key(0), 10), "x": np.arange(10, dtype=np.float32)}
    with ENGINES[name](noisy, data, chunk_size=4) as engine:
        engine.publish(jnp.float32(0.5), 0)
        found = np.concatenate([chunk.scores for chunk in engine.collect(wait=True)])
    np.testing.assert_allclose(found, noisy(jnp.float32(0.5), data), rtol=1e-6)


def test_closing_twice_is_harmless(build: Build) -> None:
    engine = build()
    engine.close()
    engine.close()


def test_inline_chunks_come_in_turn_and_go_round() -> None:
    params, data = linear_problem(NUM_EXAMPLES)
    engine = InlineEngine(scorers.grad_norm(linear_loss), on_host(data), chunk_size=16, chunks_per_collect=2)
    engine.publish(params, 0)
    first, second = engine.collect(), engine.collect()
    assert [int(chunk.ids[0]) for chunk in first + second] == [0, 16, 32, 0]
    assert engine.state() == {"next": 1}


def test_the_saved_state_resumes_the_turn() -> None:
    params, data = linear_problem(NUM_EXAMPLES)
    engine = InlineEngine(scorers.grad_norm(linear_loss), on_host(data), chunk_size=16, chunks_per_collect=1)
    engine.restore({"next": 2})
    engine.publish(params, 0)
    assert [chunk.ids.tolist() for chunk in engine.collect()] == [list(range(32, 40))]


def test_rates_are_the_difference_between_two_looks() -> None:
    params, data = linear_problem(NUM_EXAMPLES)
    engine, clock = on_one_device(scorers.grad_norm(linear_loss), on_host(data), chunk_size=16), [0.0]
    rates = Rates(engine, now=lambda: clock[0])
    engine.publish(params, 0)
    engine.collect()
    clock[0] = 4.0
    seen = rates.since_last()
    assert (seen["scores_per_second"], seen["scores_per_second_by_worker"]) == (10.0, {"inline": 10.0})
    assert (seen["workers"], seen["bytes_moved"]) == (1, 4 * NUM_EXAMPLES)
    clock[0] = 5.0
    assert rates.since_last()["scores_per_second"] == 0.0


def test_the_turn_is_not_moved_by_waiting() -> None:
    params, data = linear_problem(NUM_EXAMPLES)
    engine = InlineEngine(scorers.grad_norm(linear_loss), on_host(data), chunk_size=16, chunks_per_collect=1)
    engine.publish(params, 0)
    engine.collect()
    assert len(engine.collect(wait=True)) == 3
    assert [int(chunk.ids[0]) for chunk in engine.collect()] == [16]


def test_a_share_is_scored_at_a_time() -> None:
    params, data = linear_problem(NUM_EXAMPLES)
    with isgd.engines.inline(scorers.grad_norm(linear_loss), on_host(data), share=0.25) as engine:
        engine.publish(params, 0)
        seen = [int(i) for _ in range(4) for chunk in engine.collect() for i in chunk.ids]
    assert sorted(seen) == list(range(NUM_EXAMPLES))
    assert engine.chunk_size == 10
    for wrong in (0.0, 1.1, -1.0, float("nan")):
        with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
            isgd.engines.inline(scorers.grad_norm(linear_loss), on_host(data), share=wrong)


def sketching(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    return scorers.grad_norm(linear_loss)(params, batch), jnp.asarray(batch["x"]) * params["w"][None]


def test_sketches_travel_with_their_scores(build: Build) -> None:
    params, data = linear_problem(NUM_EXAMPLES)
    engine = build(sketching)
    engine.publish(params, 3)
    chunks = engine.collect(wait=True)
    assert sorted(merged(chunks)) == list(range(NUM_EXAMPLES))
    for chunk in chunks:
        assert chunk.version == 3
        np.testing.assert_allclose(chunk.scores, expected(params)[chunk.ids], rtol=1e-6)
        np.testing.assert_allclose(chunk.sketches, np.asarray(data["x"])[chunk.ids], rtol=1e-6)


def test_scores_without_sketches_say_so(build: Build) -> None:
    engine = build()
    engine.publish(linear_problem(NUM_EXAMPLES)[0], 0)
    assert {chunk.sketches for chunk in engine.collect(wait=True)} == {None}


@pytest.mark.parametrize(
    ("scorer", "said"),
    [
        (lambda params, batch: jnp.sum(jnp.asarray(batch["y"])) + params["b"], "floating-point scores, got float32"),
        (lambda params, batch: jnp.asarray(batch["x"]) * params["w"][None], "floating-point scores, got float32"),
        (lambda params, batch: jnp.tile(jnp.asarray(batch["y"]), 2), "floating-point scores, got float32"),
        (lambda params, batch: jnp.asarray(batch["y"])[:2], "floating-point scores, got float32"),
        (lambda params, batch: jnp.zeros(batch["y"].shape, jnp.int32), "floating-point scores, got int32"),
        (lambda params, batch: (jnp.asarray(batch["y"]), jnp.asarray(batch["y"])), "dims.* sketches, got float32"),
        (lambda params, batch: (jnp.asarray(batch["y"]),) * 3, "got a tuple of 3"),
        (lambda params, batch: {"scores": jnp.asarray(batch["y"])}, "got a dict"),
    ],
)
def test_what_cannot_be_scores_is_refused_in_a_sentence(build: Build, scorer: Any, said: str) -> None:
    engine = build(scorer)
    engine.publish(linear_problem(NUM_EXAMPLES)[0], 0)
    with pytest.raises((ValueError, contract.WorkersGone)) as refused:
        engine.collect(wait=True)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError("; ".join([str(refused.value), *engine.notices()]))


def test_an_engine_is_a_context_manager(build: Build) -> None:
    with build() as engine:
        engine.publish(linear_problem(NUM_EXAMPLES)[0], 0)
        engine.collect()


def test_an_engine_that_never_scored_says_so(build: Build) -> None:
    assert build().stats().num_scored == 0


def test_local_takes_all_devices_but_the_first() -> None:
    _, data = linear_problem(NUM_EXAMPLES)
    with isgd.engines.local(scorers.grad_norm(linear_loss), on_host(data)) as engine:
        assert list(engine.stats().scored) == [f"cpu:{i}" for i in range(1, 8)]
    with pytest.raises(ValueError, match=r"with a single device use isgd\.engines\.inline"):
        isgd.engines.local(scorers.grad_norm(linear_loss), on_host(data), devices=[])


def test_data_without_a_common_leading_axis_are_refused() -> None:
    for data in ({"x": np.zeros((3, 2)), "y": np.zeros(4)}, {"x": np.zeros(())}, {}):
        with pytest.raises(ValueError, match="one common leading axis"):
            isgd.engines.inline(scorers.grad_norm(linear_loss), data)


def test_a_replay_gives_what_arrived_when_it_arrived() -> None:
    params, data = linear_problem(NUM_EXAMPLES)
    newer = jax.tree.map(lambda x: x + 1, params)
    arrivals = {0: Arrivals([], 0.0), 5: Arrivals([(0, 0, 1)], 1.0), 10: Arrivals([(0, 2, 2), (5, 0, 0)], 2.0)}
    with isgd.engines.replay(sketching, on_host(data), Schedule(16, arrivals)) as engine:
        engine.publish(params, 0)
        assert engine.collect() == []
        assert [(c.version, int(c.ids[0])) for c in engine.collect()] == [(0, 0), (0, 16)]
        with pytest.raises(RuntimeError, match=r"has scores of versions \[5\] at step 10: publish these before"):
            engine.collect()
    with isgd.engines.replay(sketching, on_host(data), Schedule(16, arrivals)) as engine:
        engine.publish(params, 0)
        engine.publish(newer, 5)
        engine.collect()
        engine.collect()
        late, fresh = engine.collect()
        np.testing.assert_allclose(late.scores, expected(params)[late.ids], rtol=1e-6)
        np.testing.assert_allclose(fresh.scores, expected(newer)[fresh.ids], rtol=1e-6)
        assert fresh.sketches is not None
        with pytest.raises(RuntimeError, match="has 3 refreshes, no more"):
            engine.collect()


def test_the_public_functions_are_the_same_objects_whatever_was_imported() -> None:
    before = {name: getattr(isgd.engines, name) for name in ("inline", "local", "replay")}
    for module in ("inline_engine", "local_engine", "replay_engine", "all_hosts", "work_queue", "worker_pool"):
        importlib.import_module(f"isgd_jax.engines.{module}")
    assert all(callable(getattr(isgd.engines, name)) for name in before)
    assert {name: getattr(isgd.engines, name) for name in before} == before
