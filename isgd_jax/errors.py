"""Mistakes that a person can mend: what was expected, what came, what to do.

The command prints these in one sentence; everything else that is raised is a fault of the program, and keeps its
traceback. Each is also one of Python's own errors, so ``except ValueError`` catches what it always did.
"""


class IsgdError(Exception):
    """The root of this library's own errors."""


class ArgumentError(IsgdError, ValueError):
    """A value is out of range, or does not fit the others."""


class ArgumentTypeError(IsgdError, TypeError):
    """A value is of the wrong type, or is missing."""


class ReferenceNotFoundError(IsgdError, AttributeError):
    """A module has no such name: ``pkg.module:name``."""


class CannotImportError(IsgdError, ImportError):
    """A module or an extra is not installed."""


class DamagedFileError(ArgumentError):
    """A file is not what was written: cut short, changed, or of another kind."""


class RunInUseError(IsgdError, RuntimeError):
    """Another process is writing to the folder of the run."""


class DivergedError(IsgdError, FloatingPointError):
    """The loss is no longer finite."""
