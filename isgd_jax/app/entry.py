"""What the script `isgd` calls first: Ctrl-C is one line at any moment, also while modules are still imported."""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

__all__ = ["main"]


def main() -> None:
    """Import the command and run it.

    Raises:
        SystemExit: always, as `isgd_jax.app.cli.main` does.
    """
    _open_closed()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where who started us has it ignored
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from isgd_jax.app import cli

        cli.main()
    except KeyboardInterrupt:
        if os.environ.get("ISGD_TRACEBACK"):
            raise
        _leave(signal.SIGINT)


def _open_closed() -> None:
    """What of the standard streams was closed leads nowhere; a file of the run would take its number, and output."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; but leave at once amid an import, which may abort, or raise or make anything of it."""
    here = frame
    while here is not None:
        if here.f_code.co_filename == "<frozen importlib._bootstrap>":
            _leave(signum)
        here = here.f_back
    raise KeyboardInterrupt


def _leave(signum: int) -> NoReturn:
    os.write(2, b"isgd: interrupted\n")
    os._exit(128 + signum)
