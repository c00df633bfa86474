"""The site: `make docs` builds it into build/site, offline, with warnings as errors.

Pages are the Markdown files beside this one, which read well on GitHub too: links to files of the repository become
links to pages where there is one, and else lead to the repository. Formulas become MathML, so that a page needs no
script and no network. Notebooks are shown with the outputs that are stored in them.
"""

import re
import shutil
import sys
import tomllib
from os.path import relpath
from pathlib import Path

from docutils.utils.math import latex2mathml

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

import isgd_jax  # noqa: E402

REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]

project, author, version = "isgd_jax", "the isgd_jax authors", isgd_jax.__version__
html_title = f"isgd_jax {version}"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "**.ipynb_checkpoints", "examples"]

html_theme = "furo"
pygments_style, pygments_dark_style = "tango", "github-dark"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": f"{REPOSITORY}/",
    "source_branch": "main",
    "source_directory": "docs/",
}
html_copy_source = False
html_show_copyright = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True

default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),  # a name in backticks may be an argument; it is a link where it is documented
    ("py:.*", r"(jax|jaxlib|jaxtyping|optax|chex|numpy|np|collections|typing|types|os|pathlib|datetime)\..*"),
    ("py:.*", r"(?!isgd_jax).*|.*\.Tree"),  # types of other libraries, aliases by their short names, type variables
]
suppress_warnings = ["mystnb.unknown_mime_type"]  # of widgets, which have text besides
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]
maximum_signature_line_length = 88


def page_of(path: Path) -> str | None:
    """The page that shows a file of the repository; None if there is none."""
    if path.parent == ROOT / "experiments" / "notebooks" and path.suffix == ".ipynb":
        return f"notebooks/{path.name}"
    whole = {ROOT / "README.md": "index.md", ROOT / "CHANGELOG.md": "changelog.md"}
    whole |= {ROOT / "CONTRIBUTING.md": "contributing.md", ROOT / "docs": "index.md"}
    if path in whole:
        return whole[path]
    return str(path.relative_to(DOCS)) if path.suffix == ".md" and path.is_relative_to(DOCS) else None


def with_links(text: str, base: Path, page: Path) -> str:
    """Text written in folder ``base``, with links as they are seen from the folder of a page."""

    def linked(found: re.Match) -> str:
        name, anchor = found["target"], found["anchor"] or ""
        path = (base / name).resolve()
        if "://" in name or not name or not path.exists():
            return found[0]  # also code that looks like a link
        if path.suffix in (".png", ".svg"):
            return f"]({relpath(path, page)}{anchor})"
        shown = page_of(path)
        if shown is not None:
            return f"]({relpath(DOCS / shown, page)}{anchor})"
        return f"]({REPOSITORY}/{'tree' if path.is_dir() else 'blob'}/main/{path.relative_to(ROOT)}{anchor})"

    return re.sub(r"\]\((?P<target>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)", linked, text)


def read(app, docname: str, source: list[str]) -> None:
    """A page's text before it is parsed: whole files of the repository in their places, links made to fit."""
    folder = (DOCS / docname).parent
    if docname.startswith("notebooks/"):
        return
    text = with_links(source[0], folder, folder)

    def file(found: re.Match) -> str:
        path = (folder / found[1]).resolve()
        app.env.note_dependency(str(path), docname=docname)  # the page is made again when this changes
        return with_links(path.read_text(), path.parent, folder)

    source[0] = with_whole_intervals(re.sub(r"^```\{include\} (\S+)\n```$", file, text, flags=re.MULTILINE))


def with_whole_intervals(text: str) -> str:
    """A page whose tables do not break a line within an interval such as [0.65, 0.80], nor before a percent sign."""

    def whole(row: re.Match) -> str:
        return re.sub(r"(?<=[\d.]),? (?=[-+]?[\d.]+\]|%)", lambda gap: gap[0].replace(" ", "\u00a0"), row[0])

    return re.sub(r"^\|.*\|$", whole, text, flags=re.MULTILINE)


def docstring(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Docstrings as they are written here: an indented block is code, and a field of a tuple needs no number."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()
    lines[:] = with_code([line if "``" in line else escaped(line) for line in lines])


def escaped(line: str) -> str:
    """A line without what reStructuredText would take for its own: the star of a signature, and absolute values."""
    return re.sub(r"(?<!\\)\|(\w[^|`]*)\|", r"\\|\1\\|", re.sub(r"(?<= )\*(?=,)", r"\\*", line))


def signature(app, what, name, obj, options, arguments: str | None, returns: str | None):
    """Types by the names that people import them by."""
    return tuple(text and re.sub(r"jaxlib\._jax\.Array|jax\.Array", "Array", text) for text in (arguments, returns))


def with_code(lines: list[str]) -> list[str]:
    """Lines with ``::`` before each block that is indented by four and follows plain text."""
    out: list[str] = []
    plain = (
        True  # whether the last line with text was plain: neither indented, nor of a list, nor a heading of a section
    )
    for line in lines:
        if line.startswith("    ") and out and not out[-1].strip() and plain:
            out += ["::", ""]
        if line.strip():
            plain = bool(re.match(r"[^\s*]", line)) and not re.match(r"\w+:$", line)
        out.append(line)
    return out


def math(self, node) -> None:
    """A formula as MathML."""
    from docutils import nodes

    self.body.append(latex2mathml.tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def source_buttons(app, pagename: str, templatename: str, context: dict, doctree) -> None:
    """The buttons of a page that is a whole file from elsewhere lead to that file."""
    shown = {page_of(ROOT / name): name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")}
    shown |= {f"{pagename}.ipynb": f"experiments/{pagename}.ipynb"} if pagename.startswith("notebooks/") else {}
    file = shown.get(f"{pagename}{context.get('page_source_suffix')}")
    if file is not None:
        context["theme_source_view_link"] = f"{REPOSITORY}/blob/main/{file}"
        context["theme_source_edit_link"] = f"{REPOSITORY}/edit/main/{file}"


def setup(app) -> None:
    """What Sphinx calls first."""
    copies = DOCS / "notebooks"
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir()
    for path in (ROOT / "experiments" / "notebooks").glob("*.ipynb"):
        text = re.sub(
            r"!\[Open in Colab\]\([^)]*\)", "Open in Colab", path.read_text()
        )  # a page loads no picture from afar
        (copies / path.name).write_text(text)
    app.add_html_math_renderer("mathml", inline_renderers=(math, None), block_renderers=(math, None))
    app.connect("source-read", read)
    app.connect("html-page-context", source_buttons)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", docstring, priority=400)  # before napoleon


html_math_renderer = "mathml"
