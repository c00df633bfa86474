"""Data that stays on the host or on disk: the same draws, the same parameters, nothing served from an old law."""

import shutil
from pathlib import Path
from typing import Any

import chex
import pytest
from problems import blobs, small_config

from isgd_jax.app.run import fit

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mode", ["uniform", "exact"])
def test_where_the_data_are_changes_nothing_and_a_run_broken_within_a_block_goes_on_bit_for_bit(
    tmp_path: Path, mode: str
) -> None:
    """Without a gate, which on the host is asked once for a block; to where rounding moves a draw.

    (With a gate a run from the host goes on in `test_fit.py`.)
    """
    steps: dict[str, Any] = {"mode": mode, "gate": "off", "steps": 24, "checkpoint_every": 21}
    here = fit(small_config(tmp_path / "device", **steps), dataset=blobs())
    there = fit(small_config(tmp_path / "host", **steps, hold="host"), dataset=blobs())
    chex.assert_trees_all_close(here.params, there.params, rtol=1e-5, atol=1e-6)
    if mode == "exact":  # as a kill after step 21 leaves it, with batches of the block's rest on their way
        broken = shutil.copytree(there.run_dir, tmp_path / "broken", ignore=shutil.ignore_patterns(".lock"))
        shutil.rmtree(broken / "checkpoints" / "24")
        told: list[dict[str, Any]] = []
        resumed = fit(small_config(broken, **steps, hold="host"), dataset=blobs(), resume=True, observe=told.append)
        assert resumed.step == 24
        assert [record["first_step"] for record in told if record["event"] == "plan"] == [21]
        chex.assert_trees_all_equal(resumed.params, there.params)
