"""Actors and nodes that die for minutes on end: `make soak`."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from problems import blobs, linear_problem
from ray_jobs import make_importable, make_job
from test_cli import SMALL, finished, isgd
from test_ray_engine import inline_scores, pids, scores_of, wait_until

from isgd_jax.app.config import configure
from isgd_jax.app.run import fit
from isgd_jax.app.run_dir import RunDir

ray = pytest.importorskip("ray")
ray_engine = pytest.importorskip("isgd_jax.engines.ray_engine")
ray_connection = pytest.importorskip("isgd_jax.engines.ray_connection")

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:os.fork"),  # Ray starts nodes by forking this process, which holds jax
]
MINUTES, EVERY, NUM_BLOBS, PATIENCE = 3.0, 20.0, 60_000, 300.0
QUICK = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def longest_wait(arrivals: list[list[list[int]]], num_chunks: int) -> int:
    """The most chunks that arrived between two arrivals of one chunk, or before its first one or after its last."""
    total, last, longest = 0, [0] * num_chunks, 0
    for runs in arrivals:
        for _, first, until in runs:
            for chunk in range(first, until + 1):
                longest = max(longest, total - last[chunk])
        total += sum(until - first + 1 for _, first, until in runs)
        for _, first, until in runs:
            for chunk in range(first, until + 1):
                last[chunk] = total
    return max(longest, *(total - seen for seen in last))


def test_the_longest_wait_is_counted() -> None:
    assert longest_wait([[[0, 0, 1]], [[1, 2, 2]], [[2, 0, 0]], [[3, 1, 2]]], 3) == 2


def test_a_random_actor_killed_every_20_seconds(tmp_path: Path) -> None:
    """The run completes, each restarted actor scores, and no chunk waits longer than two sweeps of the others."""
    rng, told, killed, over = random.Random(0), list[str](), list[int](), threading.Event()
    end, failing = time.monotonic() + 60 * MINUTES, set[str]()

    def kill() -> None:
        while not over.wait(EVERY):
            victims = pids()
            if victims:
                killed.append(rng.choice(victims))
                os.kill(killed[-1], signal.SIGKILL)

    def observe(record: dict[str, Any]) -> None:
        if record["event"] == "warning":
            told.append(record["text"])
            name = record["text"].split()[1]
            if "failed" in record["text"]:
                failing.add(name)
            elif "scores again" in record["text"]:
                failing.discard(name)

    def done(record: dict[str, Any]) -> bool:
        """After the time of the kills, as soon as all who failed score again; some patience later in any case."""
        if time.monotonic() > end:
            over.set()
        return time.monotonic() > end and (not failing or time.monotonic() > end + PATIENCE)

    config = configure(
        engine="cluster", scorers=3, mode="relaxed", hidden=(512, 512), refresh_every=20, chunk_size=256, steps=10**7,
        log_every=500, checkpoint_every=10_000, run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    killer = threading.Thread(target=kill)
    killer.start()
    dataset = blobs(NUM_BLOBS)  # so many that a sweep takes seconds, longer than Ray takes to see that an actor died
    result = fit(config, dataset=dataset, observe=observe, until=done)
    over.set()
    killer.join()
    lines = list(RunDir(result.run_dir).records())
    arrivals = [line["arrived"] for line in lines if line["event"] == "refresh"]
    num_chunks = -(-NUM_BLOBS // 256)
    lost = [text for text in told if "its process or its node is gone" in text]
    back = [text for text in told if "scores again" in text]
    print(f"{result.step} steps, {len(killed)} kills, {len(lost)} losses told, {len(back)} came back; "
          f"longest wait {longest_wait(arrivals, num_chunks) / num_chunks:.2f} sweeps")  # fmt: skip
    assert lines[-1]["event"] == "finished"
    assert len(killed) >= 60 * MINUTES / EVERY - 2
    assert back
    assert not failing
    assert longest_wait(arrivals, num_chunks) <= 2 * num_chunks


def test_a_node_is_lost_and_another_joins() -> None:
    """Two nodes, an actor on each: one node dies, then a new one joins, and the actor begins there."""
    from ray.cluster_utils import Cluster

    make_importable()
    for name, value in ray_connection.QUIET.items():
        os.environ[name] = value
    hosts = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = hosts.add_node(num_cpus=1)
        hosts.wait_for_nodes()
        job = make_job()[0]
        engine = ray_engine.ray_cluster(
            job.scorer, job.data, num_workers=2, address=hosts.address, chunk_size=4, fingerprint="same",
            make_job=make_job,
        )  # fmt: skip
        params, told = linear_problem()[0], list[str]()
        engine.publish(params, 0)
        assert (scores_of(engine) == inline_scores(params)).all()
        wait_until(lambda: len(pids()) == 2)
        hosts.remove_node(second, allow_graceful=False)
        for version in range(1, 4):  # the other actor does it alone
            engine.publish(params, version)
            assert (scores_of(engine) == inline_scores(params)).all()
        wait_until(lambda: told.extend(engine.notices()) or any("node is gone" in text for text in told))
        hosts.add_node(num_cpus=1)
        version = 3

        def is_back() -> bool:
            nonlocal version
            version += 1
            engine.publish(params, version)
            engine.collect()
            told.extend(engine.notices())
            return any("scores again" in text for text in told)

        wait_until(is_back)
        engine.close()
    finally:
        ray.shutdown()
        hosts.shutdown()


def test_a_trainer_killed_while_its_actors_live_is_resumed(tmp_path: Path) -> None:
    """A Ray of its own outlives the trainer: what the trainer started is cleared away, and the run goes on."""
    ray_command = [sys.executable, "-m", "ray.scripts.scripts"]
    environment = os.environ | ray_connection.QUIET | QUICK
    start = [*ray_command, "start", "--head", "--port=0", "--num-cpus=2", "--include-dashboard=false"]
    subprocess.run(start, env=environment, check=True, capture_output=True, timeout=120)
    try:
        arguments = ["--data-dir", "data", *SMALL, "--mode", "relaxed", "--engine", "cluster", "--scorers", "2"]
        arguments += ["--address", "auto", "--steps", "1000000", "--log-every", "1000", "--checkpoint-every", "500"]
        process = isgd("train", "--run-dir", "run", *arguments, cwd=tmp_path, **QUICK)
        run = RunDir(tmp_path / "run")
        wait_until(lambda: any(run.checkpoints.glob("[0-9]*")) and len(pids()) == 2)
        process.kill()
        process.communicate()
        process = isgd("train", "--resume", "run", cwd=tmp_path, **QUICK)
        wait_until(lambda: any(record["event"] == "resumed" for record in run.records()))
        resumed = [record["step"] for record in run.records() if record["event"] == "resumed"][-1]

        def scored() -> int:
            return sum(record["scored"] for record in run.records("refresh") if record["step"] > resumed)

        wait_until(lambda: scored() > 2000, seconds=PATIENCE)
        process.send_signal(signal.SIGTERM)
        code, out, err = finished(process)
        assert (code, err) == (128 + signal.SIGTERM, ""), out
    finally:
        subprocess.run([*ray_command, "stop", "--force"], env=environment, capture_output=True, timeout=120)
