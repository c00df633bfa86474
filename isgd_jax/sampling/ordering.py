"""The order of the line that draws are laid along: by fixed keys, by score, or by clusters of gradients' directions.

Guarantees:

* every order is a permutation of the examples, so draws stay unbiased; each group of examples has a stretch by itself;
* of several sketches of an example the one of the newest parameters is kept, and none that is not finite.

Source: ours (`clusters`, `samplers.order_by`).
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from isgd_jax.errors import ArgumentError
from isgd_jax.gradients.meshes import replicated
from isgd_jax.sampling import clusters
from isgd_jax.sampling.law import order_by
from isgd_jax.sampling.options import GradientSketch
from isgd_jax.sampling.state import Ordering, SamplerState, on_mesh, own_key
from isgd_jax.types import Key

__all__ = ["create", "line", "with_sketches"]


def create(size: int, keys: Array | np.ndarray | None, sketch: GradientSketch | None) -> Ordering:
    """What the line will be ordered by: fixed keys [n], sketches yet to come, or neither, which is by score."""
    return Ordering(
        None if keys is None else on_mesh(keys),
        None if sketch is None else jnp.zeros((size, sketch.dims), jnp.float32),
        None if sketch is None else jnp.zeros(size, bool),
    )


def line(state: SamplerState, probs: Float[Array, " n"], *, key: Key | None, num_cells: int) -> Int[Array, " n"]:
    """The example at each place of the line, a permutation [n].

    Args:
        state: of the sampler.
        probs: of the proposal: what lies beside each other otherwise is ordered by them.
        key: of the start of k-means; None takes the state's own.
        num_cells: clusters, where there are sketches.
    """
    keys, sketches, known = state.ordering
    group = None if state.examples.groups is None else state.examples.groups.ids
    if sketches is None or known is None:
        return order_by(*(x for x in (group, keys, probs) if x is not None))
    start = own_key(state, state.version) if key is None else key

    def by_cells() -> Int[Array, " n"]:
        """What never was sketched is a last stretch of the line, by score."""
        return clusters.by_cells(start, sketches, probs, num_cells=num_cells, known=known)

    found = lax.cond(jnp.any(known), by_cells, lambda: order_by(probs))
    return found if group is None else found[jnp.argsort(group[found], stable=True)]


def with_sketches(
    state: SamplerState, ids: Int[Array, " c"], sketches: Float[Array, "..."], version: int | Array
) -> Ordering:
    """The ordering with these sketches, but for padding, those of an older version, and any not finite."""
    keys, rows, known = state.ordering
    if rows is None or known is None:
        raise ArgumentError("sketches came, but the order of this sampler is not made of any: order=sketch wants them")
    if sketches.shape != (*ids.shape, rows.shape[1]):
        raise ArgumentError(
            f"expected sketches of shape {(*ids.shape, rows.shape[1])}, one of {rows.shape[1]} numbers for each of "
            f"the ids; got {sketches.shape}"
        )
    size, ids, sketches = rows.shape[0], replicated(ids), replicated(sketches)
    is_newer = jnp.asarray(version, jnp.int32) >= state.table.versions.at[ids].get(mode="fill", fill_value=0)
    is_sound = (ids >= 0) & (ids < size) & is_newer & jnp.all(jnp.isfinite(sketches), axis=1)
    at = jnp.where(is_sound, ids, size)
    rows = rows.at[at].set(sketches.astype(jnp.float32), mode="drop")
    return Ordering(keys, rows, known.at[at].set(True, mode="drop"))
