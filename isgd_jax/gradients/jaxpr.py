"""A jaxpr as a graph that can be read backwards, cut, and run again. All that is private to JAX stands here.

A jaxpr is a list of equations with calls in it; the same inner jaxpr may be called twice. Here every value is a node
that knows the operation it came from, and calls that only name or recompute (`jit`, `remat`) are inlined. What is
computed twice of the same values is one node (value numbering): XLA would find that too, but here it also tells that
two contractions share a factor, as in losses that differentiate a model several times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun

from isgd_jax.gradients import costs
from isgd_jax.gradients.convolutions import in_fast_layout

__all__ = [
    "Constant",
    "Node",
    "Op",
    "Program",
    "Value",
    "dependent",
    "emit",
    "is_zero",
    "made_varying",
    "one_example",
    "operations",
    "program",
    "relaid",
    "run",
    "scan_sizes",
    "sources",
    "varying_axes",
]

_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}


@dataclass(eq=False)
class Value:
    """One array of the program: an input (``op`` is None) or output number ``index`` of an operation."""

    aval: Any
    op: Op | None = None
    index: int = 0
    emitted: dict[Any, Value] = field(default_factory=dict)
    """What `emit` has made of it."""
    parts: Any = None
    """What `cuts.cut` has found that it is the sum of: asked again wherever it is used again."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return tuple(self.aval.shape)

    @property
    def dtype(self) -> Any:
        """Of the array."""
        return self.aval.dtype


@dataclass(eq=False)
class Constant:
    """A literal or a captured array: known without running anything."""

    value: Any
    op: None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array, or () of a number."""
        return tuple(jax.numpy.shape(self.value))

    @property
    def dtype(self) -> Any:
        """As JAX types it."""
        return jax.numpy.result_type(self.value)


Node = Value | Constant


def is_zero(node: Node) -> bool:
    """Whether a value is known to be zeros alone; of what is traced outside, nothing is known."""
    while node.op is not None and node.op.name == "pvary":  # a zero that counts as each device's own
        node = node.op.inputs[node.index]
    return isinstance(node, Constant) and not isinstance(node.value, jax.core.Tracer) and not np.any(node.value)


@dataclass(eq=False)
class Op:
    """One primitive: ``apply(*inputs)`` returns the list of its outputs.

    A ``region`` (a loop or branches whose inside was cut) takes the place of ``apply``: ``region.apply(inputs, used)``;
    ``used`` says which outputs anybody reads.
    """

    name: str
    inputs: list[Node]
    params: dict[str, Any]
    apply: Callable[..., Sequence[Any]]
    outputs: list[Value] = field(default_factory=list)
    region: Any = None

    def add_output(self, aval: Any) -> Value:
        """One more output, of this shape and dtype: what a region exports."""
        self.outputs.append(Value(aval, self, len(self.outputs)))
        return self.outputs[-1]


@dataclass(eq=False)
class Program:
    """``inputs`` and ``outputs`` of a closed jaxpr; what lies between hangs on the outputs."""

    inputs: list[Value]
    outputs: list[Node]
    effects: list[Op] = field(default_factory=list)
    """What is to be run though nobody reads it, such as `jax.debug.print`."""


def program(closed: Any) -> Program:
    """The graph of a closed jaxpr, calls inlined.

    Args:
        closed: of `jax.make_jaxpr`; its captured arrays become constants.

    Returns:
        Its inputs and outputs. An inner jaxpr that is called twice is there twice, so that every value has one origin.
    """
    inputs = [Value(v.aval) for v in closed.jaxpr.invars]
    if _has_mutable_arrays(closed.jaxpr):
        op = Op("mutable array", list(inputs), {}, jaxpr_as_fun(closed))
        return Program(inputs, list(_attach(op, closed.out_avals)))
    effects: list[Op] = []
    return Program(inputs, _inline(closed.jaxpr, closed.consts, inputs, _Seen({}, effects)), effects)


def _has_mutable_arrays(jaxpr: Any) -> bool:
    """Whether it reads or writes arrays in place (`jax.new_ref`): what follows what is then no longer seen from what
    reads what, so that such a program is run as it stands.
    """
    for eqn in jaxpr.eqns:
        if any(type(getattr(v, "aval", None)).__name__ == "AbstractRef" for v in (*eqn.invars, *eqn.outvars)):
            return True
        if eqn.primitive.name in _CALLS and _has_mutable_arrays(_inner(eqn)[0]):
            return True
    return False


def varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes along which devices hold different values, inside `jax.shard_map`; none elsewhere."""
    types = [jax.typeof(x) for x in jax.tree.leaves(tree)]
    return frozenset().union(*(getattr(getattr(x, "manual_axis_type", None), "varying", ()) or () for x in types))


