"""Figures and words into one file: the template engine, and how numbers are written."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from isgd_jax.app import figures
from isgd_jax.app.labels import label
from isgd_jax.app.records import is_number

__all__ = ["NOTHING", "duration", "inline", "number", "percent", "render"]

NOTHING = "-"
"""What stands where nothing was measured."""


def render(template: str, **context: Any) -> str:
    """A template of the folder ``templates/`` as text; everything that is not a figure is escaped.

    Args:
        template: the name of its file.
        context: what it names. A name that it uses and that is missing is an error, not an empty place.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("isgd_jax.app.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "duration": duration, "words": label}
    light, dark = figures.css_colours()
    return environment.get_template(template).render(light=light, dark=dark, **context)


def inline(drawn: Mapping[str, Figure], where: str) -> dict[str, Markup]:
    """Figures as SVG elements by name; ``where`` keeps their ids apart from those of other sections of the page."""
    return {name: Markup(figures.svg(figure, f"{where}-{name}")) for name, figure in drawn.items()}


def number(value: Any) -> str:
    """A number in at most four digits that count, whole numbers whole; anything else as it is; nothing as a dash.

    >>> number(0.000123456), number(12345), number(None)
    ('0.0001235', '12,345', '-')
    """
    if value is None:
        return NOTHING
    if not is_number(value):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def percent(value: float | None) -> str:
    """A share in percent."""
    return NOTHING if value is None else f"{100 * value:.1f} %"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them.

    >>> duration(5.25), duration(3725.0)
    ('5.2 s', '1:02:05')
    """
    if seconds is None:
        return NOTHING
    if abs(seconds) >= timedelta.max.total_seconds():
        return f"{seconds:.3g} s"
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
