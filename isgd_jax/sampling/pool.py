"""Points of a continuous domain: a pool drawn from it, redrawn in turn, and importance sampling from the pool.

    pool = isgd.pool_sampler(draw_points, num_points=16_384, batch_size=256)
    state = pool.init(key)

    draw = pool.sample(step_key, state)
    points = pool.take(state, draw)                  # in place of rows of a data set
    ...                                              # gradients at these points, an update weighted by target / probs
    state = pool.observe(state, draw, grads)
    state = pool.refresh(state)                      # now and then: new points in turn, and the next proposal

A loss of several terms (equation, boundary, initial values) has a pool for each, with its share of the batch, and adds
their gradients.

Guarantees:

* at any parameters the estimate is unbiased for the mean over the pool, as that of `isgd_jax.importance_sampler` is for
  a data set; and since points come without regard to what is known of them, it is unbiased over pools for the mean over
  the domain (at parameters that were not fitted to the very pool, as between two turns they are, a little);
* draws are made along a curve through space (``order="place"``), so those of a step are spread as the proposal is:
  neighbors have similar gradients, and stratified draws then have less variance than their norms alone give;
* points are redrawn *in turn*, never by score: replacing what scores low would move the mean to what scores high;
* the score of a new point is a guess until it is drawn; a wrong guess costs variance, never bias;
* the state is one pytree of arrays, points included: saved and donated as a whole, it goes on bit for bit;
* nothing is read to the host: all run inside ``jax.jit``.

Source: ours; the reweighting is the paper's, section 3. Pools refined by residual, which are not unbiased, are the
field's custom (Wu et al. 2023, arXiv 2207.10289).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from isgd_jax.errors import ArgumentError, ArgumentTypeError
from isgd_jax.sampling import places, samplers, score_table
from isgd_jax.sampling.estimator import importance_sampler
from isgd_jax.sampling.options import GradientSketch, OrderName
from isgd_jax.sampling.state import BatchSampler, SamplerState, check_sizes, own_key
from isgd_jax.types import Draw, Key

__all__ = ["PoolSampler", "PoolState", "grid_cells", "pool_sampler"]

Points: TypeAlias = Any
"""Points of the domain: a pytree of arrays with one leading axis."""

PER_CELL = 32
"""Points of the pool in a cell of the default grid, on average: enough for a mean, few enough to be near."""


class PoolState(NamedTuple):
    """The points, what is known of them, and whose turn it is: made by ``init``, all that the next draw depends on."""

    points: Points
    """Leaves [n, ...]."""
    sampler: SamplerState
    turn: Int[Array, ""]
    """The first of the points that the next ``refresh`` redraws."""


class PoolSampler(NamedTuple):
    """Pure functions, as those of `isgd_jax.sampling.state.BatchSampler`, on points that the state holds.

    None of them is decorated: jit them where it suits the loop, and donate the state.
    """

    num_points: int
    batch_size: int
    init: Callable[..., PoolState]
    """``init(key) -> state``: the first pool; nothing is scored."""
    sample: Callable[..., Draw]
    """``sample(key, state, *, ahead=0) -> draw``: changes nothing."""
    take: Callable[[PoolState, Draw], Points]
    """``take(state, draw) -> points``: the drawn ones, leaves [m, ...]."""
    observe: Callable[..., PoolState]
    """``observe(state, draw, grads=None, *, norms=None, halves=None, scores=None, sketches=None, seconds=None,
    axis_name=None) -> state``."""
    record: Callable[..., PoolState]
    """``record(state, ids, scores, *, version, sketches=None, seconds=None) -> state``."""
    refresh: Callable[..., PoolState]
    """``refresh(state, key=None, *, score=None) -> state``: new points in turn, then the next proposal."""
    report: Callable[[PoolState], Any]
    """``report(state)``: what is known of the variance, of draws from the pool."""


def pool_sampler(
    draw_points: Callable[[Key, int], Points],
    *,
    num_points: int,
    batch_size: int,
    redraw: float = 0.1,
    order: Literal["place"] | OrderName | GradientSketch | Array | np.ndarray = "place",
    cells: Callable[[Points], Int[Array, " n"]] | None = None,
    **options: Any,
) -> PoolSampler:
    """Importance sampling of a continuous domain: collocation points, pixels, rays.

    >>> import jax, jax.numpy as jnp
    >>> pool = pool_sampler(lambda key, count: jax.random.uniform(key, (count, 2)), num_points=1024, batch_size=64)
    >>> state = pool.init(jax.random.key(0))
    >>> draw = pool.sample(jax.random.key(1), state)
    >>> pool.take(state, draw).shape
    (64, 2)

    Args:
        draw_points: ``(key, count) -> points``, each from what the loss is averaged over: uniform in the domain for an
            integral. They may be independent, or, with less variance, spread evenly (`isgd_jax.quasi_random`). A pytree
            of arrays with leading axis ``count``, which is a Python int.
        num_points: in the pool, N: as many as can be scored again and again; thousands.
        batch_size: draws in a step, m. A loss of several terms has a pool for each, and this is its share.
        redraw: the share of the pool that each ``refresh`` replaces, 0 to 1; 0 keeps the first pool.
        order: along which draws are stratified. "place": a Hilbert curve through the box of the points' coordinates,
            best for up to about ten; else as for `isgd_jax.importance_sampler`.
        cells: ``points [n, ...] -> numbers of cells [n]``, 0 to n - 1: which points are neighbors, so that a new one
            begins with the mean score of its cell. `grid_cells` by default; cells of sketches do as well.
        options: those of `isgd_jax.importance_sampler`, such as ``uniform_fraction``.

    Returns:
        The functions, `PoolSampler`.

    Raises:
        TypeError: ``draw_points`` is no function, a number is of the wrong type, or an option has no such name.
        ValueError: a number is out of range, or an option fits no pool.
    """
    if not callable(draw_points):
        raise ArgumentTypeError(f"draw_points must be a function (key, count) -> points, got {draw_points!r}")
    check_sizes(num_points, batch_size)
    if not 0.0 <= redraw <= 1.0:
        raise ArgumentError(f"redraw is the share of the pool that a refresh replaces, 0 to 1; got {redraw!r}")
    if options.get("example_weights") is not None:
        raise ArgumentError(
            "example_weights belong to given examples, and the points of a pool change: put weights into the loss, or "
            "draw points from the distribution that is meant"
        )
    for name in ("costs", "groups"):
        if options.get(name) is not None:
            raise ArgumentError(
                f"{name} belong to given examples, and the points of a pool change: make one pool for each group, with "
                "its share of the batch"
            )
    if hasattr(order, "__array__") or isinstance(order, list | tuple):
        raise ArgumentError(
            'order is an array: it orders given examples, and the points of a pool change. Take "place", "score", '
            '"index" or a sketch of gradients'
        )
    is_by_place = isinstance(order, str) and order == "place"
    line: Any = np.arange(num_points) if is_by_place else order  # to be replaced by where the points are
    inner = importance_sampler(num_points, batch_size=batch_size, order=line, **options)
    num_redrawn = math.ceil(redraw * num_points - 1e-9)  # 0.07 of 100 are 7, whatever the product rounds to
    made = _Pool(draw_points, inner, num_redrawn, grid_cells if cells is None else cells, is_by_place)
    return PoolSampler(
        num_points, batch_size, made.init, made.sample, made.take, made.observe, made.record, made.refresh, made.report
    )


def grid_cells(points: Points) -> Int[Array, " n"]:
    """The cell of each point in a grid over the box that the points span, with some thirty points a cell.

    Args:
        points: leaves [n, ...]; all numbers of a point are its coordinates, keys are none. Best for up to four: with
            more the grid has few cells along each.

    Returns:
        Numbers 0 to n - 1 [n], equal for points in the same cell.
    """
    at = places.coordinates(points)
    if at is None:
        return jnp.zeros(jax.tree.leaves(points)[0].shape[0], jnp.int32)
    size, dims = at.shape
    along = max(1, int((size / PER_CELL) ** (1.0 / max(dims, 1))))
    low, high = jnp.min(at, axis=0), jnp.max(at, axis=0)
    inside = (at - low[None]) / jnp.maximum(high - low, jnp.finfo(jnp.float32).tiny)[None]
    cells = jnp.clip((inside * along).astype(jnp.int32), 0, along - 1)
    digits = min(dims, int(math.log(size, along))) if along > 1 else 0  # so that numbers stay below n
    return jnp.sum(cells[:, :digits] * (along ** jnp.arange(digits, dtype=jnp.int32))[None], axis=1, dtype=jnp.int32)


@dataclass(frozen=True)
class _Pool:
    """The functions of a `PoolSampler`."""

    draw_points: Callable[[Key, int], Points]
    inner: BatchSampler
    num_redrawn: int
    cells: Callable[[Points], Int[Array, " n"]]
    is_by_place: bool

    def init(self, key: Key) -> PoolState:
        """A first pool, of which nothing is scored.

        Raises:
            ValueError: ``draw_points`` gave another number of points than it was asked for.
        """
        pool_key, own = jax.random.split(key)
        points = self._drawn(pool_key, self.inner.num_examples)
        state = PoolState(points, self.inner.init(own), jnp.int32(0))
        if not self.is_by_place:
            return state
        known = self._ordered(points, state.sampler)
        size = self.inner.num_examples
        law = samplers.prepare(jnp.full(size, 1.0 / size, jnp.float32), samplers.order_by(self._keys(points)))
        return state._replace(sampler=known._replace(proposal=known.proposal._replace(law=law)))

    def sample(self, key: Key, state: PoolState, *, ahead: int | Array = 0) -> Draw:
        """The draw of this step, or of the step ``ahead`` from now: indices into the pool, and their probabilities."""
        return self.inner.sample(key, state.sampler, ahead=ahead)

    def take(self, state: PoolState, draw: Draw) -> Points:
        """The drawn points."""
        return jax.tree.map(lambda x: x[draw.indices], state.points)

    def observe(self, state: PoolState, draw: Draw, grads: Any = None, **more: Any) -> PoolState:
        """Move on by a step, and learn from its gradients, as `isgd_jax.importance_sampler` does."""
        return state._replace(sampler=self.inner.observe(state.sampler, draw, grads, **more))

    def record(self, state: PoolState, ids: Any, scores: Any, **more: Any) -> PoolState:
        """Write scores of points that were measured besides, since the last refresh: it gives places to new points."""
        return state._replace(sampler=self.inner.record(state.sampler, ids, scores, **more))

    def refresh(
        self,
        state: PoolState,
        key: Key | None = None,
        *,
        score: Callable[[Points], Float[Array, " k"]] | None = None,
    ) -> PoolState:
        """Redraw the points whose turn it is, and make the next proposal.

        Args:
            state: of this sampler.
            key: of the new points; by default from the state's seed and version.
            score: ``new points [k, ...] -> scores [k]``, something cheap such as residuals scaled to norms; by default
                a new point begins with the mean score of its cell's points, or of all where none is measured there.

        Raises:
            TypeError: ``score`` is no function.
        """
        if score is not None and not callable(score):
            raise ArgumentTypeError(f"score must be a function of the new points, got a {type(score).__name__}")
        known = state.sampler
        key = own_key(known, known.version) if key is None else key
        # By their number too, so that a key used again, also that of `init`, does not draw the same points again.
        point_key, order_key = jax.random.split(jax.random.fold_in(key, known.proposal.refreshes))
        if self.num_redrawn:
            state = self._redrawn(state, point_key, score)
        return state._replace(sampler=self.inner.refresh(state.sampler, order_key))

    def report(self, state: PoolState) -> Any:
        """What is known of the variance of draws from the pool."""
        return self.inner.report(state.sampler)

    def _redrawn(self, state: PoolState, key: Key, score: Callable[[Points], Array] | None) -> PoolState:
        size, count = self.inner.num_examples, self.num_redrawn
        ids = (state.turn + jnp.arange(count, dtype=jnp.int32)) % size
        fresh = self._drawn(key, count)
        points = jax.tree.map(lambda old, new: old.at[ids].set(new.astype(old.dtype)), state.points, fresh)
        known = self._ordered(points, _forgotten(state.sampler, ids))
        guessed, is_known = self._of_cells(points, known, ids) if score is None else (score(fresh), jnp.asarray(True))
        # Where nothing is known of any point, nothing is guessed: such a version counts as never scored.
        version = jnp.where(is_known, known.version, score_table.NEVER)
        known = self.inner.record(known, ids, guessed, version=version, seconds=known.clock.seconds)
        return PoolState(points, known, (state.turn + count) % size)

    def _ordered(self, points: Points, known: SamplerState) -> SamplerState:
        """The state whose line runs through space as the points lie now; a line of another kind is left alone."""
        if not self.is_by_place:
            return known
        return known._replace(ordering=known.ordering._replace(keys=self._keys(points)))

    def _keys(self, points: Points) -> Int[Array, " n"]:
        """Where each point lies along the curve."""
        at = places.coordinates(points)
        return jnp.zeros(self.inner.num_examples, jnp.int32) if at is None else places.along_hilbert_curve(at)

    def _of_cells(self, points: Points, known: SamplerState, ids: Int[Array, " k"]) -> tuple[Float[Array, " k"], Array]:
        """The mean score of the measured points in each new point's cell, and whether any point is measured."""
        size, at = self.inner.num_examples, self.cells(points)
        measured = (known.table.versions != score_table.NEVER).astype(jnp.float32)
        total = jax.ops.segment_sum(measured * known.table.scores, at, num_segments=size)
        count = jax.ops.segment_sum(measured, at, num_segments=size)
        everywhere = jnp.sum(total) / jnp.maximum(jnp.sum(count), 1.0)
        mean = jnp.where(count > 0.0, total / jnp.maximum(count, 1.0), everywhere)
        return mean[at[ids]], jnp.sum(count) > 0.0

    def _drawn(self, key: Key, count: int) -> Points:
        points = self.draw_points(key, count)
        lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(points)}
        if lengths != {(count,)}:
            raise ArgumentError(
                f"draw_points(key, {count}) must return arrays with leading axis {count}, got leading axes "
                f"{sorted(lengths)}"
            )
        return jax.tree.map(jnp.copy, points)  # the state is donated, and what was drawn may be the caller's own


def _forgotten(state: SamplerState, ids: Int[Array, " k"]) -> SamplerState:
    """The state without what was known of the points that have gone."""
    table = state.table._replace(versions=state.table.versions.at[ids].set(score_table.NEVER))
    known = state.ordering.is_sketched
    if known is None:
        return state._replace(table=table)
    ordering = state.ordering._replace(is_sketched=known.at[ids].set(False))
    return state._replace(table=table, ordering=ordering)
