"""How a step draws: by its proposal or, with the gate shut, all examples alike; every few steps as two half-batches.

Two half-batches drawn apart are what an unbiased estimate of ‖mean gradient‖² needs where the draws of a batch depend
on each other. They are a valid design like any other, some 5 % less good than one whole batch: so only every fourth
step.

Guarantees:

* ``draw.probs`` are those of the law that was really drawn from;
* ``proposed`` are the proposal's for the same examples, so that a shut gate learns when to open;
* samplers whose draws are apart anyway are never halved: their draws are the same, watched or not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from isgd_jax import samplers
from isgd_jax.proposal import Frozen
from isgd_jax.typing import Batch, Draw, Key, Sampler

WATCH_EVERY = 4
"""Steps between two that are drawn in halves: what they cost in variance and time is then not to be noticed."""


class Choice(NamedTuple):
    """The draws of a step, and what the proposal thinks of them. The first ``m // 2`` draws are the first half."""

    draw: Draw
    proposed: Float[Array, " m"]
    is_apart: Bool[Array, ""]
    """Whether the halves were drawn apart, so that their inner product is ‖mean gradient‖² without bias."""
    promise: Float[Array, ""] | None = None
    """How much larger a batch the scores of candidates promise, where candidates were scored (presampling)."""


Choose = Callable[[Key, Any, Any, Batch], Choice]
"""``(key, law, state, data) -> Choice``: the state is that of training, the key this step's own."""


def make_choose(sampler: Sampler, *, num_draws: int, is_watched: bool, is_apart: bool, is_gated: bool) -> Choose:
    """How a step draws ``num_draws`` with ``sampler``.

    ``is_apart``: the draws of this sampler know nothing of each other. ``is_gated``: obey the gate.
    """
    halve = is_watched and not is_apart and num_draws >= 2

    def choose(key: Key, law: Any, state: Any, data: Batch) -> Choice:
        is_turn = state.step % WATCH_EVERY == 0
        is_scored, law = isinstance(law, Frozen), law.law if isinstance(law, Frozen) else law

        def drawn(sampler: Sampler) -> Draw:
            draw = sampler(key, law, num_draws=num_draws)
            return _where(is_turn, in_halves(sampler, key, law, num_draws=num_draws), draw) if halve else draw

        draw = drawn(sampler)
        if is_gated:  # the order of the line stays good when its probabilities do harm
            plain = samplers.uniform if is_apart else samplers.uniform_strata
            draw = _where(state.watch.gate.is_open, draw, drawn(plain))
        proposed = samplers.probabilities_of(law, draw.indices) if is_scored else draw.probs
        return Choice(draw, proposed, is_turn)

    return choose


def in_halves(sampler: Sampler, key: Key, law: Any, *, num_draws: int) -> Draw:
    """Two half-batches, drawn apart, one after the other."""
    first, second = jax.random.split(key)
    parts = sampler(first, law, num_draws=num_draws // 2), sampler(second, law, num_draws=num_draws - num_draws // 2)
    return jax.tree.map(lambda *both: jnp.concatenate(both), *parts)


def _where(condition: Bool[Array, ""], yes: Draw, no: Draw) -> Draw:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
