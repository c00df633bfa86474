"""The door: a recipe written once as a TFDS data set (ArrayRecord, no TensorFlow), and read back through TFDS.

Guarantees:
  - what is read is whole: TFDS writes into a folder of another name and renames it at the end;
  - processes that prepare the same data set at once do so separately, and the first to end wins;
  - examples keep the order of the original files.
"""

import contextlib
import functools
import io
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tensorflow_datasets as tfds

from isgd_jax.app.data import checks
from isgd_jax.app.data.files import locate
from isgd_jax.app.data.recipe import Recipe, Splits
from isgd_jax.app.data.sources import read
from isgd_jax.app.data.spill import CannotSpillError, spilled
from isgd_jax.errors import ArgumentError, IsgdError

__all__ = ["is_prepared", "load_prepared", "open_folder", "read_split", "told_if_damaged"]

# Importing this module is the library's business alone: the bars would write over its own progress.
tfds.disable_progress_bar()


_SHARD_BYTES = 1 << 28
_TFDS_FEATURES = "tensorflow_datasets.core.features."
_Shard: TypeAlias = Callable[[], Iterator[tuple[int, dict[str, np.ndarray]]]]


class _Builder(tfds.core.ShardBasedBuilder):
    """Writes the splits of a recipe, shard by shard.

    TFDS's better known `GeneratorBasedBuilder` sorts all examples by key even if told not to shuffle, and cannot sort
    more than 1 GB without TensorFlow.
    """

    name = "isgd_recipe"  # in TFDS's registry, where the catalog has the recipes' names

    def __init__(self, recipe: Recipe, splits: Splits, data_dir: Path) -> None:
        # Its own name on disk: a catalog data set of the same name may lie beside it, in another form.
        self.name = f"isgd_{recipe.name}"
        self.VERSION = tfds.core.Version(recipe.version)
        self.recipe = recipe
        self.splits = splits
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.recipe.about,
            homepage=self.recipe.homepage,
            features=tfds.features.FeaturesDict(self._features()),
        )

    def _features(self) -> dict[str, tfds.features.FeatureConnector]:
        """Raw bytes: four times faster to write than TFDS's default, which makes every pixel a 64-bit integer."""
        raw = tfds.features.Encoding.BYTES
        return {
            key: tfds.features.ClassLabel(num_classes=self.recipe.num_classes)
            if key == "label"
            else tfds.features.Tensor(shape=array.shape[1:], dtype=array.dtype, encoding=raw)
            for key, array in self.splits["train"].items()
        }

    def _shard_iterators_per_split(self, dl_manager: tfds.download.DownloadManager) -> dict[str, list[_Shard]]:
        return {split: [*_shards(arrays)] for split, arrays in self.splits.items()}


