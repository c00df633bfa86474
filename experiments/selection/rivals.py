"""The methods that importance sampling is compared with, and ours, as `selection.contest.Method`s.

Orders without replacement (uniform, rs2, grab) are told in `selection.orders`, pruning (prune, repb, orderdp, seta) in
`selection.pruning`. Here:

larger     uniform with batches twice as large (and so half as many steps)
subset     uniform on a random half of the data, fixed at the start
presample  Katharopoulos & Fleuret 2018 (arXiv 1803.00942): score three batches by the bound from the logits, draw one,
           reweight; shut while the promised speed-up is below what it costs
ranks      Loshchilov & Hutter 2015 (arXiv 1511.06343): probability falls exponentially with the rank of the latest
           known loss, from 100 : 1 down to 1 : 1 over training, without reweighting
rho        RHO-LOSS, Mindermann et al. 2022 (arXiv 2206.07137): of four batches the one with the largest loss in excess
           of the irreducible loss, from models trained on the other half of the data. Theirs takes one of ten, which
           costs more here, where scoring is paid for
ours       importance sampling: stratified draws from a calibrated proposal (mixture 0.1) behind the gate; what is
           drawn is scored with the update, and a tenth of all every 50 steps besides
ours-free  the same without the tenth: nothing is scored but what is drawn
ours-apart  ours-free with a key of each step's own: steps independent of one another, and not spread evenly
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import isgd_jax as isgd
from isgd_jax.engines import scorers
from isgd_jax.sampling import candidates
from selection import orders, pruning
from selection.contest import FORWARD, NORMS, Choice, Method, Problem
from selection.orders import Epochs, new_epochs, next_batch

__all__ = ["METHODS", "drawn_by", "ours", "presampling", "ranking", "rho_loss"]

Tree = Any
Array = jax.Array

CANDIDATES = 3
"""Batches that presampling scores for one update."""
RHO_CANDIDATES, RHO_EPOCHS, RHO_RATE = 4, 3, 0.02
PRESSURE = 100.0
SWEEP_BATCH = 1024
ORDER_EVERY = 8
"""Refreshes of ours between two sorts of all examples: by label first, an older order is as good."""


class Presampling(NamedTuple):
    epochs: Epochs
    speedup: Array
    is_open: Array


def presampling(problem: Problem) -> Method:
    """Katharopoulos & Fleuret's algorithm 1, with the library's `presample`."""
    size, num_candidates = problem.batch_size, CANDIDATES * problem.batch_size
    score = scorers.logit_bound(problem.logits_fn, lambda logits, e: -jax.nn.log_softmax(logits)[e["y"]])
    worth = 1.0 + num_candidates * FORWARD / size  # the larger uniform batch that costs as much

    def start(key: Array, data: Tree) -> tuple[Presampling, float]:
        epochs = new_epochs(key, jnp.arange(problem.num_examples))
        return Presampling(epochs, jnp.float32(1.0), jnp.asarray(False)), 0.0

    def choose(key: Array, memory: Presampling, params: Tree, data: Tree, progress: Array) -> tuple[Choice, Any]:
        draw_key, epoch_key = jax.random.split(key)

        def open_() -> tuple[Choice, Epochs, Array]:
            indices, epochs = next_batch(epoch_key, memory.epochs, num_candidates)
            scores = score(params, jax.tree.map(lambda leaf: leaf[indices], data))
            draw = candidates.resample(draw_key, scores, num_draws=size)
            weights = 1.0 / (num_candidates * draw.probs)
            cost = jnp.float32(num_candidates * FORWARD)
            return Choice(indices[draw.indices], weights, cost), epochs, candidates.speedup(scores)

        def shut() -> tuple[Choice, Epochs, Array]:
            indices, epochs = next_batch(epoch_key, memory.epochs, size)
            return Choice(indices, jnp.ones(size), jnp.float32(0.0)), epochs, memory.speedup

        choice, epochs, found = jax.lax.cond(memory.is_open, open_, shut)
        return choice, memory._replace(epochs=epochs, speedup=0.9 * memory.speedup + 0.1 * found)

    def learn(memory: Presampling, choice: Choice, losses: Array, norms: None, step: Array) -> Presampling:
        # While shut, scores come from the losses for nothing: 2 (1 - exp(-loss)) is the L1 norm of the same slope.
        found = 0.9 * memory.speedup + 0.1 * candidates.speedup(1.0 - jnp.exp(-losses))
        speedup = jnp.where(memory.is_open, memory.speedup, found)
        return memory._replace(speedup=speedup, is_open=speedup > worth)

    return Method(start, choose, learn)


class Ranking(NamedTuple):
    losses: Array
    order: Array
    """Examples by falling loss."""


def ranking(problem: Problem) -> Method:
    """Online batch selection by ranks of the latest known losses, sorted anew twice an epoch."""
    size, num_examples = problem.batch_size, problem.num_examples

    def start(key: Array, data: Tree) -> tuple[Ranking, float]:
        return Ranking(jnp.full(num_examples, jnp.inf), jax.random.permutation(key, num_examples)), 0.0

    def choose(key: Array, memory: Ranking, params: Tree, data: Tree, progress: Array) -> tuple[Choice, Ranking]:
        decay = (1.0 - jnp.clip(progress, 0.0, 1.0)) * jnp.log(PRESSURE) + 1e-6
        # The inverse of the distribution function of a rank r/N with density proportional to exp(-decay r/N).
        place = -jnp.log1p(-jax.random.uniform(key, (size,)) * -jnp.expm1(-decay)) / decay
        ranks = jnp.minimum((place * num_examples).astype(jnp.int32), num_examples - 1)
        return Choice(memory.order[ranks], jnp.ones(size), 0.0), memory

    def learn(memory: Ranking, choice: Choice, losses: Array, norms: None, step: Array) -> Ranking:
        return memory._replace(losses=memory.losses.at[choice.indices].set(losses))

    def refresh(key: Array, memory: Ranking, params: Tree, data: Tree, step: Array) -> tuple[Ranking, float]:
        tie_breaker = jax.random.permutation(key, num_examples)
        return memory._replace(order=jnp.lexsort((tie_breaker, -memory.losses))), 0.0

    return Method(start, choose, learn, refresh, refresh_every=max(1, num_examples // (2 * size)))


class Reducible(NamedTuple):
    epochs: Epochs
    irreducible: Array


def rho_loss(problem: Problem) -> Method:
    """Reducible holdout loss, with two irreducible-loss models, each trained on the half that the other one judges."""
    size, num_candidates = problem.batch_size, RHO_CANDIDATES * problem.batch_size
    half = problem.num_examples // 2
    tx = optax.sgd(RHO_RATE, momentum=0.9, nesterov=True)
    all_losses = jax.vmap(problem.loss_fn, (None, 0))

    def judge(key: Array, data: Tree, indices: Array) -> Tree:
        """A model trained for a few epochs on some of the examples."""
        params = problem.init(key)
        steps = RHO_EPOCHS * (len(indices) // size)

        def body(state: tuple[Tree, Tree, Epochs], step_key: Array) -> tuple[Any, None]:
            params, opt_state, epochs = state
            chosen, epochs = next_batch(step_key, epochs, size)
            batch = jax.tree.map(lambda leaf: leaf[chosen], data)
            grad = jax.grad(lambda p: jnp.mean(all_losses(p, batch)))(params)
            updates, opt_state = tx.update(grad, opt_state)
            return (optax.apply_updates(params, updates), opt_state, epochs), None

        state = (params, tx.init(params), new_epochs(key, indices))
        return jax.lax.scan(body, state, jax.random.split(key, steps))[0][0]

    def start(key: Array, data: Tree) -> tuple[Reducible, float]:
        order = jax.random.permutation(key, problem.num_examples)
        halves = order[:half], order[half:]
        irreducible = jnp.zeros(problem.num_examples)
        for i, (learnt, judged) in enumerate((halves, halves[::-1])):
            params = judge(jax.random.fold_in(key, i), data, learnt)
            losses = _by_slices(lambda p, e: problem.loss_fn(p, e), params, data, judged)
            irreducible = irreducible.at[judged].set(losses)
        cost = problem.num_examples * (RHO_EPOCHS + FORWARD)
        return Reducible(new_epochs(key, order), irreducible), cost

    def choose(key: Array, memory: Reducible, params: Tree, data: Tree, progress: Array) -> tuple[Choice, Reducible]:
        candidates, epochs = next_batch(key, memory.epochs, num_candidates)
        losses = all_losses(params, jax.tree.map(lambda leaf: leaf[candidates], data))
        _, best = jax.lax.top_k(losses - memory.irreducible[candidates], size)
        choice = Choice(candidates[best], jnp.ones(size), num_candidates * FORWARD)
        return choice, memory._replace(epochs=epochs)

    return Method(start, choose)


class Sampled(NamedTuple):
    key: Array
    """Of all draws of the run."""
    state: Any
    draws: isgd.Draw
    """Of all steps until the next refresh, stacked: made one by one they take a twentieth of so small a step."""
    place: Array
    """Of the next one among them."""


def ours(problem: Problem, *, sweep: float, every: int, mixture: float = 0.1, apart: bool = False) -> Method:
    """Importance sampling: every so many steps a share ``sweep`` is scored; what is drawn scores itself besides."""
    fixed = {"order": problem.train["y"], "order_every": ORDER_EVERY, "learning_steps": 0, "monitor": False}
    size = problem.num_examples
    sampler = isgd.importance_sampler(size, batch_size=problem.batch_size, uniform_fraction=mixture, **fixed)
    return drawn_by(sampler, problem, sweep=sweep, every=every, apart=apart)


def drawn_by(sampler: Any, problem: Problem, *, every: int, sweep: float = 0.0, apart: bool = False) -> Method:
    """Batches of a sampler, which learns the norms of what is drawn.

    Args:
        sampler: made by `isgd_jax.importance_sampler`.
        problem: what is learnt.
        every: steps between two refreshes.
        sweep: the part of all examples that is scored at each of them besides.
        apart: whether steps draw independently of each other; else one key serves the run.
    """
    size, swept = problem.num_examples, round(sweep * problem.num_examples)

    def drawn(key: Array, state: Any) -> Sampled:
        def one(ahead: Array) -> isgd.Draw:
            own = jax.random.fold_in(key, state.clock.step + ahead) if apart else key
            return sampler.sample(own, state, ahead=ahead)

        return Sampled(key, state, jax.vmap(one)(jnp.arange(every)), jnp.int32(0))

    def start(key: Array, data: Tree) -> tuple[Sampled, float]:
        return drawn(key, sampler.init(key)), 0.0

    def choose(key: Array, memory: Sampled, params: Tree, data: Tree, progress: Array) -> tuple[Choice, Sampled]:
        draw = jax.tree.map(lambda leaf: leaf[memory.place], memory.draws)
        return Choice(draw.indices, draw.target / draw.probs, 0.0, draw), memory

    def learn(memory: Sampled, choice: Choice, losses: Array, norms: Array, step: Array) -> Sampled:
        state = sampler.observe(memory.state, choice.draw, norms=norms)
        return memory._replace(state=state, place=memory.place + 1)

    def refresh(key: Array, memory: Sampled, params: Tree, data: Tree, step: Array) -> tuple[Sampled, float]:
        state, at = memory.state, (step // every * swept + jnp.arange(swept)) % size
        if swept:
            state = sampler.record(state, at, _sweep(problem, params, data, at), version=step)
        return drawn(memory.key, sampler.refresh(state)), NORMS * swept

    return Method(start, choose, learn, refresh, refresh_every=every, measure=_norms)


def _norms(memory: Tree, grads: Any, mean: Tree) -> Array:
    return isgd.norms(grads)


def _sweep(problem: Problem, params: Tree, data: Tree, indices: Array) -> Array:
    """The exact norms of some examples, a thousand at a time."""
    score = scorers.grad_norm(problem.loss_fn)
    count = -(-len(indices) // SWEEP_BATCH)
    padded = jnp.pad(indices, (0, count * SWEEP_BATCH - len(indices)), mode="edge").reshape(count, SWEEP_BATCH)
    norms = jax.lax.map(lambda some: score(params, jax.tree.map(lambda leaf: leaf[some], data)), padded)
    return norms.reshape(-1)[: len(indices)]


def _by_slices(one: Callable[[Tree, Tree], Array], params: Tree, data: Tree, indices: Array) -> Array:
    batch = jax.tree.map(lambda leaf: leaf[indices], data)
    return jax.lax.map(lambda example: one(params, example), batch, batch_size=min(SWEEP_BATCH, len(indices)))


METHODS: dict[str, Callable[[Problem], Method]] = {
    "uniform": orders.uniform,
    "rs2": orders.rs2,
    "larger": lambda problem: orders.uniform(problem, batches=2),
    "subset": lambda problem: orders.uniform(problem, share=0.5),
    "presample": presampling,
    "prune": pruning.infobatch,
    "repb": pruning.repb,
    "orderdp": pruning.orderdp,
    "seta": pruning.seta,
    "ranks": ranking,
    "rho": rho_loss,
    "grab": orders.grab,
    "ours": lambda problem: ours(problem, sweep=0.1, every=50),
    "ours-free": lambda problem: ours(problem, sweep=0.0, every=50),
    "ours-apart": lambda problem: ours(problem, sweep=0.0, every=50, apart=True),
}
