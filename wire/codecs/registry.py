"""All codecs there are: the classes that the files of this package register."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

import wire.codecs

if TYPE_CHECKING:
    from wire.codecs.base import Codec

_classes: dict[str, type[Codec]] = {}


def register(cls: type[Codec]) -> type[Codec]:
    """Class decorator that makes a codec known by its `name`."""
    if _classes.setdefault(cls.name, cls) is not cls:
        raise ValueError(f"two codecs are named {cls.name}")
    return cls


def codec_names() -> tuple[str, ...]:
    """The names that a chain may be written with, sorted. ``none``, the empty chain, is not among them."""
    _import_all()
    return tuple(sorted(name for name, cls in _classes.items() if not cls.always))


def always_on() -> tuple[str, ...]:
    """The names of the codecs that stand in front of every chain by themselves, in their order."""
    _import_all()
    return tuple(sorted(name for name, cls in _classes.items() if cls.always))


def codec_class(name: str) -> type[Codec]:
    """The codec of that name.

    Raises:
        KeyError: there is none.
    """
    _import_all()
    return _classes[name]


@cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(wire.codecs.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"wire.codecs.{module.name}")
