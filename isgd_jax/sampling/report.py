"""What a state knows, for a person: variances with their bands, how draws are shared out, and how fresh scores are."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from isgd_jax.sampling import allocation, samplers, score_table
from isgd_jax.sampling.allocation import GroupReport
from isgd_jax.sampling.groups import Groups
from isgd_jax.sampling.state import SamplerState
from isgd_jax.variance import monitor
from isgd_jax.variance.rolling import Band

__all__ = ["CostReport", "GroupNames", "SamplerReport", "ScoreReport", "make_report"]

TOP = 0.01
"""The part of the examples that is drawn most, of which the share of draws is told."""


@jax.tree_util.register_static
class GroupNames(tuple[str, ...]):
    """Names of groups; no leaf of a report, so that a report goes through ``jax.jit``."""


class CostReport(NamedTuple):
    """Variance per unit of cost: Tr Cov of one draw times its expected cost, which is that of an estimate of cost 1."""

    uniform_cost: Float[Array, ""]
    """Of a uniform draw, in the unit of ``costs=``."""
    cost: Float[Array, ""]
    """Of a draw as they are made now."""
    uniform: Band | None
    """Variance times cost of uniform draws; None without a monitor."""
    drawn: Band | None
    """The same of the draws as they are made."""


class ScoreReport(NamedTuple):
    """How much of the data has a score, and how fresh scores are."""

    known_share: Float[Array, ""]
    """Share of the examples that have a score at all."""
    trusted_share: Float[Array, ""]
    """Share of the scores that were fresh enough when the proposal was made."""
    mean_age: Float[Array, ""]
    """Versions since their scores were measured, over the examples that have one."""
    quarantined: Int[Array, ""]
    """Scores that came and were not recorded: they were not finite, or negative."""


class SamplerReport(NamedTuple):
    """Arrays; nothing is read to the host until it is looked at. Printing it makes a table.

    ``equivalent_batch`` is the plain batch with the variance of the batches that are drawn: draws times
    uniform / drawn. It speaks of variance: under Adam draws may be worth less in loss. ``noise_scale`` is Tr Cov of one
    uniform draw over ‖mean gradient‖² (McCandlish et al. 2018): plain batches far below it are bound by noise. Both are
    0 while the monitor has not measured them.
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
    scores: ScoreReport
    gate_is_open: Bool[Array, ""]
    version: Int[Array, ""]
    cost: CostReport | None = None
    """Where examples have costs."""
    groups: GroupReport | None = None
    """Where there are groups: one number for each."""
    group_names: tuple[str, ...] | None = None

    def __str__(self) -> str:
        rows = [("parameter updates", f"{int(self.version):,}")]
        if self.variance is not None:
            names = {"uniform": "uniform", "stale": "in use, independent", "drawn": "drawn", "ideal": "ideal"}
            for field, label in names.items():
                rows.append((f"variance of a draw, {label}", _told(getattr(self.variance, field))))
            for label, value in (
                ("equivalent plain batch", self.equivalent_batch), ("gradient noise scale", self.noise_scale),
            ):  # fmt: skip
                rows.append((label, f"{float(value):.4g}" if float(value) > 0.0 else "not known yet"))
        if self.cost is not None:
            cost = f"{float(self.cost.cost):.4g}; uniform {float(self.cost.uniform_cost):.4g}"
            rows.append(("cost of a draw", cost))
            for label, band in (("uniform", self.cost.uniform), ("drawn", self.cost.drawn)):
                if band is not None:
                    rows.append((f"variance times cost, {label}", _told(band)))
        rows += [
            ("uniform fraction", f"{float(self.uniform_fraction):.3g}"),
            ("draws of the top 1 %", f"{100 * float(self.top_share):.1f} %"),
            ("examples scored", f"{100 * float(self.scores.known_share):.1f} %"),
            ("scores trusted", f"{100 * float(self.scores.trusted_share):.1f} %"),
            ("mean age of scores", f"{float(self.scores.mean_age):.4g} updates"),
            ("gate", "open" if bool(self.gate_is_open) else "shut: draws are uniform"),
        ]
        if int(self.scores.quarantined):
            rows.append(("scores set aside", f"{int(self.scores.quarantined):,} were not finite or negative"))
        if self.variance is not None and int(self.num_measured) == 0:
            rows.append(("note", "no mean gradient was measured: variances are second moments"))
        width = 2 + max(len(label) for label, _ in rows)
        told = "\n".join(f"{label:<{width}}{value}" for label, value in rows)
        return told if self.groups is None else f"{told}\n{_groups_told(self.groups, self.group_names)}"


def _told(band: Band) -> str:
    value, low, high = (float(x) for x in band)
    return f"{value:.4g} [{low:.4g}, {high:.4g}]" if math.isfinite(high - low) else "not known yet"


