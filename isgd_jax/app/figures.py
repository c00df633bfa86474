"""How figures look: one style, colours for every eye, PNG for files and SVG that follows a page's theme."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

__all__ = [
    "BLUE",
    "COLOURS",
    "GREEN",
    "GREY",
    "INK",
    "ON_DARK",
    "ORANGE",
    "STYLE",
    "STYLES",
    "SUBDIVISIONS",
    "PlainLogLocator",
    "css_colours",
    "plain_log",
    "png",
    "style",
    "svg",
]

INK = "#222222"
GREY, BLUE, GREEN, ORANGE = "#777777", "#0072B2", "#009E73", "#D55E00"
PINK, SKY, YELLOW, BROWN = "#CC79A7", "#3FA9D9", "#C9A800", "#8C5A2B"
COLOURS = (GREY, BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, BROWN)
"""Okabe and Ito's palette, nearly: colour-blind readers tell it apart, and the line styles say the same again."""

STYLES = ("--", "-", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)))

ON_DARK = {
    INK: "#e6e6e6", GREY: "#a0a0a0", BLUE: "#4db2ec", GREEN: "#35c99c", ORANGE: "#ff8a3d",
    PINK: "#e79fc6", SKY: "#8fd3f4", YELLOW: "#f0d64a", BROWN: "#c99a6b",
}  # fmt: skip
"""What each colour becomes on a dark page."""

STYLE: Any = {
    "figure.figsize": (7.2, 4.2),
    "figure.dpi": 140,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
}


class PlainLogLocator(LogLocator):
    """Ticks at powers of ten; where few of them are in view at 1, 2 and 5 of each decade, or at more."""

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        """The places of ticks between two values."""
        for subs in SUBDIVISIONS:
            self.set_params(subs=subs)
            ticks = list(super().tick_values(vmin, vmax))
            if sum(vmin <= tick <= vmax for tick in ticks) >= 3:
                break
        return ticks


SUBDIVISIONS = ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.2, 1.5, *range(2, 10)), tuple(np.arange(10, 100) / 10))


def plain_log(axis: Axis) -> None:
    """A logarithmic axis, which may be short: 0.2, 0.5, 1, 2 in place of powers of ten."""
    axis.set_major_locator(PlainLogLocator())
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


@contextmanager
def style() -> Iterator[None]:
    """Inside, matplotlib draws in our style."""
    with mpl.rc_context(STYLE):
        yield


def png(figure: Figure) -> bytes:
    """The figure on white, for a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page that defines our colors as ``--<hex>``, such as ``--0072b2``.

    The same figure gives the same text: neither a date nor random ids are in it.

    Args:
        figure: drawn in our colors, which follow the page's theme; others stay as they are.
        name: keeps the ids of one figure apart from those of others on the page.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    element = buffer.getvalue()
    element = element[element.index("<svg") :]
    for reference in ('id="', 'href="#', "url(#"):
        element = element.replace(reference, f"{reference}{name}-")
    for colour in ON_DARK:
        element = re.sub(colour, f"var(--{colour[1:].lower()})", element, flags=re.IGNORECASE)
    return element


def css_colours() -> tuple[dict[str, str], dict[str, str]]:
    """The variables that `svg` refers to: their values on a light and on a dark page."""
    light = {colour[1:].lower(): colour for colour in ON_DARK}
    return light, {colour[1:].lower(): dark for colour, dark in ON_DARK.items()}
