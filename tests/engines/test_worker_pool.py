"""Faults of workers, of any engine: each is arranged by hand, none needs luck or the clock."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from problems import linear_loss, linear_problem

from isgd_jax.engines import scorers
from isgd_jax.engines.chunks import Chunks
from isgd_jax.engines.contract import ScoredChunk, WorkersGone
from isgd_jax.engines.local_engine import TRIES, DeviceWorker, Job, device_pool
from isgd_jax.engines.worker_pool import WorkerPool
from isgd_jax.sampling import score_table

pytestmark = pytest.mark.devices(8)

NUM_EXAMPLES, CHUNK = 40, 8
NUM_CHUNKS = NUM_EXAMPLES // CHUNK
DEADLINE = 60.0


class Faulty(DeviceWorker):
    """A device that does to each item what the test wants: ``fault(worker, item, scores) -> scores``, or raises."""

    fault: Callable[["Faulty", Any, np.ndarray], np.ndarray]

    def finish(self, started: Any) -> np.ndarray:
        return type(self).fault(self, started[0], super().finish(started))


@pytest.fixture
def pool() -> Iterator[Callable[..., WorkerPool]]:
    made: list[WorkerPool] = []

    def make(fault: Callable[..., np.ndarray], *, workers: int = 2, **options: Any) -> WorkerPool:
        _, data = linear_problem(NUM_EXAMPLES)
        job = Job(scorers.grad_norm(linear_loss), jax.tree.map(np.asarray, data), Chunks(NUM_EXAMPLES, CHUNK))
        kind = type("Fault", (Faulty,), {"fault": staticmethod(fault)})
        made.append(device_pool(job, jax.local_devices()[1 : workers + 1], make_worker=kind, **options))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def until(engine: WorkerPool, enough: Callable[[list[ScoredChunk]], bool]) -> list[ScoredChunk]:
    """Collect, as a trainer would, until it is enough."""
    got: list[ScoredChunk] = []
    pause = threading.Event()
    for _ in range(int(DEADLINE / 0.01)):
        got += engine.collect()
        if enough(got):
            return got
        pause.wait(0.01)
    raise AssertionError(f"only {len(got)} chunks after {DEADLINE} s: {engine.notices()}")


def all_scored(chunks: list[ScoredChunk]) -> bool:
    return {int(i) for chunk in chunks for i in chunk.ids} == set(range(NUM_EXAMPLES))


def true_scores(params: Any) -> np.ndarray:
    _, data = linear_problem(NUM_EXAMPLES)
    return np.asarray(jax.jit(scorers.grad_norm(linear_loss))(params, data))


def check_scores(chunks: list[ScoredChunk], params: Any) -> None:
    for chunk in chunks:
        np.testing.assert_allclose(chunk.scores, true_scores(params)[chunk.ids], rtol=1e-5)


def said(engine: WorkerPool, *texts: str, params: Any) -> list[str]:
    """The notices from now until each text was said; meanwhile training goes on, and publishes."""
    notices, pause, version = [], threading.Event(), 1000
    for _ in range(int(DEADLINE / 0.01)):
        notices += engine.notices()
        if all(any(text in notice for notice in notices) for text in texts):
            return notices
        version += 1
        engine.publish(params, version)
        pause.wait(0.01)
    raise AssertionError(f"nobody said {texts}: {notices}")


def test_without_a_fault_nothing_is_said_and_all_work(pool: Callable[..., WorkerPool]) -> None:
    engine, (params, _) = pool(lambda worker, item, scores: scores), linear_problem(NUM_EXAMPLES)
    engine.publish(params, 0)
    check_scores(until(engine, all_scored), params)
    assert engine.notices() == []
    assert engine.stats().workers == 2


@pytest.mark.slow
@pytest.mark.parametrize("wait", [False, True])
def test_a_worker_that_dies_in_mid_chunk_costs_nothing_but_time(pool: Callable[..., WorkerPool], wait: bool) -> None:
    def dies(worker: DeviceWorker, item: Any, scores: np.ndarray) -> np.ndarray:
        if worker.name.endswith(":1"):
            raise RuntimeError("the power is gone")
        return scores

    engine, (params, _) = pool(dies), linear_problem(NUM_EXAMPLES)
    for version in range(3):
        engine.publish(params, version)
        chunks = engine.collect(wait=True) if wait else until(engine, all_scored)
        assert all_scored(chunks)
        check_scores(chunks, params)
    failed = "cpu:1 failed (RuntimeError: the power is gone); others take its work"
    said(engine, failed, "cpu:1 is gone for good", params=params)
    assert engine.stats().workers == 1
    assert engine.stats().again >= 1


def test_an_error_that_passes_is_forgiven(pool: Callable[..., WorkerPool]) -> None:
    failures = [RuntimeError("a hiccup")]

    def once(worker: DeviceWorker, item: Any, scores: np.ndarray) -> np.ndarray:
        if failures:
            raise failures.pop()
        return scores

    engine, (params, _) = pool(once, workers=1), linear_problem(NUM_EXAMPLES)
    engine.publish(params, 0)
    assert all_scored(until(engine, all_scored))
    said(engine, "a hiccup", "scores again", params=params)
    assert engine.stats().workers == 1


def test_all_workers_gone_without_waiting_collects_nothing_and_says_so(pool: Callable[..., WorkerPool]) -> None:
    def dies(worker: DeviceWorker, item: Any, scores: np.ndarray) -> np.ndarray:
        raise RuntimeError("no power")

    engine, (params, _) = pool(dies), linear_problem(NUM_EXAMPLES)
    engine.publish(params, 0)
    left = "no worker is left (for good): training goes on with the scores there are"
    notices = said(engine, left, params=params)
    assert sum("failed" in notice for notice in notices) == 2  # told once each, not at each of their tries
    assert engine.collect() == []
    assert engine.stats().workers == 0


def test_all_workers_gone_while_waiting_is_an_error(pool: Callable[..., WorkerPool]) -> None:
    def dies(worker: DeviceWorker, item: Any, scores: np.ndarray) -> np.ndarray:
        raise RuntimeError("no power")

    engine, (params, _) = pool(dies), linear_problem(NUM_EXAMPLES)
    engine.publish(params, 0)
    with pytest.raises(WorkersGone, match="all workers are gone and 5 chunks lack scores at version 0: go on with"):
        engine.collect(wait=True)


@pytest.mark.slow
@pytest.mark.parametrize("wait", [False, True])
def test_a_worker_that_hangs_is_left_behind_and_its_late_result_does_no_harm(
    pool: Callable[..., WorkerPool], wait: bool
) -> None:
    wake, hangs = threading.Event(), threading.Event()

    def slow(worker: DeviceWorker, item: Any, scores: np.ndarray) -> np.ndarray:
        if worker.name.endswith(":1"):
            hangs.set()
            assert wake.wait(DEADLINE)
        return scores

    engine, (params, _) = pool(slow, timeout=0.3), linear_problem(NUM_EXAMPLES)
    engine.publish(params, 0)
    assert hangs.wait(DEADLINE)
    first = engine.collect(wait=True) if wait else until(engine, all_scored)
    assert all_scored(first)
    assert engine.stats().again >= 1
    newer = jax.tree.map(lambda x: x + 1, params)
    engine.publish(newer, 1)
    second = engine.collect(wait=True) if wait else until(engine, all_scored)
    wake.set()
    engine.publish(newer, 2)
    third = (
        engine.collect(wait=True)
        if wait
        else until(engine, lambda got: {c.version for c in got} >= {2} and all_scored(got))
    )
    check_scores(first, params)
    check_scores([chunk for chunk in second + third if chunk.version > 0], newer)
    assert all(chunk.version == 0 for chunk in second + third if not chunk.version)


@pytest.mark.parametrize("how", ["a lower version", "restored"])
def test_a_run_after_another_is_scored_anew_and_gets_nothing_of_the_first(
    pool: Callable[..., WorkerPool], how: str
) -> None:
    wake, hangs = threading.Event(), threading.Event()

    def slow(worker: DeviceWorker, item: Any, scores: np.ndarray) -> np.ndarray:
        if not hangs.is_set():
            hangs.set()
            assert wake.wait(DEADLINE)
        return scores

    engine, (params, _) = pool(slow), linear_problem(NUM_EXAMPLES)
    engine.publish(jax.tree.map(lambda x: x + 1, params), 7)
    assert hangs.wait(DEADLINE)
    if how == "restored":
        engine.restore(engine.state())
        with pytest.raises(RuntimeError, match="call publish"):
            engine.collect()
    version = 7 if how == "restored" else 0
    engine.publish(params, version)
    wake.set()
    found = engine.collect(wait=True)
    assert all_scored(found)
    assert {chunk.version for chunk in found} == {version}
    check_scores(found, params)
    engine.publish(params, version + 1)
    check_scores(engine.collect(wait=True), params)
    assert engine.notices() == []


def test_nan_from_a_worker_is_set_aside_by_the_table(pool: Callable[..., WorkerPool]) -> None:
    def poisoned(worker: DeviceWorker, item: Any, scores: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(scores)) == 3, np.nan, scores).astype(np.float32)

    engine, (params, _) = pool(poisoned), linear_problem(NUM_EXAMPLES)
    engine.publish(params, 0)
    kept, rejected = score_table.create(NUM_EXAMPLES), 0
    for chunk in engine.collect(wait=True):
        kept, bad = score_table.record(kept, jax.numpy.asarray(chunk.ids), jax.numpy.asarray(chunk.scores), version=0)
        rejected += int(bad)
    assert rejected == NUM_CHUNKS
    assert int((kept.versions == score_table.NEVER).sum()) == NUM_CHUNKS


def test_results_of_the_wrong_shape_are_refused_and_the_worker_given_up(pool: Callable[..., WorkerPool]) -> None:
    def short(worker: DeviceWorker, item: Any, scores: np.ndarray) -> np.ndarray:
        return scores[:-1] if worker.name.endswith(":1") else scores

    engine, (params, _) = pool(short), linear_problem(NUM_EXAMPLES)
    engine.publish(params, 0)
    check_scores(until(engine, all_scored), params)
    said(engine, "expected [8] floating-point scores, got float32[7]", "cpu:1 is gone for good", params=params)
    assert engine.stats().refused == TRIES


def test_a_worker_with_other_data_is_refused_when_it_joins(pool: Callable[..., WorkerPool]) -> None:
    engine = pool(lambda worker, item, scores: scores, fingerprint="ours")
    _, data = linear_problem(NUM_EXAMPLES)
    job = Job(scorers.grad_norm(linear_loss), jax.tree.map(np.asarray, data), Chunks(NUM_EXAMPLES, CHUNK))
    with pytest.raises(ValueError, match="another data set: expected fingerprint 'ours', got 'theirs'"):
        engine.join(DeviceWorker(jax.local_devices()[5], job, fingerprint="theirs"))
    with pytest.raises(ValueError, match="there is a worker cpu:1 already"):
        engine.join(DeviceWorker(jax.local_devices()[1], job, fingerprint="ours"))


def test_a_late_joiner_takes_part(pool: Callable[..., WorkerPool]) -> None:
    def dies(worker: DeviceWorker, item: Any, scores: np.ndarray) -> np.ndarray:
        if worker.name.endswith(":1"):
            raise RuntimeError("no power")
        return scores

    engine, (params, data) = pool(dies, workers=1), linear_problem(NUM_EXAMPLES)
    engine.publish(params, 0)
    said(engine, "for good", params=params)
    job = Job(scorers.grad_norm(linear_loss), jax.tree.map(np.asarray, data), Chunks(NUM_EXAMPLES, CHUNK))
    engine.join(DeviceWorker(jax.local_devices()[4], job))
    check_scores(until(engine, all_scored), params)


def test_closing_does_not_wait_for_a_worker_that_hangs(pool: Callable[..., WorkerPool]) -> None:
    wake, hangs = threading.Event(), threading.Event()

    def slow(worker: DeviceWorker, item: Any, scores: np.ndarray) -> np.ndarray:
        hangs.set()
        assert wake.wait(DEADLINE)
        return scores

    engine, (params, _) = pool(slow, workers=1), linear_problem(NUM_EXAMPLES)
    engine.publish(params, 0)
    assert hangs.wait(DEADLINE)
    threading.Timer(1.0, wake.set).start()
    engine.close()
    engine.publish(params, 1)  # nobody is there to mind


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=lambda e: type(e).__name__)
def test_any_end_of_a_workers_thread_is_a_loss_that_is_told(pool: Callable[..., WorkerPool], error: Any) -> None:
    def ends(worker: DeviceWorker, item: Any, scores: np.ndarray) -> np.ndarray:
        raise error

    engine, (params, _) = pool(ends, workers=1), linear_problem(NUM_EXAMPLES)
    engine.publish(params, 0)
    with pytest.raises(WorkersGone, match="all workers are gone"):
        engine.collect(wait=True)
    assert engine.stats().workers == 0
    notices = engine.notices()
    assert f"worker cpu:1 failed ({type(error).__name__}: {error}); others take its work" in notices
    assert "worker cpu:1 is gone for good" in notices


def test_a_worker_that_cannot_be_revived_is_lost_and_told(pool: Callable[..., WorkerPool]) -> None:
    def dies(worker: Any, item: Any, scores: np.ndarray) -> np.ndarray:
        def fails(failures: int) -> bool:
            raise OSError("no power to revive")

        worker.revive = fails
        raise RuntimeError("no power")

    engine, (params, _) = pool(dies, workers=1), linear_problem(NUM_EXAMPLES)
    engine.publish(params, 0)
    said(engine, "could not be revived (OSError: no power to revive)", "gone for good", params=params)
    assert engine.stats().workers == 0


def test_every_worker_is_closed_though_closing_one_raises(pool: Callable[..., WorkerPool]) -> None:
    engine, closed = pool(lambda worker, item, scores: scores), list[str]()

    def fails() -> None:
        raise OSError("it does not close")

    first, second = engine._workers.values()
    first.close, second.close = fails, lambda: closed.append(second.name)  # type: ignore[method-assign]
    engine.close()
    assert closed == ["cpu:2"]
    assert "worker cpu:1 could not be closed (OSError: it does not close)" in engine.notices()


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_scores_that_are_no_scores_are_passed_on_and_told_once_a_worker(
    pool: Callable[..., WorkerPool], value: float
) -> None:
    def odd(worker: DeviceWorker, item: Any, scores: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(scores)) == 3, value, scores).astype(np.float32)

    engine, (params, _) = pool(odd, workers=1), linear_problem(NUM_EXAMPLES)
    for version in range(3):
        engine.publish(params, version)
        assert sum(chunk.scores[3] == value or np.isnan(chunk.scores[3]) for chunk in engine.collect(wait=True)) == 5
    (notice,) = engine.notices()
    assert notice.startswith(
        "worker cpu:1 found what cannot be scores: 1 of 8 in a chunk are NaN, infinite or negative"
    )


def test_waiting_on_a_closed_engine_is_an_error(pool: Callable[..., WorkerPool]) -> None:
    engine, (params, _) = pool(lambda worker, item, scores: scores), linear_problem(NUM_EXAMPLES)
    engine.publish(params, 0)
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.collect(wait=True)


def test_who_waits_for_an_engine_that_is_closed_meanwhile_is_told_at_once(pool: Callable[..., WorkerPool]) -> None:
    def slow(worker: DeviceWorker, item: Any, scores: np.ndarray) -> np.ndarray:
        while not engine._closed:
            threading.Event().wait(0.01)
        return scores

    engine, (params, _) = pool(slow), linear_problem(NUM_EXAMPLES)
    engine.publish(params, 0)
    threading.Timer(0.2, engine.close).start()
    with pytest.raises(RuntimeError, match=r"the engine was closed, and .* chunks lack scores at version 0: nobody"):
        engine.collect(wait=True)


def test_that_all_workers_are_gone_is_said_with_the_reason(pool: Callable[..., WorkerPool]) -> None:
    def fails(worker: DeviceWorker, item: Any, scores: np.ndarray) -> np.ndarray:
        raise ValueError("no such layer")

    engine, (params, _) = pool(fails), linear_problem(NUM_EXAMPLES)
    engine.publish(params, 0)
    with pytest.raises(
        WorkersGone, match=r"all workers are gone .*; worker cpu:. failed \(ValueError: no such layer\)"
    ):
        engine.collect(wait=True)
