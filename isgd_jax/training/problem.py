"""What is trained: a loss of one example, parameters, and data as any pytree of arrays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from isgd_jax.engines.chunks import check_held
from isgd_jax.errors import ArgumentError, ArgumentTypeError
from isgd_jax.gradients.captured import CapturingJit
from isgd_jax.gradients.jaxpr import relaid
from isgd_jax.gradients.meshes import lies_on_a_mesh
from isgd_jax.gradients.plan import check_no_keys
from isgd_jax.types import Batch, Example, Key, Params

__all__ = ["NOTHING", "Problem"]

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Problem:
    """A loss on data.

    Args:
        loss_fn: the loss of ONE example, a scalar: ``loss_fn(params, example)``; with ``frozen`` it is
            ``loss_fn(params, frozen, example)``, and with ``needs_key`` it takes a key of the example's own, last.
        params: to start from, a pytree of arrays (``nnx.split(model, nnx.Param)`` and `equinox.partition` make one);
            or a function ``key -> params``.
        train: a pytree of arrays with leading axis n, on the device or on the host (NumPy, memory-mapped). Integers
            stay integers, and nothing is standardized: that is the loss's business.
        held_out: more such pytrees, by name; measured, never trained on.
        frozen: arrays that the loss needs and nobody trains, such as a pretrained base; presampling's scorer gets them
            too. What the loss captures is passed to the program as well, not written into it.
        needs_key: the loss draws random numbers, such as dropout.
        augment: ``(key, example) -> example``: another picture of an example at each draw.
        metrics: ``(params, example) -> scalar`` by name (with ``frozen`` in between), measured on held-out data; by
            default the loss, where it needs no key.
        hold: "device" moves the training data there; "host" leaves them, and a thread fetches what is drawn.

    Raises:
        TypeError: parameters or data are no arrays, or a random key or BatchNorm's statistics are among the parameters.
        ValueError: arrays of the data differ in length, or there are none.
    """

    loss_fn: Callable[..., Float[Array, ""]]
    params: Params
    train: Batch
    held_out: Mapping[str, Batch] = field(default_factory=lambda: NOTHING)
    frozen: Any = None
    needs_key: bool = False
    augment: Callable[[Key, Example], Example] | None = None
    metrics: Mapping[str, Callable[..., Float[Array, ""]]] = field(default_factory=lambda: NOTHING)
    hold: str = "device"

    def __post_init__(self) -> None:
        if not isinstance(self.held_out, Mapping):
            raise ArgumentTypeError(
                f"held_out names its sets, such as {{'test': data}}; got a {type(self.held_out).__name__}"
            )
        for name, data in {"train": self.train, **self.held_out}.items():
            _check_data(name, data)
        if not self.makes_params:
            _check_params(self.params)
        if self.hold not in ("device", "host"):
            raise ArgumentError(f'hold must be "device" or "host", got {self.hold!r}')
        if self.needs_key and self.held_out and not self.metrics:
            raise ArgumentError(
                "the loss needs a key, so held-out data are measured by something else: metrics={'loss': "
                "a function of (params, example) without randomness}"
            )

    @property
    def num_examples(self) -> int:
        """Examples in the training data."""
        return int(jax.tree.leaves(self.train)[0].shape[0])

    @property
    def makes_params(self) -> bool:
        """Whether ``params`` is a function of a key. Modules of Equinox are callable too, but pytrees."""
        return callable(self.params) and jax.tree_util.all_leaves([self.params])

    def init(self, key: Key) -> Params:
        """The parameters to start from: copies, since training donates them.

        Raises:
            TypeError: what the function of the key made are no arrays.
        """
        made = self.params(key) if self.makes_params else self.params
        _check_params(made)
        return jax.tree.map(jnp.array, made)

    def loss(self, params: Params, frozen: Any, example: tuple[Example, Key | None]) -> Float[Array, ""]:
        """The loss, in the form that training differentiates.

        Args:
            params: what is differentiated by.
            frozen: left out of the call where the problem has none.
            example: the example as the loss sees it, with its key, or None where the loss needs none (`pictures`).
        """
        example, key = example
        arguments = (params, example) if frozen is None else (params, frozen, example)
        return self.loss_fn(*arguments, key) if self.needs_key else self.loss_fn(*arguments)

    @property
    def is_random(self) -> bool:
        """Whether examples need keys of their own."""
        return self.needs_key or self.augment is not None

    def measured(self) -> Mapping[str, Callable[..., Float[Array, ""]]]:
        """What is measured on held-out data."""
        return self.metrics or ({} if self.needs_key else {"loss": self.loss_fn})

    def check_measures(self, params: Params) -> None:
        """See, from shapes alone, that what is measured on held-out data can be.

        Args:
            params: as they are trained.

        Raises:
            ValueError: a set is not such as the loss or a metric takes, or a metric gives no scalar.
        """
        extra = () if self.frozen is None else (self.frozen,)
        if lies_on_a_mesh((params, self.frozen, dict(self.held_out))):
            return  # shapes alone do not say where arrays lie
        for name, data in self.held_out.items():
            example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), data)
            for what, function in self.measured().items():
                try:
                    value = jax.eval_shape(function, params, *extra, example)
                except (TypeError, ValueError, LookupError, AttributeError) as error:
                    raise ArgumentError(
                        f"{what} cannot be measured on held_out[{name!r}], which must be made as the training data "
                        f"are, or by metrics= that take it: {type(error).__name__}: {error}"
                    ) from error
                got = value.shape if isinstance(value, jax.ShapeDtypeStruct) else f"a {type(value).__name__}"
                if got != ():
                    raise ArgumentError(f"{what} of an example of held_out[{name!r}] must be a scalar, got {got}")
                if not any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
                    raise ArgumentError(
                        f"{what} of an example of held_out[{name!r}] must be a real number, got {value.dtype}"
                    )

    def evaluator(self, *, batch_size: int = 1024) -> Callable[[Params, Batch], dict[str, Float[Array, ""]]]:
        """``(params, data) -> means`` of what is measured, jitted; the data pass through in slices.

        Args:
            batch_size: examples at a time, which bounds the memory; the means do not depend on it but for rounding.

        Returns:
            A function that compiles once for each number of examples; its means are float32 scalars, by name.
        """
        functions = dict(self.measured())

        def evaluate(params: Params, frozen: Any, data: Batch) -> dict[str, Array]:
            extra = () if frozen is None else (frozen,)

            def one(example: Example) -> dict[str, Array]:
                return {name: jnp.asarray(fn(params, *extra, example), jnp.float32) for name, fn in functions.items()}

            size = jax.tree.leaves(data)[0].shape[0]
            values = jax.lax.map(relaid(one), data, batch_size=min(batch_size, size))
            return jax.tree.map(jnp.mean, values)

        program = CapturingJit(evaluate)
        return lambda params, data: program(params, self.frozen, data)

    def scorer(self, make: Callable[..., Any] | None = None) -> Callable[[Any, Batch], Any]:
        """What an engine scores with: exact norms, of one random picture of each example where there are pictures.

        Frozen arrays are captured, not published: an engine copies or sends them once, not at each refresh.

        Args:
            make: ``loss_fn -> scorer``, by default `isgd_jax.engines.scorers.grad_norm`. What it makes is called as
                ``scorer(params, (batch, keys))``, with None for keys where the loss needs none.

        Its parameters are what `published` makes of a refresh's.
        """
        from isgd_jax.engines.scorers import grad_norm  # a scorer is made only where somebody scores

        own: Any = (make or grad_norm)(lambda params, example: self.loss(params, self.frozen, example))

        def score(published: tuple[Params, Array | None], batch: Batch) -> Any:
            params, bits = published
            size = jax.tree.leaves(batch)[0].shape[0]
            keys = None if bits is None else jax.random.split(jax.random.wrap_key_data(bits), size)
            return own(params, self.pictures(keys, batch))

        return score

    def published(self, key: Key) -> Callable[[Params, int], Any]:
        """What the scorer is told at a refresh: parameters and, for randomness, bits of a key.

        Args:
            key: folded with the step, so that each refresh scores other random pictures, and a resumed run the same
                ones.
        """

        def make(params: Params, step: int) -> Any:
            bits = jax.random.key_data(jax.random.fold_in(key, step)) if self.is_random else None
            return params, bits

        return make

    def pictures(self, keys: Array | None, batch: Batch) -> tuple[Batch, Array | None]:
        """A batch as the loss sees it: augmented, with a key an example.

        Args:
            keys: one for each example [b], or None where nothing is random. Augmentation and loss get the same one.
            batch: examples [b].

        Returns:
            The batch, and the keys where the loss needs them, else None.
        """
        if self.augment is not None and keys is not None:
            batch = jax.vmap(self.augment)(keys, batch)
        return batch, keys if self.needs_key else None


def _check_params(params: Params) -> None:
    leaves = jax.tree.leaves(params)
    wrong = next((x for x in leaves if not hasattr(x, "dtype") or not hasattr(x, "shape")), None)
    is_module = any(f"{kind.__module__}.{kind.__name__}" == "flax.nnx.module.Module" for kind in type(params).__mro__)
    if not leaves or wrong is not None or is_module:
        got = "no leaves at all" if wrong is None else f"a leaf of type {type(wrong).__name__}"
        got = f"the module {type(params).__name__}" if is_module else got
        raise ArgumentTypeError(
            f"params must be a pytree of arrays, got {got}: take the arrays out of the model first (nnx.split(model, "
            "nnx.Param), equinox.partition), and close the rest over in loss_fn"
        )
    if any(map(_is_statistic, jax.tree.leaves(params, is_leaf=_is_statistic))) or _is_linen_with_statistics(params):
        raise ArgumentTypeError(
            "BatchNorm's statistics are among the params, where the optimizer would train them: give "
            'variables["params"] alone (nnx.split(model, nnx.Param, ...)), and the rest as frozen='
        )
    check_no_keys(params)


def _is_statistic(x: Any) -> bool:
    """Whether this is a statistic of Flax NNX."""
    return any(f"{kind.__module__}.{kind.__name__}" == "flax.nnx.variablelib.BatchStat" for kind in type(x).__mro__)


def _is_linen_with_statistics(params: Params) -> bool:
    """Whether these are all variables of a Linen model, and not its parameters alone."""
    return isinstance(params, Mapping) and {"params", "batch_stats"} <= set(params)


def _check_data(name: str, data: Batch) -> None:
    leaves = jax.tree.leaves(data)
    for leaf in leaves:
        if not isinstance(leaf, np.ndarray | jax.Array):
            raise ArgumentTypeError(f"the data of {name!r} must be arrays, got a {type(leaf).__name__}")
        if leaf.ndim == 0:
            raise ArgumentError(f"every array of {name!r} needs a leading axis of examples, got a single number")
    if not leaves:
        raise ArgumentError(f"the data of {name!r} hold no arrays")
    lengths = {leaf.shape[0] for leaf in leaves}
    if len(lengths) > 1 or 0 in lengths:
        raise ArgumentError(f"the arrays of {name!r} must have one row an example, got {sorted(lengths)} rows")
    check_held(data)
