"""The original files of a data set: found, or downloaded whole, or one clear error at once.

Guarantees:
  - what was downloaded has its checksum, when it came and whenever it is found again; else it is fetched anew;
  - a file is there only whole: it is written under another name and renamed;
  - what stands in the way is told in one sentence, with the files to bring; those that are there already are kept.
"""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

from isgd_jax.app.data.recipe import RawFile, Recipe
from isgd_jax.errors import ArgumentError

__all__ = ["locate"]

_TIMEOUT_SECONDS = 10.0  # to connect, and for each read: a dead network is told in seconds
_AS_IT_IS = {"Accept-Encoding": "identity"}
_log = logging.getLogger(__name__)


def locate(recipe: Recipe, *, raw_dir: Path | None, downloads: Path) -> dict[str, Path]:
    """The recipe's files by name: in ``raw_dir`` alone if given, else where a package put them, else downloaded.

    Args:
      recipe: whose files.
      raw_dir: the only folder to look in. Checksums are not asked for there: copies may be compressed differently.
      downloads: where downloaded files are kept.

    Raises:
      FileNotFoundError: a file is not in ``raw_dir``, or comes with a package that is not installed.
      ConnectionError: a file cannot be downloaded.
      ValueError: what was downloaded is not what it should be.
      OSError: ``downloads`` cannot be written to.
    """
    if raw_dir is not None:
        return _in_raw_dir(recipe, raw_dir)
    for folder in (*recipe.folders, *_package_folders(recipe)):
        if all((folder / file.name).is_file() for file in recipe.files):
            return {file.name: folder / file.name for file in recipe.files}
    return {file.name: _downloaded(recipe, file, downloads) for file in recipe.files}


def _in_raw_dir(recipe: Recipe, raw_dir: Path) -> dict[str, Path]:
    missing = [file.name for file in recipe.files if not (raw_dir / file.name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{recipe.name}: expected the file{'s' * (len(missing) > 1)} {', '.join(missing)} in raw_dir {raw_dir}, "
            f"which has no such file; the originals are described at {recipe.homepage}"
        )
    return {file.name: raw_dir / file.name for file in recipe.files}


def _package_folders(recipe: Recipe) -> list[Path]:
    """Found, not imported: a data package may load all its tables, or need what is not installed, when imported."""
    spec = importlib.util.find_spec(recipe.package) if recipe.package else None
    return [Path(place) / "data" for place in (spec and spec.submodule_search_locations) or []]


def _downloaded(recipe: Recipe, file: RawFile, folder: Path) -> Path:
    if file.url is None or file.sha256 is None:
        raise FileNotFoundError(
            f"{recipe.name}: {file.name} comes with the package {recipe.package}, which is not installed; "
            f"pip install {recipe.package}, or put the file into a folder and name it as raw_dir"
        )
    import pooch  # where nothing is to be downloaded, it need not be there
    import requests

    # As it lies there: servers may pack what is packed already, and it would come unpacked.
    downloader = pooch.HTTPDownloader(timeout=_TIMEOUT_SECONDS, chunk_size=1 << 20, headers=_AS_IT_IS)
    if not (folder / file.name).is_file():
        _log.info("downloading %s to %s", file.url, folder / file.name)
    try:
        with _quiet(pooch.get_logger()):
            found = pooch.retrieve(file.url, f"sha256:{file.sha256}", file.name, folder, downloader=downloader)
    except requests.exceptions.RequestException as error:
        bring = ", ".join(file.name for file in recipe.files)
        raise ConnectionError(
            f"{recipe.name}: {file.name} is not whole on this machine and {file.url} cannot be reached, or not to the "
            f"file's end ({error}); put {bring} into a folder and name it as raw_dir"
        ) from error
    except ValueError as error:
        raise ArgumentError(
            f"{file.url} gave another file than the one with SHA-256 {file.sha256}: the download was cut short, or the "
            f"file there is another one; try again ({error})"
        ) from error
    except OSError as error:
        raise type(error)(
            f"cannot write {file.name} into {folder} ({error}); make room there, or name another data_dir"
        ) from error
    return Path(found)


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Its lines would stand between ours."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
