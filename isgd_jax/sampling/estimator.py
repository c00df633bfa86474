"""The importance sampler: which examples the next step learns from, and what their gradients teach about the next ones.

    sampler = isgd.importance_sampler(num_examples, batch_size=128)
    state = sampler.init()

    draw = sampler.sample(key, state)                # indices, probs, target
    ...                                              # gradients of these examples, an update weighted by target / probs
    state = sampler.observe(state, draw, grads)      # fresh norms: scores, and what proposals are worth
    state = sampler.refresh(state)                   # now and then: the next proposal

Guarantees:

* the estimate sum(target / probs * gradient) / m is unbiased over the key for any state, whatever the scores: ``probs``
  are those that the indices were really drawn with, and all are positive;
* ``sample`` changes nothing: the same key and state give the same draw, and ``ahead=k`` gives the draw that the k-th
  step from now would make with the same proposal and the same verdict of the gate;
* one key serves a whole run. Over it each draw is distributed as one of a fresh key; stratified and systematic draws of
  one key are besides spread evenly over the steps between two refreshes, as the batches of a shuffled epoch are (ours:
  a Kronecker sequence in each stratum). At each refresh, and where the gate moves, the sequences begin anew, so that no
  draw knows of those that its proposal was learnt from. Who wants the steps independent of one another, as the paper
  has them, folds the step into the key;
* what draws teach (calibration, uniform fraction, gate, monitor) is estimated without bias from their own
  probabilities, before their fresh scores take the place of the old ones;
* no function reads a value to the host: all run inside ``jax.jit``, ``lax.scan``, ``jax.pmap`` and on a mesh;
* with ``monitor=False`` nothing is drawn in halves and nothing is estimated from halves;
* ``costs`` and the allocation of ``groups`` change what is drawn, never what is estimated; shares of groups change
  ``draw.target``.

Source: the paper, section 4, for scores, staleness and the additive constant; the rest is told where it stands
(`calibration`, `fractions`, `clusters`, `costs`, `groups`; `variance.gate`, `variance.monitor`).
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int, Integer

from isgd_jax.errors import ArgumentError
from isgd_jax.sampling import (
    allocation,
    drawing,
    evidence,
    fractions,
    gates,
    ordering,
    renewal,
    report,
    score_table,
)
from isgd_jax.sampling import costs as cost
from isgd_jax.sampling.groups import Groups, as_groups
from isgd_jax.sampling.options import (
    GradientSketch,
    Options,
    OrderName,
    SamplerName,
    check_options,
    expected_draws,
    is_poisson,
    order_keys,
)
from isgd_jax.sampling.placement import taking_split
from isgd_jax.sampling.state import (
    FORMAT,
    BatchSampler,
    Examples,
    SamplerState,
    advanced,
    blank_clock,
    check_clock,
    check_sizes,
    check_state,
    key_data,
    on_mesh,
    step_ahead,
)
from isgd_jax.types import Draw, Key, Params, Sampler

__all__ = ["ImportanceSampler", "importance_sampler"]


def importance_sampler(
    num_examples: int,
    *,
    batch_size: int,
    sampler: SamplerName | Sampler = "stratified",
    order: OrderName | GradientSketch | Array | np.ndarray = "score",
    order_every: int = 1,
    uniform_fraction: float | Literal["auto"] = "auto",
    calibrate: bool = True,
    learning_steps: int | None = None,
    gate: bool = True,
    monitor: bool = True,
    additive: float = 0.0,
    max_age: int | None = None,
    max_age_seconds: float | None = None,
    min_trusted: float = 0.1,
    example_weights: Float[Array | np.ndarray, " n"] | None = None,
    score_memory: float = 0.0,
    record_drawn: bool = True,
    steps_per_update: int = 1,
    costs: Float[Array | np.ndarray, " n"] | None = None,
    groups: Groups | Int[Array | np.ndarray, " n"] | None = None,
) -> BatchSampler:
    """Draws examples in proportion to what is known of the norms of their gradients.

    Args:
        num_examples: of the training set, N.
        batch_size: draws in a step, m.
        sampler: how indices are drawn. "stratified": one in each of m equal parts of the line of probabilities;
            "systematic": equal steps along it; "independent": the paper's; "without_replacement"; "poisson": a random
            number of draws, with ``draw.mask`` (expected are 0.1 m of 8, 0.6 m of 128); or a function of one's own,
            ``(key, law, *, num_draws) -> Draw``.
        order: along which the line runs, in each group by itself, so that neighbours have similar gradients. "score";
            "index" (groups as they lie); an array [n],
            such as labels, to order by it and then by score; or a `GradientSketch`
            (`isgd_jax.gradients.sketches.last_layer_sketch`) to order by clusters of gradients' directions.
        order_every: a new order is made at every so many refreshes: it is a sort of all examples.
        uniform_fraction: share of the uniform distribution in the proposal, 0 to 1; no weight is larger than one over
            it. "auto": the share that the draws show to be best so far, 0.3 until they show anything.
        calibrate: draw by what old scores have turned out to be worth, sqrt(E[norm² | score, age]).
        learning_steps: versions before calibrated scores are used; None is two periods between refreshes. Give two
            sweeps of the data where scores come from workers in turn.
        gate: draw uniformly, along the same order, while the scores do harm.
        monitor: estimate the variance of uniform, present and ideal draws from the draws of training.
        additive: a constant added to each score, the paper's smoothing.
        max_age: versions after which a score counts as the mean of those trusted.
        max_age_seconds: the same by the caller's clock; ``observe`` and ``record`` then need ``seconds=``, counted from
            the start of the run.
        min_trusted: the share of trusted scores below which draws are uniform.
        example_weights: a_n [n] of the target sum(a_n g_n), which may be negative; None for the mean of all gradients.
            They come back as ``draw.target``.
        score_memory: share of the old mean square that a score keeps when a fresh one comes, for augmented examples.
        record_drawn: whether ``observe`` writes fresh norms (or ``scores=``) of the drawn examples into the table.
        steps_per_update: calls of ``observe`` that make one parameter update, as with ``optax.MultiSteps``.
        costs: of a draw of each example [n], above 0, such as tokens: draws then have the least variance per unit of
            cost, q ∝ score / √cost, and the report tells it.
        groups: an id for each example [n], or `Groups`: shares of the target and of the draws, and a report of each.

    Returns:
        The functions, `BatchSampler`.

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: a number is out of range, or an array has not one entry an example.
    """
    given = locals() | {"groups": as_groups(groups)}
    options = Options(**{field.name: given[field.name] for field in dataclasses.fields(Options)})
    num_examples, batch_size = check_sizes(num_examples, batch_size)
    options = check_options(options, num_examples, batch_size)
    made = ImportanceSampler(num_examples, batch_size, options)
    return made.functions(is_scored=True)


@dataclass(frozen=True)
class ImportanceSampler:
    """The functions of an importance sampler; they share nothing but its options."""

    num_examples: int
    batch_size: int
    options: Options

    def functions(self, **more: Any) -> BatchSampler:
        """The methods as they are handed out.

        Args:
            more: further fields of `BatchSampler`, such as ``is_scored`` or presampling's two steps.
        """
        filled = expected_draws(self.options, self.batch_size) / self.batch_size
        reported = report.make_report(
            self._check_state, self._scores_are_used, self.batch_size, groups=self.options.groups, filled=filled
        )
        sketch = _sketch_of(self.options)
        more |= {"steps_per_update": self.options.steps_per_update, "learns": self._learns}
        more |= {"sketch": None if sketch is None else sketch.of_grads}
        more |= {"max_age_seconds": self.options.max_age_seconds}
        return BatchSampler(
            self.num_examples,
            self.batch_size,
            self.init,
            taking_split(self.sample),
            taking_split(self.observe),
            taking_split(self.record),
            taking_split(self.refresh),
            taking_split(reported),
            **more,
        )

    @property
    def _learns(self) -> bool:
        """Whether fresh norms go anywhere: into the table, or into what is estimated from them."""
        options = self.options
        is_learnt = options.calibrate or options.gate or options.monitor or options.record_drawn
        return is_learnt or isinstance(options.uniform_fraction, str) or options.groups is not None

    def init(self, key: Key | None = None) -> SamplerState:
        """The state before the first step: nothing scored, all examples alike.

        Args:
            key: what epochs and k-means fold theirs from; by default of seed 0.

        Returns:
            The state, in buffers of its own: it can be donated. It is made by one program, compiled once a sampler.
        """
        with jax.transfer_guard("allow"):
            return self._compiled_init(key, _arrays(self.options))

    @functools.cached_property
    def _compiled_init(self) -> Callable[..., SamplerState]:
        return jax.jit(self._initial)

    def _initial(self, key: Key | None, arrays: "_Arrays") -> SamplerState:
        """What `init` compiles; arrays are arguments, since a program would hold them as constants."""
        # Inside a caller's jit they are constants again: without the barrier XLA sorts them while it compiles, which
        # takes it seconds for each ten thousand.
        arrays = lax.optimization_barrier(arrays)
        options, size = self.options, self.num_examples
        blank = evidence.blank(options.calibrate, options.gate, options.monitor, self.batch_size)
        is_learnt, sketch = isinstance(options.uniform_fraction, str), _sketch_of(options)
        state = SamplerState(
            format=jnp.int32(FORMAT),
            key_data=key_data(key),
            clock=blank_clock(),
            table=score_table.create(size),
            quarantined=jnp.int32(0),
            proposal=renewal.blank(options, size),
            ordering=ordering.create(size, arrays.keys, sketch),
            examples=Examples(
                None if arrays.weights is None else on_mesh(arrays.weights),
                None if arrays.costs is None else cost.create(on_mesh(arrays.costs)),
                self._blank_groups(arrays.ids),
            ),
            fractions=fractions.create() if is_learnt else None,
            **blank,
        )
        state = self.refresh(state)  # the first proposal, and what it is expected to cost and to allocate
        state = state._replace(proposal=state.proposal._replace(refreshes=jnp.int32(0)))
        return jax.tree.map(jnp.copy, state)  # no two leaves share a buffer, so the whole can be donated

    def sample(
        self, key: Key, state: SamplerState, *, params: Params = None, data: Any = None, ahead: int | Array = 0
    ) -> Draw:
        """The draw of this step, or of the step ``ahead`` from now, from the proposal in use.

        Args:
            key: of the whole run: the state knows the step. A key of each step's own makes the draws of different
                steps independent, instead of spread evenly.
            state: of this sampler.
            params: not needed; so that all samplers are called alike.
            data: not needed.
            ahead: steps since the last ``observe``, for draws made before their turn.

        Returns:
            The draw with its target, the version of the parameters it is for, and whether its halves are independent. A
            random number of draws (poisson) comes in m places, of which ``mask`` is false on the empty ones.

        Raises:
            ValueError: ``ahead`` is negative, or the state is of another run or format.
        """
        del params, data
        self._check_state(state)
        step = step_ahead(state, ahead)
        draw = drawing.drawn(self.options, self.batch_size, key, state, step)
        return draw._replace(
            target=self._target(state, draw.indices, step), version=step // self.options.steps_per_update
        )

    def observe(
        self,
        state: SamplerState,
        draw: Draw,
        grads: Params = None,
        *,
        norms: Float[Array, " m"] | None = None,
        halves: tuple[Params, Params] | None = None,
        scores: Float[Array, " m"] | None = None,
        sketches: Float[Array, "m dims"] | None = None,
        seconds: float | Float[Array, ""] | None = None,
        axis_name: str | None = None,
    ) -> SamplerState:
        """Move on by a step, and learn from its gradients.

        Args:
            state: of this sampler.
            draw: as ``sample`` gave it: the whole of it, also on a device that handled a part.
            grads: per-example gradients of the draw, lazy or stacked; on several devices, of this device's part.
            norms: their norms [m], if they are known already. Norms alone teach everything but what needs the mean
                gradient: the monitor then has second moments, and no variances.
            halves: beside ``norms``, two trees whose average is the weighted mean gradient of the draw, of its first
                ``m // 2`` gradients and of the others (`isgd_jax.value_norms_and_mean`): all that the monitor needs.
            scores: what the table gets in place of the norms, such as losses.
            sketches: of the gradients [m, dims], where the order is made of sketches and ``grads`` are not given.
            seconds: the caller's clock, where scores are distrusted by it; from the start of the run, since float32
                holds few digits.
            axis_name: of the devices that each handle a part of the draw (`share`).

        Without gradients and norms the state only moves on.

        Raises:
            ValueError: the shapes do not fit the draw, ``max_age_seconds`` was given and ``seconds`` is not, or is not
                finite or too large for it in float32, ``halves`` came with ``grads``, without norms, or with
                ``axis_name``, or sketches that no order wants.
        """
        self._check_state(state)
        self._check_seconds(seconds)
        evidence.check_halves(halves, grads, norms, axis_name)
        found = evidence.norms_of(draw, grads, norms, scores, axis_name=axis_name)
        if found.norms is not None:
            unit = None if state.examples.groups is None else self._unit(state, draw.indices)
            state = evidence.learnt(state, draw, found.norms, unit)
            if state.monitor is not None:
                watched = evidence.monitored(
                    state.monitor,
                    self.num_examples,
                    draw,
                    grads,
                    found.norms,
                    halves=halves,
                    proposal_weights=evidence.single(state, draw) if is_poisson(self.options) else None,
                    axis_name=axis_name,
                )
                state = state._replace(monitor=watched)
        if self.options.record_drawn and found.scores is not None:
            at = evidence.places(state, draw)
            sketches = self._sketched(grads, axis_name) if sketches is None else evidence.gathered(sketches, axis_name)
            state = self._written(state, at, found.scores, state.version, sketches, seconds)
        moved = advanced(state.clock, steps_per_update=self.options.steps_per_update, seconds=seconds)
        return state._replace(clock=moved)

    def record(
        self,
        state: SamplerState,
        ids: Integer[Array | np.ndarray, " c"],
        scores: Float[Array | np.ndarray, " k"],
        *,
        version: int | Int[Array, ""],
        sketches: Float[Array | np.ndarray, "..."] | None = None,
        seconds: float | Float[Array, ""] | None = None,
    ) -> SamplerState:
        """Write scores that were measured besides, with the parameters of ``version``.

        A score that is not finite, or negative, is counted in ``state.quarantined`` and not written; one older than
        what is there is dropped, with its sketch. Nor is a sketch written that is not finite.

        Args:
            state: of this sampler.
            ids: the examples [c], of any width. Those outside 0..n-1 are padding.
            scores: one for each of the ids [c], in the unit of the others: norms, or anything in proportion to them.
            version: parameter updates made when they were measured, as ``state.version`` counts.
            sketches: [c, dims], where the order is made of sketches.
            seconds: as for ``observe``: counted from the start of the run.

        Raises:
            TypeError: ``ids`` or ``version`` are no whole numbers.
            ValueError: ``max_age_seconds`` was given and ``seconds`` is not, or is not finite or too large for it in
                float32, ``version`` is negative, the shapes do not fit, or sketches came that no order wants.
        """
        self._check_state(state)
        self._check_seconds(seconds)
        ids, scores = jnp.asarray(score_table.as_ids(ids, self.num_examples)), jnp.asarray(scores)
        if ids.ndim != 1 or scores.shape != ids.shape:
            raise ArgumentError(
                f"expected one score for each of the ids [c], got shapes {scores.shape} and {ids.shape}"
            )
        state = self._written(state, ids, scores, version, sketches, seconds)
        if seconds is None:
            return state
        return state._replace(clock=state.clock._replace(seconds=jnp.asarray(seconds, jnp.float32)))

    def refresh(self, state: SamplerState, key: Key | None = None) -> SamplerState:
        """The state with a proposal made of all that is known: scores, calibration, uniform fraction, costs and groups.

        O(n), or O(n log n) where a new order is due. Draws made before and observed after stay unbiased, since each
        carries its own ``probs``.

        Args:
            state: of this sampler; donate it.
            key: of the start of the clusters; by default it comes from the state's seed and version.

        Raises:
            ValueError: the state is of another run or format.
        """
        self._check_state(state)
        return renewal.renewed(state, self.options, self.batch_size, key)

    def _target(self, state: SamplerState, indices: Int[Array, " m"], step: Int[Array, ""]) -> Float[Array, " m"]:
        """The factor [m] of each drawn gradient in what is estimated at a step."""
        shares = None if self.options.groups is None else allocation.shares_at(self.options.groups, step)
        unit = self._unit(state, indices)
        return (
            unit
            if shares is None or state.examples.groups is None
            else unit * shares[state.examples.groups.ids[indices]]
        )

    def _unit(self, state: SamplerState, indices: Int[Array, " m"]) -> Float[Array, " m"]:
        """The same but for the share of the group: a_n, 1/N, or one over the size of the group."""
        if state.examples.target is not None:
            return state.examples.target[indices]
        if state.examples.groups is None or self.options.groups is None or self.options.groups.shares is None:
            return jnp.full(indices.shape, 1.0 / self.num_examples, jnp.float32)
        return (1.0 / jnp.maximum(state.examples.groups.sizes, 1.0))[state.examples.groups.ids[indices]]

    def _blank_groups(self, ids: Array | np.ndarray | None) -> allocation.GroupState | None:
        if ids is None or self.options.groups is None:
            return None
        return allocation.create(on_mesh(ids), self.options.groups.num_groups)

    def _scores_are_used(self, state: SamplerState) -> Bool[Array, ""]:
        """Whether draws are made by score now."""
        return gates.is_open(state)

    def _sketched(self, grads: Params, axis_name: str | None) -> Float[Array, "m dims"] | None:
        sketch = _sketch_of(self.options)
        if sketch is None or grads is None:
            return None
        return evidence.gathered(sketch.of_grads(grads), axis_name)

    def _written(
        self,
        state: SamplerState,
        ids: Int[Array, " c"],
        scores: Float[Array, " c"],
        version: int | Int[Array, ""],
        sketches: Float[Array | np.ndarray, "..."] | None,
        seconds: float | Array | None,
    ) -> SamplerState:
        now = state.clock.seconds if seconds is None else seconds
        known, bad = score_table.record(
            state.table, ids, scores, version=version, seconds=now, memory=self.options.score_memory
        )
        if sketches is not None:
            state = state._replace(ordering=ordering.with_sketches(state, ids, jnp.asarray(sketches), version))
        return state._replace(table=known, quarantined=state.quarantined + bad)

    def _check_state(self, state: SamplerState) -> None:
        """Refuse a state that was made for something else: what examples count for, cost and belong to lies in it.

        Raises:
            TypeError: it is no state.
            ValueError: it is of another format, or of a sampler with other arguments.
        """
        check_state(state, self.num_examples)
        known, options = state.examples, self.options
        pairs = (
            ("example_weights", known.target, options.example_weights),
            ("costs", known.costs, options.costs),
            ("groups", known.groups, options.groups),
        )
        for name, made, given in pairs:
            if (made is None) != (given is None):
                were, are = ("without", "with") if made is None else ("with", "without")
                raise ArgumentError(f"the state was made {were} {name}, this sampler {are}: begin with its own init()")
        if known.groups is not None and options.groups is not None:
            count = known.groups.sizes.shape[0]
            if count != options.groups.num_groups:
                raise ArgumentError(
                    f"the state is of {count} groups, this sampler of {options.groups.num_groups}: begin with its own "
                    "init()"
                )

    def _check_seconds(self, seconds: float | Array | None) -> None:
        if self.options.max_age_seconds is not None and seconds is None:
            raise ArgumentError("max_age_seconds distrusts scores by the clock: pass seconds= to observe and record")
        check_clock(seconds, self.options.max_age_seconds)


class _Arrays(NamedTuple):
    """The arrays among the options: what the line is ordered by first, and one number or id for each example."""

    keys: np.ndarray | None
    weights: Array | np.ndarray | None
    costs: Array | np.ndarray | None
    ids: Array | np.ndarray | None


def _arrays(options: Options) -> _Arrays:
    weights, costs, groups = options.example_weights, options.costs, options.groups
    return _Arrays(
        order_keys(options),
        None if weights is None else weights.astype(np.float32),
        None if costs is None else costs.astype(np.float32),
        None if groups is None else groups.ids.astype(np.int32),
    )


def _sketch_of(options: Options) -> GradientSketch | None:
    return options.order if isinstance(options.order, GradientSketch) else None
