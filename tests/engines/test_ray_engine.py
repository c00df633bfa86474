"""The engine of actors, on a Ray of this host."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import NUM_EXAMPLES as NUM_BLOBS
from problems import blobs, linear_problem, small_config
from ray_jobs import NUM_EXAMPLES, SlowOnce, make_importable, make_job, nothing_there, rows, sketching, sometimes_nan

import isgd_jax as isgd
from isgd_jax.app.run import fit
from isgd_jax.engines.contract import Engine, WorkersGone
from isgd_jax.engines.inline_engine import InlineEngine
from isgd_jax.engines.work_queue import WorkItem
from isgd_jax.sampling import score_table

ray = pytest.importorskip("ray")
ray_engine = pytest.importorskip("isgd_jax.engines.ray_engine")
ray_connection = pytest.importorskip("isgd_jax.engines.ray_connection")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

PARAMS, _ = linear_problem(NUM_EXAMPLES)


@pytest.fixture(scope="module", autouse=True)
def ray_of_this_host() -> Iterator[None]:
    make_importable()
    ray_connection.connect(None, 3)
    yield
    ray.shutdown()


@pytest.fixture
def build() -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def build(make: Callable[[], Any] = make_job, *, num_workers: int = 1, **options: Any) -> Any:
        job = make_job()[0]
        settings = {"fingerprint": "same", "chunk_size": 4, "make_job": make} | options
        made.append(isgd.engines.ray_cluster(job.scorer, job.data, num_workers=num_workers, **settings))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


def pids() -> list[int]:
    """Processes of actors, all of them of this test's engine: closed ones are gone or going."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.read_bytes().startswith(b"ray::ScoringActor"):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def wait_until(holds: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def scores_of(engine: Engine) -> np.ndarray:
    found = np.full(NUM_EXAMPLES, np.nan, np.float32)
    for chunk in engine.collect(wait=True):
        found[chunk.ids] = chunk.scores
    return found


def inline_scores(params: Any, size: int = 4, scorer: Any = None) -> np.ndarray:
    job, _ = make_job(scorer)
    engine = InlineEngine(job.scorer, job.data, chunk_size=size, devices=jax.local_devices()[:1])
    engine.publish(params, 0)
    return scores_of(engine)


def doubled(params: Any) -> Any:
    return jax.tree.map(lambda x: 2 * x, params)


def test_scores_waited_for_are_those_of_inline_bit_for_bit_though_an_actor_is_killed(build: Callable[..., Any]) -> None:
    """Those that are not finite come through as well, and are set aside by the table."""
    engine = build(functools.partial(make_job, sometimes_nan), num_workers=2)
    assert isinstance(engine, Engine)
    engine.publish(PARAMS, 0)
    found, bad = scores_of(engine), int((linear_problem(NUM_EXAMPLES)[1]["y"] > 1.0).sum())
    np.testing.assert_array_equal(found, inline_scores(PARAMS, scorer=sometimes_nan))
    _, rejected = score_table.record(
        score_table.create(NUM_EXAMPLES), jnp.arange(NUM_EXAMPLES), jnp.asarray(found), version=0
    )
    assert int(rejected) == bad > 0
    wait_until(lambda: len(pids()) == 2)
    os.kill(pids()[0], signal.SIGKILL)
    engine.publish(doubled(PARAMS), 1)
    np.testing.assert_array_equal(scores_of(engine), inline_scores(doubled(PARAMS), scorer=sometimes_nan))


def test_when_all_are_killed_training_goes_on_is_told_and_they_come_back(build: Callable[..., Any]) -> None:
    engine, told = build(), list[str]()
    engine.publish(PARAMS, 0)
    wait_until(lambda: len(engine.collect()) + engine.stats().scored["scorer-0"] > 0)
    for pid in pids():
        os.kill(pid, signal.SIGKILL)
    engine.publish(PARAMS, 1)

    def heard(text: str) -> bool:
        engine.collect()
        told.extend(engine.notices())
        return any(text in notice for notice in told)

    wait_until(lambda: heard("no worker is left (for now): training goes on"))
    assert any("its process or its node is gone" in notice for notice in told)
    assert all("\n" not in notice for notice in told)
    wait_until(lambda: heard("worker scorer-0 scores again"))


def test_an_actor_with_other_data_is_refused(build: Callable[..., Any]) -> None:
    engine = build(functools.partial(make_job, fingerprint="other"))
    engine.publish(PARAMS, 0)
    with pytest.raises(WorkersGone, match="all workers are gone and 10 chunks lack scores") as stopped:
        engine.collect(wait=True)
    told = str(stopped.value)
    assert "it has another data set: expected fingerprint 'same', got 'other'" in told
    assert "worker scorer-0 is gone for good" in told


