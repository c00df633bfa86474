"""Comparisons: answers worked by hand, counted coverage, and a small study trained, stopped, resumed and read."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from problems import blobs, small_config

from isgd_jax.app import compare, figures
from isgd_jax.app.compare.plots import figure
from isgd_jax.app.compare.study import _is_whole
from isgd_jax.app.config import Config, configure
from isgd_jax.app.html import comparison_page
from isgd_jax.app.records import Record
from isgd_jax.app.run import fit
from isgd_jax.app.run_dir import RunDir
from isgd_jax.errors import RunInUseError


def curve(losses: list[float], every: int = 10, seconds: float = 1.0) -> list[Record]:
    return [
        {"event": "progress", "step": every * i, "train_seconds": seconds * i, "test_loss": loss, "test_error": None}
        for i, loss in enumerate(losses)
    ]


LEVEL = compare.Level("test_loss", 0.5)


def test_levels_as_a_person_writes_them() -> None:
    assert compare.levels("test_loss=0.5,0.1", "test_error=0.2") == (
        compare.Level("test_loss", 0.5),
        compare.Level("test_loss", 0.1),
        compare.Level("test_error", 0.2),
    )


@pytest.mark.parametrize("text", ["test_loss", "test_loss=", "test_loss=low", "=0.1", "test_loss=nan"])
def test_a_level_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a level is a field and its values"):
        compare.levels(text)


def test_the_first_step_at_or_below_a_level() -> None:
    assert compare.first_seen(curve([1.0, 0.5, 0.9]), LEVEL) == 10
    assert compare.first_seen(curve([1.0, 0.5], seconds=3.0), LEVEL, "train_seconds") == 3.0
    assert compare.first_seen(curve([1.0, 0.6]), LEVEL) == math.inf


def test_a_field_that_was_not_measured_is_named() -> None:
    with pytest.raises(ValueError, match="no 'train_loss'; they have test_loss, train_seconds"):
        compare.first_seen(curve([1.0]), compare.Level("train_loss", 0.5))


def test_the_median_interval_of_five_is_their_range_and_infinity_stays() -> None:
    assert compare.median([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 1.0, 5.0)
    assert compare.median([1.0, math.inf, 2.0, math.inf, math.inf]) == (math.inf, 1.0, math.inf)


def test_the_geometric_mean_by_hand() -> None:
    """Logs -1, 0, 1: mean 0, standard error 1/sqrt(3), Student's 97.5 % point for 2 degrees of freedom 4.302653."""
    found = compare.geometric_mean(np.exp([-1.0, 0.0, 1.0]))
    assert found == pytest.approx(
        (1.0, math.exp(-4.302653 / math.sqrt(3)), math.exp(4.302653 / math.sqrt(3))), rel=1e-6
    )


def test_the_mean_by_hand_and_without_bounds_where_none_are_known() -> None:
    half = 4.302653 / math.sqrt(3)
    assert compare.mean([-1.0, 0.0, 1.0]) == pytest.approx((0.0, -half, half), rel=1e-6)
    assert compare.mean([3.0]) == (3.0, -math.inf, math.inf)
    assert compare.mean([3.0, math.inf]) == (math.inf, -math.inf, math.inf)
    assert all(map(math.isnan, compare.mean([])))


def test_ratios_are_paired_by_seed() -> None:
    """Ours is 0.8 of its own base each time: strangers would differ by far more."""
    base = np.array([10.0, 100.0, 1000.0])
    assert compare.paired_ratio(0.8 * base, base) == pytest.approx((0.8, 0.8, 0.8))


def test_ratios_with_runs_that_never_got_there() -> None:
    inf = math.inf
    assert (
        compare.paired_ratio([1.0, inf, 1.0, inf], [2.0, 2.0, inf, inf]).value == 0.5
    )  # 0.5, inf, 0; the last says nothing
    assert math.isnan(compare.paired_ratio([inf], [inf]).value)


