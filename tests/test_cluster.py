"""The engine of actors, on a Ray of this host."""

import functools
import os
import signal
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
from problems import blobs, linear_loss, linear_problem, small_config

from isgd_jax import scorers, table
from isgd_jax.engines.chunks import Chunks
from isgd_jax.engines.inline import Inline
from isgd_jax.engines.local import Job
from isgd_jax.train import fit
from isgd_jax.typing import Engine, WorkersGone

ray = pytest.importorskip("ray")
cluster = pytest.importorskip("isgd_jax.engines.cluster")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
NUM_EXAMPLES = 40
PARAMS, _ = linear_problem(NUM_EXAMPLES)


class SlowOnce(Chunks):
    """The first process that asks for a batch takes for ever."""

    def __init__(self, flag: Path) -> None:
        super().__init__(NUM_EXAMPLES, 4)
        self._flag = flag

    def batch(self, data: Any, chunk: int) -> Any:
        try:
            self._flag.touch(exist_ok=False)
        except FileExistsError:
            return super().batch(data, chunk)
        time.sleep(1000)


def sometimes_nan(params: Any, batch: Any) -> jax.Array:
    return jnp.where(batch["y"] > 1.0, jnp.nan, scorers.grad_norm(linear_loss)(params, batch))


def make_job(scorer: Any = None, chunks: Chunks | None = None, fingerprint: str = "same") -> tuple[Job, str]:
    """What an actor does to be ready."""
    data = jax.tree.map(np.asarray, linear_problem(NUM_EXAMPLES)[1])
    job = Job(scorer or scorers.grad_norm(linear_loss), data, chunks or Chunks(NUM_EXAMPLES, 4))
    return job, fingerprint


def nothing_there() -> Any:
    raise FileNotFoundError("no data set in /nowhere")


@pytest.fixture(scope="module", autouse=True)
def ray_of_this_host() -> Iterator[None]:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    cluster.connect(None, 3)
    yield
    ray.shutdown()


@pytest.fixture
def build() -> Iterator[Callable[..., Any]]:
    made: list[Engine] = []

    def build(make: Callable[[], Any] = make_job, *, scorers: int = 1, **options: Any) -> Any:
        engine, _ = cluster.cluster(make_job()[0], make, scorers=scorers, **({"fingerprint": "same"} | options))
        made.append(engine)
        return engine

    yield build
    for engine in made:
        engine.close()


def pids() -> list[int]:
    """Processes of actors, all of them of this test's engine: closed ones are gone or going."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.read_bytes().startswith(b"ray::Scorer"):
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
    for chunk in engine.collect():
        found[chunk.ids] = chunk.scores
    return found


def inline_scores(params: Any) -> np.ndarray:
    job, _ = make_job()
    engine = Inline(job.scorer, job.data, chunk_size=4, devices=jax.local_devices()[:1])
    engine.publish(params, 0)
    return scores_of(engine)


def doubled(params: Any) -> Any:
    return jax.tree.map(lambda x: 2 * x, params)


def test_exact_scores_are_those_of_inline_bit_for_bit_though_an_actor_is_killed(build: Callable[..., Any]) -> None:
    engine = build(exact=True, scorers=2)
    assert isinstance(engine, Engine)
    engine.publish(PARAMS, 0)
    np.testing.assert_array_equal(scores_of(engine), inline_scores(PARAMS))
    wait_until(lambda: len(pids()) == 2)
    os.kill(pids()[0], signal.SIGKILL)
    engine.publish(doubled(PARAMS), 1)
    np.testing.assert_array_equal(scores_of(engine), inline_scores(doubled(PARAMS)))


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
    engine = build(functools.partial(make_job, fingerprint="other"), exact=True)
    engine.publish(PARAMS, 0)
    with pytest.raises(WorkersGone, match="all workers are gone and 10 chunks lack scores") as stopped:
        engine.collect()
    told = str(stopped.value)
    assert "it has another data set: expected fingerprint 'same', got 'other'" in told
    assert "worker scorer-0 is gone for good" in told


def test_a_slow_actor_holds_up_nobody(build: Callable[..., Any], tmp_path: Path) -> None:
    slow = functools.partial(make_job, chunks=SlowOnce(tmp_path / "flag"))
    engine = build(slow, exact=True, scorers=2, patience=0.5)
    engine.publish(PARAMS, 0)
    np.testing.assert_array_equal(scores_of(engine), inline_scores(PARAMS))
    assert engine.stats().again > 0


def test_scores_that_are_not_finite_come_through_to_be_set_aside(build: Callable[..., Any]) -> None:
    engine = build(functools.partial(make_job, sometimes_nan), exact=True)
    engine.publish(PARAMS, 0)
    bad = int((linear_problem(NUM_EXAMPLES)[1]["y"] > 1.0).sum())
    rejected = 0
    for chunk in engine.collect():
        _, count = table.record(
            table.create(NUM_EXAMPLES), jnp.asarray(chunk.ids), jnp.asarray(chunk.scores), version=0
        )
        rejected += int(count)
    assert rejected == bad > 0


@pytest.mark.parametrize("exact", [False, True])
def test_a_full_object_store_is_said(build: Callable[..., Any], exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(exact=exact)

    def full(value: Any) -> None:
        raise ray.exceptions.ObjectStoreFullError("no room")

    monkeypatch.setattr(ray, "put", full)
    if exact:
        with pytest.raises(OSError, match="Ray's object store has no room for the 20 bytes of the parameters"):
            engine.publish(PARAMS, 0)
    else:
        engine.publish(PARAMS, 0)
        assert "workers go on with older ones" in engine.notices()[0]


def test_accelerators_come_first_and_who_has_no_room_asks_for_what_there_is_most_of() -> None:
    gpu, cpu = {"num_gpus": 1}, {"num_cpus": 1}
    assert cluster.places(3, {"CPU": 8.0, "GPU": 2.0}) == ([gpu, gpu, cpu], 10)
    assert cluster.places(2, {"TPU": 1.0, "CPU": 0.0}).needs == [{"resources": {"TPU": 1}}] * 2
    assert cluster.places(2, {}).room == 0


def test_an_actor_that_cannot_load_its_data_is_given_up_and_says_why(build: Callable[..., Any]) -> None:
    """In exact mode the run ends there: its last sentence holds the reason."""
    engine = build(nothing_there, exact=True)
    engine.publish(PARAMS, 0)
    with pytest.raises(WorkersGone, match=r"all workers are gone .*no data set in /nowhere"):
        engine.collect()


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
        scored[0] += record["scored"] if record["event"] == "refresh" else 0
        if scored[0] > 2 * NUM_BLOBS and record["event"] == "refresh":
            os.kill(os.getpid(), signal.SIGTERM)
            scored[0] = 0

    first = fit(config, dataset=blobs(), observe=enough)
    assert first.stopped_by == signal.SIGTERM
    replay = {"mode": "relaxed", "refresh_every": 100, "replay": str(tmp_path / "run"), "steps": first.step}
    again = fit(small_config(tmp_path / "again", **SETTINGS | replay), dataset=blobs())
    chex.assert_trees_all_equal(again.params, first.params)
