"""Quantization on the CPU, compiled by Numba: one pass over the data each, several times torch's speed.

The kernels release the GIL, run on the calling thread alone, and are compiled when first called, a few
seconds in all; the result is cached on disk. Arithmetic is float32 without contraction or reassociation, so
that torch's operations give the same bits.

A matrix ``[rows, width]`` lies in memory as one run of numbers. Where all of a row has one range, a loop over
the row is fast if the row is long. Where it is short, or the columns have ranges of their own, the ranges are
written out for a *stretch*, some thousand neighbouring numbers after which they repeat.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

import numba
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int32]
    Bytes = NDArray[np.uint8]

_F = TypeVar("_F", bound="Callable[..., Any]")

_SHORT_ROW = 128
_SHORT_STRETCH = 1024
_LONG_STRETCH = 1 << 17


def compiled(function: _F) -> _F:
    """Decorates a kernel."""
    try:
        return cast("_F", numba.njit(nogil=True, cache=True)(function))
    except RuntimeError:  # There is nowhere to keep the cache.
        return cast("_F", numba.njit(nogil=True)(function))


@compiled
def _stretch(rows: int, width: int, count: int, by_row: bool) -> int:
    """How many numbers have ranges that then repeat; 0 if ranges are better applied row by row."""
    if not by_row:
        return width * max(1, _SHORT_STRETCH // width)
    if rows > count and width < _SHORT_ROW and count * width <= _LONG_STRETCH:
        return count * width
    return 0


@compiled
def _written_out(values: Floats, width: int, by_row: bool, stretch: int) -> Floats:
    """The groups' values for each number of a stretch."""
    out = np.empty(stretch, np.float32)
    if by_row:
        for group in range(values.size):
            out[group * width : (group + 1) * width] = values[group]
    else:
        for start in range(0, stretch, values.size):
            out[start : start + values.size] = values
    return out


