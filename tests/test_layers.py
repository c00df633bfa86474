"""The import rule: a module imports from lower levels only, and neighbours on a level do not know each other.

This list is where the levels live; a new module must be entered here.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "isgd_jax"

LEVELS = [
    {"typing", "config", "sums", "windows", "clock", "userfiles"},
    {"factoring", "table", "samplers", "variance", "calibration", "gate", "mixtures", "orders", "models", "checkpoint"}
    | {"rundir", "presets"},
    {"gradients", "explain", "microbatches", "proposal", "reweight", "monitor", "shared_checkpoints"},
    {"scorers", "sharded", "presample", "optimizers", "distributed", "sketches"},
    {"sampling"},
    {"engines", "data", "signals", "console", "figures", "tensorboard"},
    {"training", "task", "schedule"},
    {"build"},
    {"evaluate", "report"},
    {"progress"},
    {"train"},
    {"compare", "probe"},
    {"page"},
    {"commands"},
    {"cli"},
]
LEVEL_OF = {module: level for level, modules in enumerate(LEVELS) for module in modules}
CORE_LEVELS = 5
"""The levels below the engines know trees and functions only."""
NOT_IN_CORE = {"flax", "tensorflow_datasets", "orbax", "matplotlib", "tyro", "rich", "ray", "sklearn"}
CORE_EXCEPTIONS = {"models": {"flax"}, "checkpoint": {"orbax"}}

FACTORING = [
    {"program", "factors", "costs", "slices"},
    {"contraction", "terms"},
    {"factored"},
    {"regions"},
    {"cuts"},
    {"plans"},
]
"""The same order inside the package `factoring`."""


def module_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    """The name under isgd_jax/ that a file belongs to; a package such as engines/ is one room."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


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
    own, found = LEVEL_OF[parts[0]], []
    for name in imported(source, parts):
        top, *rest = name.split(".")
        if top == "isgd_jax" and rest and rest[0] in LEVEL_OF and rest[0] != parts[0] and LEVEL_OF[rest[0]] >= own:
            found.append(f"{'.'.join(parts)} (level {own}) imports {rest[0]} (level {LEVEL_OF[rest[0]]})")
        if own < CORE_LEVELS and top in NOT_IN_CORE - CORE_EXCEPTIONS.get(parts[0], set()):
            found.append(f"{'.'.join(parts)} (level {own}) imports {top}, which the core does without")
    return found


def test_every_module_has_a_level() -> None:
    assert {room(path) for path in module_files()} - set(LEVEL_OF) == set()


@pytest.mark.parametrize("path", module_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    if room(path) in LEVEL_OF:
        assert violations(path.read_text(), path.relative_to(PACKAGE).with_suffix("").parts) == []


def test_factoring_imports_run_downwards() -> None:
    level_of = {module: level for level, modules in enumerate(FACTORING) for module in modules}
    files = [path for path in (PACKAGE / "factoring").glob("*.py") if path.stem != "__init__"]
    assert {path.stem for path in files} == set(level_of)
    for path in files:
        for name in imported(path.read_text(), ("factoring", path.stem)):
            if name.startswith("isgd_jax.factoring."):
                assert level_of[name.split(".")[2]] < level_of[path.stem], f"{path.stem} imports {name}"


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        (("table",), "from isgd_jax import proposal"),
        (("table",), "from isgd_jax.proposal import propose"),
        (("table",), "import isgd_jax.samplers"),
        (("table",), "from . import variance"),
        (("table",), "from .cli import main"),
        (("engines", "local_engine"), "from ..train import fit"),
        (("typing",), "def f():\n    from isgd_jax.config import Config"),
        (("samplers",), "import orbax.checkpoint as ocp"),
        (("gradients",), "from flax import linen"),
    ],
)
def test_a_violation_is_found(parts: tuple[str, ...], source: str) -> None:
    assert len(violations(source, parts)) == 1


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        (("proposal",), "from isgd_jax.table import ScoreTable"),
        (("engines", "local_engine"), "from isgd_jax.engines.inline_engine import InlineEngine"),
        (("models",), "from flax import linen"),
        (("train",), "import orbax.checkpoint"),
    ],
)
def test_what_is_allowed_passes(parts: tuple[str, ...], source: str) -> None:
    assert violations(source, parts) == []
