"""What is trained: a data set, a model and a loss, made into the two functions the rest of the code speaks of."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isgd_jax.app import data, models
from isgd_jax.app.config import ModelConfig
from isgd_jax.engines.scorers import softmax_cross_entropy
from isgd_jax.errors import ArgumentError
from isgd_jax.types import Batch, Example, LossFn, Params

__all__ = ["OutputLoss", "Task", "make"]

OutputLoss = Callable[[Array, Example], Float[Array, ""]]
"""A loss of one example from the model's outputs for it."""


class Task(NamedTuple):
    """A model on a data set."""

    loss_fn: LossFn
    """``(params, example) -> scalar``."""
    logits_fn: Callable[[Params, Example], Array]
    """``(params, example) -> outputs`` of the model."""
    init: Callable[[Array], Params]
    """``key -> params``."""
    train: Batch
    test: Batch
    num_examples: int
    fingerprint: str
    inputs: data.Inputs
    """What is done to the inputs before the model sees them; kept with a run."""
    num_classes: int | None = None
    """How many classes an example's one label may be of; None where the largest output is no answer, so no error."""


def make(
    config: ModelConfig, dataset: data.Dataset, *, model: models.Model | None = None, loss: OutputLoss | None = None
) -> Task:
    """The task of a configuration.

    A model of one input is given that array, a model of several a dict of them; the loss is given the whole example.

    Args:
        config: names of the model and of the loss.
        dataset: what is trained on; its arrays are ``[n, ...]``.
        model: takes the place of ``config.model``; anything with Linen's ``init`` and ``apply``, for one example.
        loss: takes the place of ``config.loss``; ``(outputs, example) -> scalar``.

    Raises:
        ValueError: the model or the loss cannot be found, does not suit the data, or gives the wrong shape.
    """
    if model is None:
        _check_suits(config.model, dataset)
        options = {"hidden": config.hidden, "initializer": config.initializer} if config.model == "mlp" else {}
        model = models.by_name(config.model, dataset.num_classes, **options)
    if loss is None and config.loss is None and dataset.num_classes is None:
        raise ArgumentError(
            f"{dataset.name} has no classes, whole-number labels [n]: name a loss of (outputs, example)"
        )
    if loss is None:
        loss = softmax_cross_entropy if config.loss is None else models.from_reference(config.loss)

    def logits_fn(params: Params, example: Example) -> Array:
        return model.apply({"params": params}, dataset.inputs.of(example))

    def loss_fn(params: Params, example: Example) -> Array:
        return loss(logits_fn(params, example), example)

    example = jax.tree.map(lambda x: x[0], dataset.train)
    example_inputs = jax.tree.map(jnp.asarray, dataset.inputs.of(example))

    def init(key: Array) -> Params:
        num_classes = dataset.num_classes if loss is softmax_cross_entropy else None
        return models.init(model, key, example_inputs, num_classes=num_classes)

    _check_scalar(loss_fn, jax.eval_shape(init, jax.random.key(0)), example, config.loss)
    classes = dataset.num_classes if "label" in example and not example["label"].shape else None
    size, fingerprint, inputs = len(dataset), dataset.fingerprint, dataset.inputs
    return Task(loss_fn, logits_fn, init, dataset.train, dataset.test, size, fingerprint, inputs, classes)


def _check_suits(name: str, dataset: data.Dataset) -> None:
    """The models that come with the library classify one input of quantities."""
    if ":" in name:
        return
    if dataset.num_classes is None:
        raise ArgumentError(
            f"{name} classifies, and {dataset.name} has no classes, whole-number labels [n]: give a model"
        )
    if len(dataset.inputs.shapes) > 1:
        raise ArgumentError(
            f"{name} takes one input, and {dataset.name} has {', '.join(dataset.inputs.shapes)}: name it with "
            "input_key, or give a model"
        )
    if not dataset.statistics:
        key = dataset.input_key
        raise ArgumentError(
            f"{name} takes quantities, and {key!r} of {dataset.name} is of {dataset.inputs.dtypes[key]}, which stays "
            "as it is: make it float32 if they are quantities, or give a model"
        )


def _check_scalar(loss_fn: LossFn, params: Params, example: Example, name: str | None) -> None:
    out = jax.eval_shape(loss_fn, params, example)
    is_scalar = isinstance(out, jax.ShapeDtypeStruct) and out.shape == ()
    if not is_scalar or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ArgumentError(
            f"the loss {name or ''} must return one floating-point scalar for one example; it returns "
            f"{jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', out)}: average or sum over what is left"
        )
