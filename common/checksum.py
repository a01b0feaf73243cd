"""Files whose last four bytes are the CRC-32 of all before them, little-endian."""

import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

CHECKSUM_BYTES: Final = 4

_PIECE: Final = 1 << 20
"""Bytes that are read at once."""


def summed(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    """Give what comes, and last the checksum of it."""
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
        yield piece
    yield memoryview(_bytes_of(checksum))


def is_sound(path: Path) -> bool:
    """Whether a file's checksum is that of what it holds; takes as long as reading it.

    Raises:
        OSError: it cannot be read.
    """
    piece, checksum = memoryview(bytearray(_PIECE)), 0
    with path.open("rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size - CHECKSUM_BYTES
        while left > 0 and (count := file.readinto(piece[: min(left, _PIECE)])):
            checksum = zlib.crc32(piece[:count], checksum)
            left -= count
        return file.read() == _bytes_of(checksum)


def _bytes_of(checksum: int) -> bytes:
    return checksum.to_bytes(CHECKSUM_BYTES, "little")
