"""A jaxpr as a graph that can be read backwards, cut, and run again. All that is private to JAX stands here.

A jaxpr is a list of equations with calls in it; the same inner jaxpr may be called twice. Here every value is its own
node that knows the operation it came from, and calls that only name or recompute (`jit`, `remat`) are inlined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend.core import Literal

_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}


@dataclass(eq=False)
class Value:
    """One array of the program: an input (``op`` is None) or output number ``index`` of an operation."""

    aval: Any
    op: Op | None = None
    index: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.aval.shape)

    @property
    def dtype(self) -> Any:
        return self.aval.dtype


@dataclass(eq=False)
class Constant:
    """A literal or a captured array: known without running anything."""

    value: Any
    op: None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(jax.numpy.shape(self.value))

    @property
    def dtype(self) -> Any:
        return jax.numpy.result_type(self.value)


Node = Value | Constant


@dataclass(eq=False)
class Op:
    """One primitive: ``apply(*inputs)`` returns the list of its outputs."""

    name: str
    inputs: list[Node]
    params: dict[str, Any]
    apply: Callable[..., Sequence[Any]]
    outputs: list[Value] = field(default_factory=list)


@dataclass(eq=False)
class Program:
    """``inputs`` and ``outputs`` of a closed jaxpr; what lies between hangs on the outputs."""

    inputs: list[Value]
    outputs: list[Node]


def program(closed: Any) -> Program:
    """The graph of a closed jaxpr, calls inlined."""
    inputs = [Value(v.aval) for v in closed.jaxpr.invars]
    return Program(inputs, _inline(closed.jaxpr, closed.consts, inputs))


def emit(name: str, function: Callable[..., Any], *inputs: Node) -> Value:
    """A new value computed from others: how the cut adds its own small operations to a program."""
    avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    return _attach(Op(name, list(inputs), {}, lambda *args: [function(*args)]), [jax.eval_shape(function, *avals)])[0]


def run(inputs: Sequence[Value], arguments: Sequence[Any], wanted: Sequence[Node]) -> list[Any]:
    """The wanted values, given the inputs; what nobody needs is not computed."""
    known: dict[Node, Any] = dict(zip(inputs, arguments, strict=True))

    def read(node: Node) -> Any:
        return node.value if isinstance(node, Constant) else known[node]

    for op in _in_order(wanted, known):
        known.update(zip(op.outputs, op.apply(*map(read, op.inputs)), strict=True))
    return [read(node) for node in wanted]


def _in_order(wanted: Sequence[Node], known: dict[Node, Any]) -> list[Op]:
    """The operations behind the wanted values, each after those it depends on (iterative: programs are deep)."""
    order: dict[Op, None] = {}
    stack = [(node.op, False) for node in reversed(wanted) if node.op is not None and node not in known]
    while stack:
        op, ready = stack.pop()
        if op in order:
            continue
        if ready:
            order[op] = None
            continue
        stack.append((op, True))
        stack.extend((x.op, False) for x in op.inputs if x.op is not None and x not in known and x.op not in order)
    return list(order)


def _inline(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Node]) -> list[Node]:
    known: dict[Any, Node] = dict(zip(jaxpr.invars, arguments, strict=True))
    known.update((v, Constant(c)) for v, c in zip(jaxpr.constvars, consts, strict=True))

    def read(atom: Any) -> Node:
        return Constant(atom.val) if isinstance(atom, Literal) else known[atom]

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        outputs = _call(eqn, inputs) if eqn.primitive.name in _CALLS else _primitive(eqn, inputs)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _call(eqn: Any, inputs: Sequence[Node]) -> list[Node]:
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if eqn.params.get("differentiated") and eqn.params.get("prevent_cse"):
        inputs = _barrier(inputs)  # as JAX lowers it: without, XLA merges the recomputation with the forward pass
    consts = getattr(inner, "consts", ())
    return _inline(getattr(inner, "jaxpr", inner), consts, inputs)


def _barrier(inputs: Sequence[Node]) -> list[Node]:
    op = Op("optimization_barrier", list(inputs), {}, lambda *args: jax.lax.optimization_barrier(args))
    return list(_attach(op, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]))


def _primitive(eqn: Any, inputs: Sequence[Node]) -> list[Value]:
    def apply(*args: Any) -> Sequence[Any]:
        with eqn.ctx.manager:
            out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
        return out if eqn.primitive.multiple_results else [out]

    return _attach(Op(eqn.primitive.name, list(inputs), eqn.params, apply), [v.aval for v in eqn.outvars])


def _attach(op: Op, avals: Sequence[Any]) -> list[Value]:
    op.outputs = [Value(aval, op, index) for index, aval in enumerate(avals)]
    return op.outputs
