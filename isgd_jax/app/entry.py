"""What the script `isgd` calls first: Ctrl-C is one line from the start, also while the command is still imported."""

import os
import signal
from types import FrameType

__all__ = ["main"]


def main() -> None:
    """Import the command and run it.

    Raises:
        SystemExit: always, as `isgd_jax.app.cli.main` does.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where who started us has it ignored
        signal.signal(signal.SIGINT, _leave)
    from isgd_jax.app import cli

    signal.signal(signal.SIGINT, before)
    cli.main()


def _leave(signum: int, frame: FrameType | None) -> None:
    """At once: nothing is begun yet, and an import that is interrupted may raise anything."""
    os.write(2, b"isgd: interrupted\n")
    os._exit(128 + signum)
