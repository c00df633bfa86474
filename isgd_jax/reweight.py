"""The Optax transformation that turns per-example gradients of drawn examples into one unbiased gradient.

Guarantees:

* the update is (1/m) sum of g_i / (N probs_i) over the draws: its mean is the full gradient, for any probabilities
  fixed before the draw; with ``target`` a_i it is (1/m) sum of a_i g_i / probs_i, whose mean is sum(a_n g_n);
* with uniform probabilities it is the plain mean: SGD, step for step;
* draws that ``mask`` leaves out count as zero, whatever finite gradient stands in their place;
* forgetting ``probs`` is a TypeError; gradients without a batch axis and wrong shapes are ValueErrors, at trace time;
* a probability that is not above 0 and at most 1, and an index outside 0..N-1, is a ValueError where values can be
  seen, and makes the update NaN inside ``jax.jit``: never a quiet wrong step.

What a transformation cannot see, so that it trains on without a word:

* **what stood before it in the chain**, where gradients are stacked. ``optax.clip_by_global_norm`` there clips the
  gradients of all draws together, as if they were one gradient: an update a hundred times too small; Adam there takes
  each draw for a step. It stands first: ``optax.chain(importance_weighting(N), optax.clip_by_global_norm(1.0), ...)``.
  (Arithmetic on the arrays of a lazy gradient, which are factors, is an error that says so.);
* **that it is missing.** Stacked per-example gradients given to an optimizer of its own, and applied, broadcast the
  parameters to one copy a draw, ``[m, *shape]``. (Lazy gradients, as `isgd_jax.per_example_grads` gives them, cannot be
  applied where a leaf is held in factors; where all are formed, as of a single product, they can.)
* **clipping of weights before it**, ``jnp.minimum(1 / probs, c)`` or probabilities changed after the draw: a bias. The
  proposal's uniform fraction bounds the weights without one;
* **probabilities of another draw or of another data set** of the same shape.

Source: the paper, section 3; Optax's ``contrib.differentially_private_aggregate`` for the interface.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Bool, Float, Int

from isgd_jax.errors import ArgumentError, ArgumentTypeError, check_array, check_whole, seen
from isgd_jax.gradients import lazy
from isgd_jax.gradients.leaf import is_factored
from isgd_jax.gradients.weights import check_example_weights, draw_weights, is_probability

__all__ = ["ReweightState", "importance_weighting"]


class ReweightState(NamedTuple):
    """What the transformation keeps: nothing of the steps made."""

    example_weights: Float[Array, " n"] | None
    """a [n] of the target sum(a_n g_n), or None for the mean of all gradients."""


def importance_weighting(
    num_examples: int, example_weights: Float[Array | np.ndarray, " n"] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Reweight and average per-example gradients; stands first in the chain, outside ``MultiSteps``.

    >>> tx = optax.chain(importance_weighting(4), optax.sgd(1.0))
    >>> params, grads = {"w": jnp.zeros(1)}, {"w": jnp.array([[1.0], [6.0]])}
    >>> updates, _ = tx.update(grads, tx.init(params), params, probs=jnp.array([0.25, 0.75]))
    >>> updates["w"].tolist()
    [-1.5]

    Args:
        num_examples: of the training set, N.
        example_weights: a_n [N] of the target sum(a_n g_n), of any sign; None for the mean of all gradients. Where the
            draws come from an estimator (`isgd_jax.importance_sampler`), give them to it instead.

    Returns:
        The transformation. ``update(grads, state, params, probs=draw.probs)`` takes gradients with a leading axis of
        the m draws, lazy or stacked, and besides ``probs`` [m]:

        * ``mask=draw.mask`` [m], for samplers of random size;
        * ``target=draw.target`` [m], the factor of each gradient in what is estimated, as estimators know it;
        * ``indices=draw.indices`` [m], where there are example weights and no target.

    Raises:
        TypeError: ``num_examples`` is no whole number, or the weights are no array, or a masked one; from ``update``,
            without ``probs``, or without ``indices`` where there are example weights, or for lists in place of arrays.
        ValueError: ``num_examples`` is not positive, or the weights are not N finite numbers; from ``update``:
            gradients that are not one a draw, a target beside example weights, an array of another shape or of no
            draws, or, where values can be seen, a probability or an index out of range.
    """
    num_examples = check_whole("num_examples", num_examples, least=1, most=None)
    check_example_weights(example_weights, num_examples)

    def init(params: Any) -> ReweightState:
        del params
        # A copy: whoever donates the state must not lose the caller's array.
        return ReweightState(None if example_weights is None else jnp.array(example_weights))

    def update(
        updates: Any,
        state: ReweightState,
        params: Any = None,
        *,
        probs: Float[Array, "..."] | None = None,
        mask: Bool[Array, "..."] | None = None,
        indices: Int[Array, "..."] | None = None,
        target: Float[Array, "..."] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, ReweightState]:
        del extra_args
        if probs is None:
            raise ArgumentTypeError(
                "importance_weighting needs the probabilities of the draws: tx.update(grads, state, params, "
                "probs=draw.probs). flax's TrainState.apply_gradients drops them; call tx.update yourself."
            )
        check_array("probs", probs)
        if probs.ndim != 1 or not probs.size:
            raise ArgumentError(f"probs must have one number a draw, [m], m at least 1; got shape {probs.shape}")
        for name, given in (("mask", mask), ("target", target), ("indices", indices)):
            if given is None:
                continue
            check_array(name, given)
            if given.shape != probs.shape:
                raise ArgumentError(f"{name} must have one number a draw, {probs.shape}; got {given.shape}")
        _check_gradients(updates, params, probs.shape[0])
        wanted = _wanted(state, num_examples, indices, mask) if target is None else _given(state, target)
        _check_probs(probs, mask)
        return lazy.weighted_mean(updates, draw_weights(probs, mask, wanted)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_probs(probs: Float[Array, " m"], mask: Bool[Array, " m"] | None) -> None:
    """Refuse what is no probability, where that can be seen; what is masked out does not matter."""
    is_right = is_probability(probs) if mask is None else is_probability(probs) | ~mask
    found = seen(is_right)
    if found is not None and not found.all():
        at = int(np.argmin(found))
        raise ArgumentError(
            f"probs must be above 0 and at most 1, got {np.asarray(probs)[at]} for draw {at}: pass those that its "
            "sampler gave, probs=draw.probs"
        )


def _given(state: ReweightState, target: Float[Array, " m"]) -> Float[Array, " m"]:
    if state.example_weights is not None:
        raise ArgumentError(
            "the weights of the examples were given twice, as target= and as importance_weighting(example_weights=): "
            "leave them to the sampler, importance_sampler(example_weights=), and pass target=draw.target"
        )
    return target


def _wanted(
    state: ReweightState, num_examples: int, indices: Int[Array, " m"] | None, mask: Bool[Array, " m"] | None
) -> Float[Array, " m"] | float:
    if state.example_weights is None:
        return 1.0 / num_examples
    if indices is None:
        raise ArgumentTypeError(
            "example_weights were given: pass indices=draw.indices so that each draw finds its own weight"
        )
    is_there = (indices >= 0) & (indices < num_examples)
    found = seen(is_there if mask is None else is_there | ~mask)
    if found is not None and not found.all():
        at = int(np.argmin(found))
        raise ArgumentError(
            f"indices must be those of {num_examples} examples, 0 to {num_examples - 1}; got {int(indices[at])} for "
            f"draw {at}"
        )
    return jnp.where(is_there, state.example_weights[jnp.where(is_there, indices, 0)], jnp.nan)


def _check_gradients(grads: Any, params: Any, num_draws: int) -> None:
    """Every leaf must be [num_draws, *param.shape]. Shapes are known while tracing: free at run time."""
    if params is None:
        leaves = jax.tree.leaves(grads, is_leaf=is_factored)
        expected = [(num_draws, *_batched_shape(leaf)[1:]) for leaf in leaves]
    else:
        structure: Any = jax.tree.structure(params)
        try:
            leaves = structure.flatten_up_to(grads)
        except ValueError as error:
            raise ArgumentError(f"gradients must be a tree like the parameters, {structure}: {error}") from error
        expected = [(num_draws, *jnp.shape(param)) for param in jax.tree.leaves(params)]
    for leaf, shape in zip(leaves, expected, strict=True):
        _check_leaf(leaf, shape)


def _check_leaf(leaf: Any, expected: tuple[int, ...]) -> None:
    if not is_factored(leaf):
        check_array("each leaf of the gradients", leaf)
    shape = _batched_shape(leaf)
    if shape == expected:
        return
    if shape == expected[1:]:
        raise ArgumentError(
            f"got a plain gradient of shape {shape}: importance_weighting takes one gradient for each of the "
            f"{expected[0]} draws, {expected}. Use isgd_jax.per_example_grads(loss_fn)(params, batch) in place of "
            "jax.grad, and put importance_weighting first in the chain, outside MultiSteps."
        )
    raise ArgumentError(
        f"expected per-example gradients of shape {expected} ({expected[0]} draws by the parameter's shape), got "
        f"{shape}: probs and gradients must come from the same draw."
    )


def _batched_shape(leaf: Any) -> tuple[int, ...]:
    """[b, *param.shape] of a stacked or of a lazy leaf, whose own ``shape`` is the parameter's."""
    return (leaf.batch_size, *leaf.shape) if is_factored(leaf) else jnp.shape(leaf)
