"""The ablations: every configuration is a right one, and the tables come out at the tiniest scale."""

from pathlib import Path

import ablations
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_transformer

import isgd_jax as isgd
from isgd_jax.app import data, models


def tiny() -> tuple[data.Dataset, ablations.Scale]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    images = (rng.normal(size=(90, 8, 8, 1)) + labels[:, None, None, None]).astype(np.float32)
    arrays = {"image": images, "label": labels.astype(np.int32)}
    made = data.from_arrays(arrays, arrays, valid={name: x[:20] for name, x in arrays.items()}, name="digits")
    return made, ablations.SCALES["digits", "tiny"]


@pytest.mark.parametrize("group", ablations.GROUPS)
def test_an_arm_differs_from_uniform_in_the_sampling_alone(group: str) -> None:
    arms, pairs = ablations.arms_of(group, *tiny())
    assert [pair.label for pair in pairs] == list(ablations.GROUPS[group])
    for pair in pairs:
        ours, base = arms[pair.arm].config.flat(), arms[pair.base].config.flat()
        assert base["mode"] == "uniform" != ours["mode"]
        for name in ablations.KEPT_BY_UNIFORM:
            assert ours[name] == base[name]
    assert len({pair.arm for pair in pairs}) == len(pairs)


def test_one_name_is_one_configuration() -> None:
    """Groups share their runs, so the folder's name must tell everything that was changed."""
    known: dict[str, object] = {}
    for group in ablations.GROUPS:
        for name, arm in ablations.arms_of(group, *tiny())[0].items():
            assert known.setdefault(name, arm.config) == arm.config


@pytest.mark.slow
def test_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablations, "GROUPS", {"scorer": {"loss": {"scorer": "loss"}}})
    command = ["--dataset", "digits", "--scale", "tiny", "--seeds", "1", "--groups", "scorer"]
    ablations.main([*command, "--folder", str(tmp_path), "--data-dir", str(tmp_path / "data")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "scorer"
    assert lines[2].split()[0] == "arm"
    assert lines[3].split()[0] == "loss"
    assert lines[3].split()[-1] in ("0/1", "1/1")


@pytest.mark.slow
def test_the_small_transformer_is_factored(key: jax.Array) -> None:
    images = jax.random.normal(key, (4, 8, 8, 1))
    model = small_transformer.factory(3)
    params = models.init(model, key, images[0], num_classes=3)

    def loss_fn(params: object, image: jax.Array) -> jax.Array:
        return -jax.nn.log_softmax(model.apply({"params": params}, image))[0]

    @jax.jit
    def norms(params: object, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        stacked = isgd.stacked_per_example_grads(loss_fn)(params, images)
        flat = jnp.concatenate([leaf.reshape(4, -1) for leaf in jax.tree.leaves(stacked)], axis=1)
        return isgd.norms(isgd.per_example_grads(loss_fn)(params, images)), jnp.linalg.norm(flat, axis=1)

    np.testing.assert_allclose(*norms(params, images), rtol=1e-4)
