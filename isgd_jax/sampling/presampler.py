"""Importance sampling without a table: each step scores many candidates and learns from few.

    sampler = isgd.presampling(num_examples, batch_size=128, scorer=isgd.scorers.logit_bound(logits_fn))
    draw = sampler.sample(key, state, params=params, data=data)

Where the data stay on the host it is two steps, with the scoring between them:

    found = sampler.candidates(key, state)
    draw = sampler.resample(key, state, found, scorer(params, batch_of(found.indices)))

The gate is the source's: while the scores promise less than they cost, the batch is drawn uniformly from the
candidates, which are then not scored; the scores of what is drawn still tell what scoring would promise.

Guarantees:

* the gradient's mean is that of the candidates, and theirs that of the data: unbiased, whatever the scores; one that is
  negative or not finite counts as the mean of the others;
* while the gate is shut, what scores promise is told by those of a half-batch, so it is no more than their number: with
  batches of a few examples the gate is slow to open, and errs towards plain draws;
* the two halves of a batch come from candidates of their own, so they are independent.

Source: Katharopoulos & Fleuret, "Not all samples are created equal" (2018), algorithm 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from isgd_jax.errors import ArgumentError, ArgumentTypeError, check_whole
from isgd_jax.gradients.placement import rows_of
from isgd_jax.gradients.weights import check_example_weights
from isgd_jax.sampling import candidates, samplers
from isgd_jax.sampling.drawing import in_halves
from isgd_jax.sampling.estimator import ImportanceSampler
from isgd_jax.sampling.options import Options, check_fraction, check_number, check_ranges
from isgd_jax.sampling.placement import taking_split
from isgd_jax.sampling.plain import _Still
from isgd_jax.sampling.state import BatchSampler, SamplerState, SpeedupGate, check_sizes, step_ahead
from isgd_jax.types import Batch, Draw, Key, Params, Scorer, Scores

__all__ = ["presampling"]

KEPT = 0.9
"""The share of the expected speed-up that is kept at each step: it is a mean over the last dozen."""


def presampling(
    num_examples: int,
    *,
    batch_size: int,
    scorer: Scorer | None = None,
    candidates: int = 4,
    uniform_fraction: float = 0.1,
    gate: bool = True,
    score_cost: float = 1.0,
    monitor: bool = True,
    example_weights: Float[Array | np.ndarray, " n"] | None = None,
    steps_per_update: int = 1,
) -> BatchSampler:
    """Draws ``batch_size`` of ``candidates`` times as many uniform draws, by scores at the present parameters.

    Args:
        num_examples: of the training set, N.
        batch_size: draws in a step.
        scorer: ``(params, batch) -> scores [b]``, or ``(params, frozen, batch)`` where ``sample`` is given frozen
            arrays, as by `isgd_jax.fit` of a problem that has some; None where `candidates` and `resample` are called
            with scores of one's own.
        candidates: scored for each draw. Where half a batch has more of them than there are examples, draws are spread
            over several, so that no probability is above 1.
        uniform_fraction: share of uniform draws among the candidates.
        gate: score only while the scores promise more than they cost.
        score_cost: of one score, in forward passes.
        monitor: estimate the variance of the draws.
        example_weights: a_n [n] of the target sum(a_n g_n).
        steps_per_update: calls of ``observe`` that make one parameter update.

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: a number is out of range, or an array has not one entry an example.
    """
    num_examples, batch_size = check_sizes(num_examples, batch_size)
    check_example_weights(example_weights, num_examples)
    check_number(uniform_fraction)
    check_fraction(uniform_fraction, 0.0)
    candidates = check_whole("candidates", candidates, least=1)
    if not 0.0 <= score_cost < math.inf:
        raise ArgumentError(f"score_cost must be 0 or more forward passes, got {score_cost}")
    options = Options(
        sampler="uniform",
        order="index",
        uniform_fraction=uniform_fraction,
        calibrate=False,
        gate=False,
        monitor=monitor,
        example_weights=example_weights,
        record_drawn=False,
        steps_per_update=steps_per_update,
    )
    made = _Presampling(num_examples, batch_size, check_ranges(options), scorer, candidates, gate, score_cost)
    return made.functions(candidates=taking_split(made.candidates), resample=taking_split(made.resample))


@dataclass(frozen=True)
class _Presampling(_Still):
    scorer: Scorer | None
    each: int
    is_gated: bool
    score_cost: float

    def init(self, key: Key | None = None) -> SamplerState:
        """The state before any candidate is scored: a batch promised to be worth itself."""
        return ImportanceSampler.init(self, key)._replace(gate=SpeedupGate(jnp.ones((), jnp.float32)))

    def candidates(self, key: Key, state: SamplerState, *, ahead: int | Array = 0) -> Draw:
        """The candidates of a step, uniform draws; their ``indices`` are to be scored.

        Args:
            key: of the whole run: the state knows the step.
            state: of this sampler.
            ahead: steps since the last ``observe``, for draws made before their turn.
        """
        self._check_state(state)
        take, *_ = _keys(key, state, ahead)
        return samplers.uniform(take, state.proposal.law, num_draws=self.each * self.batch_size)

    def resample(
        self,
        key: Key,
        state: SamplerState,
        candidates: Draw,
        scores: Float[Array, " c"],
        *,
        ahead: int | Array = 0,
    ) -> Draw:
        """The draw of a step among its candidates, by their scores.

        Args:
            key: that of ``candidates``.
            state: of this sampler.
            candidates: as `candidates` drew them.
            scores: one [c] for each, of its gradient: ``example_weights`` come on top. One that is negative or not
                finite counts as the mean of the others.
            ahead: steps since the last ``observe``, for draws made before their turn.

        Raises:
            ValueError: there is not one score for each candidate.
        """
        if scores.shape != candidates.indices.shape:
            raise ArgumentError(f"expected {candidates.indices.shape[0]} scores, one a candidate; got {scores.shape}")
        scores = self._weighted(state, scores, candidates.indices)
        parts = []
        for pick, part, size in self._halves(_keys(key, state, ahead), candidates):
            own = scores[part.start : part.start + part.draw.indices.shape[0]]
            parts.append(self._by_score(pick, own, part.draw, size))
        return self._joined(state, parts, ahead)

    def sample(
        self,
        key: Key,
        state: SamplerState,
        *,
        params: Params = None,
        data: Any = None,
        frozen: Any = None,
        ahead: int | Array = 0,
    ) -> Draw:
        """The draw of this step.

        Args:
            key: of the whole run: the state knows the step.
            state: of this sampler.
            params: to score with.
            data: the training set, of which the candidates are taken.
            frozen: arrays that the scorer needs besides; None where it takes none.
            ahead: steps since the last ``observe``.

        Raises:
            TypeError: there is no scorer, or no ``params`` and ``data`` to score with.
            ValueError: the data are not of N examples, or the scorer does not give one score a candidate.
        """
        if self.scorer is None or params is None or data is None:
            raise ArgumentTypeError(
                "presampling scores candidates at each step: give presampling(scorer=...) and sample(params=..., "
                "data=...), or call candidates() and resample() with scores of your own"
            )
        self._check_data(data)
        found, pays = self.candidates(key, state, ahead=ahead), self._scores_are_used(state)
        scored = partial(self._scored, partial(self.scorer, *_given(params, frozen)), state, data)
        parts = [
            self._chosen(scored, pick, part.draw, pays, size)
            for pick, part, size in self._halves(_keys(key, state, ahead), found)
        ]
        return self._joined(state, parts, ahead)

    def observe(self, state: SamplerState, draw: Draw, grads: Params = None, **given: Any) -> SamplerState:
        """As `ImportanceSampler.observe`; the larger batch that the candidates promised moves the gate."""
        after = super().observe(state, draw, grads, **given)
        if draw.expected_speedup is None:
            return after
        mean = KEPT * _expected_speedup(state) + (1.0 - KEPT) * draw.expected_speedup
        return after._replace(gate=SpeedupGate(mean))

    def _check_data(self, data: Any) -> None:
        """Refuse data of fewer or more examples: look-ups beyond the last row give the last row.

        Raises:
            ValueError: a leaf has not one row an example.
        """
        for leaf in jax.tree.leaves(data):
            if jnp.shape(leaf)[:1] != (self.num_examples,):
                raise ArgumentError(
                    f"data must be arrays with leading axis {self.num_examples}, one row for each example of this "
                    f"sampler; got shape {jnp.shape(leaf)}"
                )

    def _scores_are_used(self, state: SamplerState) -> Array:
        """Whether candidates are scored now; scores of the caller's own always are."""
        if self.scorer is None or not self.is_gated:
            return jnp.asarray(True)
        return candidates.pays(_expected_speedup(state), candidates=self.each, score_cost=self.score_cost)

    def _halves(self, keys: Array, found: Draw) -> list[tuple[Key, "_Part", int]]:
        """The key, the candidates and the size of each half-batch."""
        _, *picks = keys
        cut = self.batch_size // 2
        halves = zip(picks, (0, cut), (cut, self.batch_size - cut), strict=True)
        return [(pick, _part(found, self.each, start, size), size) for pick, start, size in halves if size]

    def _scored(
        self, score: Callable[[Batch], Scores], state: SamplerState, data: Batch, indices: Array
    ) -> Float[Array, " c"]:
        """Scores of examples, with the weights of the target.

        Raises:
            ValueError: the scorer does not give one score an example.
        """
        found = score(jax.tree.map(lambda x: rows_of(x, indices), data))
        if jnp.shape(found) != indices.shape:  # longer ones would be drawn from, and the mean be another
            raise ArgumentError(
                f"presampling's scorer must give one score an example: expected {list(indices.shape)}, got "
                f"{list(jnp.shape(found))}"
            )
        return self._weighted(state, found.astype(jnp.float32), indices)

    def _weighted(self, state: SamplerState, scores: Float[Array, " c"], indices: Array) -> Float[Array, " c"]:
        """Scores of gradients as those of what is averaged, N |a| times as large."""
        target = state.examples.target
        return scores if target is None else scores * (self.num_examples * jnp.abs(target[indices]))

    def _chosen(
        self, scored: Callable[[Array], Scores], key: Key, found: Draw, pays: Array, size: int
    ) -> tuple[Draw, Float[Array, ""]]:
        """Draws of one half, by score if that pays."""
        count = found.indices.shape[0]

        def by_chance() -> tuple[Draw, Array]:
            draw = samplers.uniform(key, jnp.ones(count, jnp.float32), num_draws=size)
            taken = found.indices[draw.indices]
            return _drawn_from(found, draw), candidates.speedup(scored(taken))

        return lax.cond(pays, lambda: self._by_score(key, scored(found.indices), found, size), by_chance)

    def _by_score(self, key: Key, scores: Float[Array, " c"], found: Draw, size: int) -> tuple[Draw, Float[Array, ""]]:
        """Draws of one half. Where it has more candidates than examples, no probability comes out above 1."""
        spread, mixture = max(1.0, scores.shape[0] / self.num_examples), self.options.uniform_fraction
        assert not isinstance(mixture, str)
        draw = candidates.resample(key, scores, num_draws=size, mixture=mixture, spread=spread)
        return _drawn_from(found, draw), candidates.speedup(scores)

    def _joined(self, state: SamplerState, parts: list[tuple[Draw, Array]], ahead: int | Array) -> Draw:
        draw, speedups = jax.tree.map(lambda *both: jnp.concatenate([jnp.atleast_1d(x) for x in both]), *parts)
        step, target = step_ahead(state, ahead), state.examples.target
        size = self.num_examples
        return draw._replace(
            target=jnp.full(draw.probs.shape, 1.0 / size, jnp.float32) if target is None else target[draw.indices],
            version=step // self.options.steps_per_update,
            in_halves=in_halves(self.options, self.batch_size, step),
            expected_speedup=jnp.mean(speedups),
        )


@dataclass(frozen=True)
class _Part:
    """Some of the candidates, and where they begin."""

    draw: Draw
    start: int


def _part(found: Draw, each: int, start: int, size: int) -> _Part:
    return _Part(jax.tree.map(lambda x: x[each * start : each * (start + size)], found), each * start)


def _given(params: Params, frozen: Any) -> tuple[Any, ...]:
    """What a scorer is called with before the batch."""
    return (params,) if frozen is None else (params, frozen)


def _keys(key: Key, state: SamplerState, ahead: int | Array) -> Array:
    """Of the candidates of a step, and of the draws of its two halves."""
    return jax.random.split(jax.random.fold_in(key, step_ahead(state, ahead)), 3)


def _expected_speedup(state: SamplerState) -> Float[Array, ""]:
    assert isinstance(state.gate, SpeedupGate)
    return state.gate.expected_speedup


def _drawn_from(found: Draw, draw: Draw) -> Draw:
    """The draw in terms of examples, so that 1/(N probs) is 1/(candidates * its own probs)."""
    probs = found.indices.shape[0] * draw.probs * found.probs[draw.indices]
    return Draw(found.indices[draw.indices], probs, draw.mask)
