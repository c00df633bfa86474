"""Leaving in good order: Ctrl-C, SIGTERM and a closed terminal ask the run to stop after the present step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["ASKING_TO_STOP", "Stop", "stop_on_signals"]

HANGUP = getattr(signal, "SIGHUP", None)
"""A terminal was closed, or the connection to it lost; None on Windows."""

ASKING_TO_STOP = (signal.SIGINT, signal.SIGTERM, *([] if HANGUP is None else [HANGUP]))


class Stop:
    """Becomes true when a signal has asked the run to stop."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Catch the first signal and remember it; a second one of the same kind acts as it always does.

    Off the main thread Python delivers no signals, and nothing is caught. `nohup` has a closed terminal ignored, and so
    it stays.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {signum: signal.getsignal(signum) for signum in ASKING_TO_STOP}
    if before.get(HANGUP) == signal.SIG_IGN:
        del before[HANGUP]

    terminals = _terminals()

    def remember(signum: int, frame: FrameType | None) -> None:
        if signum == HANGUP:
            _let_go(terminals - _terminals())
        stop.signum = signum
        signal.signal(signum, before[signal.Signals(signum)])

    for signum in before:
        signal.signal(signum, remember)
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _terminals() -> set[int]:
    """Which of standard output and standard error are terminals that are there."""
    return {descriptor for descriptor in (1, 2) if os.isatty(descriptor)}


def _let_go(descriptors: set[int]) -> None:
    """What is written there goes nowhere: it would be an error in the middle of what is saved."""
    if descriptors:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in descriptors:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
