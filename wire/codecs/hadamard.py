"""The Walsh-Hadamard rotation, which spreads outliers over their neighbours.

One large value among many small ones widens the range of its group, and the small ones fall between few
levels. Rotated by an orthonormal matrix of entries of one size, the large value becomes a share of all; the
error of each is then an average of many.

Source: Ashkboos and others, QuaRot, https://arxiv.org/abs/2404.00456.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from wire.codecs import compiled
from wire.codecs.layout import TensorType, flat

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 256
"""The longest block."""


def rotated(x: Tensor) -> Tensor:
    """Rotates the channels of a map, and the last axis of any other tensor; rotating twice gives `x` again.

    The axis is cut into blocks: of 256 while they fit, then of the powers of two that make up the rest, the
    largest first. Each is multiplied by its Hadamard matrix in Sylvester's order over the root of its size.

    Args:
        x: dense, in either memory order, floating point; not changed.

    Returns:
        Float32, in the same memory order.
    """
    whole = TensorType.of(x)
    outer, size, inner = _axis(whole)
    y = flat(x).to(torch.float32, copy=True).view(outer, size, inner)
    lengths = _blocks(size)
    kernels = compiled.kernels("_bit_kernels", x.device)
    if kernels is not None:
        ends, scales = np.cumsum(lengths), np.array([length**-0.5 for length in lengths], np.float32)
        if inner == 1:
            kernels.rotate_runs(y.view(outer, size).numpy(), ends, scales)
        else:
            kernels.rotate_columns(y.numpy(), ends, scales)
    else:
        runs = [(length, length * lengths.count(length)) for length in dict.fromkeys(lengths)]
        parts = [
            _rotated_blocks(part, length) * float(np.float32(length**-0.5))
            for part, (length, _) in zip(y.split([total for _, total in runs], 1), runs, strict=True)
        ]
        y = torch.cat(parts, 1)
    return TensorType(torch.float32, whole.shape, whole.order).shaped(y.view(-1))


def block_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """For each element the sum over its block, and the block's size; both of x's shape, float64."""
    whole = TensorType.of(x)
    outer, size, inner = _axis(whole)
    lengths = _blocks(size)
    values = flat(x).double().view(outer, size, inner)
    sums = torch.cat([p.sum(1, keepdim=True).expand_as(p) for p in values.split(lengths, 1)], 1)
    sizes = torch.tensor([float(n) for n in lengths for _ in range(n)], dtype=torch.float64, device=x.device)
    sizes = sizes.view(1, size, 1).expand_as(sums)
    return whole.shaped(sums.reshape(-1)), whole.shaped(sizes.reshape(-1))


def _axis(whole: TensorType) -> tuple[int, int, int]:
    """The memory as `[outer, size, inner]`, of which the middle axis is rotated."""
    shape = whole.shape
    if len(shape) == 4 and whole.order == "C":
        return shape[0], shape[1], shape[2] * shape[3]
    size = shape[1] if len(shape) == 4 else shape[-1] if shape else 1
    return whole.numel // size, size, 1


def _blocks(size: int) -> list[int]:
    lengths = [LARGEST] * (size // LARGEST)
    rest = size % LARGEST
    return lengths + [1 << bit for bit in reversed(range(LARGEST.bit_length())) if rest >> bit & 1]


def _rotated_blocks(x: Tensor, length: int) -> Tensor:
    """Rotates blocks of one length, `[outer, blocks * length, inner]`, and leaves out the scale."""
    outer, size, inner = x.shape
    for step in range(length.bit_length() - 1):
        pairs = x.reshape(outer, -1, 2, 1 << step, inner)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack((first + second, first - second), 2)
    return x.reshape(outer, size, inner)
