"""Errors that a user can act on, each with the exit code of the command line."""

from __future__ import annotations

import importlib
from types import ModuleType


class PywmError(Exception):
    """An error with a message meant for the user; the command line prints it without a traceback."""

    exit_code = 2


class UserError(PywmError, ValueError):
    """What the user asked for cannot be done: a wrong argument, name, file or combination."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or does not fit."""


class EnvError(PywmError):
    """The environment failed or broke its own contract."""

    exit_code = 3


class NumericalError(PywmError):
    """Training produced a value that is not finite and stopped."""

    exit_code = 4


class MissingExtra(UserError, ImportError):
    """An optional dependency is not installed."""


def require_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say how to install it.

    Args:
        module: dotted name of the module to import.
        extra: the extra of pywm that brings it.

    Raises:
        MissingExtra: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f'{module} is not installed. Install it with: pip install "pywm[{extra}]"'
        ) from error
