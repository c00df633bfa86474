"""The data sets that have a name."""

import difflib
import importlib.util
import os
from pathlib import Path

from isgd_jax.app.data.cifar10 import CIFAR10
from isgd_jax.app.data.dataset import Dataset, from_arrays
from isgd_jax.app.data.digits import DIGITS
from isgd_jax.app.data.flights import NYCFLIGHTS13
from isgd_jax.app.data.idx import FASHION_MNIST, MNIST
from isgd_jax.app.data.recipe import Recipe
from isgd_jax.app.data.svhn import SVHN_CROPPED
from isgd_jax.errors import ArgumentError, CannotImportError

__all__ = ["load", "load_recipe", "names"]

_RECIPES = {recipe.name: recipe for recipe in (DIGITS, FASHION_MNIST, MNIST, CIFAR10, SVHN_CROPPED, NYCFLIGHTS13)}


def names() -> tuple[str, ...]:
    """The names that `load` knows wherever it runs."""
    return tuple(_RECIPES)


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    raw_dir: str | os.PathLike[str] | None = None,
    on_disk: bool = False,
    prepare: bool = True,
) -> Dataset:
    """A data set by name, in memory.

    Args:
      name: one of `names`; or any data set, ``name`` or ``name/config``, that TFDS has prepared as ArrayRecord in
        ``data_dir`` and that has an input, a class label and the splits train and test: its newest version is read.
      data_dir: where prepared data sets are kept; by default TFDS's own folder, ``$TFDS_DATA_DIR`` or
        ``~/tensorflow_datasets``. Written once, when one of `names` is first asked for.
      raw_dir: where the original files are, if they are to be neither looked for nor downloaded.
      on_disk: map the training set from disk, instead of reading it into memory.
      prepare: False only reads, for who looks at a run of somebody else's: nothing is written or downloaded, and no
        code is imported that the data set's own files name.

    Raises:
      ImportError: what reads it is not installed.
      ConnectionError: an original file is not on this machine, and cannot be downloaded.
      FileNotFoundError: there is no home folder, no ``raw_dir``, or a file is not in it; or, where it is only read, the
        data set has not been prepared.
      OSError: ``data_dir`` cannot be written to.
      ValueError: there is no data set of this name, or what is there is damaged or of another kind.
    """
    root = _data_dir(data_dir)
    raw = None if raw_dir is None else _existing(_at_home(raw_dir))
    if name in _RECIPES:
        return load_recipe(_RECIPES[name], data_dir=root, raw_dir=raw, on_disk=on_disk, prepare=prepare)
    folder = _newest_version(root / name) if name else None
    if folder is None:
        raise ArgumentError(_unknown(name, root))
    _require_tfds()
    from isgd_jax.app.data.prepared import load_folder

    return load_folder(name, folder, on_disk=on_disk, trusted=prepare)


def load_recipe(
    recipe: Recipe, *, data_dir: Path, raw_dir: Path | None = None, on_disk: bool = False, prepare: bool = True
) -> Dataset:
    """A data set by its recipe, as `load` gives it by its name.

    Args:
        recipe: what it is, and where its original files come from.
        data_dir: where it lies prepared by TFDS, or is prepared first.
        raw_dir: where the original files are; None looks in ``data_dir``, and downloads what is missing.
        on_disk: map the training set from a file beside it, in place of reading it into memory.
        prepare: False reads what lies there, and writes and downloads nothing.

    Raises:
        ImportError: TFDS is not installed.
        FileNotFoundError: it is not prepared, and may not be.
        ValueError: a file is damaged.
        OSError: ``data_dir`` cannot be written to, or a download failed.
    """
    _require_tfds()
    from isgd_jax.app.data.prepare import load_prepared

    splits = load_prepared(recipe, data_dir=data_dir, raw_dir=raw_dir, on_disk=on_disk, prepare=prepare)
    return from_arrays(
        splits["train"],
        splits["test"],
        valid=splits.get("valid"),
        name=recipe.name,
        num_classes=recipe.num_classes,
        per_coordinate=recipe.per_coordinate,
    )


def _require_tfds() -> None:
    """TFDS is half a second of imports, and an extra: asked for when it is needed, not before."""
    missing = [name for name in ("tensorflow_datasets", "array_record") if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotImportError(f"named data sets need {' and '.join(missing)}: pip install 'isgd_jax[train]'")


def _data_dir(given: str | os.PathLike[str] | None) -> Path:
    return _at_home(given or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def _at_home(folder: str | os.PathLike[str]) -> Path:
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:  # a user without a home folder, as containers have them
        raise FileNotFoundError(
            f"there is no home folder, so {folder} is nowhere; name the folder of the data sets with data_dir "
            "or set TFDS_DATA_DIR"
        ) from error


def _existing(raw_dir: Path) -> Path:
    if not raw_dir.is_dir():
        raise FileNotFoundError(f"raw_dir {raw_dir} is no folder; name the one that holds the original files")
    return raw_dir


def _newest_version(folder: Path) -> Path | None:
    """The folder of the highest version below ``folder``; TFDS names it by three numbers, like 3.0.10."""
    prepared = [info.parent for info in folder.glob("*.*.*/dataset_info.json")]
    numbered = {
        tuple(map(int, path.name.split("."))): path for path in prepared if path.name.replace(".", "").isdigit()
    }
    return numbered[max(numbered)] if numbered else None


def _unknown(name: str, data_dir: Path) -> str:
    close = difflib.get_close_matches(name, _RECIPES, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return (
        f"unknown data set {name!r}{hint}; known are {', '.join(_RECIPES)}, "
        f"and what TFDS has prepared as ArrayRecord in {data_dir}"
    )
