"""Medians and quartiles over the seeds of each arm, against updates and against seconds of training."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from isgd_jax.app.compare.study import Curve, Study
from isgd_jax.app.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["AXES", "FIELDS", "Quartiles", "all_figures", "draw", "figure", "quartiles"]

AXES = {"step": "updates", "train_seconds": "seconds of training, scoring included"}
"""What curves are drawn against: the field of the lines of progress, and its name on the axis."""

FIELDS = {
    "train_loss": "Loss on the training set",
    "train_error": "Error on the training set",
    "test_loss": "Loss on held-out data",
    "test_error": "Error on held-out data",
    "variance_ratio": "Variance of a draw: the proposal in use over uniform",
}
"""What is drawn if it was measured, and its title."""

POINTS = 300


class Quartiles(NamedTuple):
    """The seeds' lower quartile, median and upper quartile of a field, at places ``x``."""

    x: np.ndarray
    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray


def quartiles(curves: list[Curve], field: str, against: str = "step") -> Quartiles | None:
    """Quartiles over runs, as far as all of them go: beyond the shortest run the others alone would mislead.

    Between two lines of progress a run is a straight line.

    Args:
        curves: one a seed.
        field: whose quartiles.
        against: the field along the axis, "step" or "train_seconds".

    Returns:
        None if no run has measured the field.
    """
    known = [
        [line for line in curve if line.get(field) is not None and line.get(against) is not None] for curve in curves
    ]
    known = [curve for curve in known if curve]
    if not known:
        return None
    xs = [np.array([float(line[against]) for line in curve]) for curve in known]
    ys = [np.array([float(line[field]) for line in curve]) for curve in known]
    grid = _grid(xs)
    values = np.stack([np.interp(grid, x, y) for x, y in zip(xs, ys, strict=True)])
    return Quartiles(grid, *np.quantile(values, [0.25, 0.5, 0.75], axis=0))


def figure(study: Study, field: str, against: str = "step") -> "Figure":
    """One field of every arm: its median as a line, its quartiles as a band.

    Args:
        study: the curves of all arms.
        field: of a line of progress, such as ``test_loss``.
        against: ``step`` or ``train_seconds``, the horizontal axis.
    """
    from matplotlib.figure import Figure

    from isgd_jax.app import figures

    drawn = Figure()
    axes = drawn.subplots()
    for i, (name, by_seed) in enumerate(study.curves.items()):
        band = quartiles(list(by_seed.values()), field, against)
        if band is not None:
            color = figures.COLOURS[i % len(figures.COLOURS)]
            line_style = figures.STYLES[i % len(figures.STYLES)]
            axes.plot(band.x, band.middle, label=name, color=color, linestyle=line_style)
            axes.fill_between(band.x, band.low, band.high, color=color, alpha=0.18, linewidth=0)
    seeds = {len(by_seed) for by_seed in study.curves.values()}
    counted = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    axes.set(title=FIELDS.get(field, field.replace("_", " ")), xlabel=AXES.get(against, against))
    axes.set_ylabel(f"median and quartiles of {counted} seeds" if seeds != {1} else "one seed")
    _scale(axes, field)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return drawn


def all_figures(study: Study) -> dict[str, "Figure"]:
    """A figure of each field that was measured, against updates and seconds, by name."""
    lines = [line for by_seed in study.curves.values() for curve in by_seed.values() for line in curve]
    measured = {name for line in lines for name, value in line.items() if value is not None}
    return {
        f"{field}-{'updates' if against == 'step' else 'seconds'}": figure(study, field, against)
        for field in FIELDS
        for against in AXES
        if {field, against} <= measured
    }


def draw(study: Study, folder: Path) -> list[Path]:
    """Write each of `all_figures` as a PNG into a folder, over what is there.

    Args:
        study: the curves of all arms.
        folder: it must exist.

    Returns:
        The paths written.
    """
    from isgd_jax.app import figures

    with figures.style():
        paths = []
        for name, drawn in all_figures(study).items():
            paths.append(write_whole(folder / f"{name}.png", figures.png(drawn)))
    return paths


def _grid(xs: list[np.ndarray]) -> np.ndarray:
    end = min(x[-1] for x in xs)
    shared = np.unique(np.concatenate(xs))
    shared = shared[shared <= end]
    if len(shared) <= POINTS:
        return shared
    return np.linspace(shared[0], end, POINTS)


def _scale(axes: "Axes", field: str) -> None:
    """Logarithmic where a curve falls through decades; percent where it is a share."""
    from matplotlib.ticker import PercentFormatter

    from isgd_jax.app import figures

    if field.endswith("_loss"):
        axes.set_yscale("log")
        figures.plain_log(axes.yaxis)
    elif field.endswith("_error"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(bottom=0)
    elif field == "variance_ratio":
        axes.set_yscale("log")
        figures.plain_log(axes.yaxis)
        axes.axhline(1.0, color=figures.GREY, linewidth=0.8)
