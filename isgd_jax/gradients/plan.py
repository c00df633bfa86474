"""The plan of a batch's gradients: what is computed for each example, and how the leaves are made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from isgd_jax.errors import ArgumentError, ArgumentTypeError
from isgd_jax.gradients import costs
from isgd_jax.gradients.contraction import Canonical, Contraction, Whole, canonical, merged
from isgd_jax.gradients.cuts import cut
from isgd_jax.gradients.factors import wide
from isgd_jax.gradients.jaxpr import Node, Program, Value, dependent, one_example, operations, program, run
from isgd_jax.gradients.leaf import Factored, formed, guard_of, is_cheaper_formed
from isgd_jax.gradients.meshes import lies_on_a_mesh, spec_of
from isgd_jax.gradients.placement import placed, stacked_split
from isgd_jax.gradients.terms import Outer, stacked_terms

__all__ = ["LeafPlan", "Plan", "check_no_keys", "make_plan"]

_WRITTEN = {
    "conv_general_dilated", "cumsum", "custom_jvp_call", "dot_general", "gather", "reduce_window_max", "scan",
    "scatter-add", "select_and_gather_add", "select_and_scatter_add", "sort", "while",
}  # fmt: skip
"""Operations whose results XLA writes to memory, activations among them: a measure of what an example needs."""


@dataclass(frozen=True)
class LeafPlan:
    """One parameter: its ``terms`` stay factors; ``formed`` for each example, ``shared`` once for all."""

    param: Any
    spec: PartitionSpec
    """How it is split, where axes of a mesh are explicit."""
    terms: list[Canonical]
    formed: list[Whole]
    shared: list[Whole]

    @property
    def nodes(self) -> list[Node]:
        """What is computed for each example."""
        return [x for term in self.terms for x in (term.left, term.right)] + [part.value for part in self.formed]

    def leaf(self, each: Iterator[Any], once: Iterator[Any], b: int, joint: bool) -> Any:
        """The lazy leaf of a batch.

        Args:
            each: values of one example's program mapped over the batch, [b, ...]; this leaf takes its own, in order.
            once: values that no example changes; likewise.
            b: examples in the batch.
            joint: whether to form the product now, where that costs less than what will be asked of the factors.

        Returns:
            A `Factored`, or a plain stacked array [b, *shape] where nothing is left to contract.
        """
        terms = stacked_terms(
            [Outer(term.factor(next(each)), next(each), term.roles, term.is_rounded) for term in self.terms]
        )
        whole, shared = _sum_of(each, len(self.formed)), _sum_of(once, len(self.shared))
        if whole is not None and shared is None and not terms:
            return whole
        if whole is None and not terms:
            terms = (_nothing(b, self.param),)
        leaf = Factored(terms, self.param.shape, self.param.dtype, whole, shared, self.spec, guard_of(b))
        return placed(formed, out=stacked_split)(leaf) if joint and is_cheaper_formed(leaf) else leaf


def _sum_of(arrays: Iterator[Any], count: int) -> Any:
    taken = [next(arrays) for _ in range(count)]
    return sum(taken[1:], start=taken[0]) if taken else None


def _nothing(b: int, param: Any) -> Outer:
    """The gradient of a parameter that no example's loss depends on: a sum over no rows at all."""
    rows, ones = (jnp.zeros((b, 1, 0, size), wide(param.dtype)) for size in (param.size, 1))
    return Outer(rows, ones, ((param.size, "i"), (1, "o")))


@dataclass(frozen=True)
class Plan:
    """The program of ONE example's loss and gradients, and how each leaf is made of it."""

    traced: Program
    result: list[Node]
    leaves: list[LeafPlan]
    aux_tree: Any
    grads_tree: Any

    def run(self, shared: Sequence[Any], batch: Any, joint: bool) -> tuple[tuple[Any, Any], Any]:
        """``(losses, aux), grads`` of a batch: one forward and one backward pass, mapped over the examples.

        Args:
            shared: the arguments of the loss but the example, as it was traced with.
            batch: examples with a leading axis b.
            joint: see `LeafPlan.leaf`.
        """
        arguments, examples = jax.tree.leaves(shared), jax.tree.leaves(batch)
        wanted = [*self.result, *(node for leaf in self.leaves for node in leaf.nodes)]

        def one(example: list[Any]) -> list[Any]:
            return run(self.traced.inputs, [*arguments, *example], wanted, self.traced.effects)

        losses, *rest = jax.vmap(one)(examples)
        aux, each = rest[: len(self.result) - 1], iter(rest[len(self.result) - 1 :])
        parts = [part.value for leaf in self.leaves for part in leaf.shared]
        once = iter(run(self.traced.inputs[: len(arguments)], arguments, parts))
        grads = [leaf.leaf(each, once, losses.shape[0], joint) for leaf in self.leaves]
        return (losses, jax.tree.unflatten(self.aux_tree, aux)), jax.tree.unflatten(self.grads_tree, grads)

    def examples_at_a_time(self, shared: Any, batch: Any, most: int | None = None) -> int | None:
        """How many examples of a batch the cache of a CPU favors, see `costs.examples_at_a_time`.

        Args:
            shared: the arguments of the loss but the example.
            batch: examples with a leading axis b.
            most: bytes to write at most.

        Returns:
            None for all of them, also where arrays lie on a mesh of several devices: each has its examples at once.
        """
        if lies_on_a_mesh((shared, batch)):
            return None
        b = jax.tree.leaves(batch)[0].shape[0]
        nodes = [node for leaf in self.leaves for node in leaf.nodes]
        written = [(_bytes(op.outputs), op.params.get("length", 1)) for op in operations(nodes) if op.name in _WRITTEN]
        return costs.examples_at_a_time(
            b,
            sum(count for count, _ in written),
            _bytes(leaf.param for leaf in self.leaves),
            most,
            turn=sum(count // turns for count, turns in written),
        )


def _bytes(arrays: Iterable[Any]) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)


