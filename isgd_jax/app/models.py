"""The small models of the command line, and the door for the user's own.

A model here is what Flax Linen calls a module: ``init(key, x)`` and ``apply(variables, x)``, where ``x`` is ONE example
without a batch axis. The library adds the batch axis with `jax.vmap`; a model that mixes the examples of a batch has no
per-example gradient.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from isgd_jax.errors import ArgumentError, ArgumentTypeError, CannotImportError, ReferenceNotFoundError
from isgd_jax.types import Key, Params

__all__ = ["CNN", "MLP", "Model", "by_name", "cnn", "from_reference", "init", "mlp"]

Input: TypeAlias = Any
"""What a model is given of one example: its one input, or a dict of its inputs."""

Logits: TypeAlias = Float[Array, " classes"]

# "paper": Alain et al. 2015, the settings stored with their experiments: weights N(0, 0.01^2), biases 0.
_INITIALIZERS = {"he": nn.initializers.he_normal(), "paper": nn.initializers.normal(0.01)}


@runtime_checkable
class Model(Protocol):
    """What the library asks of a model."""

    def init(self, key: Key, x: Input, /) -> Mapping[str, Params]:
        """``{"params": ...}`` for one example ``x``, without a batch axis."""

    def apply(self, variables: Mapping[str, Params], x: Input, /) -> Any:
        """The outputs for one example, such as logits [classes]."""


class MLP(nn.Module):
    """Dense layers and ReLU over the flattened example."""

    hidden: tuple[int, ...]
    num_classes: int
    initializer: str

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Logits:
        kernel_init = _INITIALIZERS[self.initializer]
        x = x.reshape(-1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, kernel_init=kernel_init)(x))
        return nn.Dense(self.num_classes, kernel_init=kernel_init)(x)


class CNN(nn.Module):
    """Two convolutions with max-pooling, one dense layer: LeNet's plan (LeCun et al. 1998), with ReLU."""

    num_classes: int
    initializer: str

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Logits:
        if x.ndim != 3:
            raise ArgumentError(f"cnn: expected one image [height, width, channels], got shape {x.shape}; try mlp")
        kernel_init = _INITIALIZERS[self.initializer]
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (5, 5), kernel_init=kernel_init)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(256, kernel_init=kernel_init)(x.reshape(-1)))
        return nn.Dense(self.num_classes, kernel_init=kernel_init)(x)


def mlp(num_classes: int, *, hidden: Sequence[int] = (512, 512, 512, 512), initializer: str = "he") -> MLP:
    """Dense layers and ReLU over the flattened example: x [...] -> logits [num_classes].

    Args:
        num_classes: outputs.
        hidden: widths of the hidden layers; by default those of the paper's models, a quarter as wide.
        initializer: "he" (He et al. 2015: scaled to the fan-in), or "paper": N(0, 0.01^2). Biases are 0.

    Raises:
        ValueError: a width or ``num_classes`` is below 1, or the initializer is unknown.

    >>> import jax
    >>> params = init(mlp(10, hidden=[16]), jax.random.key(0), jax.numpy.zeros([8, 8, 1]))
    >>> params["Dense_0"]["kernel"].shape
    (64, 16)
    """
    if any(width < 1 for width in hidden):
        raise ArgumentError(f"mlp: expected hidden widths of at least 1, got {tuple(hidden)}")
    return MLP(tuple(hidden), _classes(num_classes), _initializer(initializer))


def cnn(num_classes: int, *, initializer: str = "he") -> CNN:
    """Two convolutions and a dense layer: one image [height, width, channels] -> logits [num_classes].

    Args:
        num_classes: outputs.
        initializer: as of `mlp`.

    Raises:
        ValueError: ``num_classes`` is below 1, or the initializer is unknown; when applied, ``x`` is no image. Images
            have at least 4 x 4 pixels, as they are halved twice.
    """
    return CNN(_classes(num_classes), _initializer(initializer))


_FACTORIES: dict[str, Callable[..., Model]] = {"mlp": mlp, "cnn": cnn}