def test_a_slow_actor_holds_up_nobody(build: Callable[..., Any], tmp_path: Path) -> None:
    slow = functools.partial(make_job, chunks=SlowOnce(tmp_path / "flag"))
    engine = build(slow, num_workers=2, timeout=0.5)
    engine.publish(PARAMS, 0)
    np.testing.assert_array_equal(scores_of(engine), inline_scores(PARAMS))
    assert engine.stats().again > 0


def test_a_full_object_store_is_said(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers go on with older parameters; only who waits for the newest learns of it by an error."""
    engine = build()

    def full(value: Any) -> None:
        raise ray.exceptions.ObjectStoreFullError("no room")

    monkeypatch.setattr(ray, "put", full)
    engine.publish(PARAMS, 0)
    assert "workers go on with older ones" in engine.notices()[0]
    assert engine.collect() == []
    with pytest.raises(OSError, match="Ray's object store has no room for the 20 bytes of the parameters"):
        engine.collect(wait=True)


def test_accelerators_come_first_and_who_has_no_room_asks_for_what_there_is_most_of() -> None:
    gpu, cpu = {"num_gpus": 1}, {"num_cpus": 1}
    assert ray_engine.places(3, {"CPU": 8.0, "GPU": 2.0}) == ([gpu, gpu, cpu], 10)
    assert ray_engine.places(2, {"TPU": 1.0, "CPU": 0.0}).needs == [{"resources": {"TPU": 1}}] * 2
    assert ray_engine.places(2, {}).room == 0


def test_an_actor_that_cannot_load_its_data_is_given_up_and_says_why(build: Callable[..., Any]) -> None:
    """Who waits for scores learns of it at once: the last sentence holds the reason."""
    engine = build(nothing_there)
    engine.publish(PARAMS, 0)
    with pytest.raises(WorkersGone, match=r"all workers are gone .*no data set in /nowhere"):
        engine.collect(wait=True)


@pytest.mark.parametrize(("data", "options"), [(rows(), {}), (rows, {}), (rows, {"num_examples": NUM_EXAMPLES})])
def test_data_are_sent_or_loaded_by_the_workers_and_sketches_come_back(data: Any, options: dict[str, int]) -> None:
    with isgd.engines.ray_cluster(sketching, data, num_workers=1, chunk_size=16, **options) as engine:
        engine.publish(PARAMS, 2)
        chunks = engine.collect(wait=True)
    assert [chunk.version for chunk in chunks] == [2, 2, 2]
    np.testing.assert_array_equal(np.concatenate([chunk.scores for chunk in chunks]), inline_scores(PARAMS, size=16))
    np.testing.assert_array_equal(np.concatenate([chunk.sketches for chunk in chunks]), rows()["x"])


def test_workers_that_load_other_rows_are_refused() -> None:
    with isgd.engines.ray_cluster(sketching, rows, num_workers=1, num_examples=NUM_EXAMPLES + 1) as engine:
        engine.publish(PARAMS, 0)
        with pytest.raises(WorkersGone, match="expected fingerprint '41 rows', got '40 rows'"):
            engine.collect(wait=True)


STRANGER = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1]).internal_kv_keys(b"", b"fun", timeout=10)
print("let in")
"""


def test_sigterm_while_ray_starts_goes_to_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own handlers, in force meanwhile, end the program with exit code 1 or 15."""
    heard: list[int] = []

    def start(address: str | None, num_workers: int) -> bool:
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(1))
        signal.raise_signal(signal.SIGTERM)
        return True

    monkeypatch.setattr(ray_connection, "_connect", start)
    before = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    try:
        with pytest.raises(SystemExit):
            ray_connection.connect(None, 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_what_is_no_address_of_a_running_ray_is_not_knocked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client has its own limit, also where the environment tells of it; "local" would start one with no token."""
    ray_connection._knock("ray://127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:1")
    ray_connection._knock("auto")
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ConnectionError, match="none that runs"):
        ray_connection._knock("local")


def test_a_ray_of_this_host_alone_lets_no_stranger_in() -> None:
    """It asks for a token, which is on no command line, and listens on the loopback interface."""
    ray_connection.connect(None, 3)  # where the test before has ended it
    token, address = os.environ["RAY_AUTH_TOKEN"], ray.get_runtime_context().gcs_address
    assert address.startswith("127.0.0.1:")
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY")}
    for environment, is_let_in in ((without, False), (os.environ, True)):
        asked = subprocess.run(
            [sys.executable, "-c", STRANGER, address], env=environment, capture_output=True, text=True, timeout=60
        )
        assert (asked.stdout == "let in\n") is is_let_in, asked.stderr
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert token.encode() not in entry.read_bytes()


