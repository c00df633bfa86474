"""The words every other module speaks: aliases, protocols, and the small records that travel between rooms.

Shapes use one letter each: ``n`` examples in the data set, ``b`` examples in a batch, ``m`` draws in a step.
"""

from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from jax import Array
from jaxtyping import Bool, Float, Int, PRNGKeyArray

__all__ = [
    "Batch",
    "Draw",
    "Example",
    "Key",
    "LossFn",
    "Params",
    "Sampler",
    "Scorer",
    "Scores",
    "SketchingScorer",
    "Source",
]

Params: TypeAlias = Any
"""The parameters of a model: any pytree of arrays."""

Example: TypeAlias = Any
"""One item of the data set: a pytree without a batch axis."""

Batch: TypeAlias = Any
"""Examples stacked: the pytree of an example, every leaf with a leading axis ``b``."""

Scores: TypeAlias = Float[Array, " b"]
"""One non-negative number an example: what is known of the norm of its gradient."""

Key: TypeAlias = PRNGKeyArray


@runtime_checkable
class LossFn(Protocol):
    """The loss of ONE example: a scalar. Everything in this library starts from it."""

    def __call__(self, params: Params, example: Example, /) -> Float[Array, ""]: ...


@runtime_checkable
class Scorer(Protocol):
    """A pure function that scores a batch; the larger the score, the more often the example is drawn."""

    def __call__(self, params: Params, batch: Batch, /) -> Scores: ...


@runtime_checkable
class SketchingScorer(Protocol):
    """A scorer that also sketches where each gradient points: engines carry both to where they are recorded."""

    def __call__(self, params: Params, batch: Batch, /) -> tuple[Scores, Float[Array, "b dims"]]: ...


class Draw(NamedTuple):
    """Indices and the probabilities they were drawn with; the two always travel together.

    ``probs`` is the expected count of the index in the draw divided by the number of draws, so that the weight
    ``1 / (N * probs)`` is right for every sampler. ``mask`` is false on the padding of designs of random size.

    What an estimator adds (`isgd_jax.importance_sampler`), None in the draws of a bare sampler: ``target``, the factor
    a_i of each drawn gradient in what is estimated, 1/N for the mean of all; the parameter ``version`` it is drawn for;
    ``in_halves``, whether the first ``m // 2`` draws are independent of the others; and ``expected_speedup``, how much
    larger a batch the scores of candidates promise, where candidates were scored.
    """

    indices: Int[Array, " m"]
    probs: Float[Array, " m"]
    mask: Bool[Array, " m"]
    target: Float[Array, " m"] | None = None
    version: Int[Array, ""] | None = None
    in_halves: Bool[Array, ""] | None = None
    expected_speedup: Float[Array, ""] | None = None


@runtime_checkable
class Sampler(Protocol):
    """A pure function of a key and a law, jittable with ``num_draws`` static."""

    def __call__(self, key: Key, law: Any, /, *, num_draws: int) -> Draw: ...


@runtime_checkable
class Source(Protocol):
    """A data set as its users may bring it: random access by lists of indices, as `tfds.data_source` has it."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int], /) -> list[Example]: ...
