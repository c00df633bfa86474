"""What a draw costs, where examples differ in it: the cheapest proposal, and variance per unit of cost.

Of all proposals, the least variance times expected cost has q ∝ score / √c, since the dearer draws are, the fewer a
budget buys. With ``costs=`` the sampler draws by it, and all that compares proposals (uniform fraction, gate, report)
compares variance times cost.

Costs are what an example is charged by itself: tokens, seconds, rollouts. A batch padded to its longest example costs
more than the sum of its tokens; charge examples the length that they are padded to (a bucket's), which is such a sum.

Source: Cochran, "Sampling Techniques", section 5.5, for strata; for single draws the same by Cauchy-Schwarz.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from isgd_jax.errors import ArgumentError, check_array, first_wrong
from isgd_jax.sampling import samplers
from isgd_jax.sampling.double_float import tree_sum
from isgd_jax.sampling.law import Law

__all__ = ["Costs", "check", "create", "of_fractions", "ratio", "renewed"]


class Costs(NamedTuple):
    """What draws cost, in the caller's unit: one number an example, and three expectations."""

    each: Float[Array, " n"]
    uniform: Float[Array, ""]
    """Of a uniform draw."""
    flat: Float[Array, ""]
    """Of a draw by the uniform part of the proposal; other than ``uniform`` where groups have shares of their own."""
    proposed: Float[Array, ""]
    """Of a draw by the proposal in use."""


def check(costs: Array | np.ndarray | None, num_examples: int) -> None:
    """Refuse costs that are not one positive number an example, where their values can be seen.

    Raises:
        TypeError: they are no array, or a masked one.
        ValueError: they are not.
    """
    if costs is None:
        return
    check_array("costs", costs)
    if costs.shape != (num_examples,):
        raise ArgumentError(f"costs must have shape ({num_examples},), one number an example; got {costs.shape}")
    with np.errstate(over="ignore", under="ignore"):
        wrong = first_wrong(lambda x: (x.astype(np.float32) > 0) & np.isfinite(x.astype(np.float32)), costs)
    if wrong is not None:
        raise ArgumentError(
            f"costs must be above 0 and finite as float32, got {wrong.value} at {wrong.at}: an example that is free "
            "would be drawn for ever; give it a small cost"
        )


def create(each: Float[Array, " n"]) -> Costs:
    """Before the first proposal: draws are uniform.

    Args:
        each: costs [n] above 0, in the caller's unit, of any scale.
    """
    mean = _mean(each)
    return Costs(each, mean, jnp.copy(mean), jnp.copy(mean))


def renewed(costs: Costs, law: Law, flat: Float[Array, " n"] | None) -> Costs:
    """The costs with their expectations under a new proposal. O(n).

    Args:
        costs: of the examples.
        law: the new proposal.
        flat: probabilities [n] of its uniform part, where groups have shares; None where that is 1/N.
    """
    proposed = _expected(costs.each, samplers.probabilities(law))
    return costs._replace(proposed=proposed, flat=costs.uniform if flat is None else _expected(costs.each, flat))


def of_fractions(costs: Costs, uniform_fraction: Float[Array, ""], fractions: Float[Array, " k"]) -> Float[Array, " k"]:
    """The expected cost [k] of a draw under other uniform fractions, over that of a uniform draw.

    Args:
        costs: under the proposal in use.
        uniform_fraction: of the proposal in use.
        fractions: the others [k].
    """
    by_score = (costs.proposed - uniform_fraction * costs.flat) / jnp.maximum(1.0 - uniform_fraction, 1e-6)
    by_score = jnp.where(uniform_fraction < 1.0, jnp.maximum(by_score, 0.0), costs.flat)
    return ((1.0 - fractions) * by_score[None] + fractions * costs.flat[None]) / costs.uniform[None]


def ratio(costs: Costs | None) -> Float[Array, ""] | float:
    """The cost of a draw by the proposal over that of a uniform one; 1 where costs do not differ."""
    return 1.0 if costs is None else costs.proposed / costs.uniform


def _mean(each: Float[Array, " n"]) -> Float[Array, ""]:
    largest = jnp.max(each)
    return largest * (tree_sum(each / largest) / each.shape[0])


def _expected(each: Float[Array, " n"], probs: Float[Array, " n"]) -> Float[Array, ""]:
    largest = jnp.max(each)
    return largest * tree_sum(probs * (each / largest))
