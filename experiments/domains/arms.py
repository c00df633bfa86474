"""How points are chosen: ours, and what the field does.

Unbiased for the integral of the loss over the domain:

* ``uniform``: new uniform points at every step;
* ``sobol``: the points of one scrambled Sobol sequence in turn (of a list of pixels: shuffled epochs);
* ``ours``: `isgd_jax.domain_sampler`, new points at every step, of a density that follows the residual's size as a few
  points have shown it at most `REFRESH` plain batches ago;
* ``ours_norms``: the same by the norms of gradients;
* ``edges``: photographs alone, pixels drawn once and for all in proportion to the size of their color's slope.

Not unbiased, they train another loss on purpose:

* ``rad``: every 1,000 steps new points, drawn from 10,000 in proportion to |r| / mean |r| + 1, and batches of these
  (Wu et al. 2023, arXiv 2207.10289, with k = 1, c = 1);
* ``rar_d``: uniform points, to which every 1,000 steps a twentieth as many are added, drawn so (k = 2, c = 0);
* ``r3``: at every step points of the batch whose residual is above the batch's mean stay, the others are drawn anew
  (Daw et al. 2023, arXiv 2207.02338);
* ``soft_mining``: photographs alone; points move by Langevin steps on |r|, a tenth is drawn anew, and losses are
  divided by |r|^0.6 (Kheradmand et al. 2024, arXiv 2312.00075).

``lbfgs`` is uniform points and Adam for half of the steps, then L-BFGS on a fixed pool (Raissi et al. 2019's way).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import isgd_jax as isgd
from domains.problems import Domain, Term, loss_of

__all__ = ["ARMS", "Arm", "arm"]

Array = jax.Array
Memory = Any
REFRESH, BOXES, UNIFORM = 25, 128, 0.25
"""Of the densities: plain batches between two refreshes, boxes, and the share that is spread uniformly."""
RESAMPLE = 1_000
"""Steps between two times that ``rad`` and ``rar_d`` change their points."""
SOBOL = 1 << 17
"""Points of the sequence, after which it begins again, in another scrambling."""


@dataclass(frozen=True)
class Arm:
    """How the points of each term are chosen: pure functions around a memory of the arm's own."""

    domain: Domain
    larger: float = 1
    """Batches are so many times a plain one."""

    @property
    def refresh_every(self) -> int:
        """Steps between two calls of ``refresh``; 0 is never."""
        return 0

    def size(self, term: Term) -> int:
        """Points of a batch."""
        return round(term.batch * self.larger)

    def init(self, key: Array) -> Memory:
        """What is remembered before the first step."""
        return ()

    def refresh(self, params: Any, memory: Memory, key: Array) -> Memory:
        """What is done now and then."""
        return memory

    def points(self, params: Any, memory: Memory, key: Array, name: str, step: Array) -> tuple[Array, Array | None]:
        """Points of a term, and their weights in the mean; None for ones."""
        term = self.domain.terms[name]
        return term.draw(key, self.size(term)), None

    def learn(self, memory: Memory, name: str, points: Array, residuals: Array, key: Array) -> Memory:
        """What is remembered of the residuals at the points of a step."""
        return memory

    def gradient(self, params: Any, memory: Memory, key: Array, step: Array) -> tuple[Any, Memory]:
        """The gradient of a step: by default the ordinary one of the weighted mean loss."""
        keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(self.domain.terms)}
        chosen = {name: self.points(params, memory, own, name, step) for name, own in keys.items()}

        def loss(params: Any) -> tuple[Array, dict[str, Array]]:
            total, sizes = jnp.zeros(()), {}
            for name, (points, weights) in chosen.items():
                term = self.domain.terms[name]
                found = jax.vmap(term.residual, (None, 0))(params, points)
                squares = jnp.square(found) if found.ndim == 1 else jnp.sum(jnp.square(found), axis=-1)
                sizes[name] = jnp.sqrt(squares)
                weights = self.weights(weights, sizes[name])
                total += term.weight * jnp.mean(squares if weights is None else weights * squares)
            return total, sizes

        gradient, sizes = jax.grad(loss, has_aux=True)(params)
        for name, (points, _) in chosen.items():
            memory = self.learn(memory, name, points, sizes[name], jax.random.fold_in(keys[name], 1))
        return gradient, memory

    def weights(self, weights: Array | None, sizes: Array) -> Array | None:
        """The weights in the mean, once residuals are known."""
        return weights

    def size_of_residual(self, params: Any, term: Term, points: Array) -> Array:
        """|residual| at points [k]."""
        found = jax.vmap(term.residual, (None, 0))(params, points)
        return jnp.abs(found) if found.ndim == 1 else jnp.linalg.norm(found, axis=-1)


