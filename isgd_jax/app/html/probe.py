"""The page of a probe."""

from isgd_jax.app import figures
from isgd_jax.app.html.html import inline, render
from isgd_jax.app.probe import Probe, figures_of

__all__ = ["probe_page"]


def probe_page(found: Probe, what: str) -> str:
    """One page of what a probe found, as HTML; ``what`` names the data and the model."""
    with figures.style():
        pictures = inline(figures_of(found.spread.norms, found.by_age, found.periods), "probe")
    return render("probe.html", title=f"Probe: {what}", found=found, figures=pictures)
