"""Scorers: ``(params, batch) -> scores[b]``, how much each example is worth drawing.

The best score is the norm of the example's gradient (Alain et al., arXiv 1511.06481). The others are cheaper and rank
examples alike, more or less: `experiments/benchmarks/ranks.py` measures how much.

A loss with more arguments, ``loss_fn(params, frozen, example)``, makes a scorer with as many: ``scorer(params, frozen,
batch)``. Only the first is differentiated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias, overload, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.lax import Precision
from jaxtyping import Float, PyTree

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients import lazy
from isgd_jax.gradients.batching import in_microbatches
from isgd_jax.gradients.per_example import per_example_grads
from isgd_jax.types import Example, Params, Scorer, Scores, SketchingScorer

__all__ = [
    "GradientSketch",
    "Select",
    "grad_norm",
    "logit_bound",
    "loss",
    "normalisation",
    "preconditioned_norm",
    "softmax_cross_entropy",
    "under",
]

_SLICE = 8
"""Examples at a time, where products are formed after all."""

Select: TypeAlias = Callable[[tuple[str, ...]], bool]
"""Whether a parameter counts, by its path: ``("params", "Dense_0", "kernel")``."""


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
    precision: Any = Precision.HIGHEST,
) -> Scorer: ...


@overload
def grad_norm(
    loss_fn: Callable[..., Any],
    *,
    sketch: GradientSketch,
    select: None = None,
    microbatch_size: int | Literal["auto"] | None = "auto",
    precision: Any = Precision.HIGHEST,
) -> SketchingScorer: ...


def grad_norm(
    loss_fn: Callable[..., Any],
    *,
    sketch: GradientSketch | None = None,
    select: Select | None = None,
    microbatch_size: int | Literal["auto"] | None = "auto",
    precision: Any = Precision.HIGHEST,
) -> Any:
    """The exact norm of each example's gradient; with a sketch, also where it points, of the same backward pass.

    Args:
        loss_fn: ``(params, example) -> scalar``, or with more arguments in between, which the scorer then takes too.
        sketch: the scorer then returns ``(norms [b], sketches [b, dims])``: give the sampler's own, as in
            ``importance_sampler(order=sketch)``, and an engine brings both to ``record``.
        select: only these parameters count (`under`, `normalisation`): cheaper, and less than the whole norm.
        microbatch_size: so many examples at a time; "auto": as many as need some 512 MiB; None: all at once.
        precision: of the matrix products.

    Raises:
        ValueError: ``microbatch_size`` is no positive integer, or ``sketch`` and ``select`` were both given; when
            called, ``select`` chose no parameter.
    """
    if sketch is not None and select is not None:
        raise ArgumentError("a sketch needs the gradients of all parameters: give either sketch= or select=")

    def score(params: Params, *args: Any) -> Any:
        chosen, rebuild = _selected(params, select)
        if not chosen:
            return jnp.zeros(jax.tree.leaves(args[-1])[0].shape[0])

        def part_loss(chosen: list[Any], *rest: Any) -> Float[Array, ""]:
            return loss_fn(rebuild(chosen), *rest)

        grads = per_example_grads(part_loss, joint=False)
        found = grads(chosen, *args)
        norms, cancelled = lazy.unguarded_norms(found, precision=precision)

        def over() -> Scores:
            safe = partial(lazy.product_norms, precision=precision)
            return in_microbatches(lambda *some: safe(grads(*some)), _SLICE)(chosen, *args)

        norms = norms if cancelled is None else lax.cond(cancelled, over, lambda: norms)
        return norms if sketch is None else (norms, sketch.of_grads(found))

    return in_microbatches(score, microbatch_size)


def preconditioned_norm(
    loss_fn: Callable[..., Any], *, microbatch_size: int | Literal["auto"] | None = "auto"
) -> Scorer:
    """The norm of the step the optimizer would make of each example: ``‖g · scale‖``.

    For Adam the scale is ``1 / (√v + ε)``, with the second moments ``v`` of ``optax.tree.get(opt_state, "nu")``. It
    ranks examples by how far they would move the parameters; the variance it lessens is that of the step, not of the
    gradient. Ours.

    Args:
        loss_fn: ``(params, example) -> scalar``.
        microbatch_size: so many examples at a time; "auto": as many as need some 512 MiB; None: all at once.

    Returns:
        A scorer whose parameters are the pair ``(params, scale)``, two trees of the same shapes; publish both
        together.

    Raises:
        ValueError: ``microbatch_size`` is no positive integer.
    """

    def score(scaled_params: tuple[Params, PyTree], *args: Any) -> Scores:
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
        return jax.vmap(loss_fn, in_axes=_last_alone(args))(*args)

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

    def one(*args: Any) -> Float[Array, ""]:
        slopes = jax.grad(loss_of_logits)(logits_fn(*args), args[-1])
        return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(slopes)))

    def score(*args: Any) -> Scores:
        return jax.vmap(one, in_axes=_last_alone(args))(*args)

    return score


def _last_alone(args: tuple[Any, ...]) -> tuple[int | None, ...]:
    """Of which arguments each example has its own: of the batch."""
    return (*[None] * (len(args) - 1), 0)


def _selected(params: Params, select: Select | None) -> tuple[list[Any], Callable[[list[Any]], Params]]:
    """The chosen leaves, and how to put others in their place."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    places = [place for place, (path, _) in enumerate(leaves) if select is None or select(_names(path))]
    if not places and leaves:
        known = sorted({name for path, _ in leaves for name in _names(path)})
        raise ArgumentError(f"select chose none of the parameters; the names on their paths are {known}")

    def rebuild(chosen: list[Any]) -> Params:
        values = [leaf for _, leaf in leaves]
        for place, value in zip(places, chosen, strict=True):
            values[place] = value
        return jax.tree.unflatten(structure, values)

    return [leaves[place][1] for place in places], rebuild


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)
