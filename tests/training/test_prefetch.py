"""Data that stays on the host or on disk: the same draws, the same parameters, nothing served from an old law."""

from pathlib import Path

import chex
import numpy as np
import pytest
from problems import blobs, small_config

from isgd_jax.app import data
from isgd_jax.app.data.dataset import spilled
from isgd_jax.app.run import fit

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("hardly_optimised")]


@pytest.mark.parametrize("mode", ["uniform", pytest.param("exact", marks=pytest.mark.slow)])
def test_where_the_data_are_changes_nothing(tmp_path: Path, mode: str) -> None:
    here = fit(small_config(tmp_path / "device", mode=mode), dataset=blobs())
    there = fit(small_config(tmp_path / "host", mode=mode, hold="host"), dataset=blobs())
    chex.assert_trees_all_close(here.params, there.params, rtol=1e-5, atol=1e-6)


def test_a_run_broken_within_a_block_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = fit(small_config(tmp_path / "whole", hold="host"), dataset=blobs())
    fit(small_config(tmp_path / "broken", hold="host", steps=21), dataset=blobs())
    resumed = fit(small_config(tmp_path / "broken", hold="host"), dataset=blobs(), resume=True)
    chex.assert_trees_all_equal(resumed.params, whole.params)


class Numbers:
    """A source of 10,000 examples, read in several goes."""

    def __init__(self, size: int = 10_000) -> None:
        self.size, self.reads = size, 0

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, indices: list[int]) -> list[dict[str, np.ndarray]]:
        self.reads += len(indices)
        return [{"image": np.full(3, i, np.float64), "label": np.int64(i % 2)} for i in indices]


def test_what_is_spilled_is_the_same_and_read_once(tmp_path: Path) -> None:
    source = Numbers()
    on_disk = data.from_source(source, Numbers(5), spill=tmp_path / "rows", name="numbers")
    in_memory = data.from_source(Numbers(), Numbers(5), name="numbers")
    assert on_disk.fingerprint == in_memory.fingerprint
    np.testing.assert_array_equal(on_disk.train["image"], in_memory.train["image"])
    assert on_disk.mean == in_memory.mean
    reads = source.reads
    spilled(source, tmp_path / "rows")
    assert source.reads <= reads + 1  # names only


def test_another_data_set_in_the_folder_is_refused(tmp_path: Path) -> None:
    spilled(Numbers(20), tmp_path / "rows")
    with pytest.raises(ValueError, match="holds another data set, of another size: delete it"):
        spilled(Numbers(30), tmp_path / "rows")
