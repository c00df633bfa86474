"""The problems of `honest.py`: clean and noisy labels, balanced and long-tailed classes, a real imbalanced table, and
sources of Python by package.

Every problem keeps a tenth of its training examples for validation, spoilt like the rest; the test set is as it came.
The spoiling is drawn from a seed of its own: all methods and seeds see the same data.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from isgd_jax.app import data
from selection import sources
from selection.contest import Problem

__all__ = ["NETWORKS", "RACE_SCALES", "SCALES", "SPOILT", "Scale", "kinds", "load", "make"]


class Scale(NamedTuple):
    """Examples kept at most, widths of the hidden layers, batch, and the budget in passes over the training set."""

    examples: int
    hidden: tuple[int, ...]
    batch_size: int
    epochs: float


SCALES = {
    ("digits", "tiny"): Scale(400, (16,), 32, 4),
    ("digits", "small"): Scale(1437, (64, 64), 32, 30),
    ("digits", "full"): Scale(1437, (128, 128), 32, 60),
    ("fashion_mnist", "tiny"): Scale(1_000, (32,), 64, 3),
    ("fashion_mnist", "small"): Scale(8_000, (128, 128), 64, 15),
    ("fashion_mnist", "full"): Scale(60_000, (512, 512, 512, 512), 128, 30),
    ("nycflights13", "tiny"): Scale(2_000, (32,), 64, 2),
    ("nycflights13", "small"): Scale(20_000, (64, 64), 64, 10),
    ("nycflights13", "full"): Scale(300_000, (256, 256, 256), 128, 20),
    (sources.NAME, "tiny"): Scale(1_000, (32,), 64, 3),
    (sources.NAME, "small"): Scale(20_000, (128, 128), 64, 15),
    (sources.NAME, "full"): Scale(20_000, (512, 512, 512, 512), 128, 30),
}

RACE_SCALES = {
    "tiny": Scale(1_000, (32,), 64, 10),
    "small": Scale(20_000, (256, 256, 256, 256), 128, 12),
    "full": Scale(60_000, (512, 512, 512, 512), 128, 20),
}
"""Sizes of the race, on any data set."""

SPOILT = {
    "clean": (0.0, 1.0),
    "noise 10 %": (0.1, 1.0),
    "noise 40 %": (0.4, 1.0),
    "imbalance 1:100": (0.0, 100.0),
}
"""The share of labels replaced by one drawn at random, and how many times rarer the last class is than the first."""

_SPOILING_SEED = 20_240


_AS_THEY_ARE = {"nycflights13": ("as it is, 1:11",), sources.NAME: ("as it is",)}


def kinds(dataset: str) -> tuple[str, ...]:
    """The problems of a data set, the plainest first; flights are imbalanced as they are."""
    return _AS_THEY_ARE.get(dataset, tuple(SPOILT))


def load(name: str, data_dir: str | None = None) -> data.Dataset:
    """A data set of the library by name, or the sources of Python."""
    return sources.load() if name == sources.NAME else data.load(name, data_dir=data_dir)


NETWORKS = ("mlp", "resnet")


def make(dataset: data.Dataset, kind: str, scale: Scale, network: str = "mlp") -> Problem:
    """The problem of a kind, for one of the `NETWORKS`.

    Raises:
        ValueError: a ResNet was asked for, and the examples are no pictures.
    """
    shape = np.shape(dataset.train[dataset.input_key])[1:]
    if network == "resnet" and len(shape) != 3:
        raise ValueError(f"a resnet: expected pictures [height, width, channels], got {dataset.name}'s {shape}")
    noise, imbalance = SPOILT.get(kind, (0.0, 1.0))
    rng = np.random.default_rng(_SPOILING_SEED)
    labels = np.asarray(dataset.train["label"])
    kept = _long_tail(rng, labels, dataset.num_classes, imbalance)[: scale.examples]
    inputs, labels = _flat(dataset, "train", kept), labels[kept]
    wrong = rng.random(len(labels)) < noise
    labels = np.where(wrong, rng.integers(0, dataset.num_classes, len(labels)), labels)
    cut = len(labels) // 10
    return Problem(
        name=f"{dataset.name}, {kind}" if network == "mlp" else f"{dataset.name}, {kind}, {network}",
        hidden=scale.hidden,
        num_classes=dataset.num_classes,
        batch_size=scale.batch_size,
        train=_split(inputs[cut:], labels[cut:]),
        valid=_split(inputs[:cut], labels[:cut]),
        test=_split(_flat(dataset, "test", slice(None)), np.asarray(dataset.test["label"])),
        picture=shape if network == "resnet" else None,
    )


def _long_tail(rng: np.random.Generator, labels: np.ndarray, num_classes: int, imbalance: float) -> np.ndarray:
    """Indices in random order, class k thinned to imbalance^(-k / (classes - 1)) of the first (Cui et al. 2019)."""
    order = rng.permutation(len(labels))
    share = imbalance ** (-np.arange(num_classes) / max(1, num_classes - 1))
    return order[rng.random(len(order)) < share[labels[order]]]


def _flat(dataset: data.Dataset, split: str, rows: np.ndarray | slice) -> np.ndarray:
    inputs = getattr(dataset, split)[dataset.input_key][rows]
    standard = np.asarray(dataset.standardize(inputs))
    return standard.reshape(len(standard), -1)


def _split(inputs: np.ndarray, labels: np.ndarray) -> dict[str, jnp.ndarray]:
    return {"x": jnp.asarray(inputs, jnp.float32), "y": jnp.asarray(labels, jnp.int32)}
