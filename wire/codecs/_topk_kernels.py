"""Finding the largest on the CPU, compiled by Numba; see `_kernels` for what that means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wire.codecs._kernels import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int32]
    Indices = NDArray[np.int64]

_SIGN = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)


@compiled
def _bin_of_rank(counts: Indices, rank: int) -> tuple[int, int]:
    """The bin that holds the number with so many larger ones, and how many of those are in the bin."""
    for bin in range(counts.size - 1, -1, -1):
        if rank < counts[bin]:
            return bin, rank
        rank -= counts[bin]
    return 0, 0


@compiled
def _threshold(bits: Ints, keep: int) -> tuple[np.int32, int]:
    """The least magnitude that is kept, and how many of that magnitude are kept."""
    # Magnitudes of floats are ordered as integers. Their 31 bits are found in three rounds.
    # Neighbours count apart: most are in few bins, and would wait for each other.
    four = np.zeros((4, 2048), np.int64)
    even = bits.size // 4 * 4
    for i in range(0, even, 4):
        for lane in range(4):
            four[lane, (bits[i + lane] & _SIGN) >> np.int32(20)] += 1
    for i in range(even, bits.size):
        four[0, (bits[i] & _SIGN) >> np.int32(20)] += 1
    counts = four.sum(0)
    high, rank = _bin_of_rank(counts, keep - 1)
    counts[:] = 0
    for i in range(bits.size):
        magnitude = bits[i] & _SIGN
        if magnitude >> np.int32(20) == high:
            counts[(magnitude >> np.int32(10)) & np.int32(1023)] += 1
    middle, rank = _bin_of_rank(counts, rank)
    upper = np.int32((high << 10) | middle)
    counts[:] = 0
    for i in range(bits.size):
        magnitude = bits[i] & _SIGN
        if magnitude >> np.int32(10) == upper:
            counts[magnitude & np.int32(1023)] += 1
    low, rank = _bin_of_rank(counts, rank)
    return np.int32((upper << np.int32(10)) | np.int32(low)), rank + 1


@compiled
def select(bits: Ints, samples: int, found: Indices) -> bool:
    """Finds the elements of largest magnitude of every sample; of equal ones, the first.

    Args:
        bits: `[samples * size]`, float32 seen as int32.
        samples: how many.
        found: `[samples * keep + 1]`, receives where they are in `bits`, ascending; the last place is for scratch.

    Returns:
        Whether there is neither NaN nor infinity; if not, nothing is found.
    """
    worst = np.int32(0)
    for i in range(bits.size):
        worst = max(worst, bits[i] & _SIGN)
    if worst >= _INFINITY:
        return False
    size, keep = bits.size // samples, (found.size - 1) // samples
    for sample in range(samples):
        start, at = sample * size, sample * keep
        least, equals = _threshold(bits[start : start + size], keep)
        for i in range(start, start + size):
            magnitude = bits[i] & _SIGN
            equal = magnitude == least
            # No branch: a processor cannot guess which elements are large.
            found[at] = i
            at += (magnitude > least) | (equal & (equals > 0))
            equals -= equal
    return True
