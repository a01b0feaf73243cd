"""Affine quantization: groups of values as evenly spaced levels between the group's least and greatest.

A tensor's memory is seen as a matrix whose rows, or whose columns, share a range. On the CPU the work is
done by compiled kernels, one pass each; elsewhere, and where Numba is not installed, by torch's operations
with the same results to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from wire.codecs import compiled
from wire.codecs.dither import PERIOD, dither, dither_starts, table
from wire.codecs.layout import TensorType, flat

if TYPE_CHECKING:
    from torch import Tensor

_SLACK = 1 + 1e-6
"""Levels are this much wider than needed, so that no rounding error carries a value past the last one."""

_TINY = 1e-37
"""Groups whose levels would be closer than this are taken for constant; 1/x must not overflow."""

WHOLE = 0
"""As a group's size: the whole tensor is one group."""

HUGE = 1e38
"""Tensors with larger values are left alone; differences of two must not overflow."""


_NO_NUMBERS, _NO_STARTS = np.empty(0, np.float32), np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Groups:
    """How a tensor's memory falls into groups that share a range.

    4-D tensors are grouped by channel, over all samples; 2-D and 3-D ones by row, that is by sample or by
    token; all others are one group. Where a group's size is asked for, each of these lines of memory (for a
    channels-last map, a pixel's channels) is cut into groups of so many neighbours, the last one shorter; in the
    matrix its last value then fills it up.

    Attributes:
        rows: of the matrix ``[rows, width]`` that the memory is seen as.
        width: of the matrix.
        count: how many groups there are.
        by_row: row r belongs to group ``r % count``; otherwise column c is group c, and `count` is `width`.
        length: of a line of memory.
        missing: how many columns of the matrix the last group of each line has too few.
    """

    rows: int
    width: int
    count: int
    by_row: bool
    length: int = 0
    missing: int = 0

    @classmethod
    def of(cls, whole: TensorType, size: int | None = None) -> Groups:
        """The groups of a tensor of this type, which is not empty where they have a size of their own."""
        if size == WHOLE:
            return cls(1, whole.numel, 1, by_row=True)
        groups = cls._natural(whole)
        if size is None:
            return groups
        size = min(size, groups.width)
        each = -(-groups.width // size)
        rows = groups.rows * each
        return cls(rows, size, rows, by_row=True, length=groups.width, missing=each * size - groups.width)

    @classmethod
    def _natural(cls, whole: TensorType) -> Groups:
        shape = whole.shape
        if len(shape) == 4 and whole.order == "NHWC":
            return cls(shape[0] * shape[2] * shape[3], shape[1], shape[1], by_row=False)
        if len(shape) == 4:
            return cls(shape[0] * shape[1], shape[2] * shape[3], shape[1], by_row=True)
        if len(shape) in (2, 3):
            rows = whole.numel // max(shape[-1], 1)
            return cls(rows, shape[-1], rows, by_row=True)
        return cls(1, whole.numel, 1, by_row=True)

    def matrix(self, x: Tensor) -> Tensor:
        """A dense tensor's memory, `[rows, width]`: a view, or a copy where something is missing."""
        values = flat(x)
        if self.missing:
            lines = values.view(-1, self.length)
            values = torch.cat((lines, lines[:, -1:].expand(-1, self.missing)), 1)
        return values.view(self.rows, self.width)

    def line(self, matrix: Tensor) -> Tensor:
        """What `matrix` made a matrix of, `[numel]`, in memory order."""
        if self.missing:
            matrix = matrix.view(-1, self.length + self.missing)[:, : self.length]
        return matrix.reshape(-1)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the groups, `[count]`, as a view or copy that broadcasts to the matrix."""
        return values.repeat(self.rows // self.count)[:, None] if self.by_row else values[None, :]


def ranges(x: Tensor, groups: Groups, levels: int, most: float = HUGE) -> Tensor | None:
    """The range of each group.

    Args:
        x: `[rows, width]`, floating point, not empty.
        groups: its groups.
        levels: how many values a quantized element can have.
        most: the largest magnitude that is taken.

    Returns:
        Float32 `[2, count]`: the value of level 0, and the distance between levels, which is 0 for a group
        whose values are all alike. None where values are larger than `most`.

    Raises:
        FloatingPointError: `x` holds NaN or infinity.
    """
    share = _SLACK / (levels - 1)
    kernels = compiled.kernels("_kernels", x.device)
    if kernels is not None:
        bits = x.float().view(-1).numpy().view(np.int32)
        found, peak = kernels.ranges(
            bits, groups.width, groups.count, groups.by_row, np.float32(share), np.float32(_TINY)
        )
        params = torch.from_numpy(found)
    else:
        ends = [f(x, int(groups.by_row)).float() for f in (torch.amin, torch.amax)]
        params = torch.stack((ends[0].view(-1, groups.count).amin(0), ends[1].view(-1, groups.count).amax(0)))
        peak = params.abs().max().item()
        low, scale = params
        scale.sub_(low).mul_(share)
        scale.masked_fill_(scale < _TINY, 0.0)
    if not peak < float("inf"):
        raise FloatingPointError
    return None if peak > most else params


def are_finite(params: Tensor) -> bool:
    """Whether ranges from the peer hold numbers only."""
    if params.device.type == "cpu":
        return bool(np.isfinite(params.numpy()).all())  # a third of the time, for so few
    return bool(params.isfinite().all())


def quantize(x: Tensor, groups: Groups, params: Tensor, seed: int | None) -> Tensor:
    """Maps each value to the nearest level, or with a seed to one of the two nearest, unbiased.

    Args:
        x: `[rows, width]`, floating point.
        groups: its groups.
        params: what `ranges` returned.
        seed: of stochastic rounding; None rounds to nearest.

    Returns:
        uint8, `[rows, width]`.
    """
    x = x.float()
    q = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    kernels = compiled.kernels("_kernels", x.device)
    if kernels is None:
        low, scale = map(groups.spread, params)
        steps = torch.where(scale > 0, scale.reciprocal(), 0.0)
        noise = 0.5 if seed is None else dither(seed, x.numel(), x.device).view(x.shape)
        return q.copy_((x - low).mul_(steps).add_(noise))
    numbers, starts = _NO_NUMBERS, _NO_STARTS
    if seed is not None:
        numbers, starts = table(x.device).numpy(), np.array(dither_starts(seed, x.numel()), np.int64)
    kernels.quantize(
        x.view(-1).numpy(),
        groups.width,
        params.numpy(),
        groups.by_row,
        numbers,
        starts,
        PERIOD,
        q.view(-1).numpy(),
    )
    return q


def dequantize(q: Tensor, groups: Groups, params: Tensor, x: Tensor) -> None:
    """Maps levels to their values.

    Args:
        q: uint8, `[rows, width]`.
        groups: its groups.
        params: what `ranges` returned.
        x: receives the values; of q's shape, floating point.
    """
    kernels = compiled.kernels("_kernels", q.device)
    if kernels is None:
        x.copy_((q * groups.spread(params[1])).add_(groups.spread(params[0])))
        return
    values = x if x.dtype == torch.float32 else torch.empty(x.shape)
    kernels.dequantize(
        q.view(-1).numpy(), groups.width, params.numpy(), groups.by_row, values.view(-1).numpy()
    )
    if values is not x:
        x.copy_(values)
