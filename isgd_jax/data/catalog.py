"""The data sets that have a name."""

import difflib
import os
from pathlib import Path

from isgd_jax.data.dataset import Dataset, from_arrays
from isgd_jax.data.digits import DIGITS
from isgd_jax.data.idx import FASHION_MNIST, MNIST
from isgd_jax.data.recipe import Recipe

_RECIPES = {recipe.name: recipe for recipe in (DIGITS, FASHION_MNIST, MNIST)}


def names() -> tuple[str, ...]:
    """The names that `load` knows without anything prepared."""
    return tuple(_RECIPES)


def load(
    name: str, *, data_dir: str | os.PathLike[str] | None = None, raw_dir: str | os.PathLike[str] | None = None
) -> Dataset:
    """A data set by name, in memory.

    Args:
      name: one of `names`.
      data_dir: where prepared data sets are kept; by default TFDS's own folder, ``$TFDS_DATA_DIR`` or
        ``~/tensorflow_datasets``. Written once, when a data set is first asked for.
      raw_dir: where the original files are, if they are to be neither looked for nor downloaded.
    """
    raw = None if raw_dir is None else _existing(Path(raw_dir).expanduser())
    if name not in _RECIPES:
        raise ValueError(_unknown(name))
    return load_recipe(_RECIPES[name], data_dir=_data_dir(data_dir), raw_dir=raw)


def load_recipe(recipe: Recipe, *, data_dir: Path, raw_dir: Path | None = None) -> Dataset:
    """Like `load`, for a recipe."""
    try:
        from isgd_jax.data.prepare import load_prepared
    except ImportError as error:
        raise ImportError(f"named data sets need the extra 'train': pip install 'isgd_jax[train]' ({error})") from error
    splits = load_prepared(recipe, data_dir=data_dir, raw_dir=raw_dir)
    return from_arrays(
        splits["train"],
        splits["test"],
        valid=splits.get("valid"),
        name=recipe.name,
        num_classes=recipe.num_classes,
        per_coordinate=recipe.per_coordinate,
    )


def _data_dir(given: str | os.PathLike[str] | None) -> Path:
    return Path(given or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _existing(raw_dir: Path) -> Path:
    if not raw_dir.is_dir():
        raise FileNotFoundError(f"raw_dir {raw_dir} is no folder; name the one that holds the original files")
    return raw_dir


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, _RECIPES, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown data set {name!r}{hint}; known are {', '.join(_RECIPES)}"
