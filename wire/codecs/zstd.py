"""zstd: lossless, smaller than lz4, and slower.

Source: Zstandard Compression and the 'application/zstd' Media Type, RFC 8878.
"""

from __future__ import annotations

import re
from typing import ClassVar

import zstandard

from wire.codecs.base import Role
from wire.codecs.lossless import Lossless
from wire.codecs.options import ArgumentError
from wire.codecs.registry import register
from wire.errors import CorruptPayload

_DEFAULT_LEVEL = 1
_HIGHEST_LEVEL = 19


@register
class Zstd(Lossless):
    """One Zstandard frame that names the size of its content.

    Args:
        args: the level, 1 to 19; higher ones are smaller and slower. 1 where nothing is said.
        role: what the stream carries.
    """

    name = "zstd"
    examples: ClassVar[tuple[str, ...]] = ("", "3")
    max_input = 1 << 31
    max_ratio = 1 << 15
    """The densest block repeats one byte: 4 bytes stand for 128 KiB."""

    def __init__(self, args: str, role: Role) -> None:
        super().__init__("", role)
        level = int(args) if re.fullmatch(r"[0-9]{1,2}", args) else 0
        if args and not 1 <= level <= _HIGHEST_LEVEL:
            raise ArgumentError(f"{args!r} is no level of {self.name}; there are 1 to {_HIGHEST_LEVEL}", 0)
        self._compressor = zstandard.ZstdCompressor(level=level or _DEFAULT_LEVEL)
        self._decompressor = zstandard.ZstdDecompressor()

    def compress(self, data: memoryview) -> bytearray:
        """The frame of some bytes."""
        return bytearray(self._compressor.compress(data))

    def decompress(self, block: memoryview, size: int) -> bytearray:
        """The bytes of a frame."""
        try:
            frame = zstandard.get_frame_parameters(block)
            # What the frame says of itself decides how much is allocated.
            if frame.content_size != size or frame.dict_id != 0:
                raise CorruptPayload(f"a zstd frame does not say that it holds {size} bytes")
            data = self._decompressor.decompress(block, read_across_frames=False, allow_extra_data=False)
        except zstandard.ZstdError:
            raise CorruptPayload("a zstd frame does not decompress") from None
        if len(data) != size:
            raise CorruptPayload(f"a zstd frame holds {len(data)} bytes, not {size}")
        return bytearray(data)
