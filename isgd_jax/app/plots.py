"""The figures of a run, in the manner of the paper, drawn from its metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from isgd_jax.app import figures
from isgd_jax.app.figures import BLUE, COLOURS, GREEN, GREY, INK, ORANGE
from isgd_jax.app.labels import label
from isgd_jax.app.records import Record, is_number
from isgd_jax.app.run_dir import RunDir
from isgd_jax.app.summary import shut_stretches

__all__ = ["FEW_WORKERS", "FILES", "SHARES", "SHOWN", "all_figures", "draw", "norms_figure", "others", "weights_figure"]

FEW_WORKERS = 8
"""As many have a curve of their own."""

SHOWN = {
    "event", "step", "seconds", "train_seconds", "loss", "train_loss", "test_loss", "train_error", "test_error",
    "sd_uniform", "sd_stale", "sd_ideal", "sd_drawn", "variance_ratio", "max_weight", "age_mean", "age_p95",
    "steps_per_second", "scores_per_second", "trusted_share",
}  # fmt: skip
"""Fields of a line of progress that have a place in a figure; the others go to `others`."""


def draw(run: RunDir) -> list[Path]:
    """Draw the figures of a run into its folder, from its metrics.jsonl: a run that goes on is drawn as it stands.

    loss.png and variance.png always, error.png of what has classes, scores.png of runs with scores.

    Args:
        run: its folder.

    Returns:
        Their paths. Each file is written whole or not at all.

    Raises:
        ArgumentError: metrics.jsonl is damaged; the line is named.
        OSError: the folder cannot be written to.
    """
    with figures.style():
        records = list(run.records())
        lines = [record for record in records if record["event"] == "progress"]
        drawn = {
            name: figure for name, figure in all_figures(lines, shut=shut_stretches(records)).items() if name in FILES
        }
        return [run.write(f"{name}.png", figures.png(figure)) for name, figure in drawn.items()]


SHARES = {"share_scoring": BLUE, "share_updating": GREEN, "share_measuring": GREY}

FILES = ("loss", "error", "variance", "scores")


def all_figures(lines: Sequence[Record], *, shut: Sequence[tuple[int, int]] = ()) -> dict[str, Figure]:
    """Every figure of a run, by name; one that would have nothing to show is left out, but for loss and variance.

    Args:
        lines: of progress, oldest first.
        shut: from which step to which the gate was shut; shaded in the figures of the variance.
    """
    drawn = {"loss": _loss(lines)}
    if not lines or any(is_number(line.get(name)) for line in lines for name in ("test_error", "train_error")):
        drawn["error"] = _error(lines)
    drawn["variance"] = _variance(lines, shut)
    if any(line.get("age_mean") is not None for line in lines):
        drawn["scores"] = _scores(lines)
    if any(line.get("variance_ratio") is not None for line in lines):
        drawn["ratio"] = _ratio(lines, shut)
    if any(line.get("share_updating") for line in lines):
        drawn["time"] = _time(lines)
    fields = others(lines)
    if fields:
        drawn["others"] = _others(lines, fields)
    return drawn


def others(lines: Sequence[Record]) -> list[str]:
    """The numbers that change and have no figure of their own, in the order in which they first appear."""
    names = dict.fromkeys(name for line in lines for name in line)
    return [
        name
        for name in names
        if name not in SHOWN
        and not name.startswith("share_")
        and not name.endswith(("_low", "_high"))
        and len(_numbers(lines, name)) > 1
    ]


def _numbers(lines: Sequence[Record], name: str) -> set[float]:
    """The values of a field; empty if it is not a number."""
    values = [line.get(name) for line in lines]
    return {float(value) for value in values if is_number(value)}


def norms_figure(norms: np.ndarray, *, what: str = "norm of the gradient of an example") -> Figure:
    """How scores [n] are spread: a histogram of their logarithms, with the mean and the root mean square.

    The distance between the two is the gain: UNIFORM over IDEAL is at least the square of their ratio.

    Args:
        norms: at least 0. Zeros have no place on the axis and count in the shares; what lies six decades below the mean
            is drawn into the first bar.
        what: the label of the axis.
    """
    figure = Figure()
    axes = figure.subplots()
    positive = norms[norms > 0]
    if len(positive):
        low, high = np.log10(positive.min()), np.log10(positive.max())
        low = max(low, np.log10(positive.mean()) - 6)  # a long tail of nearly zero would hide the rest
        bins = np.logspace(low, max(high, low + 0.1), 60)
        axes.hist(
            np.clip(positive, bins[0], None),
            bins=bins.tolist(),
            weights=np.full(len(positive), 1 / len(norms)),
            color=BLUE,
        )
        axes.axvline(norms.mean(), color=ORANGE, label=f"mean, {norms.mean():.3g}")
        rms = np.sqrt(np.square(norms, dtype=np.float64).mean())
        axes.axvline(rms, color=GREEN, linestyle="--", label=f"root mean square, {rms:.3g}")
    axes.set(title="How the norms are spread", xlabel=what, ylabel="share of examples", xscale="log")
    if len(positive) and high - low < 2:
        figures.plain_log(axes.xaxis)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    _legend(axes)
    return figure


def weights_figure(probs: np.ndarray) -> Figure:
    """The weights 1/(Nq) of the draws that probabilities [n] make: a histogram of their logarithms."""
    figure = Figure()
    axes = figure.subplots()
    weights = 1 / (len(probs) * probs)
    low, high = np.log10(weights.min()), np.log10(weights.max())
    bins = np.logspace(low, max(high, low + 0.1), 60)
    axes.hist(np.clip(weights, bins[0], bins[-1]), bins=bins.tolist(), weights=probs, color=BLUE)
    axes.axvline(1.0, color=GREY, linestyle="--", label="uniform draws, 1")
    axes.axvline(weights.max(), color=ORANGE, label=f"largest, {weights.max():.3g}")
    axes.set(
        title="How the weights of the draws are spread", xlabel="weight, 1/(Nq)", ylabel="share of draws", xscale="log"
    )
    if high - low < 2:
        figures.plain_log(axes.xaxis)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    _legend(axes)
    return figure


def _loss(lines: Sequence[Record]) -> Figure:
    figure = Figure()
    axes = figure.subplots()
    _line(axes, lines, "loss", "training, mean(s·L) of the draws", BLUE)
    _line(axes, lines, "train_loss", "training set", BLUE, "--")
    _line(axes, lines, "test_loss", "held out", ORANGE)
    axes.set(title="Loss", xlabel="updates", ylabel="mean loss of an example", yscale="log")
    figures.plain_log(axes.yaxis)
    _legend(axes)
    return figure


def _error(lines: Sequence[Record]) -> Figure:
    figure = Figure()
    axes = figure.subplots()
    _line(axes, lines, "train_error", "training set", BLUE, "--")
    _line(axes, lines, "test_error", "held out", ORANGE)
    axes.set(title="Share of examples classified wrong", xlabel="updates", ylabel="error")
    found = [value for name in ("train_error", "test_error") for value in _numbers(lines, name)]
    positive = [value for value in found if value > 0]
    if positive and max(positive) > 4 * min(positive):
        # What matters at the end would lie flat at the bottom. Zero has no place on it, and draws nothing.
        axes.set_yscale("log")
        figures.plain_log(axes.yaxis)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(axes)
    return figure


def _variance(lines: Sequence[Record], shut: Sequence[tuple[int, int]]) -> Figure:
    figure = Figure()
    axes = figure.subplots()
    axes.set_yscale("log")
    _line(axes, lines, "sd_uniform", "uniform: plain SGD", GREY, "--")
    _line(axes, lines, "sd_stale", "stale: the proposal in use", BLUE)
    _line(axes, lines, "sd_ideal", "ideal: the least for independent draws", GREEN, ":")
    _line(axes, lines, "sd_drawn", "drawn: whole batches, by the sampler in use", ORANGE, "-.")
    axes.set(title="Standard deviation of the gradient of one draw", xlabel="updates", ylabel="√Tr Cov")
    _shade(axes, shut)
    figures.plain_log(axes.yaxis)
    _legend(axes)
    return figure


def _ratio(lines: Sequence[Record], shut: Sequence[tuple[int, int]]) -> Figure:
    figure = Figure()
    axes = figure.subplots()
    axes.axhline(1.0, color=GREY, linewidth=1, label="uniform: no gain")
    _line(axes, lines, "variance_ratio", "stale over uniform: the proposal in use", BLUE)
    _line(axes, _with_ratio(lines), "ideal_ratio", "ideal over uniform", GREEN, ":")
    axes.set(title="Variance over that of uniform draws", xlabel="updates", ylabel="ratio", yscale="log")
    _shade(axes, shut)
    figures.plain_log(axes.yaxis)
    _legend(axes)
    return figure


def _shade(axes: Axes, shut: Sequence[tuple[int, int]]) -> None:
    """The stretches in which the gate was shut."""
    for i, (begin, end) in enumerate(shut):
        label = "gate shut: uniform draws" if i == 0 else None
        axes.axvspan(begin, end, color=GREY, alpha=0.15, linewidth=0, label=label)


def _with_ratio(lines: Sequence[Record]) -> list[Record]:
    """IDEAL over UNIFORM, where both were measured."""
    known = [line for line in lines if line.get("sd_ideal") is not None and line.get("sd_uniform")]
    return [{"step": line["step"], "ideal_ratio": (line["sd_ideal"] / line["sd_uniform"]) ** 2} for line in known]


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
    rates = [line.get("scores_per_second_by_worker") for line in lines]
    by_worker = [rate if isinstance(rate, dict) else {} for rate in rates]
    names = sorted({name for rate in by_worker for name in rate})
    for name in names if 1 < len(names) <= FEW_WORKERS else []:
        flat = [line | {"one": rate.get(name)} for line, rate in zip(lines, by_worker, strict=True)]
        _line(axes, flat, "one", name, GREY, ":")


def _time(lines: Sequence[Record]) -> Figure:
    """Shares of the time so far, stacked, and the speed."""
    figure = Figure()
    above, below = figure.subplots(2, 1, sharex=True)
    shares = [name for name in SHARES if any(name in line for line in lines)]
    steps = [line["step"] for line in lines]
    heights = [[line.get(name) or 0.0 for line in lines] for name in shares]
    labels = [name.removeprefix("share_") for name in shares]
    above.stackplot(steps, heights, labels=labels, colors=[SHARES[name] for name in shares], alpha=0.75)
    above.set(title="Where the time goes", ylabel="share since the start")
    above.set_ylim(0, 1)
    above.yaxis.set_major_formatter(PercentFormatter(1.0))
    above.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    _line(below, lines, "steps_per_second", "", INK)
    below.set(xlabel="updates", ylabel="updates a second")
    below.set_ylim(bottom=0)
    return figure


def _others(lines: Sequence[Record], fields: Sequence[str]) -> Figure:
    """Pictures of what else was measured, each on its own scale: up to three side by side fill the width."""
    columns = min(3, len(fields))
    rows = -(-len(fields) // columns)
    figure = Figure(figsize=(7.2, 1.6 * rows + 0.5))
    grid = figure.subplots(rows, columns, squeeze=False)
    for i, (axes, field) in enumerate(zip(grid.flat, fields, strict=False)):
        _line(axes, lines, field, "", COLOURS[1 + i % 3])
        axes.set_title(label(field), fontsize=9, fontweight="normal")
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(3))
    for axes in list(grid.flat)[len(fields) :]:
        axes.remove()
    return figure


def _line(axes: Axes, lines: Sequence[Record], field: str, label: str, colour: str, style: str = "-") -> None:
    """One curve against the step, with its band if it has one; a field that was not measured draws nothing."""
    points = [(line["step"], line[field]) for line in lines if is_number(line.get(field))]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=colour, linestyle=style)
    low, high = f"{field}_low", f"{field}_high"
    bounds = [
        (line["step"], line[low], line[high])
        for line in lines
        if is_number(line.get(low)) and is_number(line.get(high))
    ]
    if axes.get_yscale() == "log":
        bounds = [bound for bound in bounds if bound[1] > 0]
    if bounds:
        steps, lows, highs = np.array(bounds, np.float64).T
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.18, linewidth=0)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:  # a run that has measured nothing yet has no curve to name
        axes.legend()
