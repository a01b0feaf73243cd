"""lz4: lossless and fast.

Source: the LZ4 block format, https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md
"""

from __future__ import annotations

import lz4.block

from wire.codecs.lossless import Lossless
from wire.codecs.registry import register
from wire.errors import CorruptPayload


@register
class Lz4(Lossless):
    """One LZ4 block, without frame or length."""

    name = "lz4"
    max_input = 0x7E000000
    max_ratio = 255

    def compress(self, data: memoryview) -> bytearray:
        """The block of some bytes."""
        block: bytearray = lz4.block.compress(data, store_size=False, return_bytearray=True)
        return block

    def decompress(self, block: memoryview, size: int) -> bytearray:
        """The bytes of a block."""
        try:
            data: bytearray = lz4.block.decompress(block, uncompressed_size=size, return_bytearray=True)
        except lz4.block.LZ4BlockError:
            raise CorruptPayload("an lz4 block does not decompress") from None
        if len(data) != size:
            raise CorruptPayload(f"an lz4 block holds {len(data)} bytes, not {size}")
        return data