class Sobol(Arm):
    """A sequence in turn; of a finite list, epochs."""

    def init(self, key: Array) -> Memory:
        memory = {}
        for i, (name, term) in enumerate(self.domain.terms.items()):
            own = jax.random.fold_in(key, i)
            if term.all_points is None:
                from scipy.stats import qmc

                seed = int(jax.random.randint(own, (), 0, 2**31 - 1))
                unit = qmc.Sobol(term.dims, rng=np.random.default_rng(seed)).random(SOBOL)
                memory[name] = term.place(jnp.asarray(unit, jnp.float32))
            else:
                memory[name] = jax.random.permutation(own, term.all_points)
        return memory

    def points(self, params: Any, memory: Memory, key: Array, name: str, step: Array) -> tuple[Array, None]:
        count = self.size(self.domain.terms[name])
        at = (step * count + jnp.arange(count)) % len(memory[name])
        return memory[name][at], None


class Fitted(NamedTuple):
    key: Array
    """Of the run."""
    states: dict[str, isgd.DomainState]
    draws: dict[str, isgd.DomainDraw]
    """Of each term, of all steps until the next refresh [steps, m, ...]: to draw them at once is cheaper."""


class Ours(Arm):
    """Points of a density that follows the residuals, weighted by one over it."""

    @property
    def refresh_every(self) -> int:
        """A refresh scores as many points at any batch: of small ones, more steps pass between two."""
        return round(REFRESH * max(1.0, 1 / self.larger))

    def sampler(self, name: str) -> isgd.DomainSampler:
        """Of a term."""
        term = self.domain.terms[name]
        return isgd.domain_sampler(
            term.spread, dims=term.dims, batch_size=self.size(term), num_boxes=BOXES, uniform_fraction=UNIFORM
        )

    def init(self, key: Array) -> Fitted:
        states = {name: self.sampler(name).init() for name in self.domain.terms}
        return Fitted(key, states, self._draws(key, states))

    def refresh(self, params: Any, memory: Fitted, key: Array) -> Fitted:
        after = {}
        for i, (name, state) in enumerate(memory.states.items()):
            score = functools.partial(self.scores, params, self.domain.terms[name])
            after[name] = self.sampler(name).refresh(jax.random.fold_in(memory.key, i), state, score)
        return Fitted(memory.key, after, self._draws(memory.key, after))

    def scores(self, params: Any, term: Term, points: Array) -> Array:
        """What new points [k] are drawn in proportion to."""
        return self.size_of_residual(params, term, points)

    def points(self, params: Any, memory: Fitted, key: Array, name: str, step: Array) -> tuple[Array, Array]:
        draw = memory.draws[name]
        at = step % self.refresh_every
        return draw.points[at], draw.weights[at]

    def _draws(self, key: Array, states: dict[str, isgd.DomainState]) -> dict[str, isgd.DomainDraw]:
        return {
            name: jax.vmap(functools.partial(self.sampler(name).sample, jax.random.fold_in(key, i), state))(
                jnp.arange(self.refresh_every)
            )
            for i, (name, state) in enumerate(states.items())
        }


class OursByNorms(Ours):
    """The same by the norms of gradients."""

    def scores(self, params: Any, term: Term, points: Array) -> Array:
        return isgd.norms(isgd.per_example_grads(loss_of(term))(params, points))


class Rad(Arm):
    """Batches of points that are drawn by residual now and then."""

    power, constant, candidates = 1.0, 1.0, 10_000

    @property
    def refresh_every(self) -> int:
        """By steps, as published."""
        return RESAMPLE

    def init(self, key: Array) -> Memory:
        return {
            name: term.draw(jax.random.fold_in(key, i), term.kept)
            for i, (name, term) in enumerate(self.domain.terms.items())
        }

    def chosen(self, params: Any, term: Term, key: Array, count: int) -> Array:
        """Points drawn by residual."""
        candidate_key, draw_key = jax.random.split(key)
        points = term.draw(candidate_key, self.candidates)
        sizes = self.size_of_residual(params, term, points) ** self.power
        probs = sizes / jnp.mean(sizes) + self.constant
        return points[jax.random.choice(draw_key, self.candidates, (count,), replace=False, p=probs / jnp.sum(probs))]

    def refresh(self, params: Any, memory: Memory, key: Array) -> Memory:
        return {
            name: self.chosen(params, term, jax.random.fold_in(key, i), term.kept)
            for i, (name, term) in enumerate(self.domain.terms.items())
        }

    def points(self, params: Any, memory: Memory, key: Array, name: str, step: Array) -> tuple[Array, None]:
        term = self.domain.terms[name]
        return memory[name][jax.random.randint(key, (self.size(term),), 0, len(memory[name]))], None