def by_name(name: str, num_classes: int | None, **options: Any) -> Model:
    """The model called "mlp" or "cnn", or what the user's ``factory(num_classes)`` at "pkg.module:factory" returns.

    Args:
        name: of the model. A module that it names is imported, from the current folder too.
        num_classes: None where the data have no classes; then only a factory of the user's will do.
        options: more that the factory takes, by name.

    Raises:
        ValueError: there is no model of this name.
        TypeError: the factory cannot be called so, or returns something without ``init`` and ``apply``.
        ImportError, AttributeError: the reference leads nowhere.
    """
    if name not in _FACTORIES and ":" not in name:
        meant = f": did you mean '{name.removesuffix('.py')}:factory'?" if name.endswith(".py") else ""
        raise ArgumentError(f"unknown model {name!r}: expected {', '.join(_FACTORIES)} or 'pkg.module:factory'{meant}")
    factory = _FACTORIES.get(name) or from_reference(name)
    try:
        inspect.signature(factory).bind(num_classes, **options)
    except TypeError as error:
        called = ", ".join(["num_classes", *(f"{key}={value!r}" for key, value in options.items())])
        raise ArgumentTypeError(f"model {name!r} cannot be called with ({called}): {error}") from error
    model = factory(num_classes, **options)
    if not isinstance(model, Model):
        raise ArgumentTypeError(
            f"model {name!r}: expected the factory to return an object with .init(key, x) and .apply(variables, x), "
            f"such as a Flax Linen module, got {type(model).__name__}: a class of Flax NNX that takes "
            "(num_classes, rngs=) becomes one by flax.nnx.bridge.to_linen(Class, num_classes)"
        )
    return model


def from_reference(reference: str) -> Any:
    """The callable at "pkg.module:name"; modules in the current folder are found too, as ``python -m`` would.

    Raises:
        ValueError: it is not of this form.
        ImportError: there is no such module.
        AttributeError: the module has no such name.
        TypeError: what it names cannot be called.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise ArgumentError(f"expected 'pkg.module:name', got {reference!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise CannotImportError(f"{reference!r}: cannot import {module_name!r} from {os.getcwd()}: {error}") from error
    found = getattr(module, attribute, None)
    if found is None:
        where = getattr(module, "__file__", None) or "built in"
        raise ReferenceNotFoundError(f"{reference!r}: the module {module_name!r} ({where}) has no {attribute!r}")
    if not callable(found):
        raise ArgumentTypeError(f"{reference!r}: expected a function, got {type(found).__name__}")
    return found


def init(model: Model, key: Key, example: Input, *, num_classes: int | None = None) -> Params:
    """The model's first parameters, for ``model.apply({"params": params}, x)``.

    Guarantees, before any parameter is computed:
      - a model that keeps variables other than "params" (BatchNorm's statistics) is refused;
      - a model that needs random numbers when applied (dropout that is not deterministic) is refused;
      - with ``num_classes``, a model whose output for one example is not of shape [num_classes] is refused.

    Args:
        model: anything with Linen's ``init`` and ``apply``, for ONE example.
        key: the same gives the same parameters.
        example: its inputs, without a batch axis; only shapes matter to most models.
        num_classes: what the output is checked against; None where it is no vector of logits.

    Raises:
        ValueError: one of these is refused.
        TypeError: ``model.init`` does not return a dict with ``params``.
    """
    variables = jax.eval_shape(model.init, key, example)
    _check_collections(variables)
    output = _applied(model, variables, example)
    shape = getattr(output, "shape", None)
    if num_classes is not None and shape != (num_classes,):
        shapes = jax.tree.map(jnp.shape, example)
        raise ArgumentError(
            f"expected the model to map one example {shapes}, without a batch axis, to logits of shape "
            f"({num_classes},), got {shape if shape is not None else type(output).__name__}"
        )
    return jax.jit(model.init)(key, example)["params"]


def _check_collections(variables: Mapping[str, Any]) -> None:
    if not isinstance(variables, Mapping) or "params" not in variables:
        came = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ArgumentTypeError(f"expected the model's init to return a dict with 'params', got {came}")
    others = sorted(set(variables) - {"params"})
    if others:
        raise ArgumentError(
            f"the model keeps variables other than 'params': {', '.join(others)}. Statistics of a batch couple its "
            "examples, so that none has a gradient of its own; use LayerNorm or GroupNorm in place of BatchNorm"
        )


def _applied(model: Model, variables: Mapping[str, Any], example: Input) -> Any:
    try:
        return jax.eval_shape(model.apply, variables, example)
    except flax.errors.InvalidRngError as error:
        raise ArgumentError(
            f"the model needs random numbers when applied ({error}); a score must be the same each time it is "
            "measured: build the model with dropout left out or deterministic"
        ) from error


def _classes(num_classes: int) -> int:
    if num_classes < 1:
        raise ArgumentError(f"expected num_classes of at least 1, got {num_classes}")
    return num_classes


def _initializer(name: str) -> str:
    if name not in _INITIALIZERS:
        raise ArgumentError(f"unknown initializer {name!r}: expected {' or '.join(map(repr, _INITIALIZERS))}")
    return name
