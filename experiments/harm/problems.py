"""The twelve problems of `do_no_harm.py`, and on which side each was expected before the first run.

They were fixed before any of them was run: six where gradients of few examples should count, six where they should not.
Each is a `isgd_jax.Problem`; what is measured is the mean loss over the whole training set.
"""

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from domains import problems as domains
from selection import problems as labeled

import isgd_jax as isgd
from isgd_jax.app import data

__all__ = ["CASES", "Case", "case"]

Array = jax.Array


class Case(NamedTuple):
    """A problem, its batch and length, the rates that are tried, and who was expected to win."""

    problem: isgd.Problem
    batch_size: int
    steps: int
    """Of either side, at equal steps."""
    rates: tuple[float, ...]
    optimizer: str = "nesterov"
    expected: str = "plain"


def _classes(dataset: str, kind: str, scale: labeled.Scale, folder: str | None, steps: int, expected: str) -> Case:
    made = labeled.make(data.load(dataset, data_dir=folder), kind, scale)
    problem = isgd.Problem(made.loss_fn, made.init, made.train)
    return Case(problem, scale.batch_size, steps, (0.003, 0.01, 0.03), expected=expected)


def digits(folder: str | None) -> Case:
    """A perceptron that learns all of its 1,294 digits: what is left at the end are few."""
    scale = labeled.Scale(1_437, (64, 64), 32, 0)
    return _classes("digits", "clean", scale, folder, 2_400, "importance")


def fashion(folder: str | None) -> Case:
    """7,200 pictures of clothes."""
    return _clothes("clean", folder, "importance")


def wrong_labels(folder: str | None) -> Case:
    """The same with 40 % of the labels drawn at random: the largest gradients are of wrong ones, for ever."""
    return _clothes("noise 40 %", folder, "plain")


def long_tail(folder: str | None) -> Case:
    """The same with classes as rare as 1 in 100 of the first."""
    return _clothes("imbalance 1:100", folder, "importance")


def _clothes(kind: str, folder: str | None, expected: str) -> Case:
    return _classes("fashion_mnist", kind, labeled.Scale(8_000, (128, 128), 64, 0), folder, 2_400, expected)


def huge_batch(folder: str | None) -> Case:
    """Digits in batches of nearly half of them: there is hardly any noise to save."""
    scale = labeled.Scale(1_437, (64, 64), 512, 0)
    made = _classes("digits", "clean", scale, folder, 1_200, "plain")
    return made._replace(rates=(0.01, 0.03, 0.1))


def tiny_model(folder: str | None) -> Case:
    """Eight hidden units on two overlapping moons: a step is nearly all overhead, and the overlap never goes."""
    del folder
    from sklearn.datasets import make_moons

    x, y = make_moons(1_000, noise=0.35, random_state=0)

    def init(key: Array) -> Any:
        return domains.glorot((2, 8, 2))(key)

    problem = isgd.Problem(_classifier, init, _pair(x, y))
    return Case(problem, 16, 2_400, (0.01, 0.03, 0.1), "nesterov", "plain")


def convex(folder: str | None) -> Case:
    """Logistic regression with a ridge, on 569 samples of tissue: strictly convex, with noise at its minimum."""
    del folder
    x, y = _table("load_breast_cancer")

    def loss_fn(params: Any, example: Any) -> Array:
        ridge = 0.05 * (jnp.sum(jnp.square(params["w"])) + jnp.square(params["b"]))
        return _margin_loss(params, example) + ridge

    problem = isgd.Problem(loss_fn, {"w": jnp.zeros(x.shape[1]), "b": jnp.zeros(())}, _pair(x, y))
    return Case(problem, 32, 2_400, (0.003, 0.01, 0.03), "nesterov", "plain")


def separable(folder: str | None) -> Case:
    """Logistic regression without a ridge on 4,000 points that a plane divides: those near it have all the gradient."""
    del folder
    rng = np.random.default_rng(0)
    truth = rng.normal(size=20) / np.sqrt(20)
    x = rng.normal(size=(16_000, 20))
    x = x[np.abs(x @ truth) > 0.25][:4_000]
    problem = isgd.Problem(_margin_loss, {"w": jnp.zeros(20), "b": jnp.zeros(())}, _pair(x, x @ truth > 0))
    return Case(problem, 32, 2_400, (0.1, 0.3, 1.0), "nesterov", "importance")


def regression(folder: str | None) -> Case:
    """Least squares on 442 patients with diabetes: residuals are spread as a normal's, and stay."""
    del folder
    x, y = _table("load_diabetes")

    def loss_fn(params: Any, example: Any) -> Array:
        return 0.5 * jnp.square(example["x"] @ params["w"] + params["b"] - example["y"])

    train = {"x": jnp.asarray(x), "y": jnp.asarray((y - y.mean()) / y.std(), jnp.float32)}
    problem = isgd.Problem(loss_fn, {"w": jnp.zeros(x.shape[1]), "b": jnp.zeros(())}, train)
    return Case(problem, 32, 2_400, (0.003, 0.01, 0.03), "nesterov", "plain")


def burgers(folder: str | None) -> Case:
    """Burgers' equation on 8,192 fixed points, each with one of the border: the shock has all the gradient."""
    del folder
    domain = domains.burgers()
    inside, border = (domain.terms[name] for name in ("inside", "border"))
    inner, outer = domains.loss_of(inside), domains.loss_of(border)

    def loss_fn(params: Any, example: Any) -> Array:
        return inner(params, example["inside"]) + outer(params, example["border"])

    keys = jax.random.split(jax.random.key(0))
    train = {"inside": inside.draw(keys[0], 8_192), "border": border.draw(keys[1], 8_192)}
    return Case(isgd.Problem(loss_fn, domain.init, train), 128, 2_400, (1e-3, 3e-3, 1e-2), "adam", "importance")


