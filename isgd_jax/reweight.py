"""The Optax transformation that turns per-example gradients of drawn examples into one unbiased gradient.

Guarantees:

* the update is (1/m) sum of g_i / (N probs_i) over the draws: its mean is the full gradient, for any probabilities
  fixed before the draw; with ``target`` a_i it is (1/m) sum of a_i g_i / probs_i, whose mean is sum(a_n g_n);
* with uniform probabilities it is the plain mean: SGD, step for step;
* draws that ``mask`` leaves out count as zero, whatever stands in their place;
* forgetting ``probs`` is a TypeError; gradients without a batch axis and wrong shapes are ValueErrors, at trace time.

It cannot see values while it is traced: probabilities that are NaN or zero give an update that is not finite.
Source: the paper, section 3; Optax's ``contrib.differentially_private_aggregate`` for the interface.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Bool, Float, Int

from isgd_jax.errors import ArgumentError, ArgumentTypeError
from isgd_jax.gradients import lazy
from isgd_jax.gradients.weights import draw_weights


class ReweightState(NamedTuple):
    """``example_weights`` a [n] of the target sum(a_n g_n), or None for the mean of all gradients."""

    example_weights: Float[Array, " n"] | None


def importance_weighting(
    num_examples: int, example_weights: Float[Array, " n"] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Reweight and average per-example gradients; stands first in the chain, outside ``MultiSteps``.

    ``update(grads, state, params, probs=draw.probs)`` takes gradients with a leading axis of draws, lazy or stacked.
    ``mask=draw.mask`` is for samplers of random size. ``target=draw.target`` [m] says what is estimated where the draws
    come from an estimator (`isgd_jax.importance_sampler`), which knows the example weights. Without one, with
    ``example_weights`` a [num_examples], the target is sum(a_n g_n) in place of the mean; ``indices=draw.indices`` then
    says whose weights apply.

    >>> tx = optax.chain(importance_weighting(60_000), optax.sgd(0.01))  # doctest: +SKIP

    Raises:
        ValueError: ``num_examples`` is not positive, or the weights are not of shape [num_examples]; from ``update``:
            gradients that are not one a draw, or a target beside example weights.
        TypeError: from ``update``, without ``probs``, or without ``indices`` where there are example weights.
    """
    if num_examples < 1:
        raise ArgumentError(f"num_examples must be the size of the data set, at least 1, got {num_examples}")
    if example_weights is not None and example_weights.shape != (num_examples,):
        raise ArgumentError(f"example_weights must have shape ({num_examples},), got {example_weights.shape}")

    def init(params: Any) -> ReweightState:
        del params
        # A copy: whoever donates the state must not lose the caller's array.
        return ReweightState(None if example_weights is None else jnp.array(example_weights))

    def update(
        updates: Any,
        state: ReweightState,
        params: Any = None,
        *,
        probs: Float[Array, " m"] | None = None,
        mask: Bool[Array, " m"] | None = None,
        indices: Int[Array, " m"] | None = None,
        target: Float[Array, " m"] | None = None,
        **extra_args: Any,
    ) -> tuple[Any, ReweightState]:
        del extra_args
        if probs is None:
            raise ArgumentTypeError(
                "importance_weighting needs the probabilities of the draws: tx.update(grads, state, params, "
                "probs=draw.probs). flax's TrainState.apply_gradients drops them; call tx.update yourself."
            )
        _check_gradients(updates, params, probs.shape[0])
        wanted = _wanted(state, num_examples, indices) if target is None else _given(state, target, probs)
        return lazy.weighted_mean(updates, draw_weights(probs, mask, wanted)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _given(state: ReweightState, target: Float[Array, " m"], probs: Float[Array, " m"]) -> Float[Array, " m"]:
    if state.example_weights is not None:
        raise ArgumentError(
            "the weights of the examples were given twice, as target= and as importance_weighting(example_weights=): "
            "leave them to the sampler, importance_sampler(example_weights=), and pass target=draw.target"
        )
    if target.shape != probs.shape:
        raise ArgumentError(f"target must have one number a draw, {probs.shape}; got {target.shape}")
    return target


def _wanted(state: ReweightState, num_examples: int, indices: Int[Array, " m"] | None) -> Float[Array, " m"] | float:
    if state.example_weights is None:
        return 1.0 / num_examples
    if indices is None:
        raise ArgumentTypeError(
            "example_weights were given: pass indices=draw.indices so that each draw finds its own weight"
        )
    return state.example_weights[indices]


def _check_gradients(grads: Any, params: Any, num_draws: int) -> None:
    """Every leaf must be [num_draws, *param.shape]. Shapes are known while tracing: free at run time."""
    if params is None:
        leaves = jax.tree.leaves(grads, is_leaf=lazy.is_factored)
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
    return (leaf.batch_size, *leaf.shape) if lazy.is_factored(leaf) else jnp.shape(leaf)
