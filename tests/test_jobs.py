"""What workers are given to do."""

from pathlib import Path

import numpy as np
import pytest
from isgd_jax.jobs import job_elsewhere, worker_job
from problems import blobs, small_config


def test_a_worker_in_another_folder_finds_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders beside the trainer, at home, and named by the environment are those of the trainer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", "prepared")

    def folders(**named: str) -> tuple[str | None, str | None]:
        made = job_elsewhere(small_config("run", **named), None, None, None)
        assert made.func is worker_job
        return made.args[0].data_dir, made.args[0].raw_dir

    assert folders(data_dir="data") == (str(tmp_path / "data"), None)
    assert folders(data_dir="~/data", raw_dir="raw") == (str(Path.home() / "data"), str(tmp_path / "raw"))
    assert folders() == (str(tmp_path / "prepared"), None)


def test_a_data_set_of_ones_own_is_sent_along() -> None:
    job, fingerprint = job_elsewhere(small_config("run"), blobs(), None, None)()
    np.testing.assert_array_equal(job.data["features"], blobs().train["features"])
    assert fingerprint == blobs().fingerprint
