"""The figures of a probe: how norms are spread, and what scores are worth by age and period."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from isgd_jax.app import figures, plots
from isgd_jax.app.figures import BLUE, GREEN, GREY, ORANGE
from isgd_jax.app.probe.verdict import Period

__all__ = ["figures_of"]


def figures_of(norms: np.ndarray, by_age: Mapping[int, float], table: Sequence[Period]) -> dict[str, Figure]:
    """The figures by name: "norms", "ageing", "periods".

    Args:
        norms: of the sampled examples [n].
        by_age: STALE/UNIFORM by age, 0 and at least one more.
        table: what each refresh period would gain and cost.
    """
    return {"norms": plots.norms_figure(norms), "ageing": _ageing(by_age), "periods": _periods(table)}


def _ageing(by_age: Mapping[int, float]) -> Figure:
    figure = Figure()
    axes = figure.subplots()
    axes.plot(list(by_age), list(by_age.values()), color=BLUE, marker="o", label="stale over uniform")
    axes.axhline(1.0, color=GREY, linestyle="--", linewidth=1, label="uniform: no gain")
    axes.set(title="What old scores are worth", xlabel="age of the scores (updates)", ylabel="variance over uniform's")
    axes.set_xscale("symlog", linthresh=min(age for age in by_age if age > 0))
    axes.set_ylim(0, 1.1 * max(1.0, *by_age.values()))
    axes.set_xticks(list(by_age), [f"{age:,}" for age in by_age])
    axes.minorticks_off()
    axes.legend()
    return figure


def _periods(table: Sequence[Period]) -> Figure:
    figure = Figure()
    axes = figure.subplots()
    every = [period.every for period in table]
    axes.plot(every, [p.at_equal_time for p in table], color=ORANGE, marker="o", label="the training devices score")
    elsewhere = [p.at_equal_time_elsewhere for p in table]
    axes.plot(every, elsewhere, color=GREEN, marker="s", linestyle="-.", label="other devices score")
    axes.axhline(1.0, color=GREY, linestyle="--", linewidth=1, label="plain SGD")
    axes.set(
        title="Variance at equal time", xlabel="updates between refreshes", ylabel="variance · time over plain SGD's"
    )
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(every, [f"{k:,}" for k in every])
    axes.xaxis.set_minor_locator(NullLocator())
    figures.plain_log(axes.yaxis)
    axes.legend()
    return figure
