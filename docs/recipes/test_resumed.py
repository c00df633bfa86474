"""Each recipe runs, and goes on bit for bit from what it saved: `make recipes`."""

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # quicker to compile

import jax

FOLDER = Path(__file__).parent
RECIPES = sorted(
    file.stem for file in FOLDER.glob("*.py") if file.stem != Path(__file__).stem
)
ALONE = [name for name in RECIPES if name != "multi_host"]
LATE, END = 25, 40
"""Steps of a run that is broken off, and of a whole one."""


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_at_most_sixty_lines_of_88_columns(name: str) -> None:
    lines = [
        line
        for line in (FOLDER / f"{name}.py").read_text().splitlines()
        if line.strip()
    ]
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 88
    assert f"]({name}.py)" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", ALONE)
def test_it_goes_on_bit_for_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "twice").mkdir()
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "twice"), str(LATE)])
    train = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")[
        "train"
    ]  # as a script, broken off
    again, whole = (
        jax.tree.leaves(train(tmp_path / folder, END)) for folder in ("twice", "whole")
    )
    assert len(again) == len(whole) > 10
    for one, other in zip(again, whole, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_two_processes_draw_the_same_and_go_on_bit_for_bit(tmp_path: Path) -> None:
    for folder in ("whole", "twice"):
        (tmp_path / folder).mkdir()
    broken_off, again, whole = (
        of_two_processes(tmp_path / folder, steps)
        for folder, steps in (("twice", LATE), ("twice", END), ("whole", END))
    )
    assert again == whole != broken_off


def of_two_processes(folder: Path, steps: int) -> str:
    """What both say of all that they hold, draws included, at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable,
        str(FOLDER / "multi_host.py"),
        str(folder),
        str(steps),
        address,
        "2",
    ]
    runs = [
        subprocess.Popen(
            [*command, str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for number in range(2)
    ]
    said = []
    for number, run in enumerate(runs):
        out, errors = run.communicate(timeout=120)
        found = re.search(rf"{number} of 2: (step {steps}, \w+)", out)
        assert found is not None, errors
        said.append(found[1])
    assert said[0] == said[1]
    return said[0]
