"""int8, int6, int4, int3, int2: evenly spaced levels between the least and greatest value of each group."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from wire.codecs import bits
from wire.codecs.affine import HUGE, WHOLE, Groups, are_finite, dequantize, quantize, ranges
from wire.codecs.base import Call, Codec, Facts, NonFiniteTensor, Packed, Part, PartType, Role, no_meta
from wire.codecs.hadamard import block_sums, rotated
from wire.codecs.layout import TensorType, flat, padded
from wire.codecs.options import ArgumentError, split_options
from wire.codecs.registry import register
from wire.errors import CorruptPayload

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_TAKES = (torch.float32, torch.float16, torch.bfloat16)
_LEAST_GROUP, _LARGEST_GROUP = 8, 1 << 20


class Quantized(Codec):
    """Affine quantization: by channel for `[B, C, H, W]`, by row for `[B, S, H]` and `[B, F]`.

    Activations are rounded to nearest, gradients stochastically, so that their sum over steps is unbiased.

    Args:
        args: ``group=N`` for groups of N neighbours in a row of memory instead, ``group=tensor`` for a single
            one; ``hadamard`` to rotate channels, or the last axis, first; or both, with a comma.
        role: what the stream carries.

    Attributes:
        bits: of a level; levels of fewer than 8 are packed densely.
    """

    kind: ClassVar[Literal["lossless", "lossy"]] = "lossy"
    examples: ClassVar[tuple[str, ...]] = ("", "group=64,hadamard")
    bits: ClassVar[int]

    def __init__(self, args: str, role: Role) -> None:
        super().__init__("", role)
        self._group: int | None = None
        self._rotates = False
        for option, position in split_options(args):
            match = re.fullmatch(r"group=([0-9]{1,7})", option)
            if match and _LEAST_GROUP <= int(match[1]) <= _LARGEST_GROUP:
                self._group = int(match[1])
            elif option == "group=tensor":
                self._group = WHOLE
            elif option == "hadamard":
                self._rotates = True
            else:
                raise ArgumentError(
                    f"{option!r} is no argument of {self.name}; it takes group=N, with N from {_LEAST_GROUP}"
                    f" to {_LARGEST_GROUP}, or group=tensor, and hadamard",
                    position,
                )

    def encode(self, x: Tensor, call: Call) -> Packed | None:
        """Two parts, the levels and the groups' ranges."""
        whole = TensorType.of(x)
        if x.dtype not in _TAKES or x.numel() == 0:
            return None
        groups, levels, shrinks = _plan(whole, self._group, self.bits)
        if not shrinks:
            return None
        values = groups.matrix(rotated(x) if self._rotates else x)
        try:
            # What is rotated back may grow by the root of a block's size.
            params = ranges(values, groups, 1 << self.bits, most=HUGE / 256 if self._rotates else HUGE)
        except FloatingPointError:
            if self._rotates and bool(x.isfinite().all()):
                return None
            raise NonFiniteTensor(self.name) from None
        if params is None:
            return None
        seed = call.seed if self.role is Role.GRADIENT else None
        q = bits.pack(groups.line(quantize(values, groups, params, seed)), self.bits)
        return Packed((Part(levels.shaped(q), follow=True), Part(params, follow=False)))

    def part_types(self, whole: TensorType, meta: Mapping[str, Any], facts: Facts) -> tuple[PartType, ...]:
        """uint8, of the same shape or packed; and float32 `[2, groups]`: level 0, and the distance of levels."""
        no_meta(self.name, meta)
        if whole.dtype not in _TAKES or whole.numel == 0:
            raise CorruptPayload(f"{self.name} never takes a tensor of {whole.dtype}, {list(whole.shape)}")
        groups, levels, _ = _plan(whole, self._group, self.bits)
        return PartType(levels, follow=True), PartType(_params(groups), follow=False)

    def decode(
        self, parts: Sequence[Tensor], whole: TensorType, meta: Mapping[str, Any], facts: Facts
    ) -> Tensor:
        """Each level's value, rotated back, in the original dtype."""
        q, params = parts
        if not are_finite(params):
            raise CorruptPayload(f"the scales of a tensor encoded with {self.name} are not finite")
        groups, *_ = _plan(whole, self._group, self.bits)
        levels = groups.matrix(bits.unpack(flat(q), self.bits, whole.numel))
        dtype = torch.float32 if self._rotates else whole.dtype
        values = torch.empty(levels.shape, dtype=dtype, device=q.device)
        dequantize(levels, groups, params, values)
        x = TensorType(dtype, whole.shape, whole.order).shaped(groups.line(values))
        if not self._rotates:
            return x
        x = rotated(x)
        if whole.dtype == torch.float16:
            top = torch.finfo(torch.float16).max
            x = x.clamp_(-top, top)
        return x.to(whole.dtype)

    def error_bound(self, x: Tensor) -> Tensor:
        """Half the distance between levels, all of it for stochastic rounding, and float32's own rounding.

        Of a rotated tensor, the sum of that over a block, divided by the root of the block's size.
        """
        if x.numel() == 0:
            return torch.zeros((), dtype=torch.float64)
        own = torch.finfo(x.dtype).eps
        if not self._rotates:
            return self._bound(x, own)
        sums, sizes = block_sums(self._bound(rotated(x), 0.0))
        squares, _ = block_sums(x.double().square())
        return sums / sizes.sqrt() + squares.sqrt() * (own + 2.0**-19)

    def _bound(self, x: Tensor, own: float) -> Tensor:
        whole = TensorType.of(x)
        groups = Groups.of(whole, self._group)
        values = groups.matrix(x).double()
        # Least and greatest of every row or column, then of every group.
        low, high = (f(values, int(groups.by_row)) for f in (torch.amin, torch.amax))
        low, high = low.view(-1, groups.count).amin(0), high.view(-1, groups.count).amax(0)
        steps = 1.0 if self.role is Role.GRADIENT else 0.5
        bound = (high - low) / ((1 << self.bits) - 1) * (steps + 1e-3)
        bound += torch.maximum(low.abs(), high.abs()) * (own + 2.0**-21) + 1e-34
        return whole.shaped(groups.line(groups.spread(bound).expand_as(values).contiguous()))


