"""fp16 and bf16: half of fp32's bytes by casting."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from wire.codecs.base import Call, Codec, Facts, Packed, Part, PartType, no_meta
from wire.codecs.layout import TensorType, flat
from wire.codecs.registry import register
from wire.errors import CorruptPayload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class Cast(Codec):
    """Casts to a narrower floating-point dtype and back.

    Finite values beyond the narrow dtype's range become its largest. NaN and infinity stay what they are,
    so that a diverged training is seen on the other side as well.

    Attributes:
        narrow: the dtype on the wire.
    """

    kind: ClassVar[Literal["lossless", "lossy"]] = "lossy"
    narrow: ClassVar[torch.dtype]

    def encode(self, x: Tensor, call: Call) -> Packed | None:
        """One part, the cast tensor; None for dtypes that are not wider."""
        if not self._takes(x.dtype) or x.numel() == 0:
            return None
        if not self.shrinks(TensorType.of(x), {}):
            return None
        top = torch.finfo(self.narrow).max
        low, high = torch.stack(torch.aminmax(flat(x))).tolist()
        if not (-top <= low and high <= top):
            x = torch.where(x.isfinite(), x.clamp(-top, top), x)
        return Packed((Part(x.to(self.narrow), follow=True),))

    def part_types(self, whole: TensorType, meta: Mapping[str, Any], facts: Facts) -> tuple[PartType, ...]:
        """The same shape and order in the narrow dtype."""
        no_meta(self.name, meta)
        if not self._takes(whole.dtype):
            raise CorruptPayload(f"{self.name} never takes a tensor of {whole.dtype}")
        return (PartType(TensorType(self.narrow, whole.shape, whole.order), follow=True),)

    def decode(
        self, parts: Sequence[Tensor], whole: TensorType, meta: Mapping[str, Any], facts: Facts
    ) -> Tensor:
        """Casts back."""
        return parts[0].to(whole.dtype)

    def error_bound(self, x: Tensor) -> Tensor:
        """Half a unit in the last place, and for values beyond the range their distance to it."""
        info = torch.finfo(self.narrow)
        size = x.double().abs()
        # Subnormals are evenly spaced. The last factor covers torch's rounding of float64 in two steps.
        rounding = torch.clamp(size, min=info.tiny) * (info.eps / 2) * 1.001
        return rounding + (size - info.max).clamp(min=0)

    def _takes(self, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point and dtype.itemsize > self.narrow.itemsize


@register
class Fp16(Cast):
    """IEEE half precision: 11 bits of precision, largest value 65504."""

    name = "fp16"
    narrow = torch.float16


@register
class Bf16(Cast):
    """bfloat16: 8 bits of precision, fp32's range."""

    name = "bf16"
    narrow = torch.bfloat16
