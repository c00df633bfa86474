"""What each way of asking a contraction costs: counted from static shapes, at trace time.

A squared norm ``‖Σ_t x_t δ_tᵀ‖²`` is a sum over pairs of rows (the Gram form, ``t²(i + o)``) or the square of the
product (``t·i·o``, and ``i·o`` numbers written and read). The Gram form can cancel, the product cannot: it wins a draw.
Costs are in floating-point operations, traffic counted as the operations that could be done meanwhile: a `Machine` says
how many, CPUs and accelerators differ in it. What is chosen is a matter of speed alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

__all__ = [
    "ACCELERATOR",
    "CPU",
    "DRAW",
    "FEWEST",
    "SLICED",
    "Machine",
    "Shape",
    "examples_at_a_time",
    "gram",
    "machine",
    "prefers_batch_gram",
    "prefers_formed",
    "prefers_gram",
    "prefers_gram_of_means",
    "product",
    "slice_size",
]


class Machine(NamedTuple):
    """What the choice between forms depends on."""

    cache: int
    """Bytes of products that are still cheap to write and read again."""
    part: int
    """Bytes of the products of a few examples worked on at a time, where those of all are too many."""
    windows: int
    """Bytes of products and windows from which on a convolution's are worked on a part at a time."""
    near: float
    """Operations that cost as much as moving a byte, within the cache,"""
    far: float
    """and beyond it."""
    passes: float
    """How often a Gram sum reads or writes its factors and pairs besides multiplying them, where that counts."""
    scored: int
    """Bytes that the intermediate values of examples scored at a time may come to, if none gave its place to another:
    an upper bound, of which some fifth to a twelfth is needed at once."""
    written: int | None
    """Bytes of the results of contractions to be written where a batch is differentiated a few examples at a time;
    None: batches are differentiated whole."""
    one_layout: bool
    """Whether convolutions are fast in one layout alone, see `convolutions`."""
    cheap_conditions: bool
    """Whether sums are looked at before they are made more carefully: each parameter's Gram sum by itself, which lets
    its factors go early (else all together), and squares before they are scaled. A condition makes an accelerator wait
    for its host."""
    as_written: bool
    """Whether each example's product is kept in the type that the program has it in: in bfloat16 half the traffic, and
    the rounding of `vmap(grad)`; else in float32."""


CPU = Machine(
    cache=12 << 20,
    part=2 << 20,
    windows=2 << 20,
    near=2,
    far=24,
    passes=0,
    scored=512 << 20,
    written=16 << 20,
    one_layout=True,
    cheap_conditions=True,
    as_written=False,
)
"""Measured on two cores."""

ACCELERATOR = Machine(
    cache=1 << 30,
    part=1 << 30,
    windows=1 << 30,
    near=30,
    far=30,
    passes=2.5,
    scored=32 << 30,
    written=None,
    one_layout=False,
    cheap_conditions=False,
    as_written=True,
)
"""Of 16 GiB; of others see `machine`. As fast as an H100: 3 TB/s, and 60 to 400 Tflop/s. Slices that run in turn leave
it idle, so there are none below 1 GiB: norms of 128 images of a ViT in three slices took 8.3 ms, norms and mean of all
at once 4.7."""

SLICED = 1.2
"""How much slower a product is when it is made a few examples at a time."""

DRAW = 0.8
"""The part of the product's cost below which the Gram form is chosen."""


def machine() -> Machine:
    """That of the device which programs are made for, unless they say otherwise: `jax.default_device`, or JAX's own."""
    config: Any = jax.config  # its fields are known to the types of some versions, and not of others
    device = config.jax_default_device
    platform = getattr(device, "platform", device) or jax.default_backend()
    return CPU if platform == "cpu" else _accelerator(_memory(platform))


@functools.cache
def _memory(platform: str) -> int | None:
    """Bytes that JAX may take of the first device's memory; None where it does not tell."""
    return (jax.local_devices(backend=platform)[0].memory_stats() or {}).get("bytes_limit")


