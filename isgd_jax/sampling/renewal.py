"""The next proposal, from all that a state knows: scores, calibration, uniform fraction, costs, groups, order.

Source: the paper, section 4, for scores and the additive constant; the rest is told where it stands (`proposal`,
`calibration`, `fractions`, `costs`, `allocation`, `ordering`).
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from isgd_jax.sampling import allocation, calibration, fractions, ordering, proposal, samplers, score_table
from isgd_jax.sampling import costs as cost
from isgd_jax.sampling.options import DISTINCT, Options, expected_draws
from isgd_jax.sampling.state import Proposal, SamplerState, begun_anew
from isgd_jax.types import Key

__all__ = ["LEARNING_REFRESHES", "blank", "renewed"]

LEARNING_REFRESHES = 2
"""Refreshes before calibrated scores are used: the first period knows nothing, the second only the first norms."""


def blank(options: Options, num_examples: int) -> Proposal:
    """A placeholder, which the first proposal is made from.

    Args:
        options: of the sampler.
        num_examples: n.
    """
    order = None if _has_no_order(options) else jnp.arange(num_examples, dtype=jnp.int32)
    law = samplers.prepare(jnp.full(num_examples, 1.0 / num_examples, jnp.float32), order)
    zero = jnp.int32(0)
    return Proposal(law, jnp.float32(1.0), zero, zero, jnp.float32(0.0), jnp.asarray(True), zero)


def renewed(state: SamplerState, options: Options, batch_size: int, key: Key | None = None) -> SamplerState:
    """The state with its next proposal, from which draws begin anew.

    Args:
        state: of a sampler with these options.
        options: of the sampler.
        batch_size: draws in a step, m.
        key: of the start of the clusters; by default it comes from the state's seed and version.
    """
    version = state.version
    fraction = jnp.float32(options.uniform_fraction) if state.fractions is None else fractions.choose(state.fractions)
    made = proposal.propose(
        state.table._replace(scores=_believed(state, options)),
        version=version,
        seconds=state.clock.seconds,
        mixture=fraction,
        additive=options.additive,
        max_age=options.max_age,
        max_age_seconds=options.max_age_seconds,
        min_trusted=options.min_trusted,
        example_weights=_weights(state, options),
        costs=None if state.examples.costs is None else state.examples.costs.each,
        mix=None if state.examples.groups is None else functools.partial(_mixed, state, options, fraction),
    )
    law = samplers.prepare(made.probs, _order(state, options, batch_size, made.probs, key))
    if options.sampler in DISTINCT:
        law = samplers.capped(law, num_draws=expected_draws(options, batch_size))
    made_at = jnp.copy(version)  # the clock's own buffer must not come out twice: the next call donates both
    before = state.proposal
    found = fraction, made_at, before.refreshes + 1, made.trusted_share, made.is_uniform, before.stream
    return _counted(begun_anew(state._replace(proposal=Proposal(law, *found))))


def _weights(state: SamplerState, options: Options) -> Float[Array, " n"] | None:
    if state.examples.groups is None or options.groups is None:
        return state.examples.target
    return allocation.unit_weights(state.examples.groups, options.groups, state.examples.target)


def _mixed(
    state: SamplerState, options: Options, fraction: Float[Array, ""], wanted: Float[Array, " n"]
) -> Float[Array, " n"]:
    """The probabilities of a proposal over groups."""
    assert state.examples.groups is not None
    assert options.groups is not None
    return allocation.drawn_by(
        state.examples.groups,
        options.groups,
        wanted,
        target=state.examples.target,
        costs=None if state.examples.costs is None else state.examples.costs.each,
        uniform_fraction=fraction,
        step=state.clock.step,
    )


def _counted(state: SamplerState) -> SamplerState:
    """The state with the allocation and the expected costs of its new proposal."""
    known, law, flat = state.examples.groups, state.proposal.law, None
    if known is not None:
        share = allocation.group_sums(samplers.probabilities(law), known.ids, known.sizes.shape[0])
        known = known._replace(allocation=share)
        flat = (share / jnp.maximum(known.sizes, 1.0))[known.ids]
    costs = None if state.examples.costs is None else cost.renewed(state.examples.costs, law, flat)
    return state._replace(examples=state.examples._replace(costs=costs, groups=known))


def _believed(state: SamplerState, options: Options) -> Float[Array, " n"]:
    """The scores, or what they have turned out to be worth in the middle of the proposal's life."""
    known, version = state.table.scores, state.version
    if state.calibration is None:
        return known
    horizon = (version - state.proposal.version) // 2  # the next period is thought as long as the last one
    predicted = calibration.predict(state.calibration, known, score_table.ages(state.table, version) + horizon)
    steps = options.learning_steps
    has_learnt = state.proposal.refreshes >= LEARNING_REFRESHES if steps is None else version >= steps
    return jnp.where(has_learnt, predicted, known)


def _order(
    state: SamplerState, options: Options, batch_size: int, probs: Float[Array, " n"], key: Key | None
) -> Int[Array, " n"] | None:
    if _has_no_order(options):
        return None

    def anew() -> Int[Array, " n"]:
        return ordering.line(state, probs, key=key, num_cells=min(batch_size, probs.shape[0]))

    if options.order_every == 1:
        return anew()
    is_due = state.proposal.refreshes % options.order_every == 0
    return lax.cond(is_due, anew, lambda: state.proposal.law.order)


def _has_no_order(options: Options) -> bool:
    return isinstance(options.order, str) and options.order == "index"
