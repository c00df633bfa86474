"""Long and random trials, by hand: `make soak`."""

import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from problems import blobs, small_config
from test_cli import SMALL, finished, isgd
from test_readers import NAMES, fuzz, readers

from isgd_jax.app.run import Result, fit
from isgd_jax.app.run_dir import Record, RunDir
from isgd_jax.engines.contract import WorkersGone
from isgd_jax.engines.local_engine import DeviceWorker

KILLS = 20
ARGUMENTS = ["--data-dir", "data", *SMALL, "--steps", "8000", "--mode", "relaxed", "--log-every", "100"]
ARGUMENTS += ["--checkpoint-every", "100"]


def last_arrays(run: Path) -> dict:
    with ocp.CheckpointManager(run.absolute() / "checkpoints") as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.Composite(arrays=ocp.args.StandardRestore())).arrays


def wait_for_training(process: subprocess.Popen[str], *, beyond: int) -> None:
    """Return when the process has printed a line of progress past the newest checkpoint."""
    assert process.stdout is not None
    for line in process.stdout:
        first = line.split()[:1]
        if first and first[0].isdigit() and int(first[0]) > beyond:
            return
    raise AssertionError(f"no update past {beyond} was made: exit code {process.wait()}")


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_killed_at_random_moments_each_resume_succeeds(tmp_path: Path) -> None:
    """A run killed with -9 at 20 random moments ends with the parameters of one that was never killed, bit for bit."""
    assert finished(isgd("train", "--run-dir", "whole", *ARGUMENTS, cwd=tmp_path), seconds=900)[0] == 0
    rng, killed, reached = random.Random(0), RunDir(tmp_path / "killed"), [0]
    for kill in range(KILLS):
        begun = (killed.path / "config.json").exists()
        how = ["--resume", "killed"] if begun else ["--run-dir", "killed", *ARGUMENTS]
        process = isgd("train", *how, cwd=tmp_path)
        if kill % 4:  # every fourth kill falls into the start-up, the others into training and saving
            wait_for_training(process, beyond=reached[-1])
        time.sleep(rng.uniform(0.0, 1.0))
        process.kill()
        _, err = process.communicate()
        assert "Error" not in err, err
        saved = [int(path.name) for path in killed.checkpoints.glob("*") if path.name.isdigit()]
        reached.append(max(saved, default=0))
    print(f"newest checkpoint after each kill: {reached[1:]}")
    assert reached == sorted(reached)
    assert len(set(reached)) > KILLS // 2
    code, _, err = finished(isgd("train", "--resume", "killed", cwd=tmp_path), seconds=900)
    assert (code, err) == (0, "")
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, last_arrays(tmp_path / "killed")["state"]["params"]),
        jax.tree.map(np.asarray, last_arrays(tmp_path / "whole")["state"]["params"]),
    )


FAULTS = 100
Finish = Callable[[DeviceWorker, Any], np.ndarray]
HONEST: Finish = DeviceWorker.finish


def dies(rng: random.Random, device: DeviceWorker, scores: np.ndarray) -> np.ndarray:
    if rng.random() < 0.2:
        raise RuntimeError("a worker died in mid-chunk")
    return scores


def all_gone(rng: random.Random, device: DeviceWorker, scores: np.ndarray) -> np.ndarray:
    raise RuntimeError("nobody is left")


def slow(rng: random.Random, device: DeviceWorker, scores: np.ndarray) -> np.ndarray:
    threading.Event().wait(rng.choice([0.0, 0.0, 0.5]))
    return scores


def not_a_number(rng: random.Random, device: DeviceWorker, scores: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(scores)) == rng.randrange(len(scores)), np.nan, scores).astype(scores.dtype)


def wrong_shape(rng: random.Random, device: DeviceWorker, scores: np.ndarray) -> np.ndarray:
    return scores[: rng.randrange(len(scores) + 1)]


def other_data(rng: random.Random, device: DeviceWorker, scores: np.ndarray) -> np.ndarray:
    device.fingerprint = "of other data"
    return scores