def image(folder: str | None) -> Case:
    """A photograph as a function of place, by a sine network of 64 units on 16,384 of its pixels: edges count."""
    del folder
    picture = domains.photograph("china")
    shape = np.asarray(picture.shape[:2])
    places = np.stack(np.meshgrid(*(np.arange(count) for count in shape), indexing="ij"), axis=-1).reshape(-1, 2)
    rows = np.random.default_rng(0).choice(len(places), 16_384, replace=False)
    at = (2 * places[rows] - (shape - 1)) / shape.max()
    train = {"at": jnp.asarray(at, jnp.float32), "color": jnp.asarray(picture.reshape(-1, 3)[rows])}

    def init(key: Array) -> Any:
        sizes = (2, 64, 64, 3)
        params = []
        for place, (k, i, o) in enumerate(zip(jax.random.split(key, 3), sizes[:-1], sizes[1:], strict=True)):
            bound = 1 / i if place == 0 else np.sqrt(6 / i) / 30.0
            params.append((jax.random.uniform(k, (i, o), minval=-bound, maxval=bound), jnp.zeros(o)))
        return params

    def loss_fn(params: Any, example: Any) -> Array:
        value = example["at"]
        for w, b in params[:-1]:
            value = jnp.sin(30.0 * (value @ w + b))
        w, b = params[-1]
        return jnp.sum(jnp.square(value @ w + b + 0.5 - example["color"]))

    return Case(isgd.Problem(loss_fn, init, train), 256, 2_400, (3e-4, 1e-3, 3e-3), "adam", "importance")


def language(folder: str | None) -> Case:
    """The next character of Python's own library, by one block of attention: sequences of 48 are much alike."""
    del folder
    length, width, vocabulary = 48, 32, 96
    rows = _library_text(length + 1, 4_096)

    def init(key: Array) -> Any:
        keys = iter(jax.random.split(key, 8))

        def made(*shape: int) -> Array:
            return jax.random.normal(next(keys), shape) / np.sqrt(shape[0])

        return {
            "embedding": made(vocabulary, width), "place": 0.1 * made(length, width), "qkv": made(width, 3 * width),
            "mixed": made(width, width), "up": made(width, 4 * width), "down": made(4 * width, width),
            "out": made(width, vocabulary),
        }  # fmt: skip

    def normed(x: Array) -> Array:
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)

    def loss_fn(params: Any, row: Array) -> Array:
        x = params["embedding"][row[:-1]] + params["place"]
        q, k, v = jnp.split(normed(x) @ params["qkv"], 3, axis=-1)
        seen = jnp.where(jnp.tri(length, dtype=bool), q @ k.T / np.sqrt(width), -1e9)
        x = x + jax.nn.softmax(seen) @ v @ params["mixed"]
        x = x + jax.nn.gelu(normed(x) @ params["up"]) @ params["down"]
        logits = normed(x) @ params["out"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, row[1:]))

    return Case(isgd.Problem(loss_fn, init, jnp.asarray(rows)), 16, 1_600, (1e-3, 3e-3, 1e-2), "adam", "plain")


def _library_text(length: int, count: int) -> np.ndarray:
    """So many stretches of the modules of the standard library, in alphabetical order: bytes 32 to 126, others 0."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    codes = np.frombuffer(text, np.uint8).astype(np.int32) - 31
    codes = np.where((codes >= 1) & (codes <= 95), codes, 0)
    starts = np.random.default_rng(0).choice(len(codes) // length, count, replace=False) * length
    return codes[starts[:, None] + np.arange(length)]


def _table(name: str) -> tuple[np.ndarray, np.ndarray]:
    import sklearn.datasets

    x, y = getattr(sklearn.datasets, name)(return_X_y=True)
    return ((x - x.mean(axis=0)) / x.std(axis=0)).astype(np.float32), y


def _pair(x: np.ndarray, y: np.ndarray) -> dict[str, Array]:
    return {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.int32)}


def _margin_loss(params: Any, example: Any) -> Array:
    """Logistic loss of a plane; ``y`` is 0 or 1."""
    side = 2.0 * example["y"].astype(jnp.float32) - 1.0
    return jax.nn.softplus(-side * (example["x"] @ params["w"] + params["b"]))


def _classifier(params: Any, example: Any) -> Array:
    value = example["x"]
    for w, b in params[:-1]:
        value = jnp.tanh(value @ w + b)
    w, b = params[-1]
    return optax.softmax_cross_entropy_with_integer_labels(value @ w + b, example["y"])


CASES: dict[str, Callable[[str | None], Case]] = {
    "digits": digits,
    "fashion": fashion,
    "long tail": long_tail,
    "separable": separable,
    "burgers": burgers,
    "image": image,
    "wrong labels": wrong_labels,
    "tiny model": tiny_model,
    "huge batch": huge_batch,
    "convex": convex,
    "regression": regression,
    "language": language,
}


def case(name: str, folder: str | None = None) -> Case:
    """A problem by its name.

    Args:
        name: of `CASES`.
        folder: where prepared data sets are kept.
    """
    return CASES[name](folder)
