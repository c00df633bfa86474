"""Programs that end while a worker is inside XLA: in processes of their own, since only those can be seen to end."""

import os
import subprocess
import sys
import time

import pytest
from processes import forced

BEGIN = """
import sys, threading, time
import jax, jax.numpy as jnp, numpy as np
import isgd_jax as isgd
from isgd_jax.engines import exits

computes = threading.Event()

def sleeps(y):
    computes.set()
    time.sleep({seconds})
    return np.abs(np.asarray(y))

def scorer(params, batch):
    return jax.pure_callback(sleeps, jax.ShapeDtypeStruct(batch["y"].shape, jnp.float32), batch["y"])

data = {{"y": np.ones(64, np.float32)}}
"""

ENDS = {
    "with": """
with isgd.engines.local(scorer, data, chunk_size=8) as engine:
    engine.publish(jnp.zeros(()), 0)
    assert computes.wait(60)
""",
    "never closed": """
engine = isgd.engines.local(scorer, data, chunk_size=8)
engine.publish(jnp.zeros(()), 0)
assert computes.wait(60)
""",
    "an error inside": """
with isgd.engines.local(scorer, data, chunk_size=8) as engine:
    engine.publish(jnp.zeros(()), 0)
    assert computes.wait(60)
    sys.exit(3)
""",
}


def ended(code: str) -> tuple[int, str, float]:
    """The exit code of a program with two devices, what it wrote to stderr, and how long it took."""
    began = time.monotonic()
    environment = os.environ | {"XLA_FLAGS": forced(2), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stderr, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("how", list(ENDS))
def test_the_interpreter_ends_clean_though_a_worker_computes(how: str) -> None:
    sooner = "from isgd_jax.engines import worker_pool\nworker_pool.PATIENCE = 0.5\n"
    code, err, _ = ended(BEGIN.format(seconds=3) + sooner + ENDS[how])
    assert code == (3 if how == "an error inside" else 0), err
    assert "terminate" not in err
    assert "closing waits for workers that still compile or score: isgd-cpu:1" in err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["with", "never closed"])
def test_the_interpreter_ends_clean_though_a_worker_compiles(how: str) -> None:
    """An unrolled program that compiles for many seconds; without the exit handler the process is aborted (134)."""
    unrolled = """
def scorer(params, batch):
    x = batch["y"]
    for i in range(80):
        x = jnp.sin(jnp.cumsum(x) * i) + jnp.tanh(x)
    computes.set()
    return jnp.abs(x)
"""
    code, err, _ = ended(BEGIN.format(seconds=0) + unrolled + ENDS[how])
    assert code == 0, err
    assert "terminate" not in err


@pytest.mark.slow
def test_who_computes_for_ever_is_named_and_left_with_an_exit_code_of_its_own() -> None:
    impatient = """
from isgd_jax.engines import worker_pool
worker_pool.PATIENCE, worker_pool.CLOSING, exits.LIMIT = 0.2, 0.4, 0.5
"""
    code, err, seconds = ended(BEGIN.format(seconds=1000) + impatient + ENDS["with"])
    assert code == 70, err
    assert "after 0.5 s: workers still compile or score (isgd-cpu:1), and the interpreter cannot end under them" in err
    assert seconds < 100
