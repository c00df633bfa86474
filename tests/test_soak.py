"""Long and random trials, by hand: `make soak`."""

import random
import time
from pathlib import Path

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_cli import SMALL, finished, isgd

KILLS = 20
ARGUMENTS = ["--data-dir", "data", *SMALL, "--steps", "600", "--mode", "relaxed", "--checkpoint-every", "10"]


def last_arrays(run: Path) -> dict:
    with ocp.CheckpointManager(run.absolute() / "checkpoints") as manager:
        return manager.restore(manager.latest_step(), args=ocp.args.Composite(arrays=ocp.args.StandardRestore())).arrays


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_killed_at_random_moments_each_resume_succeeds(tmp_path: Path) -> None:
    """A run killed with -9 at 20 random moments ends with the parameters of one that was never killed, bit for bit."""
    assert finished(isgd("train", "--run-dir", "whole", *ARGUMENTS, cwd=tmp_path))[0] == 0
    rng, kills = random.Random(0), 0
    while kills < KILLS:
        begun = (tmp_path / "killed" / "config.json").exists()
        how = ["--resume", "killed"] if begun else ["--run-dir", "killed", *ARGUMENTS]
        process = isgd("train", *how, cwd=tmp_path)
        time.sleep(rng.uniform(1.0, 12.0))
        process.kill()
        _, err = process.communicate()
        assert "Error" not in err, err
        kills += 1
        print(f"kill {kills}: checkpoints {sorted(p.name for p in (tmp_path / 'killed' / 'checkpoints').glob('*'))}")
    code, _, err = finished(isgd("train", "--resume", "killed", cwd=tmp_path))
    assert (code, err) == (0, "")
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, last_arrays(tmp_path / "killed")["state"]["params"]),
        jax.tree.map(np.asarray, last_arrays(tmp_path / "whole")["state"]["params"]),
    )
