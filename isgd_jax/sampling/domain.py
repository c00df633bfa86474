"""Importance sampling of a continuous domain: new points at every step, most of them where scores are large.

    domain = isgd.domain_sampler(place, dims=2, batch_size=256)
    state = domain.init()

    draw = domain.sample(key, state, step)
    ...                                        # the gradient at draw.points, each weighted by draw.weights
    state = domain.refresh(key, state, score)  # now and then: a few new points are scored, and the density follows

The domain is a map from the unit cube, so every draw is a point that has not been seen before, and nothing has to be
remembered but a density: it is constant in some hundred boxes of the cube (`isgd_jax.sampling.boxes`), small where
scores are large. A loss of several terms (equation, boundary, initial values) has a sampler for each, with its share of
the batch, and adds their gradients.

Guarantees:

* at any parameters the estimate is unbiased for the mean over the domain, whatever was scored, by what, and when: a
  score that is wrong or old costs variance, never bias;
* points are never drawn twice (but for what rounds to one float32), so what a step leaves of its error the next ones
  average out, as with uniform points (of a pool that serves many steps the error stays until the pool is redrawn);
* places of the draws are spread evenly within a step and over the steps between two refreshes, as the density is;
* no weight is above one over the uniform fraction;
* the state is one pytree of arrays; nothing is read to the host, and all runs inside ``jax.jit``.

Source: ours; the reweighting is the paper's, section 3. Points refined by residual without weights, which changes what
is solved, are the field's custom (Wu et al. 2023, arXiv 2207.10289).
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from isgd_jax.errors import ArgumentError, ArgumentTypeError, check_array, check_whole
from isgd_jax.gradients.meshes import replicated
from isgd_jax.gradients.placement import laid_like
from isgd_jax.sampling.boxes import MOST_BOXES, POINTS_PER_BOX, Boxes, densities, fitted, moved, uniform_boxes
from isgd_jax.sampling.places import quasi_random, wrapped
from isgd_jax.types import Key

__all__ = ["DomainDraw", "DomainReport", "DomainSampler", "DomainState", "domain_sampler"]

Points: TypeAlias = Any
"""Points of the domain: a pytree of arrays with one leading axis."""

SPREAD_UNIFORMLY = 0.5
"""Of the points that a refresh scores: where scores were small, they may have grown."""

_OF_DRAWS, _OF_SCORED = 0, 1
"""What the key is folded with besides the number of refreshes."""


class DomainDraw(NamedTuple):
    """Points, and what makes their mean unbiased: ``target / probs``, as for draws from a list of examples."""

    points: Points
    """Leaves [m, ...]."""
    probs: Float[Array, " m"]
    """Of the box that each lies in."""
    target: Float[Array, " m"]
    """The volume of that box."""

    @property
    def weights(self) -> Float[Array, "*steps m"]:
        """Of each gradient in the mean over the batch [m]: one over the density, 1 on average."""
        return self.target / self.probs


class DomainState(NamedTuple):
    """The density and how it did: made by ``init``, all that the next draw depends on besides key and step."""

    boxes: Boxes
    refreshes: Int[Array, ""]
    drawn: Float[Array, ""]
    """The second moment of a weighted draw from the density before, as the newest points were scored, over that of a
    uniform one; 1 before the second refresh."""
    ideal: Float[Array, ""]
    """The least that any density could have had."""
    unusable: Int[Array, ""]
    """Scores so far that were no finite number of at least 0; they counted as 0."""


class DomainReport(NamedTuple):
    """How much draws save, by the scores; printing it makes a table.

    Second moments are of scores: where these are norms of gradients, of the gradients, which far from the end of a
    training is nearly their variance.
    """

    drawn: Float[Array, ""]
    """Second moment of a weighted draw over that of a uniform one, told by points that the density had not seen."""
    ideal: Float[Array, ""]
    """The same of draws in exact proportion to fresh scores."""
    equivalent_batch: Float[Array, ""]
    """The uniform batch with the second moment of the batches drawn: draws over ``drawn``."""
    refreshes: Int[Array, ""]
    unusable: Int[Array, ""]

    def __str__(self) -> str:
        rows = [
            ("refreshes", f"{int(self.refreshes):,}"),
            ("second moment over uniform's, drawn", f"{float(self.drawn):.4g}"),
            ("second moment over uniform's, ideal", f"{float(self.ideal):.4g}"),
            ("equivalent plain batch", f"{float(self.equivalent_batch):.4g}"),
        ]
        if int(self.unusable):
            rows.append(("scores below 0 or not finite", f"{int(self.unusable):,}"))
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:{width}}  {value}" for label, value in rows)


class DomainSampler(NamedTuple):
    """Pure functions around a `DomainState`. None of them is decorated: jit them where it suits the loop."""

    dims: int
    batch_size: int
    init: Callable[[], DomainState]
    """``init() -> state``: the uniform density."""
    sample: Callable[..., DomainDraw]
    """``sample(key, state, step) -> draw``: changes nothing; one key serves a run (each sampler has its own: of one key
    their places are the same), and many steps may be drawn at once by `jax.vmap` over ``step``."""
    refresh: Callable[..., DomainState]
    """``refresh(key, state, score) -> state``: the density follows ``score(points) -> [k]`` of new points. Scores have
    no gradient."""
    report: Callable[[DomainState], DomainReport]


def domain_sampler(
    place: Callable[[Float[Array, "k dims"]], Points],
    *,
    dims: int,
    batch_size: int,
    num_boxes: int = 128,
    uniform_fraction: float = 0.25,
) -> DomainSampler:
    """Importance sampling of a continuous domain: collocation points, pixels, rays.

    >>> import jax, jax.numpy as jnp
    >>> domain = domain_sampler(lambda unit: 2 * unit - 1, dims=2, batch_size=64)
    >>> key, state = jax.random.key(0), domain.init()
    >>> state = domain.refresh(key, state, lambda points: jnp.exp(-100 * jnp.sum(points**2, axis=1)))
    >>> domain.sample(key, state, 0).points.shape
    (64, 2)

    Args:
        place: ``points of the unit cube [k, dims] -> points of the domain``, a pytree of arrays with leading axis k.
            What the loss is averaged over is what it makes of uniform points: for an integral it keeps volumes in
            proportion (a box by scaling, a triangle or a sphere by their usual maps; for a domain of any shape take its
            bounding box, and a loss and a score of 0 outside: the mean is then over the box). Coordinates are 0 to 1,
            both ends included: once in millions of draws one is 1, so bound what is an index, and keep a logarithm or a
            root off its end.
        dims: of the cube. Boxes must be small along each axis: with three dimensions take more of them, and beyond
            about five they save little.
        batch_size: draws in a step, m. A loss of several terms has a sampler for each, and this is its share.
        num_boxes: of the density, a power of two, at most 2^15. A refresh scores eight new points for each.
        uniform_fraction: share of the draws that is spread uniformly, above 0: no weight is above one over it, and
            nothing that arises where scores were small goes unseen for long. Uniform places have 24 bits along each
            axis, so what has less than some 2^-20 of the mass comes as a multiple of 2^-24 of it, or never: keep it
            above a thousandth.

    Returns:
        The functions, `DomainSampler`.

    Raises:
        TypeError: ``place`` is no function, or a number is of the wrong type.
        ValueError: a number is out of range.
    """
    if not callable(place):
        raise ArgumentTypeError(f"place must be a function of points of the unit cube, got {place!r}")
    dims = check_whole("dims", dims, least=1)
    batch_size = check_whole("batch_size", batch_size, least=1)
    num_boxes = check_whole("num_boxes", num_boxes, least=2)
    if num_boxes > MOST_BOXES:
        raise ArgumentError(f"num_boxes must be at most {MOST_BOXES}, got {num_boxes}")
    if num_boxes & (num_boxes - 1):
        raise ArgumentError(f"num_boxes must be a power of two, got {num_boxes}")
    if not isinstance(uniform_fraction, Real) and not hasattr(uniform_fraction, "dtype"):
        raise ArgumentTypeError(f"uniform_fraction must be a number, got {uniform_fraction!r}")
    if not 0.0 < uniform_fraction <= 1.0:
        raise ArgumentError(f"uniform_fraction must be above 0 and at most 1, got {uniform_fraction!r}")
    made = _Domain(place, dims, batch_size, num_boxes, float(uniform_fraction))
    return DomainSampler(dims, batch_size, made.init, made.sample, made.refresh, made.report)


@dataclass(frozen=True)
class _Domain:
    """The functions of a `DomainSampler`."""

    place: Callable[[Array], Points]
    dims: int
    batch_size: int
    num_boxes: int
    uniform_fraction: float

    def init(self) -> DomainState:
        """The uniform density, of which nothing is known."""
        # Each an array of its own: the state is donated.
        boxes = uniform_boxes(self.num_boxes.bit_length() - 1, self.dims)
        return DomainState(boxes, jnp.int32(0), jnp.float32(1.0), jnp.float32(1.0), jnp.int32(0))

    def sample(self, key: Key, state: DomainState, step: int | Array) -> DomainDraw:
        """The draw of a step: new points.

        Args:
            key: of the run.
            state: of this sampler.
            step: its number; the places of the steps between two refreshes go on from each other.

        Raises:
            TypeError: ``step`` is no whole number, or ``state`` no state.
            ValueError: it is several, or the state is another sampler's.
        """
        state = self._checked(state)
        own = self._own(key, state, _OF_DRAWS)
        first = wrapped("step", step) * jnp.uint32(self.batch_size)
        unit, box = moved(state.boxes, quasi_random(own, self.batch_size, self.dims, first=first))
        return DomainDraw(self._placed(unit), state.boxes.mass[box], state.boxes.volume[box])

    def refresh(self, key: Key, state: DomainState, score: Callable[[Points], Float[Array, " k"]]) -> DomainState:
        """A density in proportion to the scores of new points, half of them uniform, half drawn as the density was.

        Args:
            key: of the run.
            state: of this sampler.
            score: ``points [k, ...] -> sizes [k]``, at least 0: norms of gradients, or something cheaper that is large
                where they are, such as absolute residuals.

        Raises:
            TypeError: ``score`` is no function, its numbers are complex, or ``state`` is no state.
            ValueError: it does not give a number a point, or the state is another sampler's.
        """
        given, state = state, self._checked(state)
        if not callable(score):
            raise ArgumentTypeError(f"score must be a function of new points, got a {type(score).__name__}")
        unit = self._to_score(self._own(key, state, _OF_SCORED), state.boxes)
        density = densities(state.boxes, unit)
        weights = 1.0 / (SPREAD_UNIFORMLY + (1.0 - SPREAD_UNIFORMLY) * density)
        found = score(self._placed(unit))
        check_array("score(points)", found)
        found = replicated(jax.lax.stop_gradient(jnp.asarray(found)))
        if found.shape != (unit.shape[0],):
            raise ArgumentError(f"score(points) must be one number a point, [{unit.shape[0]}], got {found.shape}")
        if jnp.issubdtype(found.dtype, jnp.complexfloating):
            raise ArgumentTypeError(f"score(points) must be real numbers, got {found.dtype}: take their jnp.abs")
        if not jnp.issubdtype(found.dtype, jnp.floating) or jnp.finfo(found.dtype).bits < 32:
            found = found.astype(jnp.float32)
        is_usable = jnp.isfinite(found) & (found >= 0.0)
        scores = jnp.where(is_usable, found, 0.0)
        # Of the largest numbers there are, one over them, which is what XLA divides by, is flushed to zero.
        scores = scores * jnp.where(jnp.max(scores) > 1.0, 2.0**-8, 1.0).astype(scores.dtype)
        largest = jnp.max(scores)
        # In their own type, so that squares stay within float32.
        scores = (scores / jnp.where(largest > 0.0, largest, 1.0)).astype(jnp.float32)
        drawn, ideal = _second_moments(scores, weights, density)
        after = DomainState(
            fitted(unit, scores, weights, uniform_fraction=self.uniform_fraction),
            state.refreshes + 1,
            drawn,
            ideal,
            state.unusable + jnp.sum(~is_usable, dtype=jnp.int32),
        )
        return laid_like(after, given)  # as it came, so that a loop can carry it

    def report(self, state: DomainState) -> DomainReport:
        """How the density did with the newest points."""
        return DomainReport(state.drawn, state.ideal, self.batch_size / state.drawn, state.refreshes, state.unusable)

    def _checked(self, state: DomainState) -> DomainState:
        """The state, whole on each device; refused if it is none, or another sampler's: its boxes would be taken for
        this one's.

        Raises:
            TypeError: it is no state.
            ValueError: it has boxes of another number or of other dimensions.
        """
        if not isinstance(state, DomainState):
            raise ArgumentTypeError(f"state must be what init and refresh give, got a {type(state).__name__}")
        found, wanted = jnp.shape(state.boxes.low), (self.num_boxes, self.dims)
        if found != wanted:
            raise ArgumentError(
                f"state must be this sampler's, with boxes [num_boxes, dims] of {wanted}, got {found}: each sampler "
                "has a state of its own, and several at once go through jax.vmap"
            )
        return jax.tree.map(replicated, state)

    def _own(self, key: Key, state: DomainState, purpose: int) -> Key:
        """A key of its own for what is done between two refreshes: nothing that was learnt from it decides on it."""
        return jax.random.fold_in(jax.random.fold_in(key, state.refreshes), purpose)

    def _to_score(self, key: Key, boxes: Boxes) -> Array:
        """New points of the cube: some spread uniformly, the others as the boxes have it."""
        count = POINTS_PER_BOX * self.num_boxes
        spread = round(SPREAD_UNIFORMLY * count)
        first, second = jax.random.split(key)
        others, _ = moved(boxes, quasi_random(second, count - spread, self.dims))
        return jnp.concatenate([quasi_random(first, spread, self.dims), others])

    def _placed(self, unit: Array) -> Points:
        """Points of the domain.

        Raises:
            ValueError: ``place`` gave another number of points than it was given.
        """
        points = self.place(unit)
        lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(points)}
        if lengths != {unit.shape[:1]}:
            raise ArgumentError(
                f"place must return arrays with leading axis {unit.shape[0]} for as many points, got leading axes "
                f"{sorted(lengths)}"
            )
        return points


def _second_moments(scores: Array, weights: Array, density: Array) -> tuple[Array, Array]:
    """Of a weighted draw by the density and by the ideal one, over that of a uniform draw; 1 where all scores are 0."""
    squares = weights * jnp.square(scores)
    uniform, total = jnp.sum(squares), jnp.sum(weights)
    drawn = jnp.sum(squares / density)
    ideal = jnp.square(jnp.sum(weights * scores)) / total
    is_known = uniform > 0.0
    over = jnp.where(is_known, uniform, 1.0)
    return jnp.where(is_known, drawn / over, 1.0), jnp.where(is_known, ideal / over, 1.0)
