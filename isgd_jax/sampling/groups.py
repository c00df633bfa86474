"""Groups of examples, such as the corpora of a mixture: shares of the target, shares of the draws, and what each costs.

    groups = isgd.Groups(corpus, shares=lambda step: jnp.where(step < 1000, easy_first, even))
    sampler = isgd.importance_sampler(num_examples, batch_size=128, groups=groups)

The shares say what is estimated: sum over groups of share times the mean gradient of the group. The allocation says how
the draws are spent on it, and changes its variance alone. Within a group examples are drawn by score; the uniform
fraction is uniform within each group.

Guarantees:

* shares change ``Draw.target``, never ``Draw.probs`` of the proposal in use nor the transform; so the estimate is
  unbiased at each step for the shares of that step, whatever they were when the proposal was made;
* every example of a group that has a share can be drawn; where shares are a function of the step, every example can;
* with ``allocation="neyman"``, no floors and no example weights, no weight ``target / probs`` of a draw by the proposal
  exceeds 2 / uniform_fraction², at the step the proposal was made;
* a fixed allocation is exact: draws have these shares while the gate is open. Give ``gate=False`` if they must always.
  (Samplers of distinct examples draw none more than once, so a small group may have less; the report tells);
* shares that are negative or not finite, or all zero, make the target NaN: a step that cannot be right shows.

Source: Neyman (1934), "On the two different aspects of the representative method", for the allocation; learning its
moments from weighted draws, per group, is ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from isgd_jax.errors import ArgumentError, ArgumentTypeError, check_unmasked

__all__ = ["Groups", "as_groups", "check", "check_chances", "num_drawable", "proportions"]

Numbers: TypeAlias = Array | np.ndarray | Sequence[float | int]
"""One for each group [G]."""

Shares: TypeAlias = Numbers | Callable[[Int[Array, ""]], Array] | None
"""One for each group [G], a function of the step that returns them, or None."""

LEAST = 1e-9
"""The least share of the draws in an allocation: one that float32 rounds to nothing would be a bias."""


@dataclass(frozen=True)
class Groups:
    """Which group each example is of, what share of the target each group has, and how draws are allocated.

    Args:
        ids: the group of each example [n], 0 to G-1.
        shares: of the target [G]: the estimate is that of sum_g share_g (mean gradient of group g). Only their ratios
            count. A function of the step, ``(int32 scalar) -> [G]``, is a schedule: it is traced. None leaves the
            target as it is, the mean of all examples or ``example_weights``.
        allocation: the shares of the draws. "neyman": those of least variance (times cost) on what scores and draws
            have shown so far; "target": the shares of the target; or numbers [G], of which only ratios count.
        floors: the least share of the draws of each group, a number or [G]; not beside an allocation in numbers.
        names: of the groups, for the report.
    """

    ids: Array | np.ndarray
    shares: Shares = None
    allocation: Literal["neyman", "target"] | Numbers = "neyman"
    floors: float | Numbers = 0.0
    names: Sequence[str] | None = None

    @property
    def num_groups(self) -> int:
        """G: as many as have shares or an allocation, or as the ids name."""
        told = (_shape(given) for given in (self.shares, self.allocation))
        return next((shape[0] for shape in told if shape), int(np.max(_on_host(self.ids))) + 1)


def as_groups(groups: Any) -> Groups | None:
    """What was given as ``groups=``, as `Groups`: an array of ids leaves the target as it is, and allocates as Neyman
    does.
    """
    return groups if groups is None or isinstance(groups, Groups) else Groups(groups)


def check(groups: Groups | None, num_examples: int, *, is_weighted: bool) -> None:
    """Refuse groups that no sampler can be made of, in the names of the arguments.

    Args:
        groups: as given; None passes.
        num_examples: N, which there must be as many ids as.
        is_weighted: whether there are example weights, which shares of groups exclude.

    Raises:
        TypeError: ids are no whole numbers.
        ValueError: a shape does not fit, a number is out of range, or a share belongs to no example.
    """
    if groups is None:
        return
    check_unmasked("groups", groups.ids)
    if not hasattr(groups.ids, "shape") or not hasattr(groups.ids, "dtype"):
        raise ArgumentTypeError(f"groups must be an array of ids [n] or isgd.Groups(ids, ...), got {groups.ids!r:.60}")
    if not np.issubdtype(groups.ids.dtype, np.integer):
        raise ArgumentTypeError(f"the ids of groups must be whole numbers, got {groups.ids.dtype}")
    if groups.ids.shape != (num_examples,):
        raise ArgumentError(f"groups need one id an example, [{num_examples}]; got shape {groups.ids.shape}")
    ids, size = _on_host(groups.ids), groups.num_groups
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise ArgumentError(f"the ids of groups must be 0 to {size - 1}, got {int(ids.min())} to {int(ids.max())}")
    if size > num_examples and not any(_shape(given) for given in (groups.shares, groups.allocation)):
        raise ArgumentError(
            f"the ids of groups are 0 to {size - 1} for {num_examples} examples: number the groups one after the "
            "other, np.unique(ids, return_inverse=True)[1]"
        )
    sizes = np.bincount(ids, minlength=size)
    if groups.shares is not None:
        _check_shares(groups, sizes, is_weighted)
    _check_allocation(groups, sizes)
    if groups.names is not None and len(groups.names) != size:
        raise ArgumentError(f"there are {size} groups, got {len(groups.names)} names")


def _check_shares(groups: Groups, sizes: np.ndarray, is_weighted: bool) -> None:
    size = len(sizes)
    if is_weighted:
        raise ArgumentError(
            "shares of groups and example_weights both say what is estimated: give one; weights within a group and "
            "shares of groups together are example_weights = share_g · weight_n / (sum of the group's weights)"
        )
    if callable(groups.shares):
        if _shape(groups.shares) != (size,):
            raise ArgumentError(
                f"shares(step) must return one number for each of the {size} groups, got shape {_shape(groups.shares)}"
            )
        if np.any(sizes == 0):
            raise ArgumentError(f"group {int(np.argmin(sizes))} has no example: a schedule may give it a share")
        return
    shares = _checked("shares", groups.shares, size)
    if np.any((shares > 0) & (sizes == 0)):
        raise ArgumentError(f"group {int(np.argmax((shares > 0) & (sizes == 0)))} has a share and no example")


def _check_allocation(groups: Groups, sizes: np.ndarray) -> None:
    size, is_rule = len(sizes), isinstance(groups.allocation, str)
    floors = np.asarray(groups.floors, np.float64)
    if floors.shape not in ((), (size,)) or not np.all(np.isfinite(floors)) or np.any(floors < 0):
        raise ArgumentError(
            f"floors are a number or one for each of the {size} groups, 0 or more; got {groups.floors!r}"
        )
    floors = np.where(sizes > 0, floors, 0.0)
    room = 1.0 if np.all(floors[sizes > 0] > 0) else 0.99  # a group without a floor must not be left without draws
    if floors.sum() > room + 1e-9:
        raise ArgumentError(f"floors are least shares of the draws and sum to at most {room}, got {floors.sum():.4g}")
    if is_rule:
        if groups.allocation not in ("neyman", "target"):
            raise ArgumentError(f'allocation must be "neyman", "target" or numbers [G], got {groups.allocation!r}')
        return
    if np.any(floors > 0):
        raise ArgumentError("floors go with a rule, and the allocation was given in numbers: raise those")
    allocation = _checked("allocation", groups.allocation, size)
    shares = None if groups.shares is None or callable(groups.shares) else np.asarray(groups.shares)
    starved = (sizes > 0 if shares is None else shares > 0) & (allocation < LEAST * allocation.sum())
    if np.any(starved):
        raise ArgumentError(
            f"group {int(np.argmax(starved))} is part of the target and has no share of the draws, or less than "
            f"{LEAST}: an example without a chance would be a bias"
        )
    if np.any((sizes == 0) & (allocation > 0)):
        raise ArgumentError(f"group {int(np.argmax((sizes == 0) & (allocation > 0)))} has draws and no example")


def _checked(name: str, given: Any, size: int) -> np.ndarray:
    try:
        values = np.asarray(_on_host(given), np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"{name} must be numbers, one for each of the {size} groups; got {given!r}") from error
    if values.shape != (size,):
        raise ArgumentError(f"{name} must have one number for each of the {size} groups, got shape {values.shape}")
    if not np.all(np.isfinite(values)) or np.any(values < 0) or not np.any(values > 0):
        raise ArgumentError(f"{name} must be finite, 0 or more, and not all 0; got {values.tolist()}")
    return values


def check_chances(groups: Groups | None, uniform_fraction: float | str) -> None:
    """Refuse a schedule under which a group without a share now could not be drawn when it has one.

    Raises:
        ValueError: the uniform fraction is 0, and nothing else gives each group draws.
    """
    if groups is None or not callable(groups.shares) or not isinstance(groups.allocation, str):
        return
    if uniform_fraction == 0.0 and np.any(np.asarray(groups.floors) == 0.0):
        raise ArgumentError(
            "uniform_fraction=0 with shares that are a function of the step leaves a group without a share now no "
            "chance until the next refresh, when it may have one: set it, or floors of the groups, above 0"
        )


def num_drawable(groups: Groups | None, num_examples: int) -> int:
    """How many examples can be drawn: those of groups that have a share, as far as it does not change."""
    given = None if groups is None else groups.shares if isinstance(groups.allocation, str) else groups.allocation
    if groups is None or given is None or callable(given):
        return num_examples
    return int(np.sum((_on_host(given) > 0)[_on_host(groups.ids)]))


def _shape(given: Any) -> tuple[int, ...] | None:
    """Of shares or of an allocation; None where there are none, or a rule has them."""
    if given is None or isinstance(given, str):
        return None
    if callable(given):
        return jax.eval_shape(lambda step: jnp.asarray(given(step)), jax.ShapeDtypeStruct((), jnp.int32)).shape
    return np.shape(given)


def _on_host(values: Any) -> np.ndarray:
    with jax.transfer_guard("allow"):
        return np.asarray(values)


def proportions(given: Numbers) -> Float[Array, " g"]:
    """Numbers of which only ratios count, over their sum: in float64, which holds sums that float32 does not."""
    values = _on_host(given).astype(np.float64)
    values = values / values.max()
    return jnp.asarray(values / values.sum(), jnp.float32)
