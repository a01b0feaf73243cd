"""int8: a quarter of fp32's bytes, as 256 levels between the least and greatest value of each group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from wire.codecs.affine import Groups, are_finite, dequantize, quantize, ranges
from wire.codecs.base import Call, Codec, NonFiniteTensor, Packed, Part, PartType, Role, no_meta
from wire.codecs.layout import TensorType
from wire.codecs.registry import register
from wire.errors import CorruptPayload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_TAKES = (torch.float32, torch.float16, torch.bfloat16)


@register
class Int8(Codec):
    """Affine quantization to 8 bits: by channel for `[B, C, H, W]`, by row for `[B, S, H]` and `[B, F]`.

    Activations are rounded to nearest, gradients stochastically, so that their sum over steps is unbiased.
    """

    name = "int8"
    kind: ClassVar[Literal["lossless", "lossy"]] = "lossy"
    levels: ClassVar[int] = 256

    def encode(self, x: Tensor, call: Call) -> Packed | None:
        """Two parts, the levels and the groups' ranges."""
        whole = TensorType.of(x)
        if x.dtype not in _TAKES or x.numel() == 0 or not self.shrinks(whole, {}):
            return None
        groups = Groups.of(whole)
        x = groups.matrix(x)
        try:
            params = ranges(x, groups, self.levels)
        except FloatingPointError:
            raise NonFiniteTensor(self.name) from None
        if params is None:
            return None
        seed = call.seed if self.role is Role.GRADIENT else None
        q = quantize(x, groups, params, seed)
        q_type = TensorType(torch.uint8, whole.shape, whole.order)
        return Packed((Part(q_type.shaped(q.view(-1)), follow=True), Part(params, follow=False)))

    def part_types(self, whole: TensorType, meta: Mapping[str, Any]) -> tuple[PartType, ...]:
        """uint8 of the same shape, and float32 `[2, groups]`: each level 0, and each distance of levels."""
        no_meta(self.name, meta)
        if whole.dtype not in _TAKES or whole.numel == 0:
            raise CorruptPayload(f"{self.name} never takes a tensor of {whole.dtype}, {list(whole.shape)}")
        return (
            PartType(TensorType(torch.uint8, whole.shape, whole.order), follow=True),
            PartType(TensorType(torch.float32, (2, Groups.of(whole).count)), follow=False),
        )

    def decode(self, parts: Sequence[Tensor], whole: TensorType, meta: Mapping[str, Any]) -> Tensor:
        """Each level's value, in the original dtype."""
        q, params = parts
        if not are_finite(params):
            raise CorruptPayload(f"the scales of a tensor encoded with {self.name} are not finite")
        groups = Groups.of(whole)
        x = whole.empty(q.device)
        dequantize(groups.matrix(q), groups, params, groups.matrix(x))
        return x

    def error_bound(self, x: Tensor) -> Tensor:
        """Half the distance between levels, all of it for stochastic rounding, and float32's own rounding."""
        whole = TensorType.of(x)
        groups = Groups.of(whole)
        if x.numel() == 0:
            return torch.zeros((), dtype=torch.float64)
        values = groups.matrix(x).double()
        # Least and greatest of every row or column, then of every group.
        low, high = (f(values, int(groups.by_row)) for f in (torch.amin, torch.amax))
        low, high = low.view(-1, groups.count).amin(0), high.view(-1, groups.count).amax(0)
        steps = 1.0 if self.role is Role.GRADIENT else 0.5
        bound = (high - low) / (self.levels - 1) * (steps + 1e-3)
        bound += torch.maximum(low.abs(), high.abs()) * (torch.finfo(x.dtype).eps + 2.0**-21) + 1e-34
        return whole.shaped(groups.spread(bound).expand_as(values).reshape(-1))
