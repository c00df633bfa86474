"""What the checksums of a checkpoint cost, in seconds a GB, beside writing and reading it.

Arrays of 64 MB, as parameters and an optimizer have them, through `isgd_jax.app.checkpoints`. Saving holds up training
until the checksums are made and the arrays are copied; a thread writes them meanwhile.

Command    python experiments/benchmarks/checkpoints.py [--gigabytes 0.5] [--folder FOLDER]
Time       seconds

Result (two CPU cores, busy; 0.3 GB on a local disk): checksums 0.6 s a GB; a save holds up training for 1.3 s a GB, and
4.5 s a GB are written besides; reading takes 5.3 s a GB, of which 0.6 are checksums.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from isgd_jax.app import checkpoints

ARRAY = 2**26
REPEATS = 3


def seconds(run: Callable[[], Any]) -> float:
    began = time.monotonic()
    run()
    return time.monotonic() - began


def measure(gigabytes: float, folder: Path) -> dict[str, float]:
    """Seconds a GB (10^9 bytes) of each part, the least of some trials."""
    count = max(1, round(gigabytes * 1e9 / ARRAY))
    tree = {str(i): jax.random.normal(jax.random.key(i), (ARRAY // 4,), jnp.float32) for i in range(count)}
    jax.block_until_ready(tree)
    saved = checkpoints.Checkpoints(folder, identity={})
    trials = []
    for step in range(REPEATS):
        trials.append(
            {
                "checksums": seconds(lambda: checkpoints.checksums(tree)),
                "saving holds up training": seconds(functools.partial(saved.save, step, tree, {})),
                "writing besides": seconds(saved.wait),
                "reading, and comparing checksums": seconds(lambda: saved.restore(tree)),
            }
        )
    saved.close()
    return {part: min(trial[part] for trial in trials) / (count * ARRAY / 1e9) for part in trials[0]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--folder", help="on the disk that is measured; by default a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        for part, each in measure(options.gigabytes, Path(made)).items():
            print(f"{part:34}{each:6.2f} s a GB")
