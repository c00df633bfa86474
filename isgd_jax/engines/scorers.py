"""Scorers: ``(params, batch) -> scores[b]``, how much each example is worth drawing.

The best score is the norm of the example's gradient (Alain et al., arXiv 1511.06481). Others are cheaper and rank
examples alike, more or less: `experiments/benchmarks/ranks.py` measures how much.

A loss with more arguments, ``loss_fn(params, frozen, example)``, makes a scorer with as many: ``scorer(params, frozen,
batch)``. Only the first is differentiated.

`validation_product`, `excess_loss` and `token_norms` come from methods that *select* data. With any score here, draws
weighted by ``target / probs`` keep the estimate unbiased, also where scores are zero, since the uniform fraction of the
proposal draws every example. To take the ``k`` best and leave out the rest, as those methods do, changes the objective:
a bias, whichever score it is by.
"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from typing import Any, Literal, Protocol, TypeAlias, overload, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients import costs, lazy
from isgd_jax.gradients.batching import at_a_time, check_microbatch_size, in_microbatches
from isgd_jax.gradients.jaxpr import made_varying, one_example
from isgd_jax.gradients.per_example import per_example_grads
from isgd_jax.gradients.plan import Plan, check_loss, make_plan
from isgd_jax.types import Example, Params, Scorer, Scores, SketchingScorer

__all__ = [
    "GradientSketch",
    "Negative",
    "Select",
    "excess_loss",
    "grad_norm",
    "logit_bound",
    "loss",
    "normalisation",
    "preconditioned_norm",
    "softmax_cross_entropy",
    "token_norms",
    "under",
    "validation_product",
]

Select: TypeAlias = Callable[[tuple[str, ...]], bool]
"""Whether a parameter counts, by its path: ``("params", "Dense_0", "kernel")``."""

Negative: TypeAlias = Literal["zero", "absolute", "keep"]
"""What becomes of scores below zero, by which nothing can be drawn: zero (the uniform fraction alone draws these),
their absolute value, or themselves, for who selects and does not draw."""


@runtime_checkable
class GradientSketch(Protocol):
    """What makes sketches of per-example gradients, lazy or stacked: `isgd_jax.last_layer_sketch` makes one."""

    def of_grads(self, grads: Any, /) -> Float[Array, "b dims"]:
        """A row for each example."""
        ...


@overload
def grad_norm(
    loss_fn: Callable[..., Any],
    *,
    sketch: None = None,
    select: Select | None = None,
    microbatch_size: int | Literal["auto"] | None = "auto",
    precision: Any = None,
) -> Scorer: ...


@overload
def grad_norm(
    loss_fn: Callable[..., Any],
    *,
    sketch: GradientSketch,
    select: None = None,
    microbatch_size: int | Literal["auto"] | None = "auto",
    precision: Any = None,
) -> SketchingScorer: ...


def grad_norm(
    loss_fn: Callable[..., Any],
    *,
    sketch: GradientSketch | None = None,
    select: Select | None = None,
    microbatch_size: int | Literal["auto"] | None = "auto",
    precision: Any = None,
) -> Any:
    """The exact norm of each example's gradient; with a sketch, also where it points, of the same backward pass.

    Args:
        loss_fn: ``(params, example) -> scalar``, or with more arguments in between, which the scorer then takes too.
        sketch: the scorer then returns ``(norms [b], sketches [b, dims])``: give the sampler's own, as in
            ``importance_sampler(order=sketch)``, and an engine brings both to ``record``.
        select: only these parameters count (`under`, `normalisation`): cheaper, and less than the whole norm.
        microbatch_size: so many examples at a time; "auto": on a CPU as many as its cache favors, at most as many as
            fit a bound on what they need, see `in_microbatches`; None: all at once.
        precision: of the matrix products.

    Raises:
        ValueError: ``microbatch_size`` is no positive integer, or ``sketch`` and ``select`` were both given; when
            called, ``select`` chose no parameter.
    """
    if sketch is not None and select is not None:
        raise ArgumentError("a sketch needs the gradients of all parameters: give either sketch= or select=")

    check_microbatch_size(microbatch_size)
    fitting: dict[str, int] = {}

    def scored(params: Params, *args: Any) -> Any:
        *rest, batch = args
        chosen, others, rebuild = _selected(params, select)
        if not chosen:
            return jnp.zeros(jax.tree.leaves(batch)[0].shape[0])

        def part_loss(chosen: list[Any], others: list[Any], *rest: Any) -> Float[Array, ""]:
            return loss_fn(rebuild(chosen, others), *rest)

        plans: dict[Any, Plan] = {}

        def plan_of(shared: Sequence[Any], batch: Any) -> Plan:
            key = (*map(jax.typeof, jax.tree.leaves(shared)), *map(str, map(one_example, jax.tree.leaves(batch))))
            if key not in plans:  # one for every look at the program, since it takes seconds
                plans[key] = make_plan(part_loss, 0, False, shared, batch)
            return plans[key]

        def score(*args: Any) -> Any:
            *shared, batch = args
            _, grads = plan_of(shared, batch).run(shared, batch, joint=False)
            norms = lazy.norms(grads, precision=precision)
            return norms if sketch is None else (norms, sketch.of_grads(grads))

        size, shared = microbatch_size, made_varying([chosen, others, *rest], batch)
        if size == "auto":
            size = plan_of(shared, batch).examples_at_a_time(shared, batch, most=costs.machine().scored) or size
        return at_a_time(score, size, [*shared, batch], fitting)

    return scored


def preconditioned_norm(
    loss_fn: Callable[..., Any], *, microbatch_size: int | Literal["auto"] | None = "auto"
) -> Scorer:
    """The norm of the step the optimizer would make of each example: ``‖g · scale‖``.

    For Adam the scale is ``1 / (√v + ε)``, with the second moments ``v`` of ``optax.tree.get(opt_state, "nu")``. It
    ranks examples by how far they would move the parameters; the variance it lessens is that of the step, not of the
    gradient. Ours.

    Args:
        loss_fn: ``(params, example) -> scalar``.
        microbatch_size: so many examples at a time; "auto": as many as fit a bound on what they need, see
            `in_microbatches`; None: all at once.

    Returns:
        A scorer whose parameters are the pair ``(params, scale)``, two trees of the same shapes; publish both
        together.

    Raises:
        ValueError: ``microbatch_size`` is no positive integer.
    """

    def score(scaled_params: tuple[Params, Any], *args: Any) -> Scores:
        params, scale = scaled_params
        return lazy.scaled_norms(per_example_grads(loss_fn, joint=False)(params, *args), scale)

    return in_microbatches(score, microbatch_size)


def under(*names: str) -> Select:
    """Parameters with one of these names on their path: ``grad_norm(loss_fn, select=under("Dense_3", "Dense_4"))``.

    >>> is_chosen = under("Dense_1")
    >>> is_chosen(("params", "Dense_1", "kernel")), is_chosen(("params", "Dense_10", "kernel"))
    (True, False)
    """
    return lambda path: any(name in path for name in names)


def normalisation(path: tuple[str, ...]) -> bool:
    """Parameters of normalisation layers, whose gradients tell much of the norm (Gray et al., arXiv 2411.00999)."""
    return any("norm" in name.lower() or name.lower().startswith("ln") for name in path)


def loss(loss_fn: Callable[..., Any]) -> Scorer:
    """The loss of each example as its score: one forward pass.

    It is in no fixed proportion to the norm; `experiments/benchmarks/ranks.py` measures how alike they rank.

    Args:
        loss_fn: as for `grad_norm`, not negative; a negative score is set aside where it is recorded.
    """

    def score(*args: Any) -> Scores:
        return jax.vmap(one, in_axes=_last_alone(args))(*args)

    def one(*args: Any) -> Any:
        value = loss_fn(*args)
        check_loss(value)
        return value

    return score


def validation_product(
    loss_fn: Callable[..., Any], *, negative: Negative = "zero", microbatch_size: int | Literal["auto"] | None = "auto"
) -> Scorer:
    """By how much a small step on each example lowers a validation loss: ⟨gradient of the example, of that loss⟩.

    Draws by it stay unbiased for the training loss, but their variance is not made small: an example whose gradient is
    large and orthogonal to the validation gradient scores 0. To keep the ``k`` best (``negative="keep"``), as GREATS
    does, is a bias toward the validation set, which is its purpose.

    Only the first-order term of GREATS is here. It chooses one example after the other, the next by the largest
    η ⟨g_i, v⟩ - η² sum of ⟨g_i, g_j⟩ over the chosen j (η the learning rate, v the validation gradient), which holds
    back near copies. That is left out because it is no score: what an example is worth depends on which were chosen
    before, and of what is chosen for certain, and the rest never, no weights make an unbiased estimate. In a loop of
    your own that accepts this bias, `isgd_jax.inner` and `isgd_jax.gram` give both products.

    The scorer's parameters are the pair ``(params, validation_gradient)``, the second a tree like the first:
    ``jax.grad`` of the mean validation loss, made anew as often as scores are.

    Args:
        loss_fn: ``(params, example) -> scalar``.
        negative: what becomes of scores below zero.
        microbatch_size: so many examples at a time; "auto": as many as fit a bound on what they need, see
            `in_microbatches`; None: all at once.

    Raises:
        ValueError: an option is unknown; when called, the trees of the pair differ.

    Source: Wang et al., "GREATS: Online Selection of High-Quality Data for LLM Training in Every Iteration" (NeurIPS
    2024), section 3, and its authors' program for the term that is left out; the product without the gradients is ours.
    """
    as_scores = _signed(negative)

    def score(pair: tuple[Params, Params], *args: Any) -> Scores:
        params, gradient = pair
        return as_scores(lazy.inner(per_example_grads(loss_fn, joint=False)(params, *args), gradient))

    return in_microbatches(score, microbatch_size)


def excess_loss(
    loss_fn: Callable[..., Any], *, reference_loss_fn: Callable[..., Any] | None = None, negative: Negative = "zero"
) -> Scorer:
    """The loss of each example less that of a reference model: high where there is something left to learn.

    Draws by it stay unbiased. To keep the ``k`` best (``negative="keep"``), as RHO-LOSS does, is a bias, toward what
    the reference has learnt and this model has not.

    The scorer's parameters are the pair ``(params, reference_params)``: two forward passes. Losses of the reference
    that were computed before are part of the example, one forward pass:
    ``scorers.loss(lambda params, example: jnp.maximum(loss_fn(params, example) - example["reference_loss"], 0.0))``.

    Args:
        loss_fn: ``(params, example) -> scalar``.
        reference_loss_fn: of the reference, ``(reference_params, example) -> scalar``; None takes ``loss_fn``.
        negative: what becomes of scores below zero.

    Raises:
        ValueError: ``negative`` is unknown.

    Source: Mindermann et al., "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt",
    arXiv 2206.07137, equation 3.
    """
    as_scores, other = _signed(negative), reference_loss_fn or loss_fn

    def score(pair: tuple[Params, Params], *args: Any) -> Scores:
        params, reference = pair
        of_each = partial(jax.vmap, in_axes=(None, *_last_alone(args)))
        return as_scores(of_each(loss_fn)(params, *args) - of_each(other)(reference, *args))

    return score


def token_norms(
    losses_fn: Callable[..., Float[Array, " t"]],
    masks: Float[Array, "k t"] | None = None,
    *,
    microbatch_size: int | Literal["auto"] | None = "auto",
) -> Callable[..., Float[Array, "b k"]]:
    """The norm of the gradient of each token's loss, or of each part of a sequence that a mask keeps.

    One score a token, where other scorers have one an example: for a sampler whose items are pairs of a sequence and a
    token, ``scores.reshape(-1)`` are those of the items ``sequence * k + part``. Draws of these pairs with
    ``target / probs`` stay unbiased for the sum over all; to keep only the tokens with the largest scores is a bias.

    A backward pass for each mask: masks of spans cost less than one for each token.

    Args:
        losses_fn: ``(params, example) -> [t]``, the loss of each token.
        masks: a row [t] for each part, which weighs the losses of its tokens; None: a part for each token.
        microbatch_size: so many pairs of example and mask at a time; "auto": as many as fit a bound on what
            they need, see `in_microbatches`.

    Returns:
        ``(params, batch) -> [b, k]``; exact norms.

    Raises:
        ValueError: ``microbatch_size`` is no positive integer; when called, the masks do not fit the tokens.
    """

    def part_loss(*args: Any) -> Float[Array, ""]:
        *others, (example, mask) = args
        return jnp.sum(mask * losses_fn(*others, example))

    of_parts: Callable[..., Scores] = grad_norm(part_loss, microbatch_size=microbatch_size)

    def score(*args: Any) -> Float[Array, "b k"]:
        *others, batch = args
        size = jax.tree.leaves(batch)[0].shape[0]
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        losses = jax.eval_shape(losses_fn, *others, example)
        if len(losses.shape) != 1 or (masks is not None and masks.shape[1:] != losses.shape):
            told = "none" if masks is None else f"masks of shape {masks.shape}"
            raise ArgumentError(
                f"losses_fn must return the loss of each token, [t], and masks be [k, t]; got {losses.shape} and {told}"
            )
        rows = jnp.eye(losses.shape[0], dtype=losses.dtype) if masks is None else masks.astype(losses.dtype)
        pairs = jax.tree.map(lambda x: jnp.repeat(x, len(rows), axis=0), batch), jnp.tile(rows, (size, 1))
        return of_parts(*others, pairs).reshape(size, len(rows))

    return score


def softmax_cross_entropy(logits: Float[Array, " c"], example: Example) -> Float[Array, ""]:
    """The loss that classifiers have, in nats: ``example["label"]`` is the index of the right class."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])


