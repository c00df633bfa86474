"""The code of the README and the command's page runs as it stands, and the package imports as lightly as promised."""

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import QUICK_TO_RUN

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
COMMAND = (ROOT / "docs" / "command.md").read_text()


def blocks(page: str) -> list[str]:
    """The Python of a page."""
    return re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


LOOP, FIT = blocks((ROOT / "README.md").read_text())
MODEL, ARRAYS = blocks(COMMAND)


def run(code: str, cwd: Path, first: str = QUICK_TO_RUN) -> str:
    code = first + code
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


TOLD = "\nprint('parameters', *[float(abs(x).sum()) for x in jax.tree.leaves(params)])\n"
"""A line about the parameters that the loop ends with."""


class Said(NamedTuple):
    """What a process printed, and the folder in which it ran."""

    lines: list[str]
    folder: Path


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Said:
    """The loop of one's own, `isgd.fit` from its parameters, the arrays of the command's page, and its command.

    The first block of that page is my_model.py; the command is the line below it, a little shorter.
    """
    folder = tmp_path_factory.mktemp("loop")
    (folder / "my_model.py").write_text(MODEL)
    command = re.search(r"^    isgd (train --model my_model.*)$", COMMAND, flags=re.MULTILINE)
    assert command is not None
    arguments = [*command.group(1).split(), "--steps", "20", "--refresh-every", "20"]
    mean_loss = "mean_loss = lambda params: float(jax.vmap(loss_fn, (None, 0))(params, data).mean())\n"
    setup, loop = LOOP.split("for step in range")
    measured = f"{setup}{mean_loss}first = mean_loss(params)\nfor step in range{loop}{TOLD}"
    losses = f"second = mean_loss(params)\n{FIT}\nprint(first, second, mean_loss(result.params))"
    alone = f"exec({ARRAYS!r}, alone := {{}})\nresult = alone['result']"
    code = f"{measured}{losses}\n{alone}\nprint(result.step, (result.run_dir / 'variance.png').is_file())\n"
    called = f"print('the command', flush=True)\nfrom isgd_jax.app.cli import main; main({arguments})"
    return Said([line for line in run(code + called, folder).splitlines() if line], folder)


def test_from_a_file_to_the_figures_of_ones_own_model(said: Said) -> None:
    figures = {path.name for path in (said.folder / "runs" / "mine").iterdir()}
    assert {"variance.png", "loss.png", "error.png"} <= figures


def test_the_loop_of_ones_own_learns_and_so_does_fit_and_arrays_of_ones_own_are_trained_on(said: Said) -> None:
    """`isgd.fit` goes on from the parameters of the loop; the arrays of the command's page stand alone."""
    (*before, three, last) = said.lines[: said.lines.index("the command")]
    first, second, third = map(float, three.split())
    assert third < second < 0.8 * first
    assert any("equivalent plain batch" in line for line in before)
    assert any("step 200/200 | loss" in line for line in before)
    assert last.split() == ["100", "True"]


MESH = """
import jax
import jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 8)
jax.set_mesh(jax.make_mesh((4, 2), ("rows", "columns")))

square = jax.device_put(jnp.arange(32.0).reshape(8, 4), jax.P("rows", "columns"))
assert str(jax.typeof(square)) == "float32[8@rows,4@columns]"
"""
"""As the guide to sharding in JAX's documentation begins, in our words: a mesh for all that follows, axes explicit."""


def test_the_loop_runs_unchanged_after_the_first_block_of_jax_s_guide_to_sharding(tmp_path: Path, said: Said) -> None:
    """The mesh is set for all that follows: the parameters are those of one device."""
    there = run(f"{MESH}{LOOP}{TOLD}", tmp_path).splitlines()
    plain, meshed = (
        [float(x) for x in next(line for line in lines if line.startswith("parameters")).split()[1:]]
        for lines in (said.lines, there)
    )
    assert len(plain) == 4
    assert meshed == pytest.approx(plain, rel=1e-4)


def test_importing_the_package_is_light_and_the_core_needs_no_extra(tmp_path: Path) -> None:
    names = ["per_example_grads", "importance_weighting", "samplers", "proposal", "sharded", "norms"]
    extras = ["tensorflow_datasets", "orbax", "matplotlib", "tyro", "ray", "flax"]
    loaded = "print([name for name in {} if name in sys.modules])"
    touch = "; ".join(f"isgd_jax.{name}" for name in names)
    code = f"import sys, isgd_jax; {loaded.format([*extras, 'jax'])}; {touch}; {loaded.format(extras)}"
    out = run(code, tmp_path, first="")
    assert out.split() == ["[]", "[]"]


def test_every_public_name_resolves() -> None:
    import isgd_jax

    for name in isgd_jax.__all__:
        assert getattr(isgd_jax, name) is not None
