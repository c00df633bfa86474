"""The figures of a run, in the manner of the paper, drawn from its metrics.jsonl."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from isgd_jax.rundir import Record, RunDir

STYLE: Any = {
    "figure.figsize": (7.2, 4.2),
    "figure.dpi": 140,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}

# Okabe and Ito's palette: colour-blind readers tell it apart, and the line styles say the same again.
GREY, BLUE, GREEN, ORANGE = "#777777", "#0072B2", "#009E73", "#D55E00"


def draw(run: RunDir) -> list[Path]:
    """Draw loss.png, error.png, variance.png and, if scores were used, scores.png into the folder of a run.

    Returns:
        Their paths. Each file is written whole or not at all.
    """
    lines = list(run.records("progress"))
    with mpl.rc_context(STYLE):
        figures = {"loss.png": _loss(lines), "error.png": _error(lines), "variance.png": _variance(lines)}
        if any(line["age_mean"] is not None for line in lines):
            figures["scores.png"] = _scores(lines)
        return [run.write(name, _png(figure)) for name, figure in figures.items()]


def _loss(lines: Sequence[Record]) -> Figure:
    figure = Figure()
    axes = figure.subplots()
    _line(axes, lines, "loss", "training, mean(s·L) of the draws", BLUE)
    _line(axes, lines, "train_loss", "training set", BLUE, "--")
    _line(axes, lines, "test_loss", "held out", ORANGE)
    axes.set(title="Loss", xlabel="updates", ylabel="loss (nats)", yscale="log")
    _legend(axes)
    return figure


def _error(lines: Sequence[Record]) -> Figure:
    figure = Figure()
    axes = figure.subplots()
    _line(axes, lines, "train_error", "training set", BLUE, "--")
    _line(axes, lines, "test_error", "held out", ORANGE)
    axes.set(title="Error", xlabel="updates", ylabel="share of examples classified wrong")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(axes)
    return figure


def _variance(lines: Sequence[Record]) -> Figure:
    figure = Figure()
    axes = figure.subplots()
    _line(axes, lines, "sd_uniform", "uniform: plain SGD", GREY, "--")
    _line(axes, lines, "sd_stale", "stale: the proposal in use", BLUE)
    _line(axes, lines, "sd_ideal", "ideal: the least for independent draws", GREEN, ":")
    axes.set(title="Variance of the gradient of one draw", xlabel="updates", ylabel="√Tr Cov", yscale="log")
    _legend(axes)
    return figure


def _scores(lines: Sequence[Record]) -> Figure:
    figure = Figure()
    above, below = figure.subplots(2, 1, sharex=True)
    _line(above, lines, "max_weight", "largest weight drawn, s = 1/(Nq)", BLUE)
    above.set(title="Weights and ages", ylabel="weight")
    above.set_ylim(bottom=0)
    _line(below, lines, "age_mean", "mean", BLUE)
    _line(below, lines, "age_p95", "95 % are younger", ORANGE, "--")
    below.set(xlabel="updates", ylabel="age of scores (updates)")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        _legend(axes)
    return figure


def _line(axes: Axes, lines: Sequence[Record], field: str, label: str, colour: str, style: str = "-") -> None:
    """One curve against the step; a field that the run did not measure draws nothing."""
    points = [(line["step"], line[field]) for line in lines if line.get(field) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=colour, linestyle=style)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:  # a run that has measured nothing yet has no curve to name
        axes.legend()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
