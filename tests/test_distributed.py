"""Several processes that train as one, over loopback."""

import json
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from problems import blobs, small_config
from test_cli import isgd

from isgd_jax.config import Config
from isgd_jax.distributed import LOST
from isgd_jax.parallel import AllDevices
from isgd_jax.rundir import RunDir
from isgd_jax.train import fit

pytestmark = pytest.mark.usefixtures("hardly_optimised")

SETTINGS: dict[str, Any] = {
    "hidden": (16,), "batch_size": 32, "refresh_every": 20, "chunk_size": 128, "log_every": 20, "checkpoint_every": 20,
    "learning_rate": 0.01, "heartbeat_timeout": 30,
}  # fmt: skip


def processes(cwd: Path, *arguments: str, count: int = 2, devices: int = 4) -> list[subprocess.Popen[str]]:
    """The same command on each of the hosts, but for its place."""
    with socket.create_server(("", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", _word(value))]
    places = ["--distributed", "--coordinator", address, "--num-processes", str(count)]
    environment = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "NPROC": "16", "JAX_PLATFORMS": "cpu",
    }  # fmt: skip
    return [
        isgd("train", *arguments, *flags, *places, "--process-id", str(i), cwd=cwd, **environment) for i in range(count)
    ]


def _word(value: Any) -> str:
    return str(value[0]) if isinstance(value, tuple) else str(value)


def progress(run: Path) -> list[dict[str, Any]]:
    return list(RunDir(run).records("progress")) if run.is_dir() else []


def wait_for(run: Path, step: int, running: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 240
    while not any(record["step"] >= step for record in progress(run)):
        assert all(process.poll() is None for process in running), [process.communicate() for process in running]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_make_the_run_of_one_and_the_loss_of_one_ends_both(tmp_path: Path) -> None:
    """2 x 4 devices give the losses of 1 x 8; one process is killed, and the other ends with our message, in time."""
    fit(Config(**SETTINGS, data_dir=str(tmp_path / "data"), run_dir=str(tmp_path / "one"), steps=40))
    running = processes(tmp_path, "--run-dir", "two", "--data-dir", "data", "--steps", "100000")
    wait_for(tmp_path / "two", 40, running)
    began = time.monotonic()
    running[1].kill()
    outs = [process.communicate(timeout=200) for process in running]
    assert time.monotonic() - began < 2 * SETTINGS["heartbeat_timeout"]
    assert running[0].returncode == LOST
    assert "process 1 of 2 ended: its training process died; this process ends too: resume" in outs[0][1]
    assert "The plan" in outs[0][0]
    assert "The plan" not in outs[1][0]
    expected, got = (progress(tmp_path / name) for name in ("one", "two"))
    assert [record["step"] for record in expected] == [0, 20, 40]
    for name in ("loss", "test_loss", "sd_stale"):
        pairs = [(theirs[name], ours[name]) for theirs, ours in zip(got, expected, strict=False) if ours[name]]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-5)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_signal_at_one_stops_all_at_one_step_and_the_run_goes_on(tmp_path: Path) -> None:
    """SIGTERM, resume, and the death of process 0, with which jax's own coordinator dies."""
    running = processes(tmp_path, "--run-dir", "two", "--data-dir", "data", "--steps", "100000")
    wait_for(tmp_path / "two", 40, running)
    running[1].send_signal(signal.SIGTERM)
    outs = [process.communicate(timeout=200) for process in running]
    assert [process.returncode for process in running] == [128 + signal.SIGTERM] * 2, outs
    stopped = [record["step"] for record in RunDir(tmp_path / "two").records()][-1]
    first, second = running = processes(tmp_path, "--resume", "two", "--steps", "100000")
    wait_for(tmp_path / "two", stopped + 20, running)
    steps = [record["step"] for record in RunDir(tmp_path / "two").records()]
    assert steps == sorted(steps)
    first.kill()
    _, err = second.communicate(timeout=200)
    first.communicate()
    assert second.returncode != 0
    assert "process 0 of 2 ended: its training process died; this process ends too: resume" in err


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(ValueError, match="--batch-size must be a multiple of the 8 devices that train"):
        AllDevices(12)


@pytest.mark.soak
@pytest.mark.parametrize("mode", ["uniform", "exact", "relaxed"])
def test_parts_of_one_process_make_the_same_run(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network: a batch cut over 8 devices gives the losses of a batch on one, in every mode."""
    changes: dict[str, Any] = {"mode": mode, "batch_size": 16, "steps": 10, "log_every": 10}
    fit(small_config(tmp_path / "whole", **changes), dataset=blobs())
    monkeypatch.setattr("isgd_jax.train.OneDevice", lambda: AllDevices(16))
    fit(small_config(tmp_path / "parts", **changes), dataset=blobs())
    expected, got = progress(tmp_path / "whole")[-1], progress(tmp_path / "parts")[-1]
    for name in ("loss", "test_loss", "sd_stale", "max_weight"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5)


def test_a_mistaken_place_is_found_before_anything_else(tmp_path: Path) -> None:
    unknown = small_config(tmp_path / "run", distributed=True, coordinator="127.0.0.1:1")
    with pytest.raises(ValueError, match="--distributed needs --num-processes, --process-id"):
        fit(unknown, dataset=blobs())
    outside = small_config(tmp_path / "run", distributed=True, coordinator="127.0.0.1:1", num_processes=2, process_id=2)
    with pytest.raises(ValueError, match="--process-id must be between 0 and 1, as --num-processes is 2; got 2"):
        fit(outside, dataset=blobs())
    nowhere = small_config(tmp_path / "run", distributed=True, coordinator="here", num_processes=2, process_id=0)
    with pytest.raises(ValueError, match="--coordinator must be host:port"):
        fit(nowhere, dataset=blobs())
    assert not (tmp_path / "run").exists()


def test_flags_of_a_place_need_the_flag_that_asks_for_it() -> None:
    with pytest.raises(ValueError, match="--process-id must be left out without --distributed"):
        Config(process_id=1)
    with pytest.raises(ValueError, match="--heartbeat-timeout must be at least 1 second"):
        Config(heartbeat_timeout=0)


def test_what_is_saved_names_no_place() -> None:
    config = Config(distributed=True, coordinator="host:1", num_processes=2, process_id=1)
    assert config.as_saved() == Config()
    assert json.dumps(config.as_saved().to_dict())