def test_closing_again_or_after_ray_has_ended_begins_no_other(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``ray.kill`` starts a Ray where none runs."""
    engine, other, killed, kill = build(), build(), list[Any](), ray.kill
    left = [worker.handle for worker in other._workers.values()]
    monkeypatch.setattr(ray_engine.ray, "kill", lambda handle: (killed.append(handle), kill(handle)))
    engine.close()
    engine.close()
    assert len(killed) == 1
    with monkeypatch.context() as patch:
        patch.setattr(ray_engine.ray, "is_initialized", lambda: False)
        other.close()
    assert len(killed) == 1
    for handle in left:
        kill(handle)


def test_an_engine_that_is_closed_or_whose_ray_was_shut_down_begins_no_other(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of Ray's calls starts one where none runs, and that one listens to everybody."""
    closed, left, put, sent = build(), build(), list[Any](), ray.put(0)
    closed.close()
    monkeypatch.setattr(ray_engine.ray, "put", put.append)
    closed.publish(PARAMS, 0)
    assert put == closed.notices() == []
    with monkeypatch.context() as patch:
        patch.setattr(ray_engine.ray, "is_initialized", lambda: False)
        for version in range(2):
            left.publish(PARAMS, version)
        told = "Ray was shut down in this process: nobody scores any more; training goes on with the scores there are"
        assert left.notices() == [told]
        with pytest.raises(OSError, match="Ray was shut down in this process: make another engine, then go on"):
            left.collect(wait=True)
        with pytest.raises(OSError, match="Ray was shut down in this process: make another engine"):
            left.seconds_per_collect(PARAMS)
        (worker,) = left._workers.values()
        for use in (lambda: worker.load(sent, 0), lambda: worker.start(WorkItem(0, 0)), lambda: worker.finish(sent)):
            with pytest.raises(ray_engine.Lost, match="Ray was shut down in this process"):
                use()
        assert not worker.revive(1)
    assert put == []


def test_what_the_store_cannot_take_is_told_while_a_run_is_planned(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(value: Any) -> None:
        raise ray.exceptions.ObjectStoreFullError("no room")

    engine = build()
    monkeypatch.setattr(ray, "put", full)
    with pytest.raises(OSError, match="Ray's object store has no room for the 20 bytes of the parameters: start Ray"):
        engine.seconds_per_collect(PARAMS)


def test_a_process_that_began_anew_says_so() -> None:
    """As after a restart between two calls, which nobody saw."""
    actor = ray_engine.ScoringActor()
    with pytest.raises(RuntimeError, match="its process began anew, and has yet to load its data"):
        actor.load(PARAMS, 0)
    with pytest.raises(RuntimeError, match="asked to score at version 0, but holds None"):
        actor.score(WorkItem(0, 0))


def test_random_keys_are_not_sent_and_the_error_says_what_to_do() -> None:
    data = {"key": jax.random.split(jax.random.key(0), 4)}
    with pytest.raises(TypeError, match=r"data\['key'\] must be an array that NumPy has.*jax.random.key_data\(keys\)"):
        isgd.engines.ray_cluster(lambda params, batch: batch["key"], data, num_workers=1)
    assert ray_engine.fingerprint_of(data) == ray_engine.fingerprint_of(data)


SETTINGS: dict[str, Any] = {"scorers": 2, "engine": "cluster", "refresh_every": 10, "steps": 200, "log_every": 100,
                            "checkpoint_every": 100}  # fmt: skip


def test_a_run_in_exact_mode_has_the_bits_of_inline(tmp_path: Path) -> None:
    inline = fit(small_config(tmp_path / "inline", **SETTINGS | {"engine": "inline"}), dataset=blobs())
    actors = fit(small_config(tmp_path / "actors", **SETTINGS), dataset=blobs())
    chex.assert_trees_all_equal(actors.params, inline.params)


def test_a_relaxed_run_stops_at_a_signal_and_is_replayed(tmp_path: Path) -> None:
    """As many steps as the actors need to have scored everything twice, then SIGTERM; a replay has the same bits."""
    config = small_config(tmp_path / "run", **SETTINGS | {"mode": "relaxed", "steps": 100_000, "refresh_every": 100})
    scored = [0]

    def enough(record: dict[str, Any]) -> None:
        if record["event"] == "refresh":
            scored[0] += record["scored"]
            time.sleep(0.5)  # so that fewer steps are made, here and by the replay, while the actors start
        if scored[0] > 2 * NUM_BLOBS and record["event"] == "refresh":
            os.kill(os.getpid(), signal.SIGTERM)
            scored[0] = 0

    first = fit(config, dataset=blobs(), observe=enough)
    assert first.stopped_by == signal.SIGTERM
    replay = {"mode": "relaxed", "refresh_every": 100, "replay": str(tmp_path / "run"), "steps": first.step}
    again = fit(small_config(tmp_path / "again", **SETTINGS | replay), dataset=blobs())
    chex.assert_trees_all_equal(again.params, first.params)
