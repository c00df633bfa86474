"""What the actors of the tests do: they import this file, so it imports no more than they need."""

import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from problems import linear_loss, linear_problem

from isgd_jax.engines import scorers
from isgd_jax.engines.chunks import Chunks
from isgd_jax.engines.local_engine import Job

NUM_EXAMPLES = 40
TESTS = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
"""What a worker must be able to import: this file and the problems."""


def make_importable() -> None:
    """For workers that are started from now on."""
    os.environ["PYTHONPATH"] = os.pathsep.join([*TESTS, os.environ.get("PYTHONPATH", "")])


class SlowOnce(Chunks):
    """The first process that asks for a batch takes for ever."""

    def __init__(self, flag: Path) -> None:
        super().__init__(NUM_EXAMPLES, 4)
        self._flag = flag

    def batch(self, data: Any, chunk: int) -> Any:
        try:
            self._flag.touch(exist_ok=False)
        except FileExistsError:
            return super().batch(data, chunk)
        time.sleep(1000)


def rows() -> Any:
    """The data, loaded by a worker."""
    return jax.tree.map(np.asarray, linear_problem(NUM_EXAMPLES)[1])


def sometimes_nan(params: Any, batch: Any) -> jax.Array:
    return jnp.where(batch["y"] > 1.0, jnp.nan, scorers.grad_norm(linear_loss)(params, batch))


def sketching(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    return scorers.grad_norm(linear_loss)(params, batch), jnp.asarray(batch["x"]) * params["w"][None]


def make_job(scorer: Any = None, chunks: Chunks | None = None, fingerprint: str = "same") -> tuple[Job, str]:
    """What an actor does to be ready."""
    job = Job(scorer or scorers.grad_norm(linear_loss), rows(), chunks or Chunks(NUM_EXAMPLES, 4))
    return job, fingerprint


def nothing_there() -> Any:
    raise FileNotFoundError("no data set in /nowhere")
