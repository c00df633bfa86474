"""The end of a program whose threads are inside XLA.

A thread that compiles when the interpreter is torn down cannot take the interpreter's lock again: it is unwound through
C++ that does not allow it, and the process aborts ("terminate called ..."), although all is saved. So what has threads
is closed before that: Python runs exit handlers in reverse order, and importing this module imports JAX first, whose
own handler takes its devices down.
"""

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax

__all__ = ["LIMIT", "LOG", "STUCK", "HasThreads", "close_at_exit", "joined"]

LOG = logging.getLogger("isgd_jax")

LIMIT = 600.0
"""Seconds that the end of the program waits for calls that cannot be interrupted. A compilation is hardly longer."""

STUCK = 70
"""The exit code where that was not enough: EX_SOFTWARE of sysexits.h."""


@runtime_checkable
class HasThreads(Protocol):
    """What must not be working when the interpreter ends."""

    @property
    def threads(self) -> list[threading.Thread]:
        """All that were started."""
        ...

    def close(self) -> None:
        """End them, as far as that is possible."""
        ...


_open: "weakref.WeakSet[HasThreads]" = weakref.WeakSet()


def close_at_exit(holder: HasThreads) -> None:
    """Close it and wait for its threads when the program ends, unless nothing of it is left by then.

    It is held weakly: an engine that is dropped before needs nothing more. One whose threads do not end in `LIMIT`
    seconds ends the process with exit code `STUCK`, and says so.
    """
    _open.add(holder)


def joined(threads: Sequence[threading.Thread], seconds: float) -> bool:
    """Wait for all threads together; whether all have ended.

    Args:
        threads: the calling thread, if it is one of them, is not waited for.
        seconds: for all together, not for each; 0 looks without waiting.
    """
    end = time.monotonic() + seconds
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, end - time.monotonic()))
    return not any(thread.is_alive() for thread in threads if thread is not threading.current_thread())


def _end() -> None:
    """Close all, and wait; the last resort is to leave without the rest of the interpreter's end, and to say so."""
    threads: list[threading.Thread] = []
    try:
        for holder in list(_open):
            with contextlib.suppress(Exception):
                holder.close()
            threads += holder.threads
        if joined(threads, LIMIT):
            return
        why, code = f"after {LIMIT:g} s", STUCK
    except KeyboardInterrupt:
        why, code = "interrupted", 130
    busy = ", ".join(thread.name for thread in threads if thread.is_alive())
    LOG.error(
        "%s: workers still compile or score (%s), and the interpreter cannot end under them. "
        "The process is ended at once, with exit code %s; exit handlers registered before isgd_jax do not run.",
        why, busy, code,
    )  # fmt: skip
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


assert jax  # imported for its exit handler, which must run after ours
atexit.register(_end)
