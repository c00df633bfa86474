"""The score table: what is known of each example's gradient norm, and how old that knowledge is.

Guarantees:

* a score that is not finite, or negative, is quarantined: counted, and the old entry kept;
* an entry is never overwritten by one measured at an older version;
* rows whose index is n (or outside 0..n-1) are padding: neither written nor counted;
* score, version and clock of a row are written together;
* with ``memory`` a score tends to the root mean square of what was measured: no example's luck decides its future.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from isgd_jax.errors import ArgumentError, ArgumentTypeError, check_whole
from isgd_jax.gradients.meshes import replicated

__all__ = ["NEVER", "ScoreTable", "ages", "as_ids", "create", "record"]

NEVER = -1
"""The version of an example that was never scored."""


class ScoreTable(NamedTuple):
    """One row an example: its score, the parameter version it was measured at, and the clock of the measurement.

    ``seconds`` counts from the start of the run, so that float32 keeps it to milliseconds for hours.
    """

    scores: Float[Array, " n"]
    versions: Int[Array, " n"]
    seconds: Float[Array, " n"]


def create(num_examples: int) -> ScoreTable:
    """A table in which nothing was ever scored.

    Raises:
        ValueError: ``num_examples`` is not positive.
    """
    if num_examples < 1:
        raise ArgumentError(f"a score table needs at least one example, got num_examples={num_examples}")
    return ScoreTable(
        jnp.zeros((num_examples,), jnp.float32),
        jnp.full((num_examples,), NEVER, jnp.int32),
        jnp.zeros((num_examples,), jnp.float32),
    )


def record(
    table: ScoreTable,
    indices: Int[Array, " c"],
    scores: Float[Array, " c"],
    *,
    version: int | Int[Array, ""],
    seconds: float | Float[Array, ""] = 0.0,
    memory: float = 0.0,
) -> tuple[ScoreTable, Int[Array, ""]]:
    """Write scores of some examples, measured at one version.

    Args:
        table: donate it, and it is changed in place.
        indices: of the examples [c]; those outside 0..n-1 are padding.
        scores: theirs [c].
        version: of the parameters that they were measured with, in updates.
        seconds: the clock of the measurement.
        memory: the share of the old mean square that is kept, sqrt(memory old² + (1 - memory) new²). With augmentation
            each visit sees another picture of the example, and scores then tend to the root mean square norm.

    Returns:
        The table, and how many scores were quarantined: negative or not finite, and so not written.

    Raises:
        TypeError: ``version`` is no whole number.
        ValueError: ``version`` is negative and no array of JAX, or ``memory`` is not in [0, 1).
    """
    if not 0.0 <= memory < 1.0:
        raise ArgumentError(f"memory is the share of the old mean square to keep, 0 to below 1, got {memory}")
    size = table.scores.shape[0]
    version = _as_version(version)
    table = jax.tree.map(replicated, table)
    indices, scores = replicated(indices).astype(jnp.int32), replicated(scores).astype(jnp.float32)
    present = (indices >= 0) & (indices < size)
    sound = jnp.isfinite(scores) & (scores >= 0.0)
    if memory:
        scores = jnp.where(sound, _blend(table, indices, scores, memory), scores)
    newer = version >= table.versions.at[indices].get(mode="fill", fill_value=NEVER)
    at = jnp.where(present & sound & newer, indices, size)
    written = ScoreTable(
        table.scores.at[at].set(scores, mode="drop"),
        table.versions.at[at].set(version, mode="drop"),
        table.seconds.at[at].set(jnp.asarray(seconds, jnp.float32), mode="drop"),
    )
    return written, jnp.sum(present & ~sound, dtype=jnp.int32)


def as_ids(ids: Any, num_examples: int) -> Int[Array | np.ndarray, "..."]:
    """Ids as int32; those that it would wrap around become n, which is padding.

    >>> import numpy as np
    >>> as_ids(np.array([3, -1, 2**32 + 3]), 10).tolist()
    [3, 10, 10]

    Args:
        ids: whole numbers of any width and shape: an array of JAX stays one, all else is looked at by NumPy.
        num_examples: n.

    Raises:
        TypeError: they are no whole numbers.
    """
    found = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise ArgumentTypeError(f"ids must be whole numbers, got {found.dtype}")
    whole = found.astype(np.int32)
    if found.dtype == np.int32 or found.dtype.itemsize < whole.dtype.itemsize:
        return whole
    numpy: Any = jnp if isinstance(found, jax.Array) else np
    return numpy.where((found >= 0) & (found < num_examples), whole, np.int32(num_examples))


def _as_version(version: int | Int[Array, ""]) -> Int[Array, ""]:
    """Updates as int32: a float would be cut, and a negative one is that of scores that were never measured."""
    if not isinstance(version, jax.Array):
        return jnp.int32(check_whole("version", version, least=0))
    if not jnp.issubdtype(version.dtype, jnp.integer):
        raise ArgumentTypeError(f"version must be a whole number, got {version.dtype}")
    return version.astype(jnp.int32)


def ages(table: ScoreTable, version: int | Int[Array, ""]) -> Int[Array, " n"]:
    """Updates made since each example was scored; for one never scored ``version + 1``, older than any score.

    Args:
        table: of which only the versions are read.
        version: of the parameters now, in updates. Negative ages are those of scores from a later version, such as a
            worker sends when the run has been set back.
    """
    return jnp.asarray(version, jnp.int32) - table.versions


def _blend(
    table: ScoreTable, indices: Int[Array, " c"], scores: Float[Array, " c"], memory: float
) -> Float[Array, " c"]:
    old = table.scores.at[indices].get(mode="fill", fill_value=0.0)
    known = table.versions.at[indices].get(mode="fill", fill_value=NEVER) != NEVER
    return jnp.where(known, jnp.hypot(math.sqrt(memory) * old, math.sqrt(1.0 - memory) * scores), scores)
