"""What is trained: a data set, a model and a loss, made into the two functions the rest of the code speaks of."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from isgd_jax import data, models
from isgd_jax.config import Config
from isgd_jax.scorers import softmax_cross_entropy
from isgd_jax.typing import Batch, Example, LossFn, Params

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


def make(
    config: Config, dataset: data.Dataset, *, model: models.Model | None = None, loss: OutputLoss | None = None
) -> Task:
    """The task of a configuration. ``model`` and ``loss`` in Python take precedence over their names.

    Raises:
        ValueError: the model or the loss cannot be found, or gives the wrong shape.
    """
    if model is None:
        options = {"hidden": config.hidden, "initializer": config.initializer} if config.model == "mlp" else {}
        model = models.by_name(config.model, dataset.num_classes, **options)
    if loss is None:
        loss = softmax_cross_entropy if config.loss is None else models.from_reference(config.loss)

    def logits_fn(params: Params, example: Example) -> Array:
        return model.apply({"params": params}, dataset.standardise(example[dataset.input_key]))

    def loss_fn(params: Params, example: Example) -> Array:
        return loss(logits_fn(params, example), example)

    example = jax.tree.map(lambda x: x[0], dataset.train)
    inputs = jnp.asarray(dataset.standardise(example[dataset.input_key]))

    def init(key: Array) -> Params:
        num_classes = dataset.num_classes if loss is softmax_cross_entropy else None
        return models.init(model, key, inputs, num_classes=num_classes)

    _check_scalar(loss_fn, jax.eval_shape(init, jax.random.key(0)), example, config.loss)
    return Task(loss_fn, logits_fn, init, dataset.train, dataset.test, len(dataset), dataset.fingerprint)


def _check_scalar(loss_fn: LossFn, params: Params, example: Example, name: str | None) -> None:
    out = jax.eval_shape(loss_fn, params, example)
    is_scalar = isinstance(out, jax.ShapeDtypeStruct) and out.shape == ()
    if not is_scalar or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            f"the loss {name or ''} must return one floating-point scalar for one example; it returns "
            f"{jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', out)}: average or sum over what is left"
        )
