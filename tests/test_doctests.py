"""The examples in docstrings are run, and say what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import isgd_jax

ROOT = Path(isgd_jax.__file__).parent
WITH_EXAMPLES = sorted(path for path in ROOT.rglob("*.py") if ">>> " in path.read_text())


def name_of(path: Path) -> str:
    parts = ("isgd_jax", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name_of(path) for path in WITH_EXAMPLES])
def test_the_examples_of_a_module(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0


def test_there_are_examples_in_every_room() -> None:
    rooms = {path.relative_to(ROOT).parts[0] for path in WITH_EXAMPLES}
    assert rooms >= {"gradients", "sampling", "engines", "training", "app", "reweight.py"}