class RarD(Rad):
    """Uniform points, and a few more by residual now and then, up to twice as many."""

    power, constant = 2.0, 0.0

    def init(self, key: Array) -> Memory:
        return jnp.int32(0), {
            name: term.draw(jax.random.fold_in(key, i), 2 * term.kept)
            for i, (name, term) in enumerate(self.domain.terms.items())
        }

    def refresh(self, params: Any, memory: Memory, key: Array) -> Memory:
        added, points = memory
        after = {}
        for i, (name, term) in enumerate(self.domain.terms.items()):
            few = term.kept // 20
            at = term.kept + (added * few + jnp.arange(few)) % term.kept
            after[name] = points[name].at[at].set(self.chosen(params, term, jax.random.fold_in(key, i), few))
        return added + 1, after

    def points(self, params: Any, memory: Memory, key: Array, name: str, step: Array) -> tuple[Array, None]:
        added, points = memory
        term = self.domain.terms[name]
        known = jnp.minimum(term.kept + added * (term.kept // 20), 2 * term.kept)
        return points[name][jax.random.randint(key, (self.size(term),), 0, known)], None


class R3(Arm):
    """What is hard stays, the rest is drawn anew."""

    def init(self, key: Array) -> Memory:
        return {
            name: term.draw(jax.random.fold_in(key, i), self.size(term))
            for i, (name, term) in enumerate(self.domain.terms.items())
        }

    def points(self, params: Any, memory: Memory, key: Array, name: str, step: Array) -> tuple[Array, None]:
        return memory[name], None

    def learn(self, memory: Memory, name: str, points: Array, residuals: Array, key: Array) -> Memory:
        fresh = self.domain.terms[name].draw(key, len(points))
        stays = residuals > jnp.mean(residuals)
        return {**memory, name: jnp.where(stays[:, None], points, fresh)}


class Edges(Arm):
    """Pixels where the picture changes, weighted so that the loss stays the picture's."""

    def init(self, key: Array) -> Memory:
        image = self.domain.truth
        slopes = np.gradient(image, axis=(0, 1))
        size = np.sqrt(sum(np.sum(slope**2, axis=-1) for slope in slopes)).ravel()
        probs = 0.9 * size / size.sum() + 0.1 / size.size
        return jnp.asarray(np.cumsum(probs), jnp.float32), jnp.asarray(probs, jnp.float32)

    def points(self, params: Any, memory: Memory, key: Array, name: str, step: Array) -> tuple[Array, Array]:
        sums, probs = memory
        term = self.domain.terms[name]
        at = jnp.searchsorted(sums, jax.random.uniform(key, (self.size(term),)) * sums[-1])
        at = jnp.minimum(at, len(probs) - 1)
        assert term.all_points is not None
        return term.all_points[at], 1 / (len(probs) * probs[at])


class SoftMining(R3):
    """Points that walk uphill on the residual."""

    power, uphill, noise, anew = 0.6, 2.0, 0.01, 0.1

    def weights(self, weights: Array | None, sizes: Array) -> Array:
        known = jax.lax.stop_gradient(sizes) + 1e-4
        soft = known**-self.power
        return soft / jnp.mean(soft)

    def gradient(self, params: Any, memory: Memory, key: Array, step: Array) -> tuple[Any, Memory]:
        gradient, _ = super().gradient(params, memory, key, step)
        after = {}
        for i, (name, term) in enumerate(self.domain.terms.items()):
            walk, new, which = jax.random.split(jax.random.fold_in(key, 100 + i), 3)
            points = memory[name]
            # The picture's own slope is not known between pixels; the network's is, as in the paper's code.
            slope = jax.vmap(jax.grad(lambda p, term=term: jnp.log(self._size(params, term, p) + 1e-4)))(points)
            pixel = 2 / max(self.domain.truth.shape)
            moved = points + pixel**2 * self.uphill * slope + self.noise * jax.random.normal(walk, points.shape)
            inside = jnp.all(jnp.abs(moved) <= jnp.max(jnp.abs(term.all_points), axis=0), axis=1)
            fresh = ~inside | (jax.random.uniform(which, inside.shape) < self.anew)
            after[name] = jnp.where(fresh[:, None], term.draw(new, len(points)), moved)
        return gradient, after

    def _size(self, params: Any, term: Term, point: Array) -> Array:
        return jnp.sum(jnp.abs(term.residual(params, point)))


class Lbfgs(Arm):
    """Uniform points; the race ends it by L-BFGS."""


ARMS: dict[str, Callable[..., Arm]] = {
    "uniform": Arm,
    "sobol": Sobol,
    "rad": Rad,
    "rar_d": RarD,
    "r3": R3,
    "ours": Ours,
    "ours_norms": OursByNorms,
    "lbfgs": Lbfgs,
    "edges": Edges,
    "soft_mining": SoftMining,
}


def arm(name: str, domain: Domain, larger: float = 1) -> Arm:
    """An arm by its name."""
    return ARMS[name](domain, larger)


def lbfgs() -> optax.GradientTransformationExtraArgs:
    """As it ends ``lbfgs``."""
    return optax.lbfgs(memory_size=20, linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=20))