IN_PROCESS = [dies, all_gone, slow, not_a_number, wrong_shape, other_data]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_hundred_faults_and_every_run_ends_right_or_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run has a fault of its workers at random moments; some are stopped by SIGTERM and resumed as well.

    A relaxed run always ends; its parameters are finite, and its replay, without any fault, gives them bit for bit. An
    exact run ends with the very parameters of a run without faults, or says that nobody is left.
    """
    rng, counted = random.Random(0), dict.fromkeys([fault.__name__ for fault in IN_PROCESS], 0)
    exact = fit(small_config(tmp_path / "exact", mode="exact"), dataset=blobs())
    for trial in range(FAULTS):
        fault, mode, folder = rng.choice(IN_PROCESS), rng.choice(["relaxed", "relaxed", "exact"]), tmp_path / str(trial)
        begins, stops = rng.randrange(40), rng.choice([None, 10, 20, 30])
        counted[fault.__name__] += 1
        trouble = threading.Event()

        def finish(self: DeviceWorker, started: Any, fault: Any = fault, trouble: Any = trouble) -> np.ndarray:
            scores = HONEST(self, started)
            return fault(rng, self, scores) if trouble.is_set() else scores

        def observe(record: Record, begins: int = begins, stops: int | None = stops, trouble: Any = trouble) -> None:
            if record.get("step", 0) >= begins:
                trouble.set()
            if record["event"] == "progress" and record["step"] == stops:
                os.kill(os.getpid(), signal.SIGTERM)

        config = small_config(folder, mode=mode, engine="local", chunk_size=10, chunk_patience=0.3)
        monkeypatch.setattr(DeviceWorker, "finish", finish)
        try:
            result: Result | None = fit(config, dataset=blobs(), observe=observe)
        except WorkersGone:
            assert mode == "exact"
            result = None
        monkeypatch.setattr(DeviceWorker, "finish", HONEST)
        if result is None or result.stopped_by is not None:
            result = fit(config, dataset=blobs(), resume=True)
        assert result.step == 40
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(result.params)))
        if mode == "exact" and fault is not not_a_number:
            chex.assert_trees_all_equal(result.params, exact.params)
        if mode == "relaxed" and fault is not not_a_number:
            again = small_config(tmp_path / f"{trial}-again", mode=mode, engine="local", chunk_size=10,
                                 chunk_patience=0.3, replay=str(folder))  # fmt: skip
            chex.assert_trees_all_equal(fit(again, dataset=blobs()).params, result.params)
    print(f"faults: {counted}")


FED = 10_000
"""Files that each reader is fed with."""


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_readers_refuse_whatever_they_cannot_read(tmp_path: Path, name: str) -> None:
    reader = next(reader for reader in readers(tmp_path) if reader.name == name)
    (tmp_path / "at").mkdir()
    print(f"{name}: {fuzz(reader, tmp_path / 'at', examples=FED):,} of {FED:,} refused")


def flip_a_bit(rng: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)


def cut_short(rng: random.Random, file: Path) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size + 1))


def remove(rng: random.Random, file: Path) -> None:
    file.unlink()


def fill_with_zeros(rng: random.Random, file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


DAMAGES = [flip_a_bit, cut_short, remove, fill_with_zeros]
DAMAGED = 60


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("failed_reads")
def test_whatever_happens_to_the_newest_checkpoint_the_run_ends_with_the_same_parameters(tmp_path: Path) -> None:
    """A run is stopped at step 35; a file of the checkpoint there, or of each, is damaged at random; it goes on."""
    whole = fit(small_config(tmp_path / "whole"), dataset=blobs())
    stopped = tmp_path / "stopped"
    fit(small_config(stopped, log_every=5), dataset=blobs(), until=lambda record: record["step"] == 35)
    rng, told = random.Random(0), 0
    for trial in range(DAMAGED):
        run = tmp_path / str(trial)
        shutil.copytree(stopped, run)
        newest = run / "checkpoints" / "35"
        rng.choice(DAMAGES)(rng, rng.choice(sorted(path for path in newest.rglob("*") if path.is_file())))
        seen: list[Record] = []
        result = fit(small_config(run, log_every=5), dataset=blobs(), resume=True, observe=seen.append)
        chex.assert_trees_all_equal(result.params, whole.params)
        told += any("is damaged" in record.get("text", "") for record in seen)
        shutil.rmtree(run)
    print(f"{told} of {DAMAGED} damages made the checkpoint before the one that was taken")
    assert 0 < told < DAMAGED


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_of_several_processes_on_one_folder_one_goes_on(tmp_path: Path) -> None:
    assert finished(isgd("train", "--run-dir", "run", "--data-dir", "data", *SMALL, cwd=tmp_path))[0] == 0
    for trial in range(1, 6):
        steps = str(60 + 100 * trial)
        both = [isgd("train", "--resume", "run", "--steps", steps, cwd=tmp_path) for _ in range(3)]
        ended = [finished(process, seconds=600) for process in both]
        assert sorted(code for code, _, _ in ended) == [0, 1, 1], ended
        assert all(re.search("is in use: process .* has been writing", err) for code, _, err in ended if code)
    steps_told = [record["step"] for record in RunDir(tmp_path / "run").records("progress")]
    assert steps_told == sorted(set(steps_told))
    assert steps_told[-1] == 560
