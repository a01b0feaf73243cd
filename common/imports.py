"""Modules of the user's own, imported so that they can register models."""

import importlib
import sys
from collections.abc import Iterable

from common.errors import UserError


def import_modules(names: Iterable[str]) -> None:
    """Import modules by name, from the current directory too.

    Raises:
        UserError: there is no such module, or it fails to import.
    """
    for name in names:
        if "" not in sys.path:
            sys.path.insert(0, "")  # as `python -m` does
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"--import {name}: {error}; give a module that Python can import from here"
            ) from error
