"""Small problems that several tests train on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from isgd_jax.app import data
from isgd_jax.app.config import Config, configure

NUM_EXAMPLES, NUM_FEATURES, NUM_CLASSES = 90, 5, 3


def blobs(num_examples: int = NUM_EXAMPLES, seed: int = 0) -> data.Dataset:
    """Three Gaussian blobs, a few of the labels wrong: some examples stay hard."""
    rng = np.random.default_rng(seed)

    def split(size: int) -> dict[str, np.ndarray]:
        label = rng.integers(NUM_CLASSES, size=size).astype(np.int32)
        features = rng.normal(size=(size, NUM_FEATURES)).astype(np.float32)
        features[np.arange(size), label] += 3.0
        label[: size // 10] = (label[: size // 10] + 1) % NUM_CLASSES
        return {"features": features, "label": label}

    return data.from_arrays(split(num_examples), split(30), num_classes=NUM_CLASSES, name="blobs")


def small_config(run_dir: Any, **changes: Any) -> Config:
    """A run of a second or two."""
    settings = {
        "hidden": (8,), "batch_size": 10, "steps": 40, "refresh_every": 8, "chunk_size": 32, "log_every": 10,
        "checkpoint_every": 10, "learning_rate": 0.02, "run_dir": str(run_dir),
    }  # fmt: skip
    return configure(**(settings | changes))


def linear_loss(params: dict[str, Array], example: dict[str, Array]) -> Array:
    """Squared error of a linear model: the norm of a gradient is |r|·sqrt(‖x‖² + 1), by hand."""
    residual = jnp.dot(example["x"], params["w"]) + params["b"] - example["y"]
    return 0.5 * residual**2


def linear_problem(num_examples: int = 40, seed: int = 0) -> tuple[dict[str, Array], dict[str, Array]]:
    """Parameters and a batch of a linear regression with a few large residuals."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_examples, 4)).astype(np.float32)
    y = (x.sum(1) + rng.standard_t(2, size=num_examples)).astype(np.float32)
    return {"w": jnp.ones(4), "b": jnp.zeros(())}, {"x": jnp.asarray(x), "y": jnp.asarray(y)}


def mlp_loss(params, example):
    """A dense net on a vector, or on each vector of a sequence, the logits averaged."""
    hidden = example["x"].reshape(-1, example["x"].shape[-1])
    for layer in params[:-1]:
        hidden = jax.nn.relu(hidden @ layer["w"] + layer["b"][None])
    logits = jnp.mean(hidden @ params[-1]["w"] + params[-1]["b"][None], axis=0)
    return -jax.nn.log_softmax(logits)[example["y"]]


def mlp(key, sizes):
    keys = jax.random.split(key, len(sizes))
    shapes = zip(keys, sizes[:-1], sizes[1:], strict=False)
    return [{"w": jax.random.normal(k, (i, o)) / np.sqrt(i), "b": jnp.zeros(o)} for k, i, o in shapes]


def images(key, *shape, num_classes=5):
    return {"x": jax.random.normal(key, shape), "y": jnp.arange(shape[0]) % num_classes}
