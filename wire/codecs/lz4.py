"""lz4: lossless, fast, and on bytes that are grouped by significance.

Source: the LZ4 block format, https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import lz4.block
import torch

from wire.codecs.base import Call, Codec, Packed, Part, PartType
from wire.codecs.layout import TensorType, padded, raw_bytes
from wire.codecs.registry import register
from wire.errors import CorruptPayload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_MAX_INPUT = 0x7E000000
_MAX_RATIO = 255
"""A byte of an LZ4 block stands for at most 255 bytes."""


@register
class Lz4(Codec):
    """One LZ4 block of the tensor's bytes, in memory order.

    Elements of several bytes are shuffled first: all first bytes, then all second bytes, and so on, since the
    high bytes of neighbours are alike where the low ones are noise.
    """

    name = "lz4"
    kind: ClassVar[Literal["lossless", "lossy"]] = "lossless"
    on_host = True

    def encode(self, x: Tensor, call: Call) -> Packed | None:
        """One part, the block, and its size in the meta values; None where it is not smaller."""
        size = x.numel() * x.dtype.itemsize
        if not 0 < size <= _MAX_INPUT:
            return None
        data = _shuffled(raw_bytes(x.cpu()), x.dtype.itemsize)
        block = lz4.block.compress(data.numpy().data, store_size=False, return_bytearray=True)
        if padded(len(block)) >= padded(size):
            return None
        return Packed((Part(torch.frombuffer(block, dtype=torch.uint8), follow=True),), {"size": len(block)})

    def part_types(self, whole: TensorType, meta: Mapping[str, Any]) -> tuple[PartType, ...]:
        """uint8 `[size]`."""
        size = meta.get("size")
        if len(meta) != 1 or type(size) is not int or not 0 < size < whole.nbytes <= size * _MAX_RATIO:
            raise CorruptPayload(f"lz4 does not make {size!r:.40} bytes of {whole.nbytes}")
        return (PartType(TensorType(torch.uint8, (size,)), follow=True),)

    def decode(self, parts: Sequence[Tensor], whole: TensorType, meta: Mapping[str, Any]) -> Tensor:
        """Decompresses, into memory of the declared size only."""
        try:
            data = lz4.block.decompress(
                parts[0].numpy().data, uncompressed_size=whole.nbytes, return_bytearray=True
            )
        except lz4.block.LZ4BlockError:
            raise CorruptPayload("an lz4 block does not decompress") from None
        if len(data) != whole.nbytes:
            raise CorruptPayload(f"an lz4 block holds {len(data)} bytes, not {whole.nbytes}")
        flat = _unshuffled(torch.frombuffer(data, dtype=torch.uint8), whole.dtype.itemsize)
        if whole.dtype == torch.bool and int(flat.max()) > 1:
            raise CorruptPayload("a tensor of bool holds bytes other than 0 and 1")
        return whole.shaped(flat.view(whole.dtype))


def _shuffled(data: Tensor, width: int) -> Tensor:
    return data if width == 1 else data.view(-1, width).t().contiguous().view(-1)


def _unshuffled(data: Tensor, width: int) -> Tensor:
    return data if width == 1 else data.view(width, -1).t().contiguous().view(-1)
