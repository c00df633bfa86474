"""Trains on both ways from where a model stands, for as long: what no figure of variance can tell.

Less variance is fewer steps only where noise is what slows training down, so the probe tries it. From the same
parameters and optimizer state go plain SGD, in shuffled epochs, and training by importance sampling, which scores what
it draws. Examples are scored once before, which is not counted: a run that has drawn by scores until here would know as
much. Both have their updates scaled down to zero by a cosine, as if training ended here: what is compared is then what
was learnt, not how noisy the last rate was. Plain SGD makes as many steps as take the same time.

Source: ours.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from isgd_jax.app.probe import measure
from isgd_jax.app.probe.verdict import Trial
from isgd_jax.engines.scorers import grad_norm
from isgd_jax.gradients.captured import CapturingJit
from isgd_jax.sampling.estimator import importance_sampler
from isgd_jax.sampling.plain import shuffled_epochs
from isgd_jax.sampling.state import BatchSampler, SamplerState
from isgd_jax.training.train_step import TrainState, make_steps
from isgd_jax.types import Batch, Key, Params

__all__ = ["KEYS", "steps_in_time", "try_both"]

KEYS = 3
"""How often both ways are tried, each time with other draws."""

MOST_SECONDS, FEWEST_STEPS = 60.0, 50
"""Of a trial by default: as many steps as fit in the time, but not fewer."""
REFRESH_EVERY = 100
"""Steps between two refreshes, as `isgd_jax.fit` has them."""
MOST_SCORED = 20.0
"""Seconds that examples are scored for before."""


def fading(steps: int) -> optax.GradientTransformation:
    """Updates scaled down to zero by a cosine over so many steps; stands last in a chain."""
    share = optax.cosine_decay_schedule(1.0, steps)
    return optax.scale_by_schedule(lambda count: share(jnp.float32(count)))  # Optax mixes types, which may be refused


def steps_in_time(asked: int | None, before: int, costs: measure.Costs) -> int:
    """Steps of a trial by importance sampling: those asked for; by default those made before, if there is time."""
    if asked is not None:
        return asked
    in_time = round(MOST_SECONDS / (2 * KEYS * max(costs.reweighted_update, 1e-9)))
    return min(max(before, FEWEST_STEPS), max(in_time, FEWEST_STEPS))


def try_both(
    probed: measure.Probed,
    params: Params,
    opt_state: Any | None,
    *,
    sample: Batch,
    steps: int,
    costs: measure.Costs,
    key: Key,
) -> Trial:
    """Train on both ways, `KEYS` times each.

    Args:
        probed: what is trained, and how.
        params: the first; they are not changed.
        opt_state: of the chain at these parameters; None begins anew.
        sample: examples [n, ...] whose mean loss is compared.
        steps: by importance sampling.
        costs: of a step of each way, which say how many plain steps take as long.
        key: of the draws.
    """
    plain_steps = max(1, round(steps * costs.reweighted_update / costs.update))
    num_examples = probed.problem.num_examples
    ours = importance_sampler(num_examples, batch_size=probed.batch_size)
    plain = shuffled_epochs(num_examples, batch_size=probed.batch_size, monitor=False)
    scores = _scored(probed, params, round(MOST_SCORED / max(costs.score_example, 1e-9)), key)

    def knowing(key: Key) -> SamplerState:
        return ours.record(ours.init(key), *scores, version=0)

    measured = probed.problem.evaluator(batch_size=measure.CHUNK)  # compiled once for all that are tried

    def mean_loss(params: Params) -> float:
        return float(measured(params, sample)["loss"])

    keys, start = list(jax.random.split(key, KEYS)), (params, opt_state)
    found = [
        _losses(probed, sampler, (*start, init), mean_loss=mean_loss, steps=count, keys=keys)
        for sampler, init, count in ((ours, knowing, steps), (plain, plain.init, plain_steps))
    ]
    return Trial(steps, plain_steps, *found)


def _scored(probed: measure.Probed, params: Params, most: int, key: Key) -> tuple[jax.Array, jax.Array]:
    """Examples in random order, all or so many, in whole chunks, and their norms."""
    problem, size = probed.problem, min(probed.chunk_size, probed.problem.num_examples)
    chunks = max(1, min(most, problem.num_examples) // size)
    ids = jax.random.permutation(key, problem.num_examples)[: chunks * size]
    score, data = CapturingJit(grad_norm(problem.loss_fn)), jax.device_put(problem.train)
    norms = [score(params, jax.tree.map(lambda x, part=part: x[part], data)) for part in ids.reshape(chunks, size)]
    return ids, jnp.concatenate(norms)


def _losses(
    probed: measure.Probed,
    sampler: BatchSampler,
    start: tuple[Params, Any, Callable[[Key], SamplerState]],
    *,
    mean_loss: Callable[[Params], float],
    steps: int,
    keys: Sequence[Key],
) -> tuple[float, ...]:
    """The mean loss after so many steps, for each key."""
    params, opt_state, init = start
    own = measure.Steps(probed).tx
    fade = fading(steps)
    tx = optax.chain(own, fade)
    advance = make_steps(probed.problem, sampler, tx).step
    refresh, data = jax.jit(sampler.refresh, donate_argnums=0), jax.device_put(probed.problem.train)
    begun = (own.init(params) if opt_state is None else opt_state, fade.init(params))
    losses = []
    for key in keys:
        # A step takes over the state that it is given.
        state = jax.tree.map(jnp.copy, TrainState(params, begun, init(key)))
        for at in range(steps):
            if at % REFRESH_EVERY == 0:
                state = state._replace(sampler=refresh(state.sampler))
            state, info = advance(state, None, data, key, jnp.float32(0.0))
            if at % measure.STEPS_IN_FLIGHT == 0:
                jax.block_until_ready(info.loss)
        losses.append(mean_loss(state.params))
    return tuple(loss if np.isfinite(loss) else float("inf") for loss in losses)
