"""The pages under docs/ and the README: code runs, commands parse, links lead somewhere, the site builds."""

import html.parser
import os
import re
import shlex
import subprocess
import sys
import tomllib
import urllib.parse
from pathlib import Path

import pytest
from processes import QUICK_TO_RUN, forced
from test_own_loops import NAMES as EXAMPLES

import isgd_jax
from isgd_jax.app import cli

ROOT = Path(__file__).parent.parent
GUIDES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "recipes").glob("*.md")])
PAGES = [ROOT / "README.md", *GUIDES]
MAKEFILE = (ROOT / "Makefile").read_text()


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT / "docs" if ROOT / "docs" in path.parents else ROOT).with_suffix(""))


def code_of(page: Path) -> str:
    """The Python of a page, as its reader would type it: from top to bottom, in one session."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL))


def commands(text: str) -> list[str]:
    """The lines of a page's indented blocks, those continued with a backslash as one."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line.strip() for line in joined.splitlines() if line.startswith("    ")]


def isgd_arguments(line: str) -> list[str] | None:
    """What follows `isgd` on a line of a shell; None if the line does not call it. A VM of that name is no call."""
    if "gcloud" in line:
        return None
    words = [re.sub(r"^\$\w+$", "0", word) for word in shlex.split(line, comments=True)]
    at = next((place for place, word in enumerate(words) if word in ("isgd", ".venv/bin/isgd")), None)
    if at is None:
        return None
    end = next((place for place in range(at, len(words)) if words[place] in ("&", "&&", ";", "|")), len(words))
    return words[at + 1 : end]


ALL = f"""{QUICK_TO_RUN}
import os, runpy
for page in sys.argv[1:]:
    print("=====", page, file=sys.stderr)
    os.makedirs(page)
    os.chdir(page)
    runpy.run_path(f"../{{page}}.py", run_name="__main__")
    os.chdir("..")
"""


WITH_CODE = [page for page in GUIDES if code_of(page) and page.stem != "command"]
"""The code of the command's page is a file and a script of their own: `test_readme.py` runs both."""

PARTS = 2


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_the_code_of_each_guide_runs_from_top_to_bottom(part: int, tmp_path: Path) -> None:
    """Some pages in one process, each in a namespace and a folder of its own."""
    pages = {page_id(page).replace("/", "-"): code_of(page) for page in WITH_CODE[part::PARTS]}
    for name, code in pages.items():
        (tmp_path / f"{name}.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-c", ALL, *pages],
        cwd=tmp_path, env=os.environ | {"XLA_FLAGS": forced(1)},  # one device, as a reader
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_the_commands_of_a_page_parse(page: Path) -> None:
    for line in commands(page.read_text()):
        arguments = isgd_arguments(line)
        if arguments is not None and not {"--resume", "--replay", "--help"} & set(arguments):
            cli._parse(arguments)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_what_a_page_tells_to_make_can_be_made(page: Path) -> None:
    wanted = {target for line in commands(page.read_text()) for target in re.findall(r"\bmake ([a-z-]+)", line)}
    wanted |= set(re.findall(r"`make ([a-z-]+)", page.read_text()))
    assert wanted <= set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    named = set(re.findall(r"`((?:experiments|tests|isgd_jax|docs)/[\w/.-]+)`", page.read_text()))
    assert missing + [name for name in named if not (ROOT / name).exists()] == []


def named_tests(text: str) -> list[tuple[str, str]]:
    """File and test of each name of a test in a page, ``file.py: test`` or, of the file named last, ``test`` alone."""
    found, file = list[tuple[str, str]](), ""
    for name in re.findall(r"`((?:[\w/]+\.py)?(?:: )?(?:test_\w+)?)`", text):
        named, _, test = name.rpartition(": ") if ": " in name else (name, "", "") if ".py" in name else ("", "", name)
        file = named or file
        if file.rpartition("/")[2].startswith("test_"):
            found.append((file, test))
    return found


def test_each_promise_names_a_test_that_exists() -> None:
    page = (ROOT / "docs" / "faults.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.endswith("| test |")]
    assert [row for row in rows if not named_tests(row)] == []
    for file, test in named_tests(page):
        (path, *others) = [path for path in (ROOT / "tests").rglob("*.py") if str(path).endswith(f"/{file}")]
        assert not others, file
        assert not test or f"def {test}(" in path.read_text(), f"{file} has no {test}"


def test_a_command_that_does_not_exist_is_found() -> None:
    assert isgd_arguments("for i in 0 1; do A=1 isgd train --seed $i --run-dir x & done") == [
        "train", "--seed", "0", "--run-dir", "x",
    ]  # fmt: skip
    assert isgd_arguments("make train") is None
    assert isgd_arguments("gcloud compute tpus tpu-vm ssh isgd --zone=here") is None
    with pytest.raises(SystemExit):
        cli._parse(["train", "--no-such-flag", "1"])


def test_what_a_page_includes_is_a_whole_file_or_an_example_that_is_run() -> None:
    whole = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert whole <= {*project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}  # the site is built from it too
    for page in GUIDES:
        for directive, name in re.findall(
            r"^```\{(literalinclude|include)\} (\S+)", page.read_text(), flags=re.MULTILINE
        ):
            path = (page.parent / name).resolve()
            assert path.name in whole if directive == "include" else path.stem in EXAMPLES, f"{page.name}: {name}"
            assert path.is_file()


def test_every_public_name_is_in_the_reference() -> None:
    shown = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.rst"))
    missing = [name for name in isgd_jax.__all__ if not re.search(rf"(?<![\w.])(isgd\.|isgd_jax\.)?{name}\b", shown)]
    assert missing == []


class Links(html.parser.HTMLParser):
    """What a page links to, and the places of a page that can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.to, self.places = set[str](), set[str]()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src"):
                self.to.add(value or "")
            elif name in ("id", "name"):
                self.places.add(value or "")


IN_REPOSITORY = re.compile(
    r"https://(?:github\.com|colab\.research\.google\.com/github)/isgd-jax/isgd_jax/(?:blob|edit|tree)/main/([^?#]*)"
)


def broken_links(site: Path) -> list[str]:
    """Links that lead nowhere, in a site or in the repository, and pictures or scripts that come from elsewhere."""
    pages = {page: Links(page) for page in site.rglob("*.html")}
    broken = []
    for page, links in pages.items():
        for link in links.to:
            url = urllib.parse.urlsplit(link)
            file = IN_REPOSITORY.match(link)
            if file and not (ROOT / file[1]).exists():
                broken.append(f"{page.relative_to(site)}: {link}")
            if url.scheme or link.startswith("//"):
                continue
            path = (page.parent / urllib.parse.unquote(url.path)).resolve() if url.path else page
            place = urllib.parse.unquote(url.fragment)
            if not path.is_file() or (path in pages and place not in {"", *pages[path].places}):
                broken.append(f"{page.relative_to(site)}: {link}")
    return broken


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_without_a_broken_link(tmp_path: Path) -> None:
    command = ["-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", str(tmp_path)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stderr) == (0, "")
    assert broken_links(tmp_path) == []
    assert "isgd_jax.importance_sampler" in (tmp_path / "reference" / "samplers.html").read_text()
    index = tmp_path / "index.html"
    gone = "https://github.com/isgd-jax/isgd_jax/edit/main/docs/nowhere.md"
    index.write_text(index.read_text() + f'<a href="nowhere.html"><a href="{gone}">')
    assert sorted(broken_links(tmp_path)) == [f"index.html: {gone}", "index.html: nowhere.html"]
