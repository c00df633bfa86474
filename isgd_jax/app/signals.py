"""Leaving in good order: Ctrl-C and SIGTERM ask the run to stop after the present step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["ASKING_TO_STOP", "Stop", "stop_on_signals"]

ASKING_TO_STOP = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Becomes true when a signal has asked the run to stop."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Catch the first signal and remember it; a second one of the same kind acts as it always does.

    Off the main thread Python delivers no signals, and nothing is caught.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {signum: signal.getsignal(signum) for signum in ASKING_TO_STOP}

    def remember(signum: int, frame: FrameType | None) -> None:
        stop.signum = signum
        signal.signal(signum, before[signal.Signals(signum)])

    for signum in ASKING_TO_STOP:
        signal.signal(signum, remember)
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
