"""Writing positions down on the CPU, compiled by Numba; see `_kernels` for what that means, `positions` for how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from wire.codecs._kernels import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Indices = NDArray[np.int64]
    Bytes = NDArray[np.uint8]
    Codes = NDArray[Any]


@compiled
def count_skips(positions: Indices, ones: Indices, totals: Indices) -> None:
    """Adds to `totals` how many codes have to skip, for each code of ones."""
    before = -1
    for position in positions:
        gap = position - before - 1
        before = position
        for i in range(ones.size):
            if gap >= ones[i]:
                totals[i] += gap // ones[i]


@compiled
def write_codes(positions: Indices, ones: int, codes: Codes) -> None:
    """Writes the codes, of which there are just enough."""
    before, at = -1, 0
    for position in positions:
        gap = position - before - 1
        before = position
        while gap >= ones:
            codes[at] = ones
            at += 1
            gap -= ones
        codes[at] = gap
        at += 1


@compiled
def read_codes(codes: Codes, ones: int, found: Indices) -> int:
    """Counts the codes that do not skip; writes their positions if `found` has just one place more."""
    count = 0
    for code in codes:
        count += code != ones
    if count != found.size - 1:
        return count
    at, position = 0, 0
    for code in codes:
        position += int(code)
        found[at] = position
        meant = code != ones
        at += meant
        position += meant
    return count


@compiled
def write_bitmap(positions: Indices, bitmap: Bytes) -> None:
    """Sets bits of what is 0 before."""
    for position in positions:
        bitmap[position >> 3] |= np.uint8(1 << (position & 7))


@compiled
def read_bitmap(bitmap: Bytes, found: Indices) -> int:
    """Counts the bits that are set; writes their positions if `found` has just one place more."""
    count = 0
    for byte in bitmap:
        for bit in range(8):
            count += (byte >> bit) & 1
    if count != found.size - 1:
        return count
    at = 0
    for i in range(bitmap.size):
        byte = bitmap[i]
        for bit in range(8):
            found[at] = 8 * i + bit
            at += (byte >> bit) & 1
    return count
