import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import blobs, linear_loss, linear_problem, small_config

from isgd_jax import evaluate, samplers, scorers, task, variance
from isgd_jax.gradients import stacked_per_example_grads

NUM_EXAMPLES = 40


def law_of(weights: jax.Array) -> samplers.Law:
    return samplers.prepare(weights / weights.sum())


def exact(scores: jax.Array) -> variance.Moments:
    """The three traces from all gradients, by their definitions."""
    params, data = linear_problem(NUM_EXAMPLES)
    grads = stacked_per_example_grads(linear_loss)(params, data)
    rows = np.concatenate([np.asarray(leaf).reshape(NUM_EXAMPLES, -1) for leaf in jax.tree.leaves(grads)], axis=1)
    norms, mean_sq = jnp.linalg.norm(rows, axis=1), float(np.sum(rows.mean(0) ** 2))
    return variance.trace_covariance(variance.moments(norms, scores), mean_sq)


@pytest.mark.slow
@pytest.mark.parametrize("scores", ["uniform", "norms", "wrong"])
def test_the_probe_is_unbiased_whatever_the_law(scores: str, key: jax.Array) -> None:
    params, data = linear_problem(NUM_EXAMPLES)
    norms = scorers.grad_norm(linear_loss)(params, data)
    weights = {
        "uniform": jnp.ones(NUM_EXAMPLES),
        "norms": norms + 0.1 * norms.mean(),
        "wrong": norms[::-1] + 0.3 * norms.mean(),
    }[scores]
    probe = evaluate.make_probe(linear_loss, probe_size=64)
    runs = [probe(params, law_of(weights), data, jax.random.fold_in(key, i)) for i in range(60)]
    for name, truth in exact(weights)._asdict().items():
        seen = np.array([getattr(run, name) for run in runs])
        assert abs(seen.mean() - truth) < 4 * seen.std() / np.sqrt(len(seen)), name


def test_evaluation_is_mean_loss_and_share_of_wrong_answers(tmp_path) -> None:
    dataset = blobs()
    work = task.make(small_config(tmp_path), dataset)
    params = work.init(jax.random.key(0))
    fit = evaluate.make_evaluate(work)(params, dict(dataset.test))
    outputs = jax.vmap(work.logits_fn, (None, 0))(params, dict(dataset.test))
    by_hand = -jax.nn.log_softmax(outputs)[jnp.arange(30), dataset.test["label"]]
    assert float(fit.loss) == pytest.approx(float(by_hand.mean()), rel=1e-5)
    assert float(fit.error) == pytest.approx(float((outputs.argmax(1) != dataset.test["label"]).mean()))
