"""Modules of the user's own, imported so that they can register models."""

import importlib
import sys
from collections.abc import Iterable

from common.errors import IsthmusError, UserError


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
        except IsthmusError:
            raise
        except Exception as error:
            # Whatever the module's own code raises.
            reason = " ".join(str(error).split()) or "nothing more is known"
            if not isinstance(error, ImportError):
                reason = f"{type(error).__name__}: {reason}"
            raise UserError(
                f"--import {name}: {reason}; give a module that Python can import from here"
            ) from error
