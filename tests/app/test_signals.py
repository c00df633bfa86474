"""Signals that ask a run to stop: each is heard once, and a terminal that is closed breaks nothing."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from isgd_jax.app.signals import stop_on_signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_remembered_and_afterwards_all_is_as_before(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), signum)
        assert (bool(stop), stop.signum) == (True, signum)
        assert signal.getsignal(signum) == before, "a second one acts as it always does"
    assert signal.getsignal(signum) == before


def test_what_nohup_has_ignored_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


IN_A_TERMINAL = """
import fcntl, sys, termios, time
from isgd_jax.app.signals import stop_on_signals

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with stop_on_signals() as stop:
    print("ready", flush=True)
    while not stop:
        time.sleep(0.01)
    print("saved", flush=True)
sys.exit(128 + stop.signum)
"""


def test_a_terminal_that_is_closed_asks_to_stop_and_takes_what_is_still_said(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    assert os.read(ours, 100).strip() == b"ready"
    os.close(ours)
    assert process.wait(60) == 128 + signal.SIGHUP
