"""`isgd train --engine cluster`, on a Ray of this host."""

import signal
import socket
import time
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_cli import SMALL, finished, isgd

from isgd_jax.app.run_dir import RunDir

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore:Sharding info not")]
QUICK = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def params_of(run: Path) -> Any:
    with ocp.CheckpointManager(run.absolute() / "checkpoints") as manager:
        restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(arrays=ocp.args.StandardRestore()))
    return jax.tree.map(np.asarray, restored.arrays["state"]["params"])


def run(cwd: Path, *arguments: str) -> str:
    """A run to its end, with a clean console."""
    code, out, err = finished(isgd("train", "--data-dir", "data", *SMALL, *arguments, cwd=cwd, **QUICK), seconds=400)
    assert (code, err) == (0, "")
    assert "raylet" not in out
    return out


@pytest.mark.soak
def test_exact_mode_gives_the_bits_of_inline(tmp_path: Path) -> None:
    run(tmp_path, "--run-dir", "inline", "--steps", "200")
    run(tmp_path, "--run-dir", "cluster", "--steps", "200", "--engine", "cluster", "--scorers", "2")
    chex.assert_trees_all_equal(params_of(tmp_path / "cluster"), params_of(tmp_path / "inline"))


@pytest.mark.soak
def test_a_relaxed_run_stops_at_a_signal_and_can_be_replayed(tmp_path: Path) -> None:
    """SIGTERM saves, stops and leaves no Ray behind; the steps made until then are replayed without workers."""
    relaxed = ["--data-dir", "data", *SMALL, "--mode", "relaxed", "--refresh-every", "10", "--chunk-size", "128"]
    endless = [*relaxed, "--steps", "1000000", "--engine", "cluster", "--scorers", "2", "--log-every", "1000"]
    process = isgd("train", "--run-dir", "run", *endless, cwd=tmp_path, **QUICK)
    folder, deadline = RunDir(tmp_path / "run"), time.monotonic() + 300
    while sum(record["scored"] for record in folder.records("refresh")) < 3000 and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code, out, err = finished(process)
    assert (code, err) == (128 + signal.SIGTERM, ""), out
    last = [record["step"] for record in folder.records()][-1]
    assert sum(record["scored"] for record in folder.records("refresh")) >= 3000
    replay = [*relaxed, "--steps", str(last), "--log-every", "1000000", "--replay", "run"]
    code, _, err = finished(isgd("train", "--run-dir", "again", *replay, cwd=tmp_path, **QUICK), seconds=400)
    assert (code, err) == (0, "")
    chex.assert_trees_all_equal(params_of(tmp_path / "again"), params_of(tmp_path / "run"))


def test_no_ray_at_the_address_is_one_sentence(tmp_path: Path) -> None:
    """Also where the address is known and nothing answers: Ray by itself would try for a quarter of an hour.

    Where ``auto`` leads is told by the environment: any Ray that runs on this machine would be joined else.
    """
    with socket.socket() as taken:  # bound and not listening: nobody answers, and nobody else gets it
        taken.bind(("", 0))
        there = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = ["train", "--data-dir", "data", "--engine", "cluster", "--address", "auto"]
        code, _, err = finished(isgd(*arguments, cwd=tmp_path, **QUICK, RAY_ADDRESS=there), seconds=100)
    assert code == 1
    assert "there is no Ray at --address auto (nothing answers at" in err
    assert "ray start --head" in err
    assert "Traceback" not in err
