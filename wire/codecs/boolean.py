"""bits: eight booleans in a byte."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from wire.codecs import bits
from wire.codecs.base import Call, Codec, Facts, Packed, Part, PartType, no_meta
from wire.codecs.layout import TensorType, flat
from wire.codecs.registry import register
from wire.errors import CorruptPayload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


@register
class Bits(Codec):
    """A mask's bits, in memory order. It is part of every chain, as nothing is lost by it but bytes."""

    name = "bits"
    kind: ClassVar[Literal["lossless", "lossy"]] = "lossless"
    always = True

    def encode(self, x: Tensor, call: Call) -> Packed | None:
        """One part, the bits; None for other dtypes, and where padding takes what packing saves."""
        if x.dtype != torch.bool or not self.shrinks(TensorType.of(x), {}):
            return None
        return Packed((Part(bits.pack(flat(x).view(torch.uint8), 1), follow=True),))

    def part_types(self, whole: TensorType, meta: Mapping[str, Any], facts: Facts) -> tuple[PartType, ...]:
        """uint8 `[size]`."""
        no_meta(self.name, meta)
        if whole.dtype != torch.bool:
            raise CorruptPayload(f"{self.name} never takes a tensor of {whole.dtype}")
        return (PartType(TensorType(torch.uint8, (bits.packed_size(whole.numel, 1),)), follow=True),)

    def decode(
        self, parts: Sequence[Tensor], whole: TensorType, meta: Mapping[str, Any], facts: Facts
    ) -> Tensor:
        """Each bit as a byte of 0 or 1."""
        return whole.shaped(bits.unpack(parts[0], 1, whole.numel).view(torch.bool))