def test_coverage_at_five_seeds() -> None:
    """2,000 studies of log-normal runs: standard error of a share 0.0049; 0.9375 and 0.95 within four of them."""
    rng = np.random.default_rng(0)
    samples = np.exp(rng.normal(size=(2000, 5)))
    # The bootstrap interval of five is their range (tested above): counted without 2,000 bootstraps.
    held = np.mean((samples.min(1) <= 1.0) & (samples.max(1) >= 1.0))
    assert abs(held - 0.9375) < 4 * 0.0055
    means = [compare.geometric_mean(sample) for sample in samples]
    assert abs(np.mean([mean.low <= 1.0 <= mean.high for mean in means]) - 0.95) < 4 * 0.0049


def test_quartiles_stop_where_the_shortest_run_does() -> None:
    found = compare.quartiles([curve([4.0, 2.0]), curve([2.0, 1.0, 0.5]), curve([3.0, 3.0, 3.0])], "test_loss")
    assert found is not None
    assert found.x.tolist() == [0, 10]
    assert found.middle.tolist() == [3.0, 2.0]
    assert (found.low.tolist(), found.high.tolist()) == ([2.5, 1.5], [3.5, 2.5])
    assert compare.quartiles([curve([1.0])], "train_loss") is None


def study() -> compare.Study:
    return compare.Study(
        {
            "uniform": {seed: curve([1.0, 0.8, 0.6, 0.5 - seed / 10, 0.1]) for seed in range(3)},
            "ours": {seed: curve([1.0, 0.5, 0.4, 0.3], seconds=2.0) for seed in range(3)},
        }
    )


def test_the_table_by_hand() -> None:
    by_steps, _, by_seconds, ours = compare.rows(study(), [LEVEL])[0:4]
    assert (by_steps.arm, by_steps.unit, by_steps.median.value, by_steps.ratio.value) == (
        "uniform",
        "updates",
        30.0,
        1.0,
    )
    assert (by_seconds.unit, by_seconds.median.value) == ("seconds", 3.0)
    assert (ours.arm, ours.median.value, ours.reached) == ("ours", 2.0, 3)
    assert ours.ratio.value == pytest.approx(2 / 3)
    written = compare.text(compare.rows(study(), [LEVEL]))
    assert "30 updates [30, 30]" in written
    assert "0.33 [0.33, 0.33]" in written
    assert compare.markdown(compare.rows(study(), [LEVEL])).count("\n") == 5


def test_an_arm_that_never_gets_there_is_shown_as_such() -> None:
    rows = compare.rows(study(), [compare.Level("test_loss", 0.2)], ["step"])
    assert "never updates" not in compare.text(rows)
    assert "never [never, never]" in compare.text(rows)
    assert rows[1].reached == 0


def test_the_figures_show_every_arm(tmp_path: Path) -> None:
    paths = compare.draw(study(), tmp_path)
    assert [path.name for path in paths] == ["test_loss-updates.png", "test_loss-seconds.png"]
    assert all(matplotlib.image.imread(path).std() > 0.02 for path in paths)
    axes = figure(study(), "test_loss").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["uniform", "ours"]
    assert axes.lines[0].get_ydata()[3] == pytest.approx(0.4)


def test_svg_has_variables_in_place_of_our_colours() -> None:
    with figures.style():
        element = figures.svg(figure(study(), "test_loss"), "one")
    assert element.startswith("<svg")
    assert "var(--0072b2)" in element
    assert "#0072b2" not in element.lower()
    light, dark = figures.css_colours()
    assert set(light) == set(dark)


def arms(tmp_path: Path, **changes: Any) -> dict[str, compare.Arm]:
    def fit_blobs(config: Config, **options: Any) -> Any:
        return fit(config, dataset=blobs(), **options)

    return {
        mode: compare.Arm(small_config("", mode=mode, steps=20, **changes), fit_blobs) for mode in ("uniform", "exact")
    }


@pytest.mark.slow
def test_a_study_is_trained_once_and_read_again(tmp_path: Path) -> None:
    said: list[str] = []
    made = compare.train(arms(tmp_path), seeds=1, folder=tmp_path / "s", say=said.append)
    assert list(made.curves) == ["uniform", "exact"]
    assert [text.split(":")[0] for text in said] == 2 * ["uniform, seed 0"] + 2 * ["exact, seed 0"]
    assert made.curves["exact"][0][-1]["train_seconds"] > 0
    again = compare.train(arms(tmp_path), seeds=1, folder=tmp_path / "s", say=said.append)
    assert (len(said), again) == (4, made)
    assert compare.read(tmp_path / "s") == made
    grouped = compare.group([tmp_path / "s" / "exact-0", tmp_path / "s" / "uniform-0"])
    assert grouped.curves == {f"mode={name}": made.curves[name] for name in ("exact", "uniform")}
    with pytest.raises(ValueError, match=r"batch_size=5, but the run was started with 10"):
        compare.train(arms(tmp_path, batch_size=5), seeds=1, folder=tmp_path / "s")


