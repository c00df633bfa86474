"""Finished runs of an experiment, a file each: written whole, and not made again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isgd_jax.app.files import write_whole

__all__ = ["cell"]


def cell(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """What is there under a name, or what is made now and kept, as JSON gives it back.

    Args:
        folder: of the experiment; made where it is not there.
        name: of the run, without ``.json``.
        make: the record of the run, which JSON can hold.
    """
    file = folder / f"{name}.json"
    if not file.exists():
        record = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(record))
    return json.loads(file.read_text())
