"""Arguments of a codec as text: ``hadamard``, ``group=64``, or several with commas between."""

from __future__ import annotations

import re
from collections.abc import Iterator

_UNITS = {unit: 1 << 10 * power for power, unit in enumerate(("", "K", "M", "G", "T"))}


class ArgumentError(ValueError):
    """An argument in a spec is wrong.

    Args:
        reason: what is wrong and what would be right.
        position: where in the arguments, counted from 0.
    """

    def __init__(self, reason: str, position: int) -> None:
        self.position = position
        super().__init__(reason)


def split_options(args: str) -> Iterator[tuple[str, int]]:
    """Yields each argument and where it starts; nothing where there are none.

    Raises:
        ArgumentError: one comes twice.
    """
    position = 0
    seen: set[str] = set()
    for option in args.split(",") if args else ():
        name = option.partition("=")[0]
        if name in seen:
            raise ArgumentError(f"{name} comes a second time", position)
        seen.add(name)
        yield option, position
        position += len(option) + 1


def parse_size(text: str) -> int | None:
    """Reads a number of bytes such as ``500M`` or ``4G``, in powers of 1024; None where it is none, or 0."""
    match = re.fullmatch(r"([0-9]{1,9})([KMGT]?)", text)
    return int(match[1]) * _UNITS[match[2]] or None if match else None
