"""The own loops of the documentation: what the whole estimator costs in lines, and that each runs and learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import forced

FOLDER = Path(__file__).parent.parent / "docs" / "examples"
LIBRARIES = ("nnx", "linen", "equinox")
MOST_LINES = 15
"""Lines that the estimator, background scoring, the monitor and a checkpoint of everything may add to a plain loop."""


def lines(file: Path) -> int:
    return sum(bool(line.strip()) for line in file.read_text().splitlines())


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_whole_estimator_takes_at_most_fifteen_lines(library: str) -> None:
    assert lines(FOLDER / f"own_loop_{library}.py") - lines(FOLDER / f"plain_{library}.py") <= MOST_LINES


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [*(f"{kind}_{library}" for library in LIBRARIES for kind in ("plain", "own_loop")), "pinn_nnx", "pinn_equinox"],
)
def test_it_runs_and_learns(name: str) -> None:
    environment = os.environ | {"XLA_FLAGS": forced(2), "NPROC": "4"}
    run = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")], capture_output=True, text=True, timeout=200, env=environment
    )
    assert run.returncode == 0, run.stderr
    found = re.search(r"loss ([\d.]+)", run.stdout)
    assert found is not None
    assert float(found[1]) < 0.5
    if name.startswith("pinn"):
        assert float(re.search(r"equivalent plain batch +([\d.]+)", run.stdout)[1]) > 192  # what was drawn
    if name.startswith("own"):
        scored = re.search(r"examples scored +([\d.]+) %", run.stdout)
        assert scored is not None
        assert float(scored[1]) > 90.0
