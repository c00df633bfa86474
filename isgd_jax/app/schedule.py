"""The schedule of a run, read from the refreshes in its metrics.jsonl: `isgd train --replay` follows it."""

from isgd_jax.app.run_dir import RunDir
from isgd_jax.engines.arrivals import Arrivals, Schedule
from isgd_jax.errors import ArgumentError, DamagedFileError

__all__ = ["check_covers", "read"]


def check_covers(schedule: Schedule, num_steps: int, refresh_every: int) -> None:
    """Refuse to train beyond the end of the schedule.

    Args:
        schedule: of the earlier run.
        num_steps: that are asked for.
        refresh_every: steps between two refreshes.

    Raises:
        ValueError: the earlier run made fewer steps.
    """
    covered = max(schedule.arrivals) + refresh_every
    if num_steps > covered:
        raise ArgumentError(f"the schedule to replay ends at step {covered}, before --steps {num_steps}: ask for less")


def read(run: RunDir, fingerprint: str) -> Schedule:
    """The schedule of a run, finished or not, on the training set of this fingerprint.

    Args:
        run: the folder.
        fingerprint: of the training set that is here.

    Returns:
        Which scores came at which refresh, and when.

    Raises:
        FileNotFoundError: this is not the folder of a run.
        ValueError: it made no refresh, as in uniform mode, or was made on other data; or its records are damaged.
    """
    run.read_config()
    if run.fingerprint() not in (None, fingerprint):
        raise ArgumentError(
            f"{run.path} was made on another data set: it has {run.fingerprint()}, this is {fingerprint}"
        )
    refreshes = {record["step"]: record for record in run.records("refresh")}
    if not refreshes:
        raise ArgumentError(f"{run.path} has no schedule to replay: it never refreshed its scores")
    try:
        sizes = {int(record["chunk_size"]) for record in refreshes.values()}
        arrivals = {
            step: Arrivals(
                [(int(version), int(first), int(last)) for version, first, last in record["arrived"]],
                float(record["clock"]),
            )
            for step, record in refreshes.items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{run.metrics}: a refresh is not what was written ({error!r})") from error
    if len(sizes) > 1:
        raise ArgumentError(
            f"{run.path} was resumed with chunks of another size, {sorted(sizes)}: it cannot be replayed"
        )
    return Schedule(sizes.pop(), arrivals)