def _shards(arrays: Mapping[str, np.ndarray]) -> Iterator[_Shard]:
    size = len(arrays["label"])
    count = math.ceil(sum(array.nbytes for array in arrays.values()) / _SHARD_BYTES)
    for start, stop in itertools.pairwise(size * shard // count for shard in range(count + 1)):
        yield functools.partial(_examples, arrays, range(start, stop))


def _examples(arrays: Mapping[str, np.ndarray], rows: range) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    for row in rows:
        yield row, {key: array[row] for key, array in arrays.items()}


def load_prepared(
    recipe: Recipe, *, data_dir: Path, raw_dir: Path | None, on_disk: bool = False, prepare: bool = True
) -> Splits:
    """The recipe's splits from ``data_dir``.

    Args:
      recipe: of the data set.
      data_dir: where it lies prepared, or is prepared first.
      raw_dir: where the original files are, if they are to be neither looked for nor downloaded.
      on_disk: map the training set from disk.
      prepare: False reads what lies there, and nothing else.

    Raises:
      FileNotFoundError: it is not prepared, and may not be.
      ValueError: it is damaged.
      OSError: ``data_dir`` cannot be written to.
    """
    folder = data_dir / f"isgd_{recipe.name}" / recipe.version
    if not is_prepared(folder):
        if not prepare:
            raise FileNotFoundError(f"{recipe.name} is not prepared in {data_dir}, and is not for a look at a run")
        _prepare(recipe, folder, data_dir=data_dir, raw_dir=raw_dir)
    with told_if_damaged(folder):
        sources = open_folder(folder, trusted=prepare).as_data_source()
    splits = {split: read_split(split, source, folder, on_disk=on_disk) for split, source in sources.items()}
    _check(recipe, splits, where=folder)
    return splits


def read_split(split: str, source: Any, folder: Path, *, on_disk: bool) -> dict[str, np.ndarray]:
    """A split in memory; the training set, if asked, mapped from a copy beside what TFDS prepared.

    Args:
      split: its name; only "train" is mapped.
      source: random access to its examples, as TFDS has it.
      folder: what TFDS prepared; the copy goes to ``mapped`` in it, and is made once.
      on_disk: whether to map.

    Raises:
      ValueError: the examples are damaged.
      CannotSpillError: there is no room for the copy; the message says which ways there are.
    """
    told = _Told(source, folder)
    if not on_disk or split != "train":
        return read(told)
    try:
        return spilled(told, folder / "mapped")
    except CannotSpillError as error:
        raise CannotSpillError(
            f"{error}: with on_disk=False (--hold host), or another data_dir; the data set itself is whole"
        ) from error


class _Told:
    """A source in a prepared folder, whose damages are told; where a copy of it goes is another matter."""

    def __init__(self, source: Any, folder: Path) -> None:
        self._source, self._folder = source, folder

    def __len__(self) -> int:
        with told_if_damaged(self._folder):
            return len(self._source)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        with told_if_damaged(self._folder):
            return self._source.__getitems__(indices)


def is_prepared(folder: Path) -> bool:
    """TFDS writes this file last, before it renames the folder."""
    return (folder / "dataset_info.json").is_file()


def open_folder(folder: Path, *, trusted: bool = True) -> tfds.core.DatasetBuilder:
    """What TFDS prepared in ``folder``, by whatever builder.

    TFDS imports the modules that ``features.json`` names; where the folder is not trusted, they must be its own.

    Raises:
      ValueError: it is damaged, or names a module that it may not.
    """
    if not trusted:
        _check_features(folder)
    with told_if_damaged(folder):
        return tfds.builder_from_directory(folder)


def _check_features(folder: Path) -> None:
    with told_if_damaged(folder):
        found = json.loads((folder / "features.json").read_bytes())
    for name in _class_names(found):
        if not name.startswith(_TFDS_FEATURES):
            raise ArgumentError(f"features.json in {folder} names {name}, which is no class of TFDS's own")


def _class_names(tree: Any) -> Iterator[str]:
    """What TFDS would import: it reads two forms of the file, and protobuf two spellings of a key."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, str) and key in ("pythonClassName", "python_class_name", "type") and "." in value:
            yield value
        elif isinstance(value, (dict, list)):
            yield from _class_names(value)


@contextlib.contextmanager
def told_if_damaged(folder: Path) -> Iterator[None]:
    """ArrayRecord checks what it reads, and each of TFDS's parsers has errors of its own, in several lines.

    Raises:
      ArgumentError: it is damaged.
      PermissionError: as inside.
    """
    try:
        yield
    except (IsgdError, PermissionError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ArgumentError(
            f"the data set prepared in {folder} cannot be read ({reason}); delete that folder and try again"
        ) from error


def _prepare(recipe: Recipe, folder: Path, *, data_dir: Path, raw_dir: Path | None) -> None:
    with _told_if_unwritable(recipe, data_dir):  # before the originals are fetched and read, which can take minutes
        data_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=data_dir).close()
    splits = recipe.read(locate(recipe, raw_dir=raw_dir, downloads=data_dir / "downloads" / f"isgd_{recipe.name}"))
    _check(recipe, splits, where="its original files")
    with _told_if_unwritable(recipe, data_dir):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces every preparation on two lines
                _Builder(recipe, splits, data_dir).download_and_prepare(file_format="array_record")
        except OSError:
            if not is_prepared(folder):  # else another process was first; its folder stays, ours is gone
                raise


@contextlib.contextmanager
def _told_if_unwritable(recipe: Recipe, data_dir: Path) -> Iterator[None]:
    """The writer of ArrayRecord says RuntimeError where the operating system says OSError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        made = type(error) if isinstance(error, OSError) else OSError
        raise made(
            f"cannot write {recipe.name} into data_dir {data_dir} ({' '.join(str(error).split())}); "
            "make room there, or name another data_dir or set TFDS_DATA_DIR"
        ) from error


def _check(recipe: Recipe, splits: Splits, *, where: Path | str) -> None:
    if any("label" not in arrays for arrays in splits.values()):
        raise ArgumentError(f"{recipe.name}: expected an input and a label in {where}, got {sorted(splits['train'])}")
    got = {split: len(arrays["label"]) for split, arrays in splits.items()}
    if got != dict(recipe.counts):
        raise ArgumentError(f"{recipe.name}: expected {dict(recipe.counts)} examples in {where}, got {got}")
    for split, arrays in splits.items():
        name = f"{recipe.name} {split} in {where}"
        checks.check_labels(name, checks.converted(name, arrays)["label"], num_classes=recipe.num_classes)
