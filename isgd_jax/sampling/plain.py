"""Samplers whose proposal never changes: epochs in random order, uniform draws, and draws by scores of one's own.

They have the same functions as `isgd_jax.importance_sampler`, so plain SGD is the same loop, watched by the same
monitor.

Guarantees:

* an epoch takes every example at most once; over the random permutations each is equally likely at each step;
* the permutation of an epoch depends on the state's seed and the number of the epoch alone;
* k draws made ahead (``ahead=0, 1, ...``) are the k draws that would be made in turn, over the end of an epoch too.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from isgd_jax.errors import ArgumentError, ArgumentTypeError, check_unmasked
from isgd_jax.gradients.weights import check_example_weights
from isgd_jax.sampling import samplers
from isgd_jax.sampling.drawing import in_halves
from isgd_jax.sampling.estimator import ImportanceSampler
from isgd_jax.sampling.options import (
    GradientSketch,
    Options,
    OrderName,
    SamplerName,
    check_number,
    check_options,
    check_ranges,
)
from isgd_jax.sampling.state import BatchSampler, SamplerState, check_sizes, on_mesh, own_key, step_ahead
from isgd_jax.types import Draw, Key, Params, Sampler

__all__ = ["fixed", "shuffled_epochs", "uniform_draws"]


def shuffled_epochs(
    num_examples: int,
    *,
    batch_size: int,
    monitor: bool = True,
    example_weights: Float[Array | np.ndarray, " n"] | None = None,
    steps_per_update: int = 1,
) -> BatchSampler:
    """Epochs in random order: the plain SGD that importance sampling is compared with.

    What does not fill a batch is left out of its epoch. ``monitor`` takes two halves of a batch for independent, which
    within an epoch they nearly are: they differ by what one has taken from the other.

    Args:
        num_examples: of the training set, N.
        batch_size: examples in a step.
        monitor: estimate the variance of the draws, where ``observe`` gets gradients.
        example_weights: a_n [n] of the target sum(a_n g_n).
        steps_per_update: calls of ``observe`` that make one parameter update.

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: the batch is larger than the data set, a number is out of range, or an array has not one entry an
            example.
    """
    num_examples, batch_size = check_sizes(num_examples, batch_size)
    check_example_weights(example_weights, num_examples)
    if batch_size > num_examples:
        raise ArgumentError(f"an epoch of {num_examples} examples has no batch of {batch_size}")
    options = _plain(monitor, example_weights, steps_per_update)
    return _Epochs(num_examples, batch_size, check_ranges(options)).functions()


def uniform_draws(
    num_examples: int,
    *,
    batch_size: int,
    monitor: bool = True,
    example_weights: Float[Array | np.ndarray, " n"] | None = None,
    steps_per_update: int = 1,
) -> BatchSampler:
    """Independent draws, all examples alike: SGD with replacement.

    Args:
        num_examples: of the training set, N.
        batch_size: draws in a step; it may exceed N.
        monitor: estimate the variance of the draws, where ``observe`` gets gradients.
        example_weights: a_n [n] of the target sum(a_n g_n); draws stay uniform.
        steps_per_update: calls of ``observe`` that make one parameter update.

    Returns:
        The functions. Since the proposal is what it is, ``record`` is a TypeError and ``refresh`` changes
        nothing.

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: a number is out of range, or an array has not one entry an example.
    """
    num_examples, batch_size = check_sizes(num_examples, batch_size)
    check_example_weights(example_weights, num_examples)
    options = dataclasses.replace(_plain(monitor, example_weights, steps_per_update), sampler="uniform")
    return _Still(num_examples, batch_size, check_ranges(options)).functions()


def fixed(
    scores: Array | np.ndarray,
    *,
    batch_size: int,
    sampler: SamplerName | Sampler = "stratified",
    order: OrderName | GradientSketch | Array | np.ndarray = "score",
    uniform_fraction: float = 0.1,
    additive: float = 0.0,
    gate: bool = True,
    monitor: bool = True,
    example_weights: Float[Array | np.ndarray, " n"] | None = None,
    steps_per_update: int = 1,
) -> BatchSampler:
    """Draws by scores of one's own, which stay as they are.

    Args:
        scores: one number of at least 0 for each example [n].
        batch_size: draws in a step.
        sampler: as in `isgd_jax.importance_sampler`, and so are all others.
        order: the line of the draws.
        uniform_fraction: share of the uniform distribution.
        additive: a constant added to each score.
        gate: draw uniformly while the scores do harm.
        monitor: estimate the variance of the draws.
        example_weights: a_n [n] of the target sum(a_n g_n).
        steps_per_update: calls of ``observe`` that make one parameter update.

    Raises:
        TypeError: a number is of the wrong type, or the scores are a masked array.
        ValueError: a score is negative or not finite, or an option is out of range.
    """
    check_unmasked("scores", scores)
    with np.errstate(over="ignore"):
        values = np.asarray(scores).astype(np.float32)
    is_score = np.isfinite(values) & (values >= 0)
    if values.ndim != 1 or not np.all(is_score):
        bad = "" if values.ndim != 1 else f"; the first wrong one is at {int(np.argmin(is_score))}"
        raise ArgumentError(
            f"fixed scores are one number an example [n], at least 0 and finite as float32, got shape {values.shape}"
            f"{bad}"
        )
    check_number(uniform_fraction)
    options = Options(
        sampler=sampler,
        order=order,
        uniform_fraction=uniform_fraction,
        additive=additive,
        gate=gate,
        monitor=monitor,
        example_weights=example_weights,
        steps_per_update=steps_per_update,
        calibrate=False,
        record_drawn=False,
    )
    size, batch_size = check_sizes(len(values), batch_size)
    options = check_options(options, size, batch_size)
    return _Fixed(size, batch_size, options, values).functions()


def _plain(monitor: bool, example_weights: Array | np.ndarray | None, steps_per_update: int) -> Options:
    return Options(
        order="index",
        uniform_fraction=1.0,
        calibrate=False,
        gate=False,
        monitor=monitor,
        example_weights=example_weights,
        record_drawn=False,
        steps_per_update=steps_per_update,
    )


@dataclass(frozen=True)
class _Still(ImportanceSampler):
    """A sampler without a next proposal."""

    def record(self, state: SamplerState, ids: Any, scores: Any, **given: Any) -> SamplerState:
        """Refused: nothing would ever draw by them.

        Raises:
            TypeError: always.
        """
        raise ArgumentTypeError(
            "this sampler's proposal never changes, so it takes no scores: use isgd_jax.importance_sampler"
        )

    def refresh(self, state: SamplerState, key: Key | None = None) -> SamplerState:
        """The state as it is: there is nothing to renew."""
        del key
        self._check_state(state)
        return state


@dataclass(frozen=True)
class _Fixed(_Still):
    """A proposal made once."""

    scores: np.ndarray

    def init(self, key: Key | None = None) -> SamplerState:
        """The state with the proposal of the scores given."""
        with jax.transfer_guard("allow"):
            return self._compiled_scored(super().init(key), self.scores)

    @functools.cached_property
    def _compiled_scored(self) -> Callable[..., SamplerState]:
        return jax.jit(self._scored)

    def _scored(self, state: SamplerState, scores: Array) -> SamplerState:
        known = state.table._replace(scores=on_mesh(scores), versions=jnp.zeros(self.num_examples, jnp.int32))
        return jax.tree.map(jnp.copy, ImportanceSampler.refresh(self, state._replace(table=known)))


@dataclass(frozen=True)
class _Epochs(_Still):
    """A permutation an epoch, kept in the state as the order of the line; the next one is made at its end."""

    def init(self, key: Key | None = None) -> SamplerState:
        """The state with the permutation of the first epoch, from ``key``."""
        state = super().init(key)
        return _in_order(state, self._permutation(state, jnp.int32(0)))

    def sample(
        self, key: Key, state: SamplerState, *, params: Params = None, data: Any = None, ahead: int | Array = 0
    ) -> Draw:
        """The next batch of the permutation, whatever the key."""
        del key, params, data
        self._check_state(state)
        size, step = self.batch_size, step_ahead(state, ahead)
        epoch, at = step // self._num_batches, step % self._num_batches * size
        indices = lax.cond(
            epoch == state.clock.step // self._num_batches,
            lambda: lax.dynamic_slice_in_dim(_order(state), at, size),
            lambda: lax.dynamic_slice_in_dim(self._permutation(state, epoch), at, size),
        )
        share, target = jnp.full(size, 1.0 / self.num_examples, jnp.float32), state.examples.target
        return Draw(
            indices,
            share,
            jnp.ones(size, bool),
            target=share if target is None else target[indices],
            version=step // self.options.steps_per_update,
            in_halves=in_halves(self.options, self.batch_size, step),
        )

    def observe(self, state: SamplerState, draw: Draw, grads: Params = None, **given: Any) -> SamplerState:
        """As `ImportanceSampler.observe`; the step that ends an epoch makes the permutation of the next one."""
        after = super().observe(state, draw, grads, **given)
        epoch = after.clock.step // self._num_batches
        order = lax.cond(
            epoch == state.clock.step // self._num_batches,
            lambda: _order(after),
            lambda: self._permutation(after, epoch),
        )
        return _in_order(after, order)

    @property
    def _num_batches(self) -> int:
        return self.num_examples // self.batch_size

    def _permutation(self, state: SamplerState, epoch: Int[Array, ""]) -> Int[Array, " n"]:
        return jax.random.permutation(own_key(state, epoch), self.num_examples).astype(jnp.int32)


def _order(state: SamplerState) -> Int[Array, " n"]:
    order = state.proposal.law.order
    assert order is not None
    return order


def _in_order(state: SamplerState, order: Int[Array, " n"]) -> SamplerState:
    """The state with its line in this order; where an example lies on it nobody asks."""
    law: samplers.Law = state.proposal.law._replace(order=order)
    return state._replace(proposal=state.proposal._replace(law=law))