@lru_cache(maxsize=64)
def _plan(whole: TensorType, group: int | None, width: int) -> tuple[Groups, TensorType, bool]:
    """A tensor's groups, the type of its levels of so many bits, and whether these are smaller, with ranges."""
    groups = Groups.of(whole, group)
    levels = TensorType(torch.uint8, whole.shape, whole.order)
    if width < 8:
        levels = TensorType(torch.uint8, (bits.packed_size(whole.numel, width),))
    size = padded(levels.nbytes) + padded(_params(groups).nbytes)
    return groups, levels, size < padded(whole.nbytes)


def _params(groups: Groups) -> TensorType:
    return TensorType(torch.float32, (2, groups.count))


@register
class Int8(Quantized):
    """256 levels: a quarter of fp32's bytes."""

    name = "int8"
    examples: ClassVar[tuple[str, ...]] = ("", "group=64,hadamard", "group=tensor")
    bits = 8


@register
class Int6(Quantized):
    """64 levels, four in three bytes."""

    name = "int6"
    bits = 6


@register
class Int4(Quantized):
    """16 levels, two in a byte."""

    name = "int4"
    examples: ClassVar[tuple[str, ...]] = ("", "group=64", "hadamard", "group=8,hadamard")
    bits = 4


@register
class Int3(Quantized):
    """8 levels, eight in three bytes."""

    name = "int3"
    bits = 3


@register
class Int2(Quantized):
    """4 levels, four in a byte."""

    name = "int2"
    bits = 2
