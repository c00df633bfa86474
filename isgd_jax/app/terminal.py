"""What the command writes to: standard output, which its reader may close early, as `head` does."""

import errno
import os
from typing import Any

from rich.console import Console

__all__ = ["Terminal"]


class Terminal(Console):
    """A console on standard output that takes no brackets for markup.

    Args:
        options: of `rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, **options)

    def on_broken_pipe(self) -> None:
        """Nobody reads any more: the command ends as by SIGPIPE, where Rich would end it by 1, without a word.

        Raises:
            BrokenPipeError: always.
        """
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