def logit_bound(
    logits_fn: Callable[..., Any],
    loss_of_logits: Callable[[Any, Example], Float[Array, ""]] = softmax_cross_entropy,
) -> Scorer:
    """The norm of the loss's gradient with respect to the logits: one forward pass.

    Up to a constant of the network, an upper bound on the norm of the whole gradient (Katharopoulos & Fleuret,
    arXiv 1803.00942, equation 20). The constant does not matter, since only ratios of scores do.

    Args:
        logits_fn: ``(params, example) -> logits``, a pytree of arrays; or with more arguments in between.
        loss_of_logits: ``(logits, example) -> scalar``; cross-entropy with ``example["label"]`` by default.
    """

    def slopes(*args: Any) -> Any:
        return jax.grad(loss_of_logits)(logits_fn(*args), args[-1])

    def score(*args: Any) -> Scores:
        return lazy.norms(jax.vmap(slopes, in_axes=_last_alone(args))(*args))

    return score


def _last_alone(args: tuple[Any, ...]) -> tuple[int | None, ...]:
    """Of which arguments each example has its own: of the batch."""
    return (*[None] * (len(args) - 1), 0)


def _signed(negative: Negative) -> Callable[[Scores], Scores]:
    """What becomes of scores below zero."""
    ways: dict[str, Callable[[Scores], Scores]] = {
        "zero": lambda scores: jnp.maximum(scores, 0.0),
        "absolute": jnp.abs,
        "keep": lambda scores: scores,
    }
    if negative not in ways:
        raise ArgumentError(f"negative must be one of {', '.join(map(repr, ways))}, got {negative!r}")
    return ways[negative]


def _selected(
    params: Params, select: Select | None
) -> tuple[list[Any], list[Any], Callable[[list[Any], list[Any]], Params]]:
    """The chosen leaves, the others, and what makes a tree of both again."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    is_chosen = [select is None or select(_names(path)) for path, _ in leaves]
    if not any(is_chosen) and leaves:
        known = sorted({name for path, _ in leaves for name in _names(path)})
        raise ArgumentError(f"select chose none of the parameters; the names on their paths are {known}")

    def rebuild(chosen: list[Any], others: list[Any]) -> Params:
        ones, rest = iter(chosen), iter(others)
        return jax.tree.unflatten(structure, [next(ones if is_one else rest) for is_one in is_chosen])

    values = [leaf for _, leaf in leaves]
    return list(compress(values, is_chosen)), list(compress(values, map(operator.not_, is_chosen))), rebuild


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)
