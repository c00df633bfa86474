"""A report: what becomes of each parameter's per-example gradient, and why."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from isgd_jax.gradients.leaf import Factored, how_squared
from isgd_jax.gradients.plan import LeafPlan, make_plan

__all__ = ["LeafReport", "Report", "explain"]


class LeafReport(NamedTuple):
    """What becomes of the gradients of one parameter.

    Attributes:
        path: of the parameter in its tree.
        how: its gradients are held, and how their norm is asked.
        why: the primitives that stood in the way, where they are formed; empty otherwise.
        held_bytes: of the whole batch, as they are held.
        stacked_bytes: of the whole batch, if one array an example were formed.
    """

    path: str
    how: str
    why: str
    held_bytes: int
    stacked_bytes: int


class Report(NamedTuple):
    """One line a parameter; print it."""

    leaves: tuple[LeafReport, ...]

    def __str__(self) -> str:
        rows = [("parameter", "gradients", "because", "bytes", "stacked")]
        rows += [(x.path, x.how, x.why, f"{x.held_bytes:,}", f"{x.stacked_bytes:,}") for x in self.leaves]
        held, stacked = (sum(x) for x in zip(*((x.held_bytes, x.stacked_bytes) for x in self.leaves), strict=True))
        rows.append(("all", "", "", f"{held:,}", f"{stacked:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join([*map(str.ljust, r[:3], widths[:3]), *map(str.rjust, r[3:], widths[3:])]) for r in rows)
        return "\n".join(line.rstrip() for line in lines)


def explain(loss_fn: Callable[..., Any], *args: Any, argnums: int = 0, has_aux: bool = False) -> Report:
    """What `per_example_grads` makes of ``loss_fn`` and ``args`` (the last is the batch); nothing is computed.

    A parameter used by one contraction is *factored*: its two factors are held, and its norm is asked of them as said.
    Other gradients are *formed*, one array an example: biases and scales, for which that is cheapest, and whatever
    comes out of a primitive that `cuts` cannot read, which is then named.

    Args:
        loss_fn: as for `per_example_grads`.
        args: of the function that `per_example_grads` returns; arrays or `jax.ShapeDtypeStruct`.
        argnums: which of them is differentiated.
        has_aux: ``loss_fn`` returns ``(loss, aux)``.

    Returns:
        A line for each parameter; ``print`` shows them as a table.
    """
    *shared, batch = args
    plan = make_plan(loss_fn, argnums, has_aux, shared, batch)
    _, grads = jax.eval_shape(lambda shared, batch: plan.run(shared, batch, joint=False), shared, batch)
    leaves = jax.tree_util.tree_leaves_with_path(grads, is_leaf=lambda x: isinstance(x, Factored))
    b = jax.tree.leaves(batch)[0].shape[0]
    return Report(tuple(_leaf(path, leaf, plan, b) for (path, leaf), plan in zip(leaves, plan.leaves, strict=True)))


def _leaf(path: Any, leaf: Any, plan: LeafPlan, b: int) -> LeafReport:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    arrays = jax.tree.leaves(replace(leaf, guard=None) if isinstance(leaf, Factored) else leaf)
    held = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in arrays)
    stacked = b * math.prod(plan.param.shape) * np.dtype(plan.param.dtype).itemsize
    return LeafReport(name, _how(leaf, plan), _why(plan), held, stacked)


def _how(leaf: Any, plan: LeafPlan) -> str:
    if not plan.terms and not plan.formed and not plan.shared:
        return "zero"
    parts = []
    if plan.terms:
        parts.append(
            f"factored, {how_squared(leaf)} of " + " + ".join(str(x.right.shape[2]) for x in leaf.terms) + " rows"
        )
    parts += ["formed"] if plan.formed else []
    parts += ["the same for all examples"] if plan.shared else []
    return " and ".join(parts)


def _why(plan: LeafPlan) -> str:
    return ", ".join(dict.fromkeys(part.because for part in (*plan.formed, *plan.shared)))
