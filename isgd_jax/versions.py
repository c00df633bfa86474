"""Pairs of versions that are known not to work together: a sentence at import, before something else fails.

What an installer can be told stands in the package's requirements too; but it may have been told otherwise.
"""

import re
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

__all__ = ["KNOWN_BAD", "BadPair", "check_versions", "found_bad"]


class BadPair(NamedTuple):
    """``package`` below ``below`` does not work with ``other`` from ``since`` on."""

    package: str
    below: str
    other: str
    since: str
    why: str


KNOWN_BAD = (
    BadPair("flax", "0.12.10", "jax", "0.11.1", "it subclasses what JAX no longer has, and fails at import"),
    BadPair("flax", "0.12.1", "jax", "0.10", "it imports what JAX no longer has"),
)
"""Of two pairs of the same packages, the one that asks for more stands first: it alone is told."""


def found_bad(version_of: Callable[[str], str] = metadata.version) -> list[str]:
    """A sentence for each two packages that `KNOWN_BAD` has as installed; a package that is not there is no pair's.

    Args:
        version_of: the version of a package by its name; raises `importlib.metadata.PackageNotFoundError`.
    """
    found: dict[tuple[str, str], str] = {}
    for pair in KNOWN_BAD:
        try:
            version, other = version_of(pair.package), version_of(pair.other)
        except metadata.PackageNotFoundError:
            continue
        if _numbers(version) < _numbers(pair.below) and _numbers(other) >= _numbers(pair.since):
            found.setdefault(
                (pair.package, pair.other),
                f"{pair.package} {version} does not work with {pair.other} {other} ({pair.why}): "
                f"install {pair.package} {pair.below} or newer, or {pair.other} below {pair.since}",
            )
    return list(found.values())


def check_versions(version_of: Callable[[str], str] = metadata.version) -> None:
    """Warn of pairs that do not work together; called when the package is imported."""
    for sentence in found_bad(version_of):
        warnings.warn(sentence, stacklevel=3)


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: 0.12.0.1 and 0.12.0.dev3 both come after 0.11.9."""
    return tuple(int(part) for part in re.match(r"[\d.]*\d", version)[0].split("."))  # type: ignore[index]