def one_example(x: Any) -> jax.ShapeDtypeStruct:
    """The type of one row of a batch: by shape alone, for an axis that lies on several devices is not to be indexed."""
    known = jax.typeof(x)
    more: dict[str, Any] = {}
    spec = getattr(getattr(known, "sharding", None), "spec", ())
    if any(names is not None for names in spec) or varying_axes(x):  # the loops of a loss must know the mesh
        more["sharding"] = jax.sharding.NamedSharding(known.sharding.mesh, jax.sharding.PartitionSpec(*spec[1:]))
    if varying_axes(x):
        more["manual_axis_type"] = known.manual_axis_type
    return jax.ShapeDtypeStruct(known.shape[1:], known.dtype, weak_type=known.weak_type, **more)


def made_varying(tree: Any, batch: Any) -> Any:
    """``tree``, its arrays told to differ between devices wherever those of ``batch`` do.

    Of what is the same on all devices, `jax.grad` inside `jax.shard_map` gives the sum over devices: no gradient of an
    example. A copy that counts as each device's own has each device's own gradients. Nothing moves.
    """
    axes = varying_axes(batch)

    def vary(x: Any) -> Any:
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree) if axes else tree


def emit(name: str, function: Callable[..., Any], *inputs: Node) -> Value:
    """A value computed from others: how the cut adds its own small operations to a program.

    Of equal functions of the same values, the same one: a function that compares by what it does is computed once.

    Args:
        name: in messages and reports.
        function: of as many arrays, to one array; it is traced for its shape, and run with the program.
        inputs: values and constants.
    """
    known = next((x.emitted for x in inputs if isinstance(x, Value)), {})
    key = (function, *map(_identity, inputs))
    if key not in known:
        avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
        op = Op(name, list(inputs), {}, lambda *args: [function(*args)])
        known[key] = _attach(op, [jax.eval_shape(function, *avals)])[0]
    return known[key]


def run(
    inputs: Sequence[Value], arguments: Sequence[Any], wanted: Sequence[Node], effects: Sequence[Op] = ()
) -> list[Any]:
    """The wanted values, given the inputs; what nobody needs is not computed.

    Args:
        inputs: of the program; more than the wanted values need does no harm.
        arguments: their values, as many.
        wanted: the values to compute, constants among them.
        effects: operations of the program that are to be run besides.

    Returns:
        One value for each of the wanted; under a trace, traced ones.
    """
    known: dict[Node, Any] = dict(zip(inputs, arguments, strict=True))

    def read(node: Node) -> Any:
        return node.value if isinstance(node, Constant) else known[node]

    order = operations(wanted, effects)
    used = set(wanted).union(*(op.inputs for op in order))
    for op in order:
        values = [read(node) for node in op.inputs]
        outputs = op.region.apply(values, [x in used for x in op.outputs]) if op.region else op.apply(*values)
        known.update(zip(op.outputs, outputs, strict=True))
    return [read(node) for node in wanted]