@compiled
def _merge_extremes(bits: Ints, low: Ints, high: Ints) -> None:
    """Lowers `low` and raises `high`, element by element."""
    for i in range(bits.size):
        # Floats compare as integers once the lower bits of the negative ones are flipped. Unlike a minimum of
        # floats, one of integers vectorises, and it does not lose NaN, which lies beyond infinity.
        ordered = np.int32(bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        low[i], high[i] = min(low[i], ordered), max(high[i], ordered)


@compiled
def _row_extremes(bits: Ints) -> tuple[np.int32, np.int32]:
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for i in range(bits.size):
        ordered = np.int32(bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        low, high = min(low, ordered), max(high, ordered)
    return low, high


@compiled
def _extremes(bits: Ints, width: int, count: int, by_row: bool) -> Floats:
    """The least and the greatest value of each group; a group with NaN in it has it as one of the two."""
    found = np.empty((2, count), np.int32)
    low, high = found[0], found[1]
    low[:], high[:] = 0x7FFFFFFF, -0x80000000
    stretch = _stretch(bits.size // width, width, count, by_row)
    if stretch == 0:
        for row in range(bits.size // width):
            least, greatest = _row_extremes(bits[row * width : (row + 1) * width])
            group = row % count
            low[group], high[group] = min(low[group], least), max(high[group], greatest)
    else:
        lows, highs = np.full(stretch, 0x7FFFFFFF, np.int32), np.full(stretch, -0x80000000, np.int32)
        for start in range(0, bits.size, stretch):
            _merge_extremes(bits[start : start + stretch], lows, highs)
        if by_row:
            for group in range(count):
                low[group] = lows[group * width : (group + 1) * width].min()
                high[group] = highs[group * width : (group + 1) * width].max()
        else:
            for start in range(0, stretch, width):
                for group in range(width):
                    low[group] = min(low[group], lows[start + group])
                    high[group] = max(high[group], highs[start + group])
    for group in range(count):
        low[group] ^= (low[group] >> np.int32(31)) & np.int32(0x7FFFFFFF)
        high[group] ^= (high[group] >> np.int32(31)) & np.int32(0x7FFFFFFF)
    return found.view(np.float32)


@compiled
def ranges(
    bits: Ints, width: int, count: int, by_row: bool, share: np.float32, tiny: np.float32
) -> tuple[Floats, np.float32]:
    """The range of each group.

    Args:
        bits: the flat matrix, float32 seen as int32.
        width: of the matrix.
        count: how many groups.
        by_row: row r belongs to group ``r % count``, not column c to group c.
        share: the distance between levels over that between the least and the greatest value.
        tiny: distances below it become 0.

    Returns:
        Float32 `[2, count]`, the least value and the distance between levels; and the largest magnitude, NaN
        where there is NaN.
    """
    params = _extremes(bits, width, count, by_row)
    peak = np.float32(0)
    for group in range(count):
        low, high = params[0, group], params[1, group]
        if np.isnan(low) or np.isnan(high):
            return params, np.float32(np.nan)
        peak = max(peak, abs(low), abs(high))
        scale = (high - low) * share
        params[1, group] = scale if scale >= tiny else np.float32(0)
    return params, peak


@compiled
def _round_down(x: Floats, low: Floats, steps: Floats, noise: Floats, q: Bytes) -> None:
    for i in range(x.size):
        q[i] = np.uint8(np.int32((x[i] - low[i]) * steps[i] + noise[i]))


@compiled
def _round(x: Floats, low: Floats, steps: Floats, q: Bytes) -> None:
    for i in range(x.size):
        q[i] = np.uint8(np.int32((x[i] - low[i]) * steps[i] + np.float32(0.5)))


@compiled
def _round_down_row(x: Floats, low: np.float32, step: np.float32, noise: Floats, q: Bytes) -> None:
    for i in range(x.size):
        q[i] = np.uint8(np.int32((x[i] - low) * step + noise[i]))


@compiled
def _round_row(x: Floats, low: np.float32, step: np.float32, q: Bytes) -> None:
    for i in range(x.size):
        q[i] = np.uint8(np.int32((x[i] - low) * step + np.float32(0.5)))


@compiled
def quantize(
    x: Floats,
    width: int,
    params: Floats,
    by_row: bool,
    noise: Floats,
    starts: NDArray[np.int64],
    period: int,
    q: Bytes,
) -> None:
    """Writes ``(x - low) / scale + noise``, rounded down, to `q`; just noise where `scale` is 0.

    Args:
        x: the flat matrix.
        width: of the matrix.
        params: `low` and `scale` of each group, `[2, count]`.
        by_row: how groups lie, as for `ranges`.
        noise: a table to take from.
        starts: element i takes ``noise[starts[i // period] + i % period]``; where `starts` is empty, 0.5.
        period: see `starts`.
        q: of x's size.
    """
    low, steps = params[0], np.zeros(params.shape[1], np.float32)
    for group in range(steps.size):
        if params[1, group] > 0:
            steps[group] = np.float32(1) / params[1, group]
    stretch = _stretch(x.size // width, width, low.size, by_row)
    run = stretch if stretch else width
    if stretch:
        lows = _written_out(low, width, by_row, stretch)
        by = _written_out(steps, width, by_row, stretch)
    else:
        lows, by = low, steps
    for start in range(0, x.size, run):
        stop = min(start + run, x.size)
        group = start // width % low.size
        if starts.size == 0:
            if stretch:
                _round(x[start:stop], lows, by, q[start:stop])
            else:
                _round_row(x[start:stop], lows[group], by[group], q[start:stop])
            continue
        at = start
        while at < stop:
            end = min(stop, (at // period + 1) * period)
            first = starts[at // period] + at % period
            some = noise[first : first + end - at]
            if stretch:
                _round_down(x[at:end], lows[at - start :], by[at - start :], some, q[at:end])
            else:
                _round_down_row(x[at:end], lows[group], by[group], some, q[at:end])
            at = end


@compiled
def _restore(q: Bytes, low: Floats, scale: Floats, x: Floats) -> None:
    for i in range(q.size):
        x[i] = np.float32(q[i]) * scale[i] + low[i]


@compiled
def _restore_row(q: Bytes, low: np.float32, scale: np.float32, x: Floats) -> None:
    for i in range(q.size):
        x[i] = np.float32(q[i]) * scale + low


@compiled
def dequantize(q: Bytes, width: int, params: Floats, by_row: bool, x: Floats) -> None:
    """Writes ``q * scale + low`` to `x`.

    Args:
        q: the flat matrix.
        width: of the matrix.
        params: `low` and `scale` of each group, `[2, count]`.
        by_row: how groups lie, as for `ranges`.
        x: of q's size.
    """
    low, scale = params[0], params[1]
    stretch = _stretch(q.size // width, width, low.size, by_row)
    if stretch:
        lows = _written_out(low, width, by_row, stretch)
        by = _written_out(scale, width, by_row, stretch)
        for start in range(0, q.size, stretch):
            _restore(q[start : start + stretch], lows, by, x[start : start + stretch])
    else:
        for start in range(0, q.size, width):
            group = start // width % low.size
            _restore_row(q[start : start + width], low[group], scale[group], x[start : start + width])
