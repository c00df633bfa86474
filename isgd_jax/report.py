"""The figures of a run, in the manner of the paper, drawn from its metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from isgd_jax import figures
from isgd_jax.figures import BLUE, GREEN, GREY, ORANGE
from isgd_jax.rundir import Record, RunDir

FEW_WORKERS = 8
"""As many have a curve of their own."""


def draw(run: RunDir) -> list[Path]:
    """Draw loss.png, error.png, variance.png and, if scores were used, scores.png into the folder of a run.

    Returns:
        Their paths. Each file is written whole or not at all.
    """
    lines = list(run.records("progress"))
    with figures.style():
        drawn = {"loss.png": _loss(lines), "error.png": _error(lines), "variance.png": _variance(lines)}
        if any(line["age_mean"] is not None for line in lines):
            drawn["scores.png"] = _scores(lines)
        return [run.write(name, figures.png(figure)) for name, figure in drawn.items()]


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
    figure = Figure(figsize=(7.2, 8.4))
    weights, ages, rates, shares = figure.subplots(4, 1, sharex=True)
    _line(weights, lines, "max_weight", "largest weight drawn, s = 1/(Nq)", BLUE)
    weights.set(title="Weights, ages and the work of scoring", ylabel="weight")
    _line(ages, lines, "age_mean", "mean", BLUE)
    _line(ages, lines, "age_p95", "95 % are younger", ORANGE, "--")
    ages.set(ylabel="age of scores (updates)")
    _rates(rates, lines)
    rates.set(ylabel="examples scored a second")
    _line(shares, lines, "trusted_share", "scores young enough to be trusted", BLUE)
    _line(shares, lines, "share_scoring", "the trainer's time lost to scoring", ORANGE, "--")
    shares.set(xlabel="updates", ylabel="share")
    shares.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (weights, ages, rates, shares):
        axes.set_ylim(bottom=0)
        _legend(axes)
    return figure


def _rates(axes: Axes, lines: Sequence[Record]) -> None:
    """All workers together, and each of a few."""
    _line(axes, lines, "scores_per_second", "all workers", BLUE)
    names = sorted({name for line in lines for name in line.get("scores_per_second_by_worker", {})})
    for name in names if 1 < len(names) <= FEW_WORKERS else []:
        flat = [line | {"one": line.get("scores_per_second_by_worker", {}).get(name)} for line in lines]
        _line(axes, flat, "one", name, GREY, ":")


def _line(axes: Axes, lines: Sequence[Record], field: str, label: str, colour: str, style: str = "-") -> None:
    """One curve against the step; a field that the run did not measure draws nothing."""
    points = [(line["step"], line[field]) for line in lines if line.get(field) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=colour, linestyle=style)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:  # a run that has measured nothing yet has no curve to name
        axes.legend()
