"""What is looked at before a run goes on: that its checkpoints are there, and that the user's files are as before."""

import hashlib
from pathlib import Path

from isgd_jax.app.config import Config
from isgd_jax.app.run_dir import RunDir
from isgd_jax.errors import ArgumentError

__all__ = ["check_checkpoints_there", "files_of_numbers"]


def check_checkpoints_there(run: RunDir) -> None:
    """Refuse to begin a run anew that has made updates, and whose checkpoints somebody took away.

    A run that was killed before its first checkpoint has none, and is begun anew.

    Args:
        run: its folder, before anything is written into it.

    Raises:
        ArgumentError: its records are of more updates than are made without a checkpoint, and there is none.
    """
    folder = run.own_checkpoints()
    if folder.is_dir() and any(folder.iterdir()):
        return
    records = list(run.records())
    made = max((record["step"] for record in records), default=0)
    if made == 0 or (records and records[-1]["event"] == "diverged"):  # of one that diverged they are discarded
        return
    has_saved = records[-1]["event"] in ("finished", "stopped")
    if not folder.is_dir() or has_saved or made > 2 * run.read_config().recording.checkpoint_every:
        raise ArgumentError(
            f"{folder} has no checkpoint, though {run.metrics.name} tells of {made:,} updates, which would be erased: "
            f"bring the checkpoints back, or begin a new run in another folder (or in this one, when "
            f"{run.metrics.name} is gone)"
        )


def files_of_numbers(config: Config) -> dict[str, str]:
    """The checksum of each file of numbers that decides what is trained: part of what a checkpoint belongs to.

    Args:
        config: of the run; the files are there.
    """
    named = {name: getattr(config.sampling, name) for name in ("example_weights", "static_scores")}
    return {
        f"file of {name}": hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        for name, path in named.items()
        if path is not None
    }
