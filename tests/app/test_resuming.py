"""Before a run goes on: what was taken away, changed or damaged since is told, and nothing is erased or made up."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from problems import blobs, small_config

from isgd_jax.app.config import Config
from isgd_jax.app.records import Record
from isgd_jax.app.resuming import check_checkpoints_there
from isgd_jax.app.run import Result, fit
from isgd_jax.app.run_dir import RunDir

pytestmark = pytest.mark.slow


def config_of(folder: Path, weights: Path, **changes: Any) -> Config:
    settings = {"mode": "uniform", "monitor": "off", "checkpoint_every": 12, "example_weights": str(weights)}
    return small_config(folder, **settings | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A run of 40 updates, with checkpoints of 36 and 40, and its file of weights."""
    folder = tmp_path_factory.mktemp("made")
    np.save(folder / "weights.npy", np.linspace(0.5, 1.5, 90))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isgd_jax.app.recorder.plots", SimpleNamespace(draw=lambda run: None))
        result = fit(config_of(folder / "run", folder / "weights.npy"), dataset=blobs())
    return result, folder / "weights.npy"


@pytest.fixture
def run(made: tuple[Result, Path], tmp_path: Path) -> RunDir:
    """The same in a folder of the test's own."""
    shutil.copytree(made[0].run_dir, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    return RunDir(tmp_path / "run")


def lines_of(folder: Path) -> list[Record]:
    return list(RunDir(folder).records("progress"))


def test_the_first_line_after_a_break_is_that_of_a_run_without_one(run: RunDir, made: tuple[Result, Path]) -> None:
    result, weights = made
    shutil.rmtree(run.checkpoints / "40")
    resumed = fit(config_of(run.path, weights), dataset=blobs(), resume=True)
    jax.tree.map(np.testing.assert_array_equal, resumed.params, result.params)
    for name in ("step", "loss", "max_weight", "test_loss"):
        whole, again = ([line[name] for line in lines_of(folder)] for folder in (result.run_dir, run.path))
        assert again == whole, name


def test_the_share_of_trusted_scores_is_known_until_the_next_refresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isgd_jax.app.recorder.plots", SimpleNamespace(draw=lambda run: None))
    for steps in (10, 20):  # scores are refreshed before the break alone
        config = small_config(tmp_path / "run", refresh_every=100, monitor="off", steps=steps)
        fit(config, dataset=blobs(), resume=steps == 20)
    assert [line["trusted_share"] for line in lines_of(tmp_path / "run")] == [None, 1.0, 1.0]


def test_lines_that_were_lost_before_a_checkpoint_are_told(run: RunDir, made: tuple[Result, Path]) -> None:
    shutil.rmtree(run.checkpoints / "40")
    logged = max(line["step"] for line in lines_of(run.path) if line["step"] <= 36)
    kept = [line for line in run.metrics.read_text().splitlines(True) if '"progress"' not in line]
    run.metrics.write_text("".join(kept))
    fit(config_of(run.path, made[1]), dataset=blobs(), resume=True)
    told = [record["text"] for record in run.records("warning")]
    assert any(f"ends at update 0, before the line of update {logged} " in text for text in told), told
    fit(config_of(run.path, made[1]), dataset=blobs(), resume=True)  # nothing was lost before the checkpoint of 40
    assert sum("ends at update" in record["text"] for record in run.records("warning")) == 1


def test_another_file_of_weights_is_refused(run: RunDir, made: tuple[Result, Path], tmp_path: Path) -> None:
    before, kept = run.metrics.read_bytes(), made[1].read_bytes()
    np.save(made[1], np.linspace(1.5, 0.5, 90))
    try:
        with pytest.raises(
            ValueError, match=r"another file of example_weights: it has \w+, this run has \w+; go on with"
        ):
            fit(config_of(run.path, made[1], steps=50), dataset=blobs(), resume=True)
    finally:
        made[1].write_bytes(kept)
    assert run.metrics.read_bytes() == before


def test_a_run_whose_checkpoints_were_taken_away_is_not_begun_anew(run: RunDir, made: tuple[Result, Path]) -> None:
    before = run.metrics.read_bytes()
    for take_away in (lambda: [shutil.rmtree(path) for path in run.checkpoints.iterdir()],
                      lambda: run.checkpoints.rmdir()):  # fmt: skip
        take_away()
        with pytest.raises(ValueError, match=r"has no checkpoint, though metrics\.jsonl tells of 40 updates, which wo"):
            fit(config_of(run.path, made[1]), dataset=blobs(), resume=True)
        assert run.metrics.read_bytes() == before
    run.metrics.unlink()
    check_checkpoints_there(run)


def test_a_run_that_was_killed_before_its_first_checkpoint_is_begun_anew(tmp_path: Path) -> None:
    run = RunDir.create(small_config(tmp_path / "run", checkpoint_every=12))
    check_checkpoints_there(run)
    run.checkpoints.mkdir()
    run.append({"event": "progress", "step": 20})
    check_checkpoints_there(run)  # the one of step 12 may have been on its way
    run.append({"event": "progress", "step": 24})
    check_checkpoints_there(run)  # that of step 24 is saved after its line, and waits for the one before
    run.append({"event": "progress", "step": 30})
    with pytest.raises(ValueError, match="tells of 30 updates"):
        check_checkpoints_there(run)
    run.append({"event": "diverged", "step": 30})
    check_checkpoints_there(run)


def test_a_damaged_line_among_the_records_is_taken_out_and_the_run_goes_on(
    run: RunDir, made: tuple[Result, Path]
) -> None:
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    run.metrics.write_bytes(b"".join([*lines[:2], b'{"event": "progr\n', *lines[3:]]))
    again = config_of(run.path, made[1], steps=44)
    told = re.escape("line 3 is damaged") + ".*; or take this line out, a run goes on without it"
    with pytest.raises(ValueError, match=told):
        fit(again, dataset=blobs(), resume=True)
    run.metrics.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    assert fit(again, dataset=blobs(), resume=True).step == 44


def test_more_epochs_than_can_be_counted_are_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    for epochs in (1e9, 1e308):
        with pytest.raises(ValueError, match=r"epochs must be at most 2\.38609e\+08, .* on blobs, .*; got 1e\+"):
            fit(small_config(tmp_path / "run", epochs=epochs), dataset=blobs())
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_records_it(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", mode="uniform", monitor="off", steps=1, learning_rate=3e38)
    with pytest.raises(FloatingPointError, match="held-out loss is not finite at step 1") as lost:
        fit(config, dataset=blobs())
    *_, last = RunDir(tmp_path / "run").records()
    assert (last["event"], last["step"], last["text"]) == ("diverged", 1, str(lost.value))
