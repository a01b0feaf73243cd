"""Which elements of a long tensor are meant: ascending positions as few bytes.

Either as a *bitmap*, one bit for each element of the tensor; or as *gaps*, how many elements are skipped before
each one that is meant, in codes of a fixed number of bits. A gap that is too large for a code is preceded by
codes of ones only, each of which skips as many elements as it says and means none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wire.codecs import bits, compiled
from wire.errors import CorruptPayload

_LEAST_BITS, _MOST_BITS = 2, 16


@dataclass(frozen=True, slots=True)
class Layout:
    """How positions are written down.

    Attributes:
        length: elements of the tensor.
        bits: of a code; 0 for a bitmap.
        codes: how many there are; 0 for a bitmap.
    """

    length: int
    bits: int = 0
    codes: int = 0

    @classmethod
    def parse(cls, meta: Mapping[str, Any], length: int, count: int) -> Layout:
        """The layout that meta values declare, for `count` positions in `length` elements.

        Raises:
            CorruptPayload: there is no such layout.
        """
        if dict(meta) == {"index": "bitmap"}:
            return cls(length)
        width, codes = meta.get("bits"), meta.get("codes")
        if (
            meta.keys() != {"index", "bits", "codes"}
            or meta["index"] != "gaps"
            or type(width) is not int
            or type(codes) is not int
            or not _LEAST_BITS <= width <= _MOST_BITS
            or not count <= codes <= count + length // ((1 << width) - 1)
        ):
            raise CorruptPayload(f"{count} positions are not written as {dict(meta)!r:.80}")
        return cls(length, width, codes)

    def meta(self) -> dict[str, Any]:
        """The meta values that `parse` reads."""
        return {"index": "gaps", "bits": self.bits, "codes": self.codes} if self.bits else {"index": "bitmap"}

    @property
    def size(self) -> int:
        """Bytes that the positions take."""
        if not self.bits:
            return bits.packed_size(self.length, 1)
        low = min(self.bits, 8)
        return bits.packed_size(self.codes, low) + bits.packed_size(self.codes, self.bits - low)


def write(positions: Tensor, length: int) -> tuple[Layout, Tensor]:
    """Writes positions down in the layout that takes the fewest bytes.

    Args:
        positions: int64 `[count]`, ascending, at least one.
        length: they are below it.

    Returns:
        The layout, and uint8 `[layout.size]`.
    """
    layout = min(_layouts(positions, length), key=lambda layout: layout.size)
    kernels = compiled.kernels("_position_kernels", positions.device)
    if not layout.bits:
        if kernels is not None:
            bitmap = torch.zeros(layout.size, dtype=torch.uint8)
            kernels.write_bitmap(positions.numpy(), bitmap.numpy())
            return layout, bitmap
        chosen = torch.zeros(length, dtype=torch.uint8, device=positions.device)
        chosen[positions] = 1
        return layout, bits.pack(chosen, 1)
    ones = (1 << layout.bits) - 1
    dtype = torch.uint8 if layout.bits <= 8 else torch.int32
    codes = torch.full((layout.codes,), ones, dtype=dtype, device=positions.device)
    if kernels is not None:
        kernels.write_codes(positions.numpy(), ones, codes.numpy())
    else:
        gaps = _gaps(positions)
        skips = gaps // ones
        codes[(skips + 1).cumsum(0) - 1] = (gaps - skips * ones).to(dtype)
    if layout.bits <= 8:
        return layout, bits.pack(codes, layout.bits)
    high = bits.pack((codes >> 8).to(torch.uint8), layout.bits - 8)
    return layout, torch.cat(((codes & 255).to(torch.uint8), high))


def read(data: Tensor, layout: Layout, count: int) -> Tensor:
    """Reads what `write` wrote.

    Args:
        data: uint8 `[layout.size]`.
        layout: how they are written.
        count: how many positions there have to be, at least one.

    Returns:
        int64 `[count]`, ascending, below `layout.length`.

    Raises:
        CorruptPayload: these bytes are not so many positions.
    """
    positions = _read_codes(data, layout, count) if layout.bits else _read_bitmap(data, layout, count)
    if positions.numel() != count:
        raise CorruptPayload(f"a tensor needs {count} positions, and others are written")
    if int(positions[-1]) >= layout.length:
        raise CorruptPayload(
            f"position {int(positions[-1])} is written in a tensor of {layout.length} elements"
        )
    return positions


def _layouts(positions: Tensor, length: int) -> list[Layout]:
    """Those that can be the smallest, in the order of their bits."""
    # Codes of about the mean gap's width are the shortest; a bit fewer or some more where gaps differ much.
    count = positions.numel()
    around = (length // count).bit_length()
    least, most = max(around - 1, _LEAST_BITS), min(around + 4, _MOST_BITS)
    widths = [width for width in range(min(least, _MOST_BITS), most + 1) if count * width < length]
    ones = [(1 << width) - 1 for width in widths]
    kernels = compiled.kernels("_position_kernels", positions.device)
    if kernels is not None:
        totals = np.zeros(len(ones), np.int64)
        kernels.count_skips(positions.numpy(), np.array(ones, np.int64), totals)
        skips = totals.tolist()
    else:
        gaps = _gaps(positions)
        skips = [int((gaps // all_ones).sum()) for all_ones in ones]
    layouts = [Layout(length, width, count + skip) for width, skip in zip(widths, skips, strict=True)]
    return [Layout(length), *layouts]


def _gaps(positions: Tensor) -> Tensor:
    return positions.diff(prepend=positions.new_full((1,), -1)) - 1


def _read_bitmap(data: Tensor, layout: Layout, count: int) -> Tensor:
    kernels = compiled.kernels("_position_kernels", data.device)
    if kernels is None:
        return bits.unpack(data, 1, layout.length).view(torch.bool).nonzero().view(-1)
    found = torch.empty(count + 1, dtype=torch.int64)
    return found[: kernels.read_bitmap(data.numpy(), found.numpy())]


def _read_codes(data: Tensor, layout: Layout, count: int) -> Tensor:
    low = min(layout.bits, 8)
    split = bits.packed_size(layout.codes, low)
    codes = bits.unpack(data[:split], low, layout.codes)
    if layout.bits > 8:
        codes = codes + (bits.unpack(data[split:], layout.bits - 8, layout.codes).to(torch.int32) << 8)
    ones = (1 << layout.bits) - 1
    if int(codes[-1]) == ones:
        raise CorruptPayload("the last of a tensor's positions is missing")
    kernels = compiled.kernels("_position_kernels", data.device)
    if kernels is None:
        meant = codes != ones
        return ((codes.to(torch.int64) + meant).cumsum(0) - 1)[meant]
    found = torch.empty(count + 1, dtype=torch.int64)
    return found[: kernels.read_codes(codes.numpy(), ones, found.numpy())]
