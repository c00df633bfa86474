"""The names of Python as flags of the command: how flags are made of fields, and how messages speak of them.

The library and the configuration speak Python (``batch_size must be at least 1``, ``leave out address=``); here, and
nowhere else, that becomes what was typed (``--batch-size must be at least 1``, ``leave out --address``).
"""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from isgd_jax.app.config import Config
from isgd_jax.app.gone import IN_PYTHON
from isgd_jax.app.help import narrow, without_none
from isgd_jax.errors import IsgdError

__all__ = ["in_flags", "parse"]

_OF_COMMANDS = ("after", "ages", "arms", "examples", "levels", "out", "resume", "run", "seeds", "trial", "until_levels")
_IN_LIBRARY = {"uniform_fraction": "mixture", "num_workers": "scorers"}
_FLAGS = {name: name for name in (*Config().flat(), *_OF_COMMANDS) if name not in IN_PYTHON} | _IN_LIBRARY
_NAMED = re.compile(
    r"(?<![\w./'\"=-])(?:"
    r"(?P<given>[a-z_]+)=(?P<value>'[^']*'|\"[^\"]*\"|[^\s,;:()]*)"  # batch_size=32, or batch_size= alone
    r"|(?P<long>[a-z]+_[a-z_]+)(?![\w./=-])"  # no word of English has an underscore
    r"|(?P<short>[a-z]+)(?= must )"
    r")"
)


def parse(what: Any, arguments: Sequence[str], *, prog: str, **options: Any) -> Any:
    """Make a dataclass, or one of several, of the arguments of a command; a field's flag is its name alone.

    Args:
        what: the type to make.
        arguments: as they were typed.
        prog: the name of the command, for messages.
        options: of `tyro.cli`.

    Raises:
        IsgdError: one of the dataclasses refused its values. tyro would print it itself, under names of its own.
        SystemExit: help was asked for, or the arguments cannot be read; it has been said.
    """
    said, shown = io.StringIO(), _Shown()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown), narrow():
            return tyro.cli(what, args=arguments, prog=prog, config=(tyro.conf.OmitArgPrefixes,), **options)
    except SystemExit as exit_error:
        cause = exit_error.__context__
        while cause is not None and not isinstance(cause, IsgdError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(said.getvalue())
        sys.stdout.write(without_none(shown.text()))
        raise


class _Shown(io.TextIOWrapper):
    """Help, kept until it is printed: in the letters and colors of the terminal that it is for."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), sys.stdout.encoding or "utf-8", write_through=True)
        self.isatty = sys.stdout.isatty  # type: ignore[method-assign]

    def text(self) -> str:
        self.seek(0)
        return self.read()


def in_flags(text: str) -> str:
    """A message of the library in the words of the command.

    >>> in_flags("batch_size must be a multiple of train_devices=2; got 5")
    '--batch-size must be a multiple of --train-devices 2; got 5'
    >>> in_flags("there is no Ray at address='here:1', or leave out address=")
    'there is no Ray at --address here:1, or leave out --address'
    >>> in_flags("hold must be device with distributed=True; the engine is not asked")
    '--hold must be device with --distributed; the engine is not asked'

    Args:
        text: a message. Names are known by their form: ``name=``, a name with an underscore, or one before "must". What
            is no name of a field stays as it is.
    """
    return _NAMED.sub(_flag, text)


def _flag(found: re.Match[str]) -> str:
    name = found["given"] or found["long"] or found["short"]
    if name not in _FLAGS:
        return found[0]
    value = (found["value"] or "").strip("'\"")
    flag = f"--{_FLAGS[name].replace('_', '-')}"
    return flag if value in ("", "True") else f"{flag} {value}"
