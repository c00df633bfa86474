"""The notebooks: the first runs with the tests, all with `make notebooks`; what is stored in them is whole."""

import importlib.util
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from processes import forced

FOLDER = Path(__file__).parent.parent / "experiments" / "notebooks"
LARGEST = 300_000
"""Bytes of a notebook with its outputs."""


def load_runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_notebooks", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runner = load_runner()
NOTEBOOKS = runner.paths()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_was_run_and_says_where_it_comes_from(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.cells[0].source, notebook.cells[2].source) == (runner.badge(path), runner.install())
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # in one go, from the top
    assert any("assert " in cell.source for cell in code)
    kinds = [output for cell in code for output in cell.outputs]
    assert not [output for output in kinds if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in kinds)
    assert path.stat().st_size < LARGEST


@pytest.mark.slow
def test_the_quickstart_runs_and_claims_what_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", forced(1))  # as its reader has it: one device
    path = FOLDER / "01_quickstart.ipynb"
    notebook = runner.executed(nbformat.read(path, as_version=4), path)
    assert "updates to 0.02" in str(notebook.cells)


def test_a_notebook_that_claims_what_is_false_fails() -> None:
    first = nbformat.v4.new_markdown_cell("where the badge goes")
    code = [nbformat.v4.new_code_cell(source) for source in ("1", "where to install", "assert 1 > 2, 'the claim'")]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    notebook = nbformat.v4.new_notebook(cells=[first, *code], metadata=metadata)
    with pytest.raises(SystemExit, match="the claim"):
        runner.executed(notebook, FOLDER / "01_quickstart.ipynb")
