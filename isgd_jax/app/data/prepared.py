"""Data sets of the TFDS catalog, or of the user's own builders, that TFDS has already prepared as ArrayRecord.

Preparing them is TFDS's business, and may need TensorFlow; reading them does not.
"""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from isgd_jax.app.data.dataset import Dataset, from_arrays
from isgd_jax.app.data.prepare import open_folder, read_split, told_if_damaged
from isgd_jax.errors import ArgumentError

__all__ = ["load_folder"]


class _Pairs:
    """A TFDS split as inputs and labels alone: names and file paths beside them cannot be stacked."""

    def __init__(self, source: Any, input_key: str, label_key: str) -> None:
        self._source, self._input, self._label = source, input_key, label_key

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, indices: list[int]) -> list[dict[str, np.ndarray]]:
        items = self._source.__getitems__(indices)
        return [{self._input: item[self._input], "label": item[self._label]} for item in items]


def load_folder(name: str, folder: Path, *, on_disk: bool = False, trusted: bool = True) -> Dataset:
    """The data set in ``folder``, whose features are an input and a class.

    It is tested on ``test``, else on ``validation``.

    Args:
      name: what it is called.
      folder: of one version, as TFDS prepared it.
      on_disk: map the training set from disk, instead of reading it into memory.
      trusted: whether modules are imported that ``features.json`` names, beside TFDS's own.

    Raises:
      ValueError: it is damaged, of another kind, or names a module that it may not.
    """
    builder = open_folder(folder, trusted=trusted)
    with told_if_damaged(folder):
        input_key, label_key = _keys(name, builder.info)
        num_classes, parts = builder.info.features[label_key].num_classes, _parts(name, set(builder.info.splits))
        try:
            sources = builder.as_data_source(split=parts)
        except NotImplementedError as error:
            raise ArgumentError(
                f"{name} in {folder} is prepared as {builder.info.file_format.value}; prepare it once more with "
                "download_and_prepare(file_format='array_record')"
            ) from error
    pairs = {part: _Pairs(source, input_key, label_key) for part, source in sources.items()}
    splits = {part: read_split(part, source, folder, on_disk=on_disk) for part, source in pairs.items()}
    return from_arrays(
        splits["train"],
        splits["test"],
        valid=splits.get("valid"),
        name=name,
        num_classes=num_classes,
        input_key=input_key,
    )


def _keys(name: str, info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """What the data set itself says is input and label; else ``image`` and ``label``."""
    keys = info.supervised_keys or ("image", "label")
    features = dict(info.features)
    if len(keys) != 2 or keys[0] not in features or not isinstance(features.get(keys[1]), tfds.features.ClassLabel):
        raise ArgumentError(f"{name}: expected an input and a class label among the features, got {sorted(features)}")
    return keys


def _parts(name: str, splits: set[str]) -> dict[str, str]:
    """Our name of a split -> TFDS's."""
    if "train" not in splits or not splits & {"test", "validation"}:
        raise ArgumentError(f"{name}: expected the splits train and test (or validation), got {sorted(splits)}")
    if "test" not in splits:
        return {"train": "train", "test": "validation"}
    return {"train": "train", "test": "test"} | ({"valid": "validation"} if "validation" in splits else {})
