"""What a run learns of its own estimator while it trains: part of its state, so part of its checkpoints.

The draws of each step bring fresh norms, with the probabilities they were drawn with. From these alone, without another
gradient: what old scores are worth (`calibration`), which share of uniform draws is best (`mixtures`), what the
proposals cost (`monitor`), and whether scores are to be used at all (`gate`).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from isgd_jax import calibration, gate, mixtures, monitor, table
from isgd_jax.calibration import Calibration
from isgd_jax.draws import WATCH_EVERY, Choice
from isgd_jax.gate import Gate, Verdict
from isgd_jax.mixtures import Mixtures
from isgd_jax.monitor import Monitor
from isgd_jax.proposal import Frozen

PROMISE_KEPT = 0.9
DRAWS_IN_WINDOW, MOST_STEPS, FEWEST_STEPS = 1536, 64, 12


class Watch(NamedTuple):
    """All that the draws have taught."""

    calibration: Calibration
    mixtures: Mixtures
    monitor: Monitor
    gate: Gate
    promise: Float[Array, ""]
    """How much larger a batch the scores of candidates promise, over the last dozen steps (presampling)."""


def create(num_draws: int) -> Watch:
    """Nothing learnt yet; the gate is open. The monitor's window holds about 1,500 draws, in 12 to 64 steps."""
    steps = min(max(-(-DRAWS_IN_WINDOW // num_draws), FEWEST_STEPS), MOST_STEPS)
    return Watch(
        calibration.create(),
        mixtures.create(),
        monitor.create(steps, max(steps // WATCH_EVERY, 6)),
        gate.create(),
        jnp.ones(()),
    )


def learn(
    watch: Watch,
    frozen: Frozen,
    choice: Choice,
    norms: Float[Array, " m"],
    *,
    step: Int[Array, ""],
    scale: Float[Array, " m"] | float = 1.0,
) -> tuple[Watch, Verdict]:
    """Add a step's fresh ``norms`` to all but the monitor. ``scale`` is N a_n of a weighted target."""
    size, draw = frozen.scores.shape[0], choice.draw
    weights, proposal_weights = 1.0 / (size * draw.probs), 1.0 / (size * choice.proposed)
    old, versions = frozen.scores[draw.indices], frozen.versions[draw.indices]
    judged, verdict = gate.observe(watch.gate, weights, proposal_weights, norms * scale, draw.mask)
    known = draw.mask & (versions != table.NEVER)
    relative = mixtures.relative_scores(proposal_weights, frozen.mixture)
    learnt = watch._replace(
        calibration=calibration.observe(watch.calibration, old, step - versions, norms, weights, known),
        mixtures=mixtures.observe(watch.mixtures, weights, norms * scale, relative, draw.mask),
        gate=judged,
    )
    return learnt, verdict


def hear(watch: Watch, promise: Float[Array, ""] | None) -> Watch:
    """Add what the candidates of a step promise, if they were scored."""
    if promise is None:
        return watch
    return watch._replace(promise=PROMISE_KEPT * watch.promise + (1.0 - PROMISE_KEPT) * promise)


def no_verdict() -> Verdict:
    """Where there is no gate."""
    return Verdict(gate.Band(*(jnp.float32(jnp.nan) for _ in range(3))), jnp.asarray(False))
