"""The pages under docs/: the API reference builds without a warning."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_reference_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "build.py", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "importance_weighting" in (tmp_path / "isgd_jax.html").read_text()
    assert "stratified" in (tmp_path / "isgd_jax" / "samplers.html").read_text()
