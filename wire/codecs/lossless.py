"""What the lossless codecs share: bytes grouped by significance, in one block of a declared size."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from wire.codecs import compiled
from wire.codecs.base import Call, Codec, Facts, Packed, Part, PartType
from wire.codecs.layout import TensorType, padded, raw_bytes
from wire.errors import CorruptPayload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class Lossless(Codec):
    """One compressed block of the tensor's bytes, in memory order.

    Elements of several bytes are shuffled first: all first bytes, then all second bytes, and so on, since the
    high bytes of neighbours are alike where the low ones are noise.

    Attributes:
        max_input: bytes of the largest tensor that is compressed.
        max_ratio: a byte of a block stands for at most so many bytes.
    """

    kind: ClassVar[Literal["lossless", "lossy"]] = "lossless"
    on_host = True
    max_input: ClassVar[int]
    max_ratio: ClassVar[int]

    @abstractmethod
    def compress(self, data: memoryview) -> bytearray:
        """The block of some bytes, of which there is at least one."""

    @abstractmethod
    def decompress(self, block: memoryview, size: int) -> bytearray:
        """The bytes of a block, for which no more than `size` bytes are allocated.

        Raises:
            CorruptPayload: it is no block of `size` bytes.
        """

    def encode(self, x: Tensor, call: Call) -> Packed | None:
        """One part, the block, and its size in the meta values; None where it is not smaller."""
        size = x.numel() * x.dtype.itemsize
        if not 0 < size <= self.max_input:
            return None
        block = self.compress(_shuffled(raw_bytes(x.cpu()), x.dtype.itemsize).numpy().data)
        if padded(len(block)) >= padded(size):
            return None
        return Packed((Part(torch.frombuffer(block, dtype=torch.uint8), follow=True),), {"size": len(block)})

    def part_types(self, whole: TensorType, meta: Mapping[str, Any], facts: Facts) -> tuple[PartType, ...]:
        """uint8 `[size]`."""
        size = meta.get("size")
        if len(meta) != 1 or type(size) is not int or not 0 < size < whole.nbytes <= size * self.max_ratio:
            raise CorruptPayload(f"{self.name} does not make {size!r:.40} bytes of {whole.nbytes}")
        return (PartType(TensorType(torch.uint8, (size,)), follow=True),)

    def decode(
        self, parts: Sequence[Tensor], whole: TensorType, meta: Mapping[str, Any], facts: Facts
    ) -> Tensor:
        """Decompresses, into memory of the declared size only."""
        data = self.decompress(parts[0].numpy().data, whole.nbytes)
        flat = _unshuffled(torch.frombuffer(data, dtype=torch.uint8), whole.dtype.itemsize)
        if whole.dtype == torch.bool and int(flat.max()) > 1:
            raise CorruptPayload("a tensor of bool holds bytes other than 0 and 1")
        return whole.shaped(flat.view(whole.dtype))


def _shuffled(data: Tensor, width: int) -> Tensor:
    kernels = compiled.kernels("_bit_kernels", data.device)
    if width == 1:
        return data
    if kernels is None:
        return data.view(-1, width).t().contiguous().view(-1)
    planes = torch.empty_like(data)
    kernels.shuffle(data.numpy().view(f"u{width}"), planes.numpy())
    return planes


def _unshuffled(data: Tensor, width: int) -> Tensor:
    kernels = compiled.kernels("_bit_kernels", data.device)
    if width == 1:
        return data
    if kernels is None:
        return data.view(width, -1).t().contiguous().view(-1)
    x = torch.zeros_like(data)
    kernels.unshuffle(data.numpy(), x.numpy().view(f"u{width}"))
    return x
