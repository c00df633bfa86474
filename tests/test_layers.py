"""The import rule, one sentence: a folder imports only from folders to its left.

types, errors -> gradients, variance -> sampling, engines, reweight -> training -> app
"""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import isgd_jax as isgd

PACKAGE = Path(__file__).parent.parent / "isgd_jax"

FOLDERS = [
    {"types", "errors", "versions"},
    {"gradients", "variance"},
    {"sampling", "engines", "reweight"},
    {"training"},
    {"app"},
]
PLACE_OF = {folder: place for place, folders in enumerate(FOLDERS) for folder in folders}
ONLY_IN_APP = {"flax", "tensorflow_datasets", "orbax", "matplotlib", "tyro", "rich", "sklearn", "pooch", "jinja2"}
RAY = ("engines/ray_engine.py", "engines/ray_connection.py")
"""The modules that know Ray."""


def module_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def parts_of(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


def imported(source: str, parts: tuple[str, ...]) -> Iterator[str]:
    """The full names that a module of the package, at ``parts`` below it, imports: also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*("isgd_jax", *parts)[: -node.level]] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def violations(source: str, parts: tuple[str, ...]) -> list[str]:
    own, found = parts[0], []
    for name in imported(source, parts):
        top, *rest = name.split(".")
        if top == "isgd_jax" and rest and rest[0] in PLACE_OF and rest[0] != own and PLACE_OF[rest[0]] >= PLACE_OF[own]:
            found.append(f"{'/'.join(parts)} imports {rest[0]}, which is not to the left of {own}")
        if own != "app" and top in ONLY_IN_APP:
            found.append(f"{'/'.join(parts)} imports {top}, which app alone knows")
        if top == "ray" and "/".join(parts) + ".py" not in RAY:
            found.append(f"{'/'.join(parts)} imports ray, which {' and '.join(RAY)} alone know")
    return found


def test_every_module_is_in_a_folder() -> None:
    assert {parts_of(path)[0] for path in module_files()} - set(PLACE_OF) == set()


def test_no_duration_is_taken_from_the_systems_clock() -> None:
    """Which may be set back: what takes it says when something was, and nothing more."""
    taken = {"/".join(parts_of(path)) for path in module_files() if "time.time(" in path.read_text()}
    assert taken == {"app/tensorboard"}


@pytest.mark.slow
@pytest.mark.parametrize("path", module_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_to_the_left(path: Path) -> None:
    assert violations(path.read_text(), parts_of(path)) == []


def test_the_command_alone_knows_its_configuration() -> None:
    library = [path for path in module_files() if parts_of(path)[0] != "app"]
    assert [str(path) for path in library if "Config" in path.read_text().replace("raylet.Config", "")] == []


def test_a_name_is_the_same_whatever_was_imported_before() -> None:
    """No module bears the name of a public function: importing it would put the module over the function."""
    before = {name: getattr(isgd, name) for name in dir(isgd)}
    for path in module_files():
        if parts_of(path)[0] != "app":
            importlib.import_module(".".join(("isgd_jax", *parts_of(path))).removesuffix(".__init__"))
    for name, value in before.items():
        assert getattr(isgd, name) is value, name
    for folder in ("gradients", "variance", "sampling", "engines"):
        room = importlib.import_module(f"isgd_jax.{folder}")
        clash = {p.stem for p in (PACKAGE / folder).glob("*.py")} & {n for n in dir(room) if callable(getattr(room, n))}
        assert clash == set()


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        (("variance", "gate"), "from isgd_jax.sampling import proposal"),
        (("variance", "gate"), "from isgd_jax.gradients.lazy import norms"),
        (("sampling", "state"), "import isgd_jax.engines.chunks"),
        (("gradients", "lazy"), "from . import costs\nfrom ..app import data"),
        (("engines", "local_engine"), "from ..training.loop import fit"),
        (("types",), "def f():\n    from isgd_jax.app.config import Config"),
        (("sampling", "samplers"), "import orbax.checkpoint as ocp"),
        (("training", "loop"), "from flax import linen"),
        (("engines", "worker_pool"), "import ray"),
    ],
)
def test_a_violation_is_found(parts: tuple[str, ...], source: str) -> None:
    assert len(violations(source, parts)) == 1


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        (("sampling", "proposal"), "from isgd_jax.sampling.score_table import ScoreTable"),
        (("training", "loop"), "from isgd_jax.sampling.state import SamplerState"),
        (("app", "models"), "from flax import linen"),
        (("engines", "ray_engine"), "import ray"),
        (("engines", "ray_connection"), "import ray"),
    ],
)
def test_what_is_allowed_passes(parts: tuple[str, ...], source: str) -> None:
    assert violations(source, parts) == []
