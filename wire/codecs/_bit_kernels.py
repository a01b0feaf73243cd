"""Packing and rotating on the CPU, compiled by Numba; see `_kernels` for what that means."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wire.codecs._kernels import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Bytes = NDArray[np.uint8]
    Words = NDArray[np.uint64]

_TILE = 64
"""Columns that are rotated at a time, so that a block of rows stays in the nearest cache."""


@compiled
def pack(words: Words, bits: int, masks: Words, out: Bytes) -> None:
    """Squeezes each word of eight small numbers, a byte each, into `bits` bytes; see `bits.pack`."""
    b, gap = np.uint64(bits), np.uint64(8 - bits)
    two, four = np.uint64(2), np.uint64(4)
    one_low, two_low, four_low = masks[0], masks[1], masks[2]
    for i in range(words.size):
        x = words[i]
        x = (x & one_low) | ((x >> gap) & (one_low << b))
        x = (x & two_low) | ((x >> (gap * two)) & (two_low << (b * two)))
        x = (x & four_low) | ((x >> (gap * four)) & (four_low << (b * four)))
        for k in range(bits):
            out[i * bits + k] = np.uint8(x >> np.uint64(8 * k))


@compiled
def unpack(data: Bytes, bits: int, masks: Words, words: Words) -> None:
    """The inverse of `pack`."""
    gap = np.uint64(8 - bits)
    two, four = np.uint64(2), np.uint64(4)
    one_low, two_low, four_low = masks[0], masks[1], masks[2]
    for i in range(words.size):
        x = np.uint64(0)
        for k in range(bits):
            x |= np.uint64(data[i * bits + k]) << np.uint64(8 * k)
        x = (x & four_low) | ((x << (gap * four)) & (four_low << np.uint64(32)))
        x = (x & two_low) | ((x << (gap * two)) & (two_low << np.uint64(16)))
        words[i] = (x & one_low) | ((x << gap) & (one_low << np.uint64(8)))


@compiled
def _rotate_run(x: Floats, scale: np.float32) -> None:
    """Rotates one block, whose numbers are neighbours."""
    half = 1
    while half < x.size:
        for start in range(0, x.size, 2 * half):
            first, second = x[start : start + half], x[start + half : start + 2 * half]
            for i in range(half):
                a, b = first[i], second[i]
                first[i], second[i] = a + b, a - b
        half *= 2
    for i in range(x.size):
        x[i] *= scale


@compiled
def _rotate_rows(x: Floats, scale: np.float32) -> None:
    """Rotates every column of `[block, columns]`, whose rows are runs."""
    half = 1
    while half < x.shape[0]:
        for row in range(x.shape[0]):
            if row & half:
                continue
            first, second = x[row], x[row + half]
            for i in range(first.size):
                a, b = first[i], second[i]
                first[i], second[i] = a + b, a - b
        half *= 2
    for row in range(x.shape[0]):
        line = x[row]
        for i in range(line.size):
            line[i] *= scale


@compiled
def rotate_runs(x: Floats, ends: NDArray[np.int64], scales: Floats) -> None:
    """Rotates the rows of `x`, `[outer, size]`, in place.

    Args:
        x: row-major.
        ends: where in a row each block ends.
        scales: what each block is multiplied with in the end.
    """
    for o in range(x.shape[0]):
        start = 0
        for b in range(ends.size):
            if ends[b] - start > 1:
                _rotate_run(x[o, start : ends[b]], scales[b])
            start = ends[b]


@compiled
def rotate_columns(x: Floats, ends: NDArray[np.int64], scales: Floats) -> None:
    """Rotates the middle axis of `x`, `[outer, size, inner]`, in place; see `rotate_runs`."""
    for o in range(x.shape[0]):
        start = 0
        for b in range(ends.size):
            if ends[b] - start > 1:
                for column in range(0, x.shape[2], _TILE):
                    tile = x[o, start : ends[b], column : column + _TILE].copy()
                    _rotate_rows(tile, scales[b])
                    x[o, start : ends[b], column : column + _TILE] = tile
            start = ends[b]


@compiled
def shuffle(words: Words, planes: Bytes) -> None:
    """Writes the lowest bytes of all words, then the second ones, and so on; words of any width."""
    for k in range(words.itemsize):
        plane, shift = planes[k * words.size : (k + 1) * words.size], np.uint64(8 * k)
        for i in range(words.size):
            plane[i] = np.uint8(words[i] >> shift)


@compiled
def unshuffle(planes: Bytes, words: Words) -> None:
    """The inverse of `shuffle`; the words are 0 before."""
    for k in range(words.itemsize):
        plane, shift = planes[k * words.size : (k + 1) * words.size], np.uint64(8 * k)
        for i in range(words.size):
            words[i] |= np.uint64(plane[i]) << shift
