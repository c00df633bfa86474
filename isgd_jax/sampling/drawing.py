"""How the draw of a step is made from a state: by score or uniformly, whole or in halves, evenly over the steps.

Guarantees:

* a draw is a function of the caller's key, the state, and the number of the step;
* stratified and systematic draws of one key are spread evenly over the steps of one stream (`Proposal.stream`), and
  know nothing of those of the streams before, which the law and the verdict of the gate were learnt from.
"""

from collections.abc import Callable
from functools import partial

import jax
from jax import lax
from jaxtyping import Array, Bool, Int

from isgd_jax.sampling import samplers
from isgd_jax.sampling.options import Options, is_poisson
from isgd_jax.sampling.state import SamplerState
from isgd_jax.types import Draw, Key, Sampler
from isgd_jax.variance.gate import Gate

__all__ = ["MONITOR_EVERY", "drawn", "in_halves"]

MONITOR_EVERY = 4
"""Steps between two that are drawn as independent halves, which the monitor needs of dependent draws. Such a batch has
some 5 % more variance than a whole one: of every fourth step that is not to be noticed."""

ALL_STEPS = 2**32 - 1
"""What the key is folded with where all steps share it: the number of no step. The caller's key is never consumed."""

_ON_LINE: dict[str, samplers.Kind] = {
    "stratified": "stratified",
    "systematic": "systematic",
    "independent": "independent",
    "without_replacement": "systematic",  # from a law that was capped when the proposal was made
}


def drawn(options: Options, batch_size: int, key: Key, state: SamplerState, step: Int[Array, ""]) -> Draw:
    """The draw of a step, without its target: as the gate and the monitor's turn have it.

    Args:
        options: of the sampler.
        batch_size: draws, m.
        key: of the run.
        state: whose proposal and gate count.
        step: its number.
    """
    law, is_turn = state.proposal.law, in_halves(options, batch_size, step)
    is_open = state.gate.is_open if isinstance(state.gate, Gate) else None
    is_halved = is_turn if _can_halve(options, batch_size) else None
    kind = _ON_LINE.get(options.sampler) if isinstance(options.sampler, str) else None
    if kind in (None, "independent"):
        key = jax.random.fold_in(key, step)
    else:
        key = jax.random.fold_in(jax.random.fold_in(key, ALL_STEPS), state.proposal.stream)
    if kind is not None:
        places = {"is_halved": is_halved, "is_open": is_open, "step": step}
        draw = samplers.on_line(kind, key, law, num_draws=batch_size, **places)
    elif options.sampler == "uniform":
        draw = samplers.uniform(key, law, num_draws=batch_size)
    else:  # halves of poisson expect half as many draws as the whole, else they would have more variance
        own = partial(samplers.poisson, part_of=batch_size) if is_poisson(options) else options.sampler
        assert not isinstance(own, str)
        draw = _branched(own, batch_size, key, law, is_halved, is_open)
    return draw._replace(in_halves=is_turn)


def in_halves(options: Options, batch_size: int, step: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether the batch of a step is two independent halves."""
    return (step % MONITOR_EVERY == 0) & _can_halve(options, batch_size)


def _can_halve(options: Options, batch_size: int) -> bool:
    return options.monitor and batch_size >= 2


def _branched(
    sampler: Sampler,
    batch_size: int,
    key: Key,
    law: samplers.Law,
    is_halved: Bool[Array, ""] | None,
    is_open: Bool[Array, ""] | None,
) -> Draw:
    """Of a sampler that is not places on a line: the one of four ways whose turn it is, alone."""

    def way(sampler: Sampler) -> Callable[[], Draw]:
        def whole() -> Draw:
            return sampler(key, law, num_draws=batch_size)

        def halves() -> Draw:
            return samplers.in_halves(sampler, key, law, num_draws=batch_size)

        return whole if is_halved is None else lambda: lax.cond(is_halved, halves, whole)

    if is_open is None:
        return way(sampler)()
    return lax.cond(is_open, way(sampler), way(samplers.uniform_strata))