def fake_arm(losses: list[float], calls: list[bool], stopped_by: int | None = None) -> compare.Arm:
    """A loop of one's own: it writes the lines of progress until it is told to end."""

    def fit_by_hand(config: Config, *, resume: bool, observe: Any, until: Any) -> Any:
        calls.append(resume)
        run = (
            RunDir.create(config)
            if not Path(str(config.recording.run_dir)).exists()
            else RunDir(Path(str(config.recording.run_dir)))
        )
        lines = [line for line in curve(losses) if line["step"] >= len(list(run.records("progress"))) * 10]
        for line in lines:
            run.append(line)
            if until(line):
                break
        run.append({"event": "finished", "step": line["step"]})
        return SimpleNamespace(stopped_by=stopped_by)

    return compare.Arm(configure(steps=40), fit_by_hand)


def test_a_run_ends_at_its_levels_and_goes_on_to_lower_ones(tmp_path: Path) -> None:
    calls: list[bool] = []
    arm = {"mine": fake_arm([1.0, 0.5, 0.4, 0.3, 0.2], calls)}
    study = compare.train(arm, seeds=1, folder=tmp_path, levels=compare.levels("test_loss=0.5"))
    assert study.curves["mine"][0][-1]["step"] == 10
    compare.train(arm, seeds=1, folder=tmp_path, levels=compare.levels("test_loss=0.5"))
    assert len(calls) == 1
    study = compare.train(arm, seeds=1, folder=tmp_path, levels=compare.levels("test_loss=0.3"))
    assert study.curves["mine"][0][-1]["step"] == 30
    assert len(calls) == 2


def test_a_run_that_diverges_counts_as_one_that_never_gets_there(tmp_path: Path) -> None:
    calls: list[bool] = []

    def lost(config: Config, **options: Any) -> Any:
        fake_arm([0.9, 0.4], calls).fit(config, **options)
        raise FloatingPointError("the training loss became nan at step 17")

    level, said = compare.Level("test_loss", 0.1), list[str]()
    both = {"lost": compare.Arm(small_config("", steps=20), lost), "ours": fake_arm([0.9, 0.05], calls)}
    made = compare.train(both, seeds=1, folder=tmp_path, levels=[level], say=said.append)
    assert [row.reached for row in compare.rows(made, [level], ["step"])] == [0, 1]
    assert any(text.startswith("lost, seed 0: diverged") and "nan at step 17" in text for text in said)
    compare.train(both, seeds=1, folder=tmp_path, levels=[level])
    assert len(calls) == 2


def test_an_extension_that_was_broken_off_is_gone_on_with(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", epochs=3)
    run = RunDir.create(config)
    run.append({"event": "finished", "step": 18, "num_steps": 18})
    assert _is_whole(run, config, lambda record: False)
    run.append({"event": "resumed", "step": 18})
    assert not _is_whole(run, config, lambda record: False)


def test_a_run_that_was_killed_before_its_first_checkpoint_goes_on(tmp_path: Path) -> None:
    calls: list[bool] = []
    RunDir.create(small_config(tmp_path / "mine-0", steps=40))
    arm = fake_arm([1.0, 0.5], calls)._replace(config=small_config("", steps=40))
    compare.train({"mine": arm}, seeds=1, folder=tmp_path)
    assert calls == [True]


def test_of_two_studies_in_one_folder_the_second_is_told(tmp_path: Path) -> None:
    def beaten(config: Config, **hooks: Any) -> Any:
        RunDir.create(config)
        raise FileExistsError(f"{config.recording.run_dir} is there already: go on with it by resume=")

    with pytest.raises(RunInUseError, match=r"was begun by another process meanwhile: wait until it ends, the same"):
        compare.train({"ours": compare.Arm(small_config("", steps=20), beaten)}, seeds=1, folder=tmp_path)


def test_a_file_in_the_place_of_a_runs_folder_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "ours-0").write_text("a note")
    with pytest.raises(FileExistsError, match=r"ours-0 is there already"):
        compare.train({"ours": compare.Arm(small_config("", steps=20))}, seeds=1, folder=tmp_path)


