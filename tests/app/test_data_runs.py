"""Runs on more than classifiers with one input, and what a run keeps of its inputs."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from problems import NUM_CLASSES, blobs, small_config

from isgd_jax.app import build, data, models, task
from isgd_jax.app.run import fit


class Reader(nn.Module):
    """Tokens and a table -> two numbers."""

    @nn.compact
    def __call__(self, x: dict[str, Array]) -> Array:
        words = nn.Embed(11, 4)(x["tokens"]).mean(0)
        return nn.Dense(2)(jnp.concatenate([words, nn.Dense(3)(x["table"])]))


def squared_error(outputs: Array, example: dict[str, Array]) -> Array:
    return jnp.sum(jnp.square(outputs - example["label"]))


def read_by_reader(size: int = 60) -> data.Dataset:
    rng = np.random.default_rng(0)

    def split(size: int) -> dict[str, np.ndarray]:
        made = {"tokens": rng.integers(0, 11, [size, 5]), "table": rng.normal([0, 1e4], [1, 1e3], [size, 2])}
        return made | {"label": np.stack([made["tokens"].mean(1), made["table"][:, 1] / 1e4], 1)}

    return data.from_arrays(split(size), split(20), name="readings")


@pytest.mark.slow
def test_a_regression_of_tokens_and_a_table_is_trained_and_predicts_from_its_folder(tmp_path: Path) -> None:
    dataset, model, seen = read_by_reader(), Reader(), []
    config = small_config(tmp_path / "run", full_train_loss=True)
    result = fit(config, dataset=dataset, model=model, loss=squared_error, observe=seen.append)
    lines = [record for record in seen if record["event"] == "progress"]
    assert lines[-1]["train_loss"] < 0.9 * lines[0]["train_loss"]
    assert {line["test_error"] for line in lines} == {None}

    inputs = data.read_inputs(tmp_path / "run")
    x = {key: dataset.test[key] for key in ("tokens", "table")}
    outputs = jax.vmap(lambda x: model.apply({"params": result.params}, x))(inputs.standardize(x))
    loss = float(jnp.mean(jax.vmap(squared_error)(outputs, dict(dataset.test))))
    assert loss == pytest.approx(lines[-1]["test_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_classifier_predicts_from_its_folder(tmp_path: Path) -> None:
    dataset = blobs()
    result = fit(small_config(tmp_path / "run", mode="uniform", steps=10), dataset=dataset)
    model = models.mlp(NUM_CLASSES, hidden=(8,))
    inputs = data.read_inputs(tmp_path / "run")
    x = dataset.test["features"]
    logits = model.apply({"params": result.params}, inputs.standardize(jnp.asarray(x[0])))
    work = task.make(small_config(tmp_path / "run").model, dataset, model=model)
    example = jax.tree.map(lambda x: jnp.asarray(x[0]), dict(dataset.test))
    np.testing.assert_array_equal(logits, work.logits_fn(result.params, example))
    assert json.loads((tmp_path / "run" / "config.json").read_text())  # beside it


def no_labels() -> data.Dataset:
    points = {"x": np.random.default_rng(0).normal(size=[20, 3])}
    return data.from_arrays(points, points, name="points")


def next_tokens() -> data.Dataset:
    tokens = np.arange(60).reshape(20, 3) % 7
    return data.from_arrays(*[{"tokens": tokens, "label": (tokens + 1) % 7}] * 2, num_classes=7, name="text")


class Words(nn.Module):
    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        return nn.Embed(7, 7)(tokens)


def token_loss(logits: Array, example: dict[str, Array]) -> Array:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), example["label"][:, None], 1))


def reconstruction(outputs: Array, example: dict[str, Array]) -> Array:
    return jnp.mean(jnp.square(outputs - example["x"]))


@pytest.mark.parametrize(
    ("dataset", "model", "loss"),
    [(next_tokens(), Words(), token_loss), (no_labels(), nn.Dense(3), reconstruction)],
    ids=["tokens", "no labels"],
)
def test_tasks_without_one_class_an_example(tmp_path: Path, dataset: data.Dataset, model: Any, loss: Any) -> None:
    config = small_config(tmp_path / "run")
    work = task.make(config.model, dataset, model=model, loss=loss)
    assert work.num_classes is None
    example = jax.tree.map(lambda x: jnp.asarray(x[0]), dict(work.train))
    params = work.init(jax.random.key(0))
    assert work.loss_fn(params, example) == loss(model.apply({"params": params}, dataset.inputs.of(example)), example)
    build.build(config, work)


def test_what_the_small_models_cannot_read_is_told(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run")
    whole = {"x": np.ones([6, 2], int), "label": np.arange(6)}
    for dataset, message in (
        (no_labels(), r"mlp classifies, and points has no classes, whole-number labels \[n\]: give a model"),
        (data.from_arrays(whole, whole), "'x' of arrays is of int32, which stays as it is: make it float32"),
        (data.from_arrays(*[whole | {"y": np.ones(6)}] * 2), "takes one input, and arrays has x, y: name it"),
    ):
        with pytest.raises(ValueError, match=message):
            task.make(config.model, dataset)
    with pytest.raises(ValueError, match=r"points has no classes, .*: name a loss of"):
        task.make(config.model, no_labels(), model=nn.Dense(3))
