"""Data sets as arrays in memory: by name through TensorFlow Datasets, or the user's own.

TensorFlow Datasets (TFDS) is the door and memory is the room. A named data set is written once as ArrayRecord into
TFDS's folder, without TensorFlow; a run brings the splits into memory and gathers its draws there, which is some
hundred times faster than reading them from disk.

    >>> from isgd_jax import data
    >>> digits = data.load("digits")  # doctest: +SKIP
    >>> digits.train["image"].shape, digits.train["image"].dtype  # doctest: +SKIP
    ((1437, 8, 8, 1), dtype('uint8'))

Importing this package imports neither TFDS nor scikit-learn; loading a named data set does.
"""

from isgd_jax.app.data.catalog import load, names
from isgd_jax.app.data.checks import Arrays, check_batch_size
from isgd_jax.app.data.dataset import Dataset, from_arrays, from_source
from isgd_jax.app.data.inputs import INPUTS_FILE, Inputs, Statistics, read_inputs
from isgd_jax.app.data.raw import raw_inputs

__all__ = [
    "INPUTS_FILE",
    "Arrays",
    "Dataset",
    "Inputs",
    "Statistics",
    "check_batch_size",
    "from_arrays",
    "from_source",
    "load",
    "names",
    "raw_inputs",
    "read_inputs",
]