def make_plan(
    loss_fn: Callable[..., Any], argnums: int | tuple[int, ...], has_aux: bool, shared: Sequence[Any], batch: Any
) -> Plan:
    """Trace the gradient of ONE example and cut it before the last contraction of each parameter.

    Shapes alone are used, so the plan holds for any batch size, and jit compiles it with the step.

    Args:
        loss_fn: ``(*shared, example) -> scalar``, or with ``has_aux`` a pair ``(scalar, aux)``.
        argnums: which of the shared arguments are differentiated.
        has_aux: whether the loss returns more.
        shared: arrays or their shapes.
        batch: examples with a leading axis b; of it one is traced.

    Raises:
        TypeError: there is no real or complex number to differentiate, or a random key beside them; the loss returns
            something else than an array, or computes in 64 bits where the process does not.
        ValueError: the loss is no scalar, ``argnums`` names no argument before the batch, or an array of the batch has
            no leading axis, or no example.
    """
    example = jax.tree.map(_without_batch_axis, batch)
    places = tuple(_from_the_front(n, len(shared)) for n in (argnums if isinstance(argnums, tuple) else (argnums,)))
    argnums = places if isinstance(argnums, tuple) else places[0]
    value_and_grad = jax.value_and_grad(checked(loss_fn, has_aux), argnums, has_aux=True, allow_int=True)
    closed, shapes = jax.make_jaxpr(value_and_grad, return_shape=True)(*shared, example)
    (_, aux), grads = shapes
    traced = program(closed)
    _check_width(traced)
    params = [shared[n] for n in argnums] if isinstance(argnums, tuple) else shared[argnums]
    _check_differentiable(params)
    result = traced.outputs[: 1 + len(jax.tree.leaves(aux))]
    examples = traced.inputs[len(jax.tree.leaves(shared)) :]
    leaves = [
        _leaf_plan(node, param, examples)
        for node, param in zip(traced.outputs[len(result) :], jax.tree.leaves(params), strict=True)
    ]
    return Plan(traced, result, leaves, jax.tree.structure(aux), jax.tree.structure(grads))


def _from_the_front(argnum: int, count: int) -> int:
    """From 0 up: a negative one counts back from the last argument, which is the batch, as for `jax.grad`."""
    if not -count - 1 <= argnum < count or argnum == -1:
        raise ArgumentError(
            f"argnums must name arguments before the batch, 0 to {count - 1}, or {-count - 1} to -2 from behind; got "
            f"{argnum}"
        )
    return argnum % (count + 1)


