"""The embedded data set: 1,797 handwritten digits of 8x8 pixels, shipped inside scikit-learn."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from isgd_jax.app.data.recipe import Recipe, Splits, hold_out

__all__ = ["DIGITS"]

_TEST = 360


def _read(files: Mapping[str, Path]) -> Splits:
    """Pixels keep their values, 0 to 16. The split is random: a writer may be on both sides of it."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    arrays = {"image": bunch.images.astype(np.uint8)[..., None], "label": bunch.target.astype(np.int32)}
    train, test = hold_out(arrays, _TEST)
    return {"train": train, "test": test}


DIGITS = Recipe(
    name="digits",
    version="1.0.0",
    about="Optical recognition of handwritten digits (UCI), as shipped with scikit-learn.",
    homepage="https://archive.ics.uci.edu/dataset/80",
    num_classes=10,
    counts={"train": 1797 - _TEST, "test": _TEST},
    read=_read,
)
