"""Data that stays on the host or on disk: the same draws, the same parameters, nothing served from an old law."""

from pathlib import Path

import chex
import pytest
from problems import blobs, small_config

from isgd_jax.app.run import fit

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mode", ["uniform", pytest.param("exact", marks=pytest.mark.slow)])
def test_where_the_data_are_changes_nothing(tmp_path: Path, mode: str) -> None:
    """Without a gate, which on the host is asked once for a block; to where rounding moves a draw."""
    here = fit(small_config(tmp_path / "device", mode=mode, gate="off", steps=24), dataset=blobs())
    there = fit(small_config(tmp_path / "host", mode=mode, gate="off", steps=24, hold="host"), dataset=blobs())
    chex.assert_trees_all_close(here.params, there.params, rtol=1e-5, atol=1e-6)


def test_a_run_broken_within_a_block_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = fit(small_config(tmp_path / "whole", hold="host"), dataset=blobs())
    fit(small_config(tmp_path / "broken", hold="host", steps=21), dataset=blobs())
    resumed = fit(small_config(tmp_path / "broken", hold="host"), dataset=blobs(), resume=True)
    chex.assert_trees_all_equal(resumed.params, whole.params)
