"""One process at a time, by filelock, where files can be locked; and whether a process that held one still runs."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from isgd_jax.errors import ArgumentError, CannotImportError

__all__ = ["is_alive", "locked", "start_of"]

_CANNOT_LOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(file: Path, *, when_busy: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock of a file, which is made and stays; however the process ends, the system lets go of it.

    Args:
        file: what all who must not work at once name alike.
        when_busy: called where somebody else holds the lock: it raises, or tells that one waits.

    Yields:
        Whether the lock is held; False where the file system cannot lock.

    Raises:
        OSError: the file cannot be written.
        ArgumentError: it is a link.
        ImportError: ``filelock`` is not installed.
    """
    try:
        import filelock
    except ModuleNotFoundError as error:
        raise CannotImportError("writing to a folder alone needs filelock: pip install 'isgd_jax[train]'") from error
    # Where there are no locks filelock would take a file's presence for one, which a killed process leaves for ever.
    lock = filelock.FileLock(file, fallback_to_soft=False)
    is_held = True
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        when_busy()
        lock.acquire()
    except NotImplementedError:
        is_held = False
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ArgumentError(f"{file} is a link, and a lock must be a file of its own: remove it") from error
        if error.errno not in _CANNOT_LOCK:
            raise
        is_held = False
    try:
        yield is_held
    finally:
        if is_held:
            lock.release()


def start_of(pid: int) -> str | None:
    """When a process of this host began, in ticks since a boot that is named: numbers of processes are used again.

    None where the system does not say, or there is no such process.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        after_name = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2]
        return f"{boot} {after_name.split()[19]}"
    except (OSError, IndexError):
        return None


def is_alive(pid: int, started: object) -> bool:
    """Whether a process of this host still runs, and is the one that began then."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is another user's
        pass
    return started is None or start_of(pid) in (started, None)