def _groups_told(groups: GroupReport, names: tuple[str, ...] | None) -> str:
    """A line for each group, in percent."""
    total, moments = float(groups.sizes.sum()), float(groups.second_moment.sum())
    labels = names or tuple(f"group {at}" for at in range(len(groups.sizes)))
    width = 2 + max(len(label) for label in labels)
    lines = [f"{'':<{width}}{'examples':>9} {'target':>8} {'proposal':>9} {'drawn':>8} {'2nd moment':>11}"]
    for at, label in enumerate(labels):
        shares = (
            float(groups.sizes[at]) / total,
            float(groups.target[at]),
            float(groups.allocation[at]),
            float(groups.drawn[at]),
            float(groups.second_moment[at]) / moments if moments > 0.0 else 0.0,
        )
        cells = (f"{100 * share:.1f} %" for share in shares)
        lines.append(f"{label:<{width}}" + " ".join(f"{x:>{w}}" for x, w in zip(cells, (9, 8, 9, 8, 11), strict=True)))
    return "\n".join(lines)


def make_report(
    check: Callable[[SamplerState], None],
    scores_are_used: Callable[[SamplerState], Bool[Array, ""]],
    batch_size: int,
    *,
    groups: Groups | None = None,
    filled: float = 1.0,
) -> Callable[[SamplerState], SamplerReport]:
    """The ``report`` of a sampler, compiled; no leaf shares a buffer with the state, which may be donated.

    Args:
        check: refuses a state of another sampler.
        scores_are_used: whether draws are made by score now: what the gate says.
        batch_size: draws in a step.
        groups: of the sampler.
        filled: the share of the draws in a step that is no padding, on average.

    Returns:
        ``report(state)``, which changes nothing and raises a ValueError for the state of another run.
    """
    names = None if groups is None or groups.names is None else GroupNames(groups.names)

    @jax.jit
    def grouped(state: SamplerState) -> GroupReport | None:
        return _grouped(state, groups)

    def report(state: SamplerState) -> SamplerReport:
        check(state)
        told = _report(state, scores_are_used(state), batch_size=batch_size, filled=filled)
        return told if groups is None else told._replace(groups=grouped(state), group_names=names)

    return report


@functools.partial(jax.jit, static_argnames=("batch_size", "filled"))
def _report(state: SamplerState, is_open: Bool[Array, ""], *, batch_size: int, filled: float) -> SamplerReport:
    """All but the groups: one program, where a report from Python would compile each of a thousand operations."""
    found = None if state.monitor is None else monitor.report(state.monitor)
    known = state.table.versions != score_table.NEVER
    ages = jnp.where(known, score_table.ages(state.table, state.version), 0).astype(jnp.float32)
    count = jnp.sum(known, dtype=jnp.int32).astype(jnp.float32)
    return SamplerReport(
        variance=found,
        num_measured=jnp.int32(0) if state.monitor is None else state.monitor.squares.seen,
        equivalent_batch=_equivalent(found, batch_size),
        noise_scale=_noise_scale(found),
        top_share=_top_share(state.proposal.law, is_open),
        uniform_fraction=state.proposal.uniform_fraction,
        scores=ScoreReport(
            known_share=count / known.shape[0],
            trusted_share=state.proposal.trusted_share,
            mean_age=jnp.sum(ages) / jnp.maximum(count, 1.0),
            quarantined=state.quarantined,
        ),
        gate_is_open=is_open,
        version=state.version,
        cost=_costs(state, found, is_open, filled),
    )


def _costs(
    state: SamplerState, found: monitor.Report | None, is_open: Bool[Array, ""], filled: float
) -> CostReport | None:
    """Of draws with padding, which costs nothing, the variance is that of a batch times all its draws."""
    if state.examples.costs is None:
        return None
    costs = state.examples.costs
    uniform, now = costs.uniform, jnp.where(is_open, costs.proposed, costs.uniform)
    if found is None:
        return CostReport(uniform, now, None, None)
    charged = now * jnp.where(is_open, filled, 1.0)  # while the gate is shut no draw is padding
    times = (Band(*(x * c for x in band)) for band, c in ((found.uniform, uniform), (found.drawn, charged)))
    return CostReport(uniform, now, *times)


def _grouped(state: SamplerState, groups: Groups | None) -> GroupReport | None:
    if groups is None or state.examples.groups is None:
        return None
    return allocation.moments(state.examples.groups, groups, state.examples.target, state.clock.step)


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


def _top_share(law: samplers.Law, is_open: Bool[Array, ""]) -> Float[Array, ""]:
    masses, size = law.masses, law.masses.shape[0]
    count = max(1, round(TOP * size))
    total = jnp.sum(masses)
    top = jnp.sum(jnp.sort(masses)[size - count :])
    return jnp.where(is_open & (total > 0.0), top / jnp.where(total > 0.0, total, 1.0), count / size)
