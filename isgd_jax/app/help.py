"""The first page of a command's help: the flags that people use, at most 50 lines of at most 100 columns.

All of them, in panels, are what tyro makes of the same dataclasses: ``--help-all``.
"""

import contextlib
import dataclasses
import inspect
import os
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, get_type_hints

import tyro

from isgd_jax.app.gone import IN_PYTHON

__all__ = ["LEAST", "WIDTH", "first_page", "narrow", "without_none"]

WIDTH = 100
"""Columns: nothing that the command prints is wider, but paths."""

LEAST = 40
"""Columns that all flags, and mistakes in them, are told in where the terminal is narrower."""

_FLAG = 27
"""Columns of a flag with its default."""


def first_page(command: type, *, prog: str, names: Sequence[str], positional: str = "") -> str:
    """The help of a command in one screen, from the docstrings of its dataclasses.

    Args:
        command: a dataclass; fields of dataclasses within it count as its own. What is told of a field is what its
            class says under "Attributes:".
        prog: what is typed, such as ``isgd train``.
        names: the fields to show, in this order.
        positional: what follows the command without a flag, as the usage line has it: a name in capitals for each.

    Raises:
        KeyError: a field is not there, or not described.
    """
    fields, told = _fields(command), _described(command)
    lines = [f"usage: {prog}{f' {positional}' if positional else ''}{' [FLAGS]' if names else ''}", ""]
    lines += [*_summary(command).splitlines(), ""]
    followed = [name for name in fields if name in told and name in _positionals(command)]
    shown = dict(zip(followed, re.findall(r"[A-Z][\w.]*", positional), strict=True))
    for name in [*followed, *names]:
        described = textwrap.wrap(told[name], WIDTH - _FLAG - 1)
        flag = f"  {shown.get(name) or '--' + name.replace('_', '-')}{_default(fields[name])}"
        if len(flag) > _FLAG:
            lines.append(flag)
            flag = ""
        lines += [
            f"{head:<{_FLAG}} {text}" for head, text in zip([flag, *[""] * len(described)], described, strict=False)
        ]
    left = [name for name in fields if name in told and name not in (*names, *followed)]
    more = f"{len(left)} flags more, in panels: {prog} --help-all" if left else ""
    return "\n".join([*lines, "", *filter(None, ["The default of each is shown beside its name.", more])])


def _summary(command: type) -> str:
    """The paragraphs of a command's docstring before its sections, in lines of at most `WIDTH` columns."""
    text = inspect.cleandoc(str(command.__doc__)).partition("\nAttributes:")[0]
    return "\n\n".join(textwrap.fill(" ".join(part.split()), WIDTH) for part in text.split("\n\n") if part.strip())


@contextlib.contextmanager
def narrow() -> Iterator[None]:
    """Inside, tyro and rich take the terminal for one of `LEAST` to `WIDTH` columns: below ten tyro never ends."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(max(LEAST, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def without_none(text: str) -> str:
    """A help of tyro's for people: what may be left out is known by having no default, and not by Python's None.

    >>> print(without_none("│ --epochs {None}|FLOAT   So many passes. (default: None) │"))
    │ --epochs FLOAT          So many passes.                 │

    Args:
        text: panels of tyro's; their width stays.
    """
    text = re.sub(r"\{None\}\|(\w+)", r"\1" + " " * len("{None}|"), text)
    text = re.sub(r"\{None,([^}\s]*\})", r"{\1" + " " * len("None,"), text)
    text = re.sub(rf"\(default:(?:{_COLOR}|[\s│])*None\)", _blank, text)
    return re.sub(rf"^(?:{_COLOR})*│(?:{_COLOR}| )*│(?:{_COLOR})*\n", "", text, flags=re.MULTILINE)


_COLOR = r"\x1b\[[\d;]*m"


def _blank(found: re.Match[str]) -> str:
    return re.sub(rf"({_COLOR}|[│\n])|.", lambda letter: letter[1] or " ", found[0])


def _fields(command: type) -> dict[str, Any]:
    """The default of each field by its name, those of dataclasses within among them."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(command):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found |= _fields(type(default)) if dataclasses.is_dataclass(default) else {field.name: default}
    return found


def _described(command: type) -> dict[str, str]:
    """What the docstrings say of each field that has a flag."""
    told: dict[str, str] = {}
    section = inspect.cleandoc(str(command.__doc__)).partition("Attributes:\n")[2]
    for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE):
        told[name] = " ".join(text.split())
    for field in dataclasses.fields(command):
        if field.default_factory is not dataclasses.MISSING:
            told |= _described(type(field.default_factory()))
    return {name: text for name, text in told.items() if name not in IN_PYTHON}


def _positionals(command: type) -> set[str]:
    hints = get_type_hints(command, include_extras=True)
    return {name for name, hint in hints.items() if tyro.conf.Positional in getattr(hint, "__metadata__", ())}


def _default(value: Any) -> str:
    if value is None or value is False or value is dataclasses.MISSING or value == ():
        return ""
    return f" {' '.join(map(str, value))}" if isinstance(value, tuple) else f" {value}"
