"""From a configuration to the parts of a run: what only the command can ask for."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import blobs, small_config

from isgd_jax.app.run import fit
from isgd_jax.app.run_dir import RunDir
from isgd_jax.engines import scorers
from isgd_jax.sampling import samplers
from isgd_jax.types import Draw

CALLS: list[str] = []


def by_halves(key: jax.Array, law: Any, /, *, num_draws: int) -> Draw:
    """Half the draws by the law, half uniform: each index with its own expected count."""
    CALLS.append("sampler")
    first = samplers.independent(key, law, num_draws=num_draws // 2)
    second = samplers.uniform(jax.random.fold_in(key, 1), law, num_draws=num_draws - num_draws // 2)
    indices = jnp.concatenate([first.indices, second.indices])
    share = (num_draws // 2) / num_draws
    probs = share * samplers.probabilities_of(law, indices) + (1 - share) / law.masses.shape[0]
    return Draw(indices, probs, jnp.ones(num_draws, bool))


def squared_loss(loss_fn: Any) -> Any:
    """A scorer of one's own, made of the loss."""
    CALLS.append("scorer")
    plain = scorers.loss(loss_fn)
    return lambda params, batch: jnp.square(plain(params, batch))


def test_a_sampler_and_a_scorer_of_ones_own_are_used(tmp_path: Path) -> None:
    CALLS.clear()
    config = small_config(
        tmp_path / "run", steps=40, sampler="test_build:by_halves", scorer="test_build:squared_loss", gate="off"
    )
    found = fit(config, dataset=blobs())
    assert {"sampler", "scorer"} <= set(CALLS)
    lines = list(RunDir(found.run_dir).records("progress"))
    assert lines[-1]["test_loss"] < 0.9 * lines[0]["test_loss"]
    assert np.isfinite(lines[-1]["sd_stale"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampler": "best"},
            "--sampler must be one of auto, stratified, .* in exact mode, or pkg.module:fn; got 'best'",
        ),
        (
            {"sampler": "a:b", "mode": "uniform"},
            "--sampler must be one of auto, shuffled, uniform in uniform mode; got",
        ),
        ({"scorer": "best"}, "--scorer must be one of grad_norm, loss, logit_bound, or pkg.module:fn; got 'best'"),
    ],
)
def test_a_name_that_is_none_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(tmp_path / "run", **changes)
