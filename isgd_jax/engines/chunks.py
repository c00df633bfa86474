"""A data set cut into chunks of one fixed shape: what a scorer is asked to do at once, on every engine."""

from typing import Any

import jax
import numpy as np

from isgd_jax.typing import Batch


class Chunks:
    """Consecutive runs of examples, all of ``size``; the last one may be shorter, and is padded before it is scored.

    Guarantees:
        * every example is in exactly one chunk, and chunk ``c`` is the same examples in every process;
        * every batch has the same shape, so that a scorer is compiled once and gives the same bits on every engine.
    """

    def __init__(self, num_examples: int, size: int) -> None:
        if num_examples < 1 or size < 1:
            raise ValueError(f"chunks need at least one example each, got {num_examples} examples in chunks of {size}")
        self.num_examples = num_examples
        self.size = min(size, num_examples)

    def __len__(self) -> int:
        return -(-self.num_examples // self.size)

    def ids(self, chunk: int) -> np.ndarray:
        """The examples of a chunk."""
        start = chunk * self.size
        return np.arange(start, min(start + self.size, self.num_examples))

    def batch(self, data: Batch, chunk: int) -> Batch:
        """The rows of a chunk; the last example again is harmless padding."""
        start = chunk * self.size

        def rows(leaf: Any) -> Any:
            taken = leaf[start : start + self.size]
            short = self.size - len(taken)
            return np.concatenate([taken, np.repeat(taken[-1:], short, axis=0)]) if short else taken

        return jax.tree.map(rows, data)
