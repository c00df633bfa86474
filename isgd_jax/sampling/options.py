"""What an importance sampler is made with: its options, and the refusal of what no sampler can be made of."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from isgd_jax.errors import ArgumentError, ArgumentTypeError, check_unmasked, check_whole
from isgd_jax.gradients.weights import check_example_weights
from isgd_jax.sampling import costs as cost
from isgd_jax.sampling import groups as grouping
from isgd_jax.sampling import samplers
from isgd_jax.sampling.groups import Groups
from isgd_jax.types import Params, Sampler

__all__ = [
    "DISTINCT",
    "GradientSketch",
    "Options",
    "OrderName",
    "SamplerName",
    "check_fraction",
    "check_number",
    "check_options",
    "check_ranges",
    "expected_draws",
    "is_poisson",
    "order_keys",
]

SamplerName = Literal["stratified", "systematic", "independent", "without_replacement", "poisson"]
OrderName = Literal["score", "index"]

DISTINCT = ("without_replacement", "poisson")
"""Samplers that draw no example twice; their laws are capped when the proposal is made."""


@runtime_checkable
class GradientSketch(Protocol):
    """How an order by clusters sees examples: ``dims`` numbers each, of which near ones mean similar gradients."""

    dims: int

    def of_grads(self, grads: Params, /) -> Float[Array, "m dims"]:
        """The sketches of per-example gradients, lazy or stacked."""
        ...


@dataclass(frozen=True)
class Options:
    """The arguments of `importance_sampler`, which documents them; also what is alike for other samplers."""

    sampler: str | Sampler = "stratified"
    order: OrderName | GradientSketch | Array | np.ndarray = "score"
    order_every: int = 1
    uniform_fraction: float | Literal["auto"] = "auto"
    calibrate: bool = True
    learning_steps: int | None = None
    gate: bool = True
    monitor: bool = True
    additive: float = 0.0
    max_age: int | None = None
    max_age_seconds: float | None = None
    min_trusted: float = 0.1
    example_weights: Array | np.ndarray | None = None
    score_memory: float = 0.0
    record_drawn: bool = True
    steps_per_update: int = 1
    costs: Array | np.ndarray | None = None
    groups: Groups | None = None


def is_poisson(options: Options) -> bool:
    """Whether a step has a random number of draws, so that ``probs`` are not those of a single draw by the law."""
    return options.sampler == "poisson" or options.sampler is samplers.poisson


def expected_draws(options: Options, batch_size: int) -> float:
    """How many of the draws of a step are examples and not padding, on average."""
    return samplers.poisson_size(batch_size) if is_poisson(options) else float(batch_size)


def order_keys(options: Options) -> np.ndarray | None:
    """What the line is ordered by first, as ranks: of int32, whatever the keys are."""
    if isinstance(options.order, str | GradientSketch):
        return None
    with jax.transfer_guard("allow"):
        check_unmasked("order", options.order)
        keys = np.asarray(options.order)
    return np.unique(keys, return_inverse=True)[1].reshape(keys.shape).astype(np.int32)


def check_options(options: Options, num_examples: int, batch_size: int) -> Options:
    """The options with counts as ints; what no sampler can be made of is refused, in the names of the arguments.

    Args:
        options: as `importance_sampler` was called.
        num_examples: N, which every array among them must have as its length.
        batch_size: m.

    Raises:
        TypeError: a number or an array is of the wrong type.
        ValueError: a name is unknown, a shape does not fit, or a number is out of range.
    """
    names = get_args(SamplerName)
    if options.sampler not in names and (isinstance(options.sampler, str) or not callable(options.sampler)):
        raise ArgumentError(f"sampler must be one of {', '.join(names)}; got {options.sampler!r}")
    if options.sampler in DISTINCT and batch_size > num_examples:
        raise ArgumentError(
            f"sampler={options.sampler!r} draws distinct examples: batch_size={batch_size} of {num_examples}"
        )
    if (expected := expected_draws(options, batch_size)) < math.log(2):  # empty in a share exp(-expected) of all steps
        raise ArgumentError(
            f"sampler='poisson' with batch_size={batch_size} expects {expected:.2g} draws a step, so that most steps "
            "would have none: give it 8 places or more, or take sampler='stratified'"
        )
    if isinstance(options.order, str) and options.order not in ("score", "index"):
        raise ArgumentError(
            f'order must be "score", "index", an array [n] or a sketch of gradients; got {options.order!r}'
        )
    keys = order_keys(options)
    if keys is not None and keys.shape != (num_examples,):
        raise ArgumentError(f"order needs one number an example, [{num_examples}]; got an array of shape {keys.shape}")
    check_example_weights(options.example_weights, num_examples)
    cost.check(options.costs, num_examples)
    grouping.check(options.groups, num_examples, is_weighted=options.example_weights is not None)
    if options.sampler == "without_replacement" and batch_size > grouping.num_drawable(options.groups, num_examples):
        raise ArgumentError(
            f"sampler='without_replacement' draws distinct examples: batch_size={batch_size} of the "
            f"{grouping.num_drawable(options.groups, num_examples)} whose groups have a share"
        )
    grouping.check_chances(options.groups, options.uniform_fraction)
    check_fraction(options.uniform_fraction, options.additive)
    return check_ranges(options)


def check_fraction(uniform_fraction: float | str, additive: float) -> None:
    """Refuse a uniform fraction under which an example could starve.

    Raises:
        ValueError: it is neither "auto" nor above 0 and at most 1, and no additive constant stands in for it.
    """
    is_fraction = not isinstance(uniform_fraction, str) and 0.0 < uniform_fraction <= 1.0
    stands_in = uniform_fraction == 0.0 and additive > 0.0
    if not (uniform_fraction == "auto" or is_fraction or stands_in):
        raise ArgumentError(
            f'uniform_fraction must be "auto", or above 0 and at most 1 (0 only beside additive above 0), got '
            f"{uniform_fraction!r}: an example without a chance would be a bias"
        )


def check_number(uniform_fraction: float | str) -> None:
    """Refuse "auto" where no fraction is learnt.

    Raises:
        TypeError: it is no number.
    """
    if isinstance(uniform_fraction, str):
        raise ArgumentTypeError(
            f"uniform_fraction must be a number here, above 0 and at most 1, got {uniform_fraction!r}: only "
            "importance_sampler learns it"
        )


def check_ranges(options: Options) -> Options:
    """The options with counts as ints, for NumPy's have types of their own; numbers out of range are refused.

    Raises:
        TypeError: a count is no whole number.
        ValueError: a number is out of range.
    """
    counts: dict[str, Any] = {
        name: check_whole(name, getattr(options, name), least=1) for name in ("order_every", "steps_per_update")
    }
    for name, limit in (("max_age", options.max_age), ("learning_steps", options.learning_steps)):
        if limit is not None:
            counts[name] = check_whole(name, limit, least=0)
    if not (0.0 <= options.additive < math.inf):
        raise ArgumentError(f"additive must be 0 or more, got {options.additive}")
    if not 0.0 <= options.min_trusted <= 1.0:
        raise ArgumentError(f"min_trusted is a share, 0 to 1, got {options.min_trusted}")
    if not 0.0 <= options.score_memory < 1.0:
        raise ArgumentError(
            f"score_memory is the share of the old mean square to keep, 0 to below 1, got {options.score_memory}"
        )
    if options.max_age_seconds is not None and not options.max_age_seconds > 0.0:
        raise ArgumentError(f"max_age_seconds must be above 0, got {options.max_age_seconds}")
    return replace(options, **counts)
