"""What each way of asking a contraction costs: counted from static shapes, at trace time.

A squared norm ``‖Σ_t x_t δ_tᵀ‖²`` is a sum over pairs of rows (the Gram form, ``t²(i + o)``) or the square of the product
(``t·i·o``, and ``i·o`` numbers written and read). The Gram form can cancel; the product cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FLOPS_PER_BYTE = 8
"""How many operations cost as much as moving a byte: about right for CPUs, kind to memory elsewhere."""


class Shape(NamedTuple):
    """The sizes of one term: [b, k, t, i] times [b, k, t, o]; ``one_hot`` rows cost nothing to multiply."""

    b: int
    k: int
    t: int
    i: int
    o: int
    one_hot: bool = False

    @property
    def product(self) -> int:
        """Operations for ``Σ_t x_t δ_tᵀ`` of every example."""
        return 2 * self.b * self.k * self.t * (self.o if self.one_hot else self.i * self.o)

    @property
    def traffic(self) -> int:
        """Bytes to write and read the products."""
        return 8 * self.b * self.k * self.i * self.o


def gram(terms: Sequence[Shape]) -> int:
    """Operations for the squared norm of a sum of terms, pair by pair."""
    pairs = [(a, b) for place, a in enumerate(terms) for b in terms[place:]]
    return sum(2 * a.b * a.k * a.t * b.t * (a.o + (0 if a.one_hot or b.one_hot else a.i)) for a, b in pairs)


def product(terms: Sequence[Shape]) -> int:
    """The same by forming the products."""
    return sum(term.product for term in terms) + FLOPS_PER_BYTE * terms[0].traffic


def prefers_gram(terms: Sequence[Shape]) -> bool:
    return gram(terms) < product(terms)


def prefers_shared_product(terms: Sequence[Shape]) -> bool:
    """Whether norms and mean together are cheaper from products formed once than each in its own best way."""
    apart = min(gram(terms), product(terms)) + sum(term.product for term in terms)
    return product(terms) + FLOPS_PER_BYTE * terms[0].traffic // 2 < apart and not any(term.one_hot for term in terms)


def prefers_batch_gram(terms: Sequence[Shape]) -> bool:
    """Whether inner products between all pairs of examples are cheaper from pairs of rows than from products."""
    if any(term.k != terms[0].k or term.one_hot != terms[0].one_hot for term in terms):
        return False
    apart = sum(2 * one.b**2 * one.k * one.t * other.t * (one.i + one.o) for one in terms for other in terms)
    formed = sum(term.product for term in terms) + 2 * terms[0].b ** 2 * terms[0].k * terms[0].i * terms[0].o
    return apart < formed + FLOPS_PER_BYTE * terms[0].traffic
