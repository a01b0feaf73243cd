"""Where the compiled kernels come from: loaded when first needed, on the CPU only, and only where Numba is."""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    import torch


def kernels(module: str, device: torch.device) -> ModuleType | None:
    """The module of this package with that name, or None where torch's operations have to do instead.

    Numba takes its time to import, so nothing else imports these modules.
    """
    return _loaded(module) if device.type == "cpu" else None


@cache
def _loaded(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"wire.codecs.{module}")
    except ImportError:
        return None
