"""What a state knows, for a person: variances with their bands, how draws are shared out, and how fresh scores are."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from isgd_jax.sampling import samplers, score_table
from isgd_jax.sampling.state import SamplerState, check_state
from isgd_jax.variance import monitor
from isgd_jax.variance.gate import Gate

__all__ = ["SamplerReport", "make_report"]

TOP = 0.01
"""The part of the examples that is drawn most, of which the share of draws is told."""


class SamplerReport(NamedTuple):
    """Arrays; nothing is read to the host until it is looked at. Printing it makes a table.

    ``equivalent_batch`` is the plain batch with the variance of the batches that are drawn: draws times
    uniform / drawn. ``noise_scale`` is Tr Cov of one uniform draw over ‖mean gradient‖² (McCandlish et al. 2018):
    plain batches far below it are bound by noise. Both are 0 while the monitor has not measured them.
    """

    variance: monitor.Report | None
    """Tr Cov of one draw, uniform, in use, ideal, drawn, each with a 95 % band; None without a monitor."""
    num_measured: Int[Array, ""]
    """Measurements of ‖mean gradient‖² in the window; at 0 the variances hold second moments only."""
    equivalent_batch: Float[Array, ""]
    noise_scale: Float[Array, ""]
    top_share: Float[Array, ""]
    """Share of the draws that the 1 % of examples drawn most get."""
    uniform_fraction: Float[Array, ""]
    trusted_share: Float[Array, ""]
    """Share of scores that were fresh enough when the proposal was made."""
    scored_share: Float[Array, ""]
    """Share of the examples that have a score at all."""
    mean_age: Float[Array, ""]
    """Versions since their scores were measured, over the examples that have one."""
    gate_is_open: Bool[Array, ""]
    version: Int[Array, ""]
    quarantined: Int[Array, ""]

    def __str__(self) -> str:
        rows = [("parameter updates", f"{int(self.version):,}")]
        if self.variance is not None:
            names = {"uniform": "uniform", "stale": "in use, independent", "drawn": "drawn", "ideal": "ideal"}
            for field, label in names.items():
                value, low, high = (float(x) for x in getattr(self.variance, field))
                told = f"{value:.4g} [{low:.4g}, {high:.4g}]" if math.isfinite(high - low) else "not known yet"
                rows.append((f"variance of a draw, {label}", told))
            rows.append(("equivalent plain batch", f"{float(self.equivalent_batch):.4g}"))
            rows.append(("gradient noise scale", f"{float(self.noise_scale):.4g}"))
        rows += [
            ("uniform fraction", f"{float(self.uniform_fraction):.3g}"),
            ("draws of the top 1 %", f"{100 * float(self.top_share):.1f} %"),
            ("examples scored", f"{100 * float(self.scored_share):.1f} %"),
            ("scores trusted", f"{100 * float(self.trusted_share):.1f} %"),
            ("mean age of scores", f"{float(self.mean_age):.4g} updates"),
            ("gate", "open" if bool(self.gate_is_open) else "shut: draws are uniform"),
        ]
        if int(self.quarantined):
            rows.append(("scores set aside", f"{int(self.quarantined):,} were not finite or negative"))
        if self.variance is not None and int(self.num_measured) == 0:
            rows.append(("note", "no mean gradient was measured: variances are second moments"))
        width = 2 + max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}{value}" for label, value in rows)


def make_report(num_examples: int, batch_size: int) -> Callable[[SamplerState], SamplerReport]:
    """The ``report`` of a sampler."""

    def report(state: SamplerState) -> SamplerReport:
        check_state(state, num_examples)
        found = None if state.monitor is None else monitor.report(state.monitor)
        known = state.table.versions != score_table.NEVER
        ages = jnp.where(known, score_table.ages(state.table, state.version), 0).astype(jnp.float32)
        count = jnp.sum(known, dtype=jnp.int32).astype(jnp.float32)
        is_open = state.gate.is_open if isinstance(state.gate, Gate) else jnp.asarray(True)
        return SamplerReport(
            variance=found,
            num_measured=jnp.int32(0) if state.monitor is None else state.monitor.squares.seen,
            equivalent_batch=_equivalent(found, batch_size),
            noise_scale=_noise_scale(found),
            top_share=jnp.where(is_open, _top_share(state.proposal.law), TOP),
            uniform_fraction=state.proposal.uniform_fraction,
            trusted_share=state.proposal.trusted_share,
            scored_share=count / num_examples,
            mean_age=jnp.sum(ages) / jnp.maximum(count, 1.0),
            gate_is_open=is_open,
            version=state.version,
            quarantined=state.quarantined,
        )

    return report


def _equivalent(found: monitor.Report | None, batch_size: int) -> Float[Array, ""]:
    if found is None:
        return jnp.float32(0.0)
    return batch_size * _ratio(found.uniform.value, found.drawn.value)


def _noise_scale(found: monitor.Report | None) -> Float[Array, ""]:
    return jnp.float32(0.0) if found is None else _ratio(found.uniform.value, found.mean_grad_norm_sq.value)


def _ratio(above: Float[Array, ""], below: Float[Array, ""]) -> Float[Array, ""]:
    """0 where either is not measured, or not above zero."""
    is_known = (below > 0.0) & (above > 0.0)
    return jnp.where(is_known, above / jnp.where(is_known, below, 1.0), 0.0).astype(jnp.float32)


def _top_share(law: samplers.Law) -> Float[Array, ""]:
    masses, size = law.masses, law.masses.shape[0]
    count = max(1, round(TOP * size))
    total = jnp.sum(masses)
    top = jnp.sum(jnp.sort(masses)[size - count :])
    return jnp.where(total > 0.0, top / jnp.where(total > 0.0, total, 1.0), count / size)
