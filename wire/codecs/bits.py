"""Small numbers as a dense run of bits, and back.

Number i takes bits ``i * b`` to ``i * b + b - 1`` of the run, the lowest first, and bit k of the run is bit
``k % 8`` of byte ``k // 8``. So eight numbers of b bits make b bytes exactly; they are handled as one word of
64 bits, in which neighbours, then pairs, then fours close ranks. The last byte's spare bits are 0.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from wire.codecs import compiled
from wire.errors import CorruptPayload


def packed_size(count: int, bits: int) -> int:
    """How many bytes `count` numbers of `bits` bits take."""
    return -(-count * bits // 8)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Packs numbers below ``2 ** bits``.

    Args:
        numbers: uint8 `[count]`, contiguous, on any device.
        bits: 1 to 8.

    Returns:
        uint8 `[packed_size(count, bits)]`.
    """
    if bits == 8:
        return numbers
    size = packed_size(numbers.numel(), bits)
    words = _filled(numbers, 8).view(torch.int64)
    out = torch.empty(words.numel(), bits, dtype=torch.uint8, device=numbers.device)
    kernels = compiled.kernels("_bit_kernels", numbers.device)
    if kernels is not None:
        kernels.pack(words.numpy().view(np.uint64), bits, _masks(bits), out.view(-1).numpy())
    else:
        for step, low in enumerate(map(int, _masks(bits))):
            together = 1 << step
            moved = words >> (8 - bits) * together
            words = words & low | moved & low << bits * together
        out.copy_(words.view(torch.uint8).view(-1, 8)[:, :bits])
    return out.view(-1)[:size]


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """Unpacks what `pack` made.

    Args:
        data: uint8 `[packed_size(count, bits)]`, contiguous.
        bits: as for `pack`.
        count: how many numbers.

    Returns:
        uint8 `[count]`.

    Raises:
        CorruptPayload: the last byte's spare bits are not 0.
    """
    if bits == 8 or count == 0:
        return data
    spare = 8 * data.numel() - count * bits
    if int(data[-1]) >> (8 - spare):
        raise CorruptPayload(f"the spare bits after {count} numbers of {bits} bits are not 0")
    data = _filled(data, bits)
    words = torch.empty(data.numel() // bits, dtype=torch.int64, device=data.device)
    kernels = compiled.kernels("_bit_kernels", data.device)
    if kernels is not None:
        kernels.unpack(data.numpy(), bits, _masks(bits), words.numpy().view(np.uint64))
    else:
        wide = torch.zeros(words.numel(), 8, dtype=torch.uint8, device=data.device)
        wide[:, :bits] = data.view(-1, bits)
        words = wide.view(-1).view(torch.int64)
        for step, low in reversed(list(enumerate(map(int, _masks(bits))))):
            together = 1 << step
            moved = words << (8 - bits) * together
            words = words & low | moved & low << 8 * together
    return words.view(torch.uint8)[:count]


def _filled(data: Tensor, multiple: int) -> Tensor:
    """`data`, followed by as many zeros as make its size a multiple."""
    missing = -data.numel() % multiple
    return torch.cat((data, data.new_zeros(missing))) if missing else data


@cache
def _masks(bits: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Of a word whose numbers stand alone, in pairs and in fours, the bits of every second such group."""
    masks = []
    for together in (1, 2, 4):
        group = (1 << bits * together) - 1
        masks.append(sum(group << 16 * together * i for i in range(4 // together)))
    return np.array(masks, np.uint64)
