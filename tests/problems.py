"""Small problems that several tests train on."""

import itertools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

if TYPE_CHECKING:
    from isgd_jax.app.config import Config
    from isgd_jax.app.data import Dataset

NUM_EXAMPLES, NUM_FEATURES, NUM_CLASSES = 90, 5, 3


def blobs(num_examples: int = NUM_EXAMPLES, seed: int = 0) -> "Dataset":
    """Three Gaussian blobs, a few of the labels wrong: some examples stay hard."""
    from isgd_jax.app import data  # here: who needs no command, as a worker, does not wait for it

    rng = np.random.default_rng(seed)

    def split(size: int) -> dict[str, np.ndarray]:
        label = rng.integers(NUM_CLASSES, size=size).astype(np.int32)
        features = rng.normal(size=(size, NUM_FEATURES)).astype(np.float32)
        features[np.arange(size), label] += 3.0
        label[: size // 10] = (label[: size // 10] + 1) % NUM_CLASSES
        return {"features": features, "label": label}

    return data.from_arrays(split(num_examples), split(30), num_classes=NUM_CLASSES, name="blobs")


def small_config(run_dir: Any, **changes: Any) -> "Config":
    """A run of a second or two."""
    from isgd_jax.app.config import configure

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
    return {"w": jnp.asarray(np.ones(4, np.float32)), "b": jnp.asarray(np.float32(0.0))}, {
        "x": jnp.asarray(x),
        "y": jnp.asarray(y),
    }


def mlp_loss(params, example):
    """A dense net on a vector, or on each vector of a sequence, the logits averaged."""
    hidden = example["x"].reshape(-1, example["x"].shape[-1])
    for layer in params[:-1]:
        hidden = jax.nn.relu(hidden @ layer["w"] + layer["b"][None])
    logits = jnp.mean(hidden @ params[-1]["w"] + params[-1]["b"][None], axis=0)
    return -jax.nn.log_softmax(logits)[example["y"]]


def mlp(key, sizes):
    rng = generator(key)
    weights = [rng.normal(size=(i, o)) / np.sqrt(i) for i, o in itertools.pairwise(sizes)]
    return [{"w": jnp.asarray(w, jnp.float32), "b": jnp.asarray(np.zeros(w.shape[1], np.float32))} for w in weights]


def images(key, *shape, num_classes=5):
    x, y = generator(key).normal(size=shape), np.arange(shape[0]) % num_classes
    return {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.int32)}


def generator(key):
    """Of NumPy's random numbers, which come without a program to compile for each shape."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))