def _accelerator(memory: int | None) -> Machine:
    if memory is None:
        return ACCELERATOR
    at_once = max(ACCELERATOR.cache, memory // 16)
    return ACCELERATOR._replace(cache=at_once, part=at_once, windows=at_once, scored=2 * memory)


class Shape(NamedTuple):
    """The sizes of one term, [b, k, t, i] times [b, k, t, o], what its left ``factor`` is, and bytes a number."""

    b: int
    k: int
    t: int
    i: int
    o: int
    factor: str = "Array"
    itemsize: int = 4

    @property
    def columns(self) -> int:
        """How wide rows of the left factor are to multiply: one-hot rows cost nothing."""
        return 0 if self.factor == "OneHot" else self.i

    @property
    def contraction(self) -> int:
        """Operations to contract the factors, whether or not examples are summed over."""
        return 2 * self.b * self.k * self.t * max(self.columns, 1) * self.o

    @property
    def windows(self) -> int:
        """Bytes of the windows of one example, if they must be written out."""
        return self.itemsize * self.k * self.t * self.i if self.factor == "Windows" else 0

    @property
    def product(self) -> int:
        """Bytes of the product of one example."""
        return self.itemsize * self.k * self.i * self.o


def gram(terms: Sequence[Shape]) -> float:
    """Operations for the squared norm of a sum of terms, pair by pair: 2·b·k·t·s·(i + o) for two terms of t and s rows.

    Windows are counted with the traffic of writing them out, one-hot rows with nothing for i.

    >>> gram([Shape(b=1, k=1, t=1, i=100, o=10)]), product([Shape(b=1, k=1, t=1, i=100, o=10)])
    (220.0, 18000.0)
    """
    pairs = [(a, b) for place, a in enumerate(terms) for b in terms[place:]]
    operations = sum(2 * a.b * a.k * a.t * b.t * (a.o + min(a.columns, b.columns)) for a, b in pairs)
    moved = sum(term.itemsize * term.b * term.k * term.t * (term.columns + term.o) for term in terms)
    moved += sum(a.itemsize * a.b * a.k * a.t * b.t for a, b in pairs)
    windows = sum((_traffic(2 * term.b * term.windows) for term in terms), start=0.0)
    return operations + windows + machine().passes * machine().near * moved


def product(terms: Sequence[Shape]) -> float:
    """Operations for the same by forming the products, all at once or a few at a time, whichever is less.

    2·b·k·t·i·o to contract, and the traffic of writing and reading b·k·i·o numbers: within the cache where they fit or
    are made in slices, which costs a fifth more arithmetic; beyond it otherwise.
    """
    contractions, formed = sum(term.contraction for term in terms), terms[0].b * terms[0].product
    return min(contractions + _traffic(2 * formed), SLICED * contractions + machine().near * 2 * formed)


def _traffic(moved: int) -> float:
    on = machine()
    return float(moved) * (on.near if moved <= 2 * on.cache else on.far)


def prefers_gram(terms: Sequence[Shape]) -> bool:
    """Whether a squared norm is asked pair by pair. One row cannot cancel; neither can one-hot rows alone."""
    safe = len(terms) == 1 and (terms[0].t <= 1 or terms[0].factor == "OneHot")
    return gram(terms) < product(terms) * (1 if safe else DRAW)


def prefers_formed(terms: Sequence[Shape]) -> bool:
    """Whether norms and a mean together are cheaper from products formed once than each in its own best way.

    Formed, the contraction is paid once and its result is read for both; apart, it is paid by the mean, and the norm
    pays for its pairs. One-hot rows alone are never formed: the product is the whole table.
    """
    contractions, formed = sum(term.contraction for term in terms), terms[0].b * terms[0].product
    apart = min(gram(terms) if prefers_gram(terms) else product(terms), product(terms)) + contractions
    return contractions + _traffic(2 * formed) * 1.5 < apart and any(term.factor != "OneHot" for term in terms)


def prefers_batch_gram(terms: Sequence[Shape]) -> bool:
    """Whether inner products between all pairs of examples are cheaper from pairs of rows than from products.

    b²·k·t·s·(i + o) against the contraction and b²·k·i·o. Terms of different kinds of factors are not compared by rows.
    """
    if any(term.factor != terms[0].factor for term in terms):
        return False
    b, apart = terms[0].b, _pairs_of_rows(terms)
    formed = sum(term.contraction for term in terms) + b**2 * terms[0].product
    return apart < formed + _traffic(2 * b * terms[0].product)


def prefers_gram_of_means(terms: Sequence[Shape]) -> bool:
    """Whether inner products between two weighted means are cheaper from pairs of rows than from the means."""
    means = sum(term.contraction for term in terms) + _traffic(2 * 2 * terms[0].product)
    return prefers_batch_gram(terms) and _pairs_of_rows(terms) < means


def _pairs_of_rows(terms: Sequence[Shape]) -> int:
    b, k = terms[0].b, terms[0].k
    return sum(2 * b**2 * k * one.t * other.t * (one.columns + one.o) for one in terms for other in terms)


def slice_size(terms: Sequence[Shape]) -> int | None:
    """How many examples to form at a time, so that their products stay within the cache; None for all of them."""
    one, on = sum(term.product + term.windows for term in terms), machine()
    most = on.windows if any(term.windows for term in terms) else on.cache
    return None if terms[0].b * one <= most else max(1, on.part // max(one, 1))


FEWEST = 8
"""Examples at a time at least: with fewer, matrix products are small."""


def examples_at_a_time(
    b: int, written: int, params: int, most: int | None = None, *, turn: int | None = None
) -> int | None:
    """How many examples of a batch to differentiate at a time; None for all of them.

    As many as write `Machine.written` bytes. Each time the sum of the gradients is read and written, so there must be
    about twice as much of them as the parameters are large. In a loop the weights are read at each turn, so that a turn
    must write about as much as they are large. Of about as many the number is taken that divides the batch.

    >>> examples_at_a_time(32, written=3 << 20, params=10 << 20)
    8

    Args:
        b: examples in the batch.
        written: bytes of what one example's contractions give.
        params: bytes of the parameters that are differentiated.
        most: bytes to write at most, however large the parameters are; None: no bound.
        turn: of ``written``, what one turn of the loops gives; None: all, there is no loop.
    """
    favored = machine().written
    looped = params * written // max(written if turn is None else turn, 1)
    bounds = ([] if favored is None else [max(favored, 2 * params, looped)]) + ([] if most is None else [most])
    size = max(FEWEST, min(bounds) // max(written, 1)) if bounds else b
    if size >= b:
        return None
    return next((smaller for smaller in range(size, size // 2, -1) if b % smaller == 0), size)
