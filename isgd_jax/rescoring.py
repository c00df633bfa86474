"""Which scores to renew first, when there is time for a few only: those that have lost most.

A proposal from calibrated scores w has the second moment (mean w)²; with the norms known it would have (mean E‖g‖)².
So an example of score and age (s, a) costs w - E‖g‖ = w (1 - E‖g‖/√E‖g‖²) by what is not known of it, and renewing it
saves what this is at its age, less what it is at the age that fresh scores have on average (the horizon).

Guarantees:

* what was never scored comes first;
* what is old comes round in the end, however little is known against it: age breaks ties;
* the choice is a function of the table and the draws: no clock, so a resumed run chooses the same.

Source: ours.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from isgd_jax import calibration as calibrations
from isgd_jax import table as tables
from isgd_jax.calibration import Calibration
from isgd_jax.table import ScoreTable

PATIENCE = 0.02
"""What age alone counts for: this part of a score, for each mean age."""


def lost(
    table: ScoreTable, calibration: Calibration, version: int | Int[Array, ""], *, horizon: int
) -> Float[Array, " n"]:
    """What each example's [n] score has lost since it was measured; infinite where there is none."""
    ages = tables.ages(table, version)
    scores = calibrations.predict(calibration, table.scores, ages + horizon)
    now = calibrations.spread(calibration, table.scores, ages + horizon)
    fresh = calibrations.spread(calibration, table.scores, jnp.full_like(ages, horizon))
    known = table.versions != tables.NEVER
    years = ages.astype(jnp.float32)
    typical = jnp.sum(jnp.where(known, years, 0.0)) / jnp.maximum(jnp.sum(known, dtype=jnp.float32), 1.0)
    waiting = PATIENCE * years / jnp.maximum(typical, 1.0)
    mean = jnp.mean(scores)
    benefit = scores * jnp.maximum(now - fresh, 0.0) + mean * waiting
    return jnp.where(known, benefit, jnp.inf)


def worst_chunks(lost: np.ndarray, *, chunk_size: int, count: int) -> list[int]:
    """The ``count`` chunks of consecutive examples that have lost most, the worst first."""
    num_chunks = -(-len(lost) // chunk_size)
    padded = np.pad(lost.astype(np.float64), (0, num_chunks * chunk_size - len(lost)))
    total = padded.reshape(num_chunks, chunk_size).sum(axis=1)
    return np.argsort(-total, kind="stable")[:count].tolist()
