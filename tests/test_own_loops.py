"""The own loops of the documentation: what the whole estimator costs in lines, and that each runs and learns."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import QUICK_TO_RUN, forced

FOLDER = Path(__file__).parent.parent / "docs" / "examples"
LIBRARIES = ("nnx", "linen", "equinox")
MOST_LINES = 14
"""Lines that the estimator, background scoring, the monitor and a checkpoint of everything may add to a plain loop."""


def lines(file: Path) -> int:
    return sum(bool(line.strip()) for line in file.read_text().splitlines())


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_whole_estimator_takes_at_most_fourteen_lines(library: str) -> None:
    assert lines(FOLDER / f"own_loop_{library}.py") - lines(FOLDER / f"plain_{library}.py") <= MOST_LINES


NAMES = (*(f"{kind}_{library}" for library in LIBRARIES for kind in ("plain", "own_loop")), "pinn_nnx", "pinn_equinox")

ALL = f"""{QUICK_TO_RUN}
import runpy
for name in sys.argv[2:]:
    print("=====", name)
    runpy.run_path(f"{{sys.argv[1]}}/{{name}}.py", run_name="__main__")
"""


@pytest.mark.slow
def test_they_run_and_learn() -> None:
    """All in one process, one after the other, each in a namespace of its own."""
    environment = os.environ | {"XLA_FLAGS": forced(2), "NPROC": "4"}
    command = [sys.executable, "-c", ALL, str(FOLDER), *NAMES]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert run.returncode == 0, run.stderr
    said = dict(part.split("\n", 1) for part in run.stdout.split("===== ")[1:])
    assert list(said) == list(NAMES)
    for name, out in said.items():
        found = re.search(r"loss ([\d.]+)", out)
        assert found is not None, name
        assert float(found[1]) < 0.5, name
        if name.startswith("pinn"):
            assert float(re.search(r"equivalent plain batch +([\d.]+)", out)[1]) > 192  # what was drawn
        if name.startswith("own"):
            scored = re.search(r"examples scored +([\d.]+) %", out)
            assert scored is not None, name
            assert float(scored[1]) > 90.0, name
