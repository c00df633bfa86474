"""The definition that lazy gradients are held to: `vmap(jax.grad)`, and sums over the arrays it forms."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

import isgd_jax as isgd
from isgd_jax.gradients import lazy


def flat(stacked: Any) -> np.ndarray:
    """All gradients of a batch as one matrix [b, parameters], in float64."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(stacked)]
    return np.concatenate([x.reshape(x.shape[0], -1) for x in leaves], axis=1)


def stacked(loss_fn: Any, params: Any, *data: Any) -> Any:
    """The gradients of a batch, formed, in one compiled program: called outside jit, each operation is one."""
    return jax.jit(isgd.stacked_per_example_grads(loss_fn))(params, *data)


def norms(loss_fn: Any, params: Any, *data: Any) -> np.ndarray:
    """Their norms [b], in float64."""
    return norms_of(stacked(loss_fn, params, *data))


def norms_of(formed: Any) -> np.ndarray:
    """The norms [b] of gradients that are formed, in float64."""
    return np.linalg.norm(flat(formed), axis=1)


def check(loss_fn: Any, params: Any, batch: Any, *, rtol: float = 1e-5) -> Any:
    """Everything that can be asked of lazy gradients, against the definition; returns them for more questions."""
    size = jax.tree.leaves(batch)[0].shape[0]
    weights = jnp.asarray(np.linspace(0.5, 2.0, size), jnp.float32)
    made, asked = jax.jit(lambda p, x: _ask(loss_fn, p, x, weights))(params, batch)
    formed = stacked(loss_fn, params, batch)
    g = flat(formed)
    norms = np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(asked["norms"], norms, rtol=rtol, atol=1e-6 * norms.max())
    np.testing.assert_allclose(asked["gram"], g @ g.T, rtol=rtol, atol=rtol * norms.max() ** 2)
    np.testing.assert_allclose(asked["inner"], g @ _flat_tree(params), rtol=rtol, atol=rtol * _scale(norms, params))
    chex.assert_trees_all_close(asked["stack"], formed, rtol=rtol, atol=rtol * norms.max())
    if size > 1:
        first, second = (
            np.asarray(w, np.float64) @ rows / len(rows)
            for w, rows in zip(np.split(np.asarray(weights), [size // 2]), np.split(g, [size // 2]), strict=True)
        )
        whole = np.asarray(weights, np.float64) @ g / size
        at_most = rtol * norms.max() ** 2 * 4.0
        np.testing.assert_allclose(asked["halves"], [first @ second, whole @ whole], rtol=rtol, atol=at_most)
    mean = jax.tree.map(lambda x: _mean_of(weights, x), formed)
    chex.assert_trees_all_close(asked["mean"], mean, rtol=rtol, atol=rtol * norms.max())
    return made


def _ask(loss_fn: Any, params: Any, batch: Any, weights: Any) -> Any:
    losses, grads = isgd.per_example_value_and_grad(loss_fn, joint=False)(params, batch)
    return grads, {
        "losses": losses,
        "norms": isgd.norms(grads),
        "gram": isgd.gram(grads),
        "inner": isgd.inner(grads, params),
        "stack": isgd.stack(grads),
        "mean": isgd.weighted_mean(grads, weights),
        "halves": lazy.halves(grads, weights) if weights.shape[0] > 1 else None,
    }


def _mean_of(weights: Any, x: Any) -> np.ndarray:
    """sum(w_n x_n) / b in NumPy's float64, in the type that the gradients have."""
    return (np.tensordot(np.asarray(weights, np.float64), np.asarray(x, np.float64), 1) / len(x)).astype(x.dtype)


def _flat_tree(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in jax.tree.leaves(tree)] or [np.zeros(0)])


def _scale(norms: np.ndarray, params: Any) -> float:
    return float(norms.max() * np.linalg.norm(_flat_tree(params)))