def relaid(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its convolutions in the layout that is fast inside loops, see `convolutions`.

    It is the same function on machines without such a layout. Where convolutions move, what is marked to be computed
    twice (`jax.checkpoint`) is computed once.

    Args:
        function: of arrays, to a tree of arrays; it is traced once, and without a convolution stays as it is.
    """

    def called(*args: Any) -> Any:
        if not costs.machine().one_layout:
            return function(*args)
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        traced, leaves = program(closed), jax.tree.leaves(args)
        if any(op.name == "conv_general_dilated" for op in operations(traced.outputs)):
            found = run(traced.inputs, leaves, traced.outputs, traced.effects)
        else:
            found = jaxpr_as_fun(closed)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), found)

    return called


def operations(wanted: Sequence[Node], effects: Sequence[Op] = ()) -> list[Op]:
    """The operations behind the wanted values, each after those it depends on (no recursion: programs are deep).

    Args:
        wanted: values; of constants and inputs there is nothing to do.
        effects: operations that are wanted themselves.

    Returns:
        In an order in which they can be run.
    """
    order: dict[Op, None] = {}
    stack = [(op, False) for op in (*reversed(effects), *(x.op for x in reversed(wanted))) if op is not None]
    while stack:
        op, ready = stack.pop()
        if ready:
            order.setdefault(op)
        elif op not in order:
            stack.append((op, True))
            stack.extend((x.op, False) for x in op.inputs if x.op is not None and x.op not in order)
    return list(order)


def sources(wanted: Sequence[Node]) -> set[Node]:
    """The inputs that the wanted values depend on."""
    read = set(wanted).union(*(op.inputs for op in operations(wanted)))
    return {node for node in read if isinstance(node, Value) and node.op is None}


def dependent(inputs: Sequence[Value], wanted: Sequence[Node]) -> list[bool]:
    """Which of the wanted values depend on any of the inputs.

    Args:
        inputs: of the program, such as those of the example.
        wanted: values of it.

    Returns:
        For each of the wanted. What does not depend on the example is computed once for a whole batch.
    """
    touched: set[Node] = set(inputs)
    for op in operations(wanted):
        if not touched.isdisjoint(op.inputs):
            touched.update(op.outputs)
    return [node in touched for node in wanted]


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.12
    return len(consts), len(carry)


@dataclass(frozen=True)
class _Seen:
    """The outputs of every operation of a program that may be shared, by the operation and its inputs; and the
    operations with effects.
    """

    known: dict[Any, list[Value]]
    effects: list[Op]


def _inline(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Node], seen: _Seen) -> list[Node]:
    known: dict[Any, Node] = dict(zip(jaxpr.invars, arguments, strict=True))
    known.update((v, Constant(c)) for v, c in zip(jaxpr.constvars, consts, strict=True))

    def read(atom: Any) -> Node:
        return Constant(atom.val) if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        outputs = _call(eqn, inputs, seen) if eqn.primitive.name in _CALLS else _primitive(eqn, inputs, seen)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _call(eqn: Any, inputs: Sequence[Node], seen: _Seen) -> list[Node]:
    if eqn.params.get("differentiated") and eqn.params.get("prevent_cse"):
        inputs = _barrier(inputs)  # as JAX lowers it: without, XLA merges the recomputation with the forward pass
    return _inline(*_inner(eqn), inputs, seen)


def _inner(eqn: Any) -> tuple[Any, Sequence[Any]]:
    """The jaxpr of a call, and its constants."""
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())


def _barrier(inputs: Sequence[Node]) -> list[Node]:
    op = Op("optimization_barrier", list(inputs), {}, lambda *args: jax.lax.optimization_barrier(args))
    return list(_attach(op, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]))


def _primitive(eqn: Any, inputs: Sequence[Node], seen: _Seen) -> list[Value]:
    def bind(*args: Any, **changed: Any) -> Any:
        with eqn.ctx.manager:
            return eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params | changed))

    def apply(*args: Any) -> Sequence[Any]:
        if eqn.primitive.name == "conv_general_dilated":
            left, right = args
            layout = eqn.params["dimension_numbers"]
            return [in_fast_layout(lambda x, y, numbers: bind(x, y, dimension_numbers=numbers), left, right, layout)]
        out = bind(*args)
        return out if eqn.primitive.multiple_results else [out]

    def made() -> list[Value]:
        op = Op(eqn.primitive.name, list(inputs), eqn.params, apply)
        if any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects):  # collectives have that one
            seen.effects.append(op)
        return _attach(op, [v.aval for v in eqn.outvars])

    if eqn.effects or eqn.primitive.name == "optimization_barrier":
        return made()
    key = (eqn.primitive, eqn.ctx, tuple(eqn.params.items()), *map(_identity, inputs))
    try:
        found = seen.known.get(key)
    except TypeError:  # a parameter without a hash
        return made()
    return found if found is not None else seen.known.setdefault(key, made())


def _identity(node: Node) -> Any:
    """Equal for nodes that are one value: the node itself; of a scalar constant, type and bits, where it is known."""
    if isinstance(node, Value):
        return node
    is_key = jax.numpy.issubdtype(node.dtype, jax.dtypes.extended)
    if node.shape or is_key or isinstance(node.value, jax.core.Tracer):
        return _Same(node.value)
    weak = getattr(jax.typeof(node.value), "weak_type", False)
    return str(node.dtype), weak, np.asarray(node.value).tobytes()


class _Same:
    """A captured array, equal to itself alone; what it is compared by stays alive."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _attach(op: Op, avals: Sequence[Any]) -> list[Value]:
    op.outputs = [Value(aval, op, index) for index, aval in enumerate(avals)]
    return op.outputs
