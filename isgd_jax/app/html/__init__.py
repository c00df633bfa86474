"""Pages: one self-contained HTML file that opens offline, light or dark as the reader's machine is."""

from isgd_jax.app.html.comparison import comparison_page
from isgd_jax.app.html.probe import probe_page
from isgd_jax.app.html.run import run_page

__all__ = ["comparison_page", "probe_page", "run_page"]