def check_no_keys(params: Any) -> None:
    """Refuse random keys among the parameters, where Flax NNX puts those of Dropout unless they are split off.

    Args:
        params: what is differentiated: a pytree of arrays, or of their shapes.

    Raises:
        TypeError: a leaf is a key of `jax.random.key`.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            raise ArgumentTypeError(
                f"params must be arrays of numbers, got a random key at {jax.tree_util.keystr(path)}: split off what "
                "is not trained, in Flax NNX by `graph, params, rest = nnx.split(model, nnx.Param, ...)` and "
                "nnx.merge(graph, params, rest) in the loss"
            )


def _check_width(traced: Program) -> None:
    """Refuse numbers of 64 bits in a program whose process has none: they would be cut wherever it is run again."""
    if jax.dtypes.canonicalize_dtype(np.float64) == np.float64:
        return
    found = {str(x.dtype) for op in operations(traced.outputs) for x in op.outputs} & _OF_64_BITS
    if found:
        raise ArgumentTypeError(
            f"a part of loss_fn computes in {', '.join(sorted(found))}, by jax.enable_x64 within it, and the process "
            "does not: enable it for all, jax.config.update('jax_enable_x64', True)"
        )


_OF_64_BITS = {"float64", "complex128", "int64", "uint64"}


def _check_differentiable(params: Any) -> None:
    """Beside others an integer has a gradient of zero; alone, all norms would be zero without a word."""
    check_no_keys(params)
    dtypes = {str(jnp.result_type(leaf)): jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
              for leaf in jax.tree.leaves(params)}  # fmt: skip
    if dtypes and not any(dtypes.values()):
        raise ArgumentTypeError(
            f"params must have an array of real or complex numbers to differentiate, got {', '.join(sorted(dtypes))} "
            "alone: convert them, such as by jax.tree.map(jnp.float32, params)"
        )


def _without_batch_axis(x: Any) -> jax.ShapeDtypeStruct:
    if not jnp.shape(x):
        raise ArgumentError("every array of a batch needs a leading axis of examples, got a scalar in the batch")
    if not jnp.shape(x)[0]:
        raise ArgumentError(f"a batch needs at least one example, got an array of shape {jnp.shape(x)} in the batch")
    return one_example(x)


def _leaf_plan(node: Node, param: Any, examples: Sequence[Value]) -> LeafPlan:
    spec = spec_of(param)
    param = jax.ShapeDtypeStruct(jnp.shape(param), jnp.result_type(param))
    if not jnp.issubdtype(param.dtype, jnp.inexact) or not param.size:
        return LeafPlan(param, spec, [], [], [])
    parts = cut(node)
    whole = [part for part in parts if isinstance(part, Whole)]
    varies = dependent(examples, [part.value for part in whole])
    formed = [part for part, each in zip(whole, varies, strict=True) if each]
    shared = [part for part, each in zip(whole, varies, strict=True) if not each]
    terms = merged([canonical(part) for part in parts if isinstance(part, Contraction)])
    return LeafPlan(param, spec, terms, formed, shared)


def check_loss(value: Any, advice: str = "") -> None:
    """Refuse what is not the loss of one example, in one clear sentence.

    Args:
        value: as the loss function returned it.
        advice: what else may help where it is no number.

    Raises:
        TypeError: it is no number.
        ValueError: it is an array of several.
    """
    is_leaf = len(jax.tree.leaves(value)) == 1 and jax.tree_util.all_leaves([value])
    if not is_leaf or not _is_numeric(value):
        raise ArgumentTypeError(
            f"loss_fn must return the scalar loss of ONE example, got {_named(value)}: return the number alone{advice}"
        )
    if jnp.shape(value) != ():
        raise ArgumentError(
            f"loss_fn must return the scalar loss of ONE example, got shape {jnp.shape(value)}; "
            "if it is written for a batch, wrap it: per_example_grads(from_batch_loss(loss_fn))"
        )


def _named(value: Any) -> str:
    if isinstance(value, np.ndarray | np.generic):
        return f"an array of {value.dtype}"
    return "None" if value is None else f"a {type(value).__name__}"


def _is_numeric(value: Any) -> bool:
    """Whether JAX takes it for an array."""
    try:
        jax.typeof(value)
    except TypeError:
        return hasattr(value, "__jax_array__")
    return True


def checked(loss_fn: Callable[..., Any], has_aux: bool = False) -> Callable[..., tuple[Any, Any]]:
    """``loss_fn`` returning (loss, aux) always, refused where the loss is not one that has a gradient.

    Args:
        loss_fn: ``(*shared, example) -> scalar``, or with ``has_aux`` a pair ``(scalar, aux)``.
        has_aux: whether it returns a pair.

    Raises:
        TypeError: by what is returned; the loss is no real number, or what should be a pair is none.
        ValueError: by what is returned; the loss is an array of several.
    """

    def pair(*args: Any) -> tuple[Any, Any]:
        value, aux = loss_fn(*args), None
        if has_aux:
            if not isinstance(value, tuple | list) or len(value) != 2:
                raise ArgumentTypeError(
                    f"loss_fn must return a pair (loss, aux) with has_aux=True, got {_named(value)}: return both, or "
                    "leave has_aux out"
                )
            value, aux = value
        more = ", or, where more comes with it, say has_aux=True; a Problem measures the rest by metrics="
        check_loss(value, "" if has_aux else more)
        if not jnp.issubdtype(dtype := jnp.result_type(value), jnp.floating):
            raise ArgumentTypeError(
                f"loss_fn must return a real number, which has a gradient, got {dtype}: convert an integer by "
                "jnp.float32, and of a complex number take jnp.real or jnp.abs"
            )
        return value, aux

    return pair