def test_a_signal_ends_the_study(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.train({"mine": fake_arm([1.0], [], stopped_by=15)}, seeds=3, folder=tmp_path)
    assert ended.value.code == 128 + 15


@pytest.mark.parametrize("name", ["", "a/b", ".hidden"])
def test_a_name_that_cannot_be_a_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an arm's name becomes a folder"):
        compare.train({name: compare.Arm(Config())}, seeds=1, folder=tmp_path)


def test_a_folder_without_a_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a study: it has no study.json"):
        compare.read(tmp_path)


def test_a_run_that_has_not_ended_is_left_out_and_named(tmp_path: Path) -> None:
    """The first has ended, and never gets there; the others may yet, and are of no arm's median."""
    ends = [
        [{"event": "finished", "step": 10, "num_steps": 10}],
        [],
        [{"event": "stopped", "step": 10, "num_steps": 40}],
        [{"event": "finished", "step": 10, "num_steps": 10}, {"event": "resumed", "step": 10}],
        [{"event": "finished", "step": 10, "num_steps": 40}],
        [{"event": "diverged", "step": 10}],
    ]
    for seed, records in enumerate(ends):
        run = RunDir.create(configure(run_dir=str(tmp_path / f"mine-{seed}"), seed=seed))
        for record in curve([1.0, 0.6]) + records:
            run.append(record)
    (tmp_path / "study.json").write_text(json.dumps({"arms": ["mine"]}))
    found = compare.read(tmp_path)
    assert found.unfinished == {("mine", seed) for seed in (1, 2, 3)}
    (never,) = compare.rows(found, [LEVEL], ["step"])
    assert (never.seeds, never.reached, never.unfinished, never.median.value) == (2, 0, 4, math.inf)
    (there,) = compare.rows(found, [compare.Level("test_loss", 0.6)], ["step"])
    assert (there.seeds, there.reached, there.unfinished, there.median.value) == (3, 3, 3, 10.0)
    assert "3/3, 3 unfinished" in compare.text([there])
    (note,) = compare.left_out(found)
    assert "mine with seed 1, mine with seed 2, mine with seed 3." in note
    alone = compare.rows(compare.group([tmp_path / "mine-1"]), [LEVEL], ["step"])
    assert "unfinished" in compare.text(alone)
    assert "never" not in compare.text(alone)
    assert note in comparison_page(found, [there], "mine")


def test_the_length_makes_an_arm_where_the_rate_decays_over_it(tmp_path: Path) -> None:
    for name, settings in {
        "a": {"schedule": "cosine", "steps": 10},
        "b": {"schedule": "cosine", "steps": 20},
        "c": {"schedule": "cosine", "epochs": 2.0},
        "d": {"steps": 10, "seed": 0},
        "e": {"steps": 20, "seed": 1},
    }.items():
        RunDir.create(configure(run_dir=str(tmp_path / name), **settings))
    found = compare.group([tmp_path / name for name in "abcde"])
    assert {name: sorted(by_seed) for name, by_seed in found.curves.items()} == {
        "schedule=cosine steps=10": [0],
        "schedule=cosine steps=20": [0],
        "schedule=cosine epochs=2.0": [0],
        "schedule=constant": [0, 1],
    }


def test_two_runs_of_one_arm_and_seed_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        RunDir.create(configure(run_dir=str(tmp_path / name)))
    with pytest.raises(ValueError, match="another run of the arm 'all runs' with seed 0"):
        compare.group([tmp_path / "a", tmp_path / "b"])


def test_the_order_of_the_arms_is_kept(tmp_path: Path) -> None:
    for name in ("zebra", "ant"):
        (tmp_path / f"{name}-0").mkdir()
        RunDir(tmp_path / f"{name}-0").append(curve([1.0])[0])
    (tmp_path / "study.json").write_text(json.dumps({"arms": ["zebra", "ant"]}))
    assert compare.read(tmp_path).base == "zebra"
