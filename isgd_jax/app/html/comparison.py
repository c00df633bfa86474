"""The page of a comparison: the table of levels, and the curves of all arms."""

from collections.abc import Sequence

from isgd_jax.app import compare, figures
from isgd_jax.app.compare.plots import all_figures
from isgd_jax.app.html.html import inline, render

__all__ = ["comparison_page"]


def comparison_page(study: compare.Study, rows: Sequence[compare.Row], title: str) -> str:
    """One page of a study, as HTML: whole in itself, with figures as SVG and no script.

    Args:
        study: the curves of all arms.
        rows: of its table.
        title: of the page; it is escaped, as all that comes from files is.
    """
    with figures.style():
        pictures = inline(all_figures(study), "study")
    return render(
        "comparison.html",
        title=title,
        arms=[(name, sorted(by_seed), max(len(c) for c in by_seed.values())) for name, by_seed in study.curves.items()],
        heads=compare.tables.HEADS,
        notes=compare.left_out(study),
        rows=[compare.tables.cells(row) for row in rows],
        figures=pictures,
    )
