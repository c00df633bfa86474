from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure
from problems import small_config

from isgd_jax.app import figures, plots
from isgd_jax.app.records import Record
from isgd_jax.app.run_dir import RunDir


def line(step: int, *, age: float | None) -> Record:
    return {
        "event": "progress", "step": step, "loss": None if step == 0 else 1 / step, "test_loss": 1.0, "test_error": 0.5,
        "sd_uniform": 3.0, "sd_stale": 2.0, "sd_ideal": 1.0, "age_mean": age, "age_p95": age, "max_weight": None,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("age", [None, 5.0])
def test_the_figures_are_pictures_of_the_lines(tmp_path: Path, age: float | None) -> None:
    run = RunDir.create(small_config(tmp_path / "run"))
    for step in (0, 10, 20):
        run.append(line(step, age=age))
    paths = plots.draw(run)
    expected = ["loss.png", "error.png", "variance.png"] + (["scores.png"] if age else [])
    assert [path.name for path in paths] == expected
    for path in paths:
        picture = matplotlib.image.imread(path)
        assert picture.shape[1] > 900
        assert picture.std() > 0.02


def test_what_has_no_figure_of_its_own_fills_the_width() -> None:
    lines = [{**line(step, age=None), "bytes_moved": step} for step in (0, 10, 20)]
    figure = plots.all_figures(lines)["others"]
    assert [axes.get_title() for axes in figure.axes] == ["bytes to and from workers"]
    assert figure.axes[0].get_position().width > 0.7


@pytest.mark.slow
@pytest.mark.parametrize(("low", "high"), [(0.55, 1.3), (1.9, 2.6), (0.03, 1.0), (1e-6, 10.0)])
def test_a_logarithmic_axis_can_be_read_however_short(low: float, high: float) -> None:
    axes = Figure().subplots()
    axes.set(yscale="log", ylim=(low, high))
    figures.plain_log(axes.yaxis)
    labels = [text.get_text() for text in axes.get_yticklabels() if low <= text.get_position()[1] <= high]
    assert 3 <= len(set(labels)) <= 8


def test_a_run_without_lines_yet_draws_empty_axes(tmp_path: Path) -> None:
    assert len(plots.draw(RunDir.create(small_config(tmp_path / "run")))) == 3
