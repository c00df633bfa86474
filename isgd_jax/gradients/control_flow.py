"""Cuts inside loops and branches: factors leave a `scan` or a `cond` in place of the gradient they would have formed.

A weight of a recurrence collects its gradient in the carry of the backward scan, one contraction a step; a weight of a
scanned layer leaves it as an output, one contraction a layer. Either way the steps' factors are stacked and the
contraction is done once, outside: summed over the steps, or kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from isgd_jax.gradients.contraction import Contraction, Parts, Side, Whole, axes_of, signature
from isgd_jax.gradients.jaxpr import Constant, Node, Op, Program, Value, made_varying, program, run, scan_sizes, sources

__all__ = ["cut_cond", "cut_scan"]


class _Scan:
    """A scan that can also put out values from the inside of its body, stacked over the steps."""

    def __init__(self, op: Op):
        self.op, self.body = op, program(op.params["jaxpr"])
        self.num_consts, self.num_carry = scan_sizes(op.params)
        self.length: int = op.params["length"]
        self.exports: dict[Node, Value] = {}
        (self.steps,) = axes_of([self.length])

    def exported(self, inner: Node) -> tuple[Node, bool]:
        """A value of the body as seen from outside, and whether it is stacked over the steps."""
        if isinstance(inner, Constant):
            return inner, False
        if inner in self.body.inputs:
            place = self.body.inputs.index(inner)
            if place < self.num_consts or place >= self.num_consts + self.num_carry:
                return self.op.inputs[place], place >= self.num_consts
        if inner not in self.exports:
            aval = jax.ShapeDtypeStruct((self.length, *inner.shape), inner.dtype)
            self.exports[inner] = self.op.add_output(aval)
        return self.exports[inner], True

    def lifted(self, term: Contraction, *, summed: bool) -> Contraction:
        """The contractions of all steps as one: summed over the steps, or with the steps as its first axis.

        Where neither factor changes from step to step, one of them is repeated: every step counts.
        """

        def lift(side: Side) -> Side:
            node, stacked = self.exported(side.node)
            return replace(side, node=node, axes=(self.steps, *side.axes) if stacked else side.axes)

        def every_step(x: Any) -> Any:
            return jnp.broadcast_to(x, (self.length, *x.shape))

        left, right = lift(term.left), lift(term.right)
        if self.steps not in (*left.axes, *right.axes):
            right = replace(right.mapped(every_step), axes=(self.steps, *right.axes))
        out, shape = (term.out, term.shape) if summed else ((self.steps, *term.out), (self.length, *term.shape))
        return replace(term, left=left, right=right, out=out, shape=shape)

    def apply(self, inputs: Sequence[Any], used: Sequence[bool]) -> Sequence[Any]:
        """Run the scan for those outputs that are used, exports included; None in the places of the others."""
        consts, init = inputs[: self.num_consts], inputs[self.num_consts :][: self.num_carry]
        outputs = [*self.body.outputs, *self.exports]
        emitted = [place for place in range(self.num_carry, len(outputs)) if used[place]]
        live = self._live(used, [outputs[place] for place in emitted])
        carried = [self.body.inputs[self.num_consts + place] for place in live]
        known = [*self.body.inputs[: self.num_consts], *carried, *self.body.inputs[self.num_consts + self.num_carry :]]
        wanted = [outputs[place] for place in (*live, *emitted)]

        def step(carry: list[Any], xs: Any) -> tuple[list[Any], list[Any]]:
            values = run(known, [*consts, *carry, *xs], wanted, self.body.effects)
            return values[: len(live)], values[len(live) :]

        how = {name: self.op.params[name] for name in ("reverse", "unroll")}
        xs = list(inputs[self.num_consts + self.num_carry :])
        last, stacked = lax.scan(step, [init[place] for place in live], xs, length=self.length, **how)
        results = dict(zip([*live, *emitted], [*last, *stacked], strict=True))
        return [results.get(place) for place in range(len(used))]

    def _live(self, used: Sequence[bool], emitted: Sequence[Node]) -> list[int]:
        """The carried values that anybody needs: a gradient that was cut is no longer collected."""
        places = range(self.num_carry)
        live = {place for place in places if used[place]}
        told = [x for op in self.body.effects for x in op.inputs]
        while True:
            read = sources([*emitted, *told, *(self.body.outputs[place] for place in sorted(live))])
            more = live | {place for place in places if self.body.inputs[self.num_consts + place] in read}
            if more == live:
                return sorted(live)
            live = more


def cut_scan(node: Value, op: Op, cut: Callable[[Node], Parts]) -> Parts | None:
    """The parts of a scan's output.

    Args:
        node: the output: collected in the carry, or stacked over the steps.
        op: the scan.
        cut: reads a value of the body as `cuts.cut` reads one of the program.

    Returns:
        Contractions of factors that now leave the scan; None where the body's value stays whole, or where its carry is
        more than a sum (``carry + this step's``).
    """
    scan = op.region or _Scan(op)
    parts = cut(scan.body.outputs[node.index])
    kept: Parts = []
    if node.index < scan.num_carry:
        own = scan.body.inputs[scan.num_consts + node.index]
        others = [part for part in parts if not (isinstance(part, Whole) and part.value is own)]
        if len(others) != len(parts) - 1:
            return None
        parts, kept = others, cut(op.inputs[scan.num_consts + node.index])
    terms = [part for part in parts if isinstance(part, Contraction)]
    if len(terms) < len(parts):
        return None
    op.region = scan
    return [*kept, *(scan.lifted(term, summed=node.index < scan.num_carry) for term in terms)]


class _Branches:
    """A cond that can also put out values from the inside of its branches: zeros from those that have none."""

    def __init__(self, op: Op):
        self.op = op
        self.branches: list[Program] = [program(branch) for branch in op.params["branches"]]
        outputs = zip(*(branch.outputs for branch in self.branches), strict=True)
        self.inside: list[dict[int, Node]] = [dict(enumerate(nodes)) for nodes in outputs]
        """For each output, the node behind it in each branch that has one."""

    def exported(self, inner: dict[int, Node]) -> Node:
        """Values of the branches, by their number, as one value outside: zeros from a branch that has none."""
        self.inside.append(inner)
        first = next(iter(inner.values()))
        return self.op.add_output(jax.ShapeDtypeStruct(first.shape, first.dtype))

    def apply(self, inputs: Sequence[Any], used: Sequence[bool]) -> Sequence[Any]:
        """Run the branch that is taken for those outputs that are used; None in the places of the others."""
        index, *operands = inputs
        wanted = [place for place in range(len(used)) if used[place]]
        branches = [self._branch(number, wanted) for number in range(len(self.branches))]
        placed = dict(zip(wanted, lax.switch(index, branches, *operands), strict=True))
        return [placed.get(place) for place in range(len(used))]

    def _branch(self, number: int, wanted: Sequence[int]) -> Callable[..., list[Any]]:
        mine = {place: self.inside[place][number] for place in wanted if number in self.inside[place]}

        def branch(*operands: Any) -> list[Any]:
            taken = self.branches[number]
            found = run(taken.inputs, operands, list(mine.values()), taken.effects)
            values = dict(zip(mine, found, strict=True))
            results = {place: values.get(place, self._zeros(place)) for place in wanted}
            # What the cond did not put out itself is each device's own in all branches, where any operand is.
            return [made_varying(x, operands) if place >= len(taken.outputs) else x for place, x in results.items()]

        return branch

    def _zeros(self, place: int) -> Any:
        return jnp.zeros(self.op.outputs[place].shape, self.op.outputs[place].dtype)


def cut_cond(node: Value, op: Op, cut: Callable[[Node], Parts]) -> Parts | None:
    """The parts of a branch's output: those of all branches, zero where another one was taken.

    Contractions that are alike in shapes and layout share factors, so that most branches cost one contraction.

    Args:
        node: the output.
        op: the cond.
        cut: reads a value of a branch as `cuts.cut` reads one of the program.

    Returns:
        The contractions; None where any branch's value stays whole.
    """
    branches = op.region or _Branches(op)
    parts = [cut(branch.outputs[node.index]) for branch in branches.branches]
    if any(isinstance(part, Whole) for branch in parts for part in branch):
        return None
    op.region = branches
    alike: dict[Any, dict[int, Contraction]] = {}
    for number, branch in enumerate(parts):
        for place, part in enumerate(branch):
            if isinstance(part, Contraction):
                alike.setdefault((place, signature(part)), {})[number] = part

    def merged(terms: dict[int, Contraction]) -> Contraction:
        first = next(iter(terms.values()))
        left = branches.exported({number: term.left.node for number, term in terms.items()})
        right = branches.exported({number: term.right.node for number, term in terms.items()})
        return replace(first, left=replace(first.left, node=left), right=replace(first.right, node=right))

    return [merged(terms) for terms in alike.values()]
