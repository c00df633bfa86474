"""What workers are given to do."""

from pathlib import Path

import pytest
from problems import blobs, small_config

from isgd_jax.jobs import jobs_elsewhere, worker_jobs


def test_a_worker_in_another_folder_finds_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders beside the trainer are named from the root; an address of a bucket stays as it is."""
    monkeypatch.chdir(tmp_path)
    made = jobs_elsewhere(small_config("run", data_dir="data", raw_dir="gs://bucket/raw"), None, None, None)
    assert made.func is worker_jobs
    assert (made.args[0].data_dir, made.args[0].raw_dir) == (str(tmp_path / "data"), "gs://bucket/raw")


def test_a_data_set_of_ones_own_is_sent_along() -> None:
    jobs, fingerprint = jobs_elsewhere(small_config("run"), blobs(), None, None)()
    assert set(jobs) == {"train"}
    assert fingerprint == blobs().fingerprint
