"""Long and random trials, by hand: `make soak`."""

import random
import subprocess
import time
from pathlib import Path

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_cli import SMALL, finished, isgd
from test_readers import READERS, fed, fuzz

from isgd_jax.app.run_dir import RunDir

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


FED = 10_000
"""Files that each reader is fed with."""


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("failed_reads")
@pytest.mark.parametrize("name", READERS)
def test_readers_refuse_whatever_they_cannot_read(tmp_path: Path, name: str) -> None:
    reader, folder = fed(tmp_path, name)
    print(f"{name}: {fuzz(reader, folder, examples=FED):,} of {FED:,} refused")
