"""Whether a state draws by its scores."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool

from isgd_jax.sampling.state import SamplerState
from isgd_jax.variance import rolling
from isgd_jax.variance.gate import Gate
from isgd_jax.variance.rolling import Band

__all__ = ["is_open", "ratio", "with_gate"]


def is_open(state: SamplerState) -> Bool[Array, ""]:
    """Whether the gate lets draws go by score; true where there is none."""
    return state.gate.is_open if isinstance(state.gate, Gate) else jnp.asarray(True)


def with_gate(state: SamplerState, opened: Any, stream: Any = None) -> SamplerState:
    """The state with its gate as it was at another step, for draws that were made then.

    Args:
        state: any; without a gate only its stream changes.
        opened: what the gate was, for draws by score or uniform ones.
        stream: ``state.proposal.stream`` of then; None is that of now.
    """
    if stream is not None:
        state = state._replace(proposal=state.proposal._replace(stream=jnp.asarray(stream, jnp.int32)))
    if not isinstance(state.gate, Gate):
        return state
    return state._replace(gate=state.gate._replace(is_open=jnp.asarray(opened)))


def ratio(state: SamplerState) -> Band | None:
    """What the gate judges: the second moment of a draw by score over that of a uniform one; None without a gate."""
    if not isinstance(state.gate, Gate):
        return None
    window = state.gate.window
    return rolling.ratio(window, *window.values.T)
