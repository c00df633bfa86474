import jax
import jax.numpy as jnp
import pytest
from problems import blobs, small_config

from isgd_jax.app import evaluation, task


def test_evaluation_is_mean_loss_and_share_of_wrong_answers(tmp_path) -> None:
    dataset = blobs()
    work = task.make(small_config(tmp_path).model, dataset)
    params = work.init(jax.random.key(0))
    fit = evaluation.make_evaluate(work)(params, dict(dataset.test))
    outputs = jax.vmap(work.logits_fn, (None, 0))(params, dict(dataset.test))
    by_hand = -jax.nn.log_softmax(outputs)[jnp.arange(30), dataset.test["label"]]
    assert float(fit.loss) == pytest.approx(float(by_hand.mean()), rel=1e-5)
    assert float(fit.error) == pytest.approx(float((outputs.argmax(1) != dataset.test["label"]).mean()))
