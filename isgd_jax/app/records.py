"""The lines of a run's metrics.jsonl, as their readers rely on them."""

from typing import Any, TypeGuard

from isgd_jax.errors import DamagedFileError

__all__ = ["MEASURED", "Record", "check_record", "is_number"]

Record = dict[str, Any]
"""One line of metrics.jsonl: `event` says which kind, `step` how many updates had been made."""

MEASURED = frozenset(
    {
        "seconds", "train_seconds", "loss", "train_loss", "test_loss", "train_error", "test_error", "max_weight",
        "age_mean", "age_p95", "variance_ratio", "steps_per_second", "scores_per_second", "trusted_share", "workers",
        "bytes_moved", "chunks_again", "results_refused",
    }
)  # fmt: skip
"""Fields of a line of progress that are numbers, or None where nothing was measured. So are ``sd_*``, ``share_*``."""


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a field of a record is a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_record(record: Record, where: str) -> None:
    """What every reader of a record relies on.

    Raises:
        DamagedFileError: a field is missing or of another type; ``where`` names the line.
    """
    step = record.get("step")
    if not (isinstance(record.get("event"), str) and isinstance(step, int) and not isinstance(step, bool)):
        raise DamagedFileError(f"{where}: expected an event and its step, got {str(record)[:200]}")
    spent = record.get("spent", {})
    if not (isinstance(spent, dict) and all(is_number(value) for value in spent.values())):
        raise DamagedFileError(f"{where}: expected seconds by task as spent, got {str(spent)[:200]}")
    is_progress = record["event"] == "progress"
    for name, value in record.items():
        is_measured = name == "seconds" or (is_progress and (name in MEASURED or name.startswith(("sd_", "share_"))))
        if is_measured and not (value is None or is_number(value)):
            raise DamagedFileError(f"{where}: expected a number or null as {name}, got {str(value)[:200]}")
