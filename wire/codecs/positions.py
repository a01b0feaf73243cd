"""Which elements of a long tensor are meant: ascending positions as few bytes.

Either as a *bitmap*, one bit for each element of the tensor; or as *gaps*, how many elements are skipped before
each one that is meant, in codes of a fixed number of bits. A gap that is too large for a code is preceded by
codes of ones only, each of which skips as many elements as it says and means none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wire.codecs import bits
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
    gaps = positions.diff(prepend=positions.new_full((1,), -1)).int() - 1
    # Codes of about the mean gap's width are the shortest; a bit fewer or some more where gaps differ much.
    around = (length // positions.numel()).bit_length()
    widths = range(max(around - 1, _LEAST_BITS), min(around + 4, _MOST_BITS) + 1)
    layouts = [Layout(length)]
    for width in widths or (_MOST_BITS,):
        if positions.numel() * width >= length:
            break
        skips = int(gaps.div((1 << width) - 1, rounding_mode="floor").sum())
        layouts.append(Layout(length, width, positions.numel() + skips))
    layout = min(layouts, key=lambda layout: layout.size)
    if not layout.bits:
        chosen = torch.zeros(length, dtype=torch.uint8, device=positions.device)
        chosen[positions] = 1
        return layout, bits.pack(chosen, 1)
    ones = (1 << layout.bits) - 1
    skips_before = gaps.div(ones, rounding_mode="floor")
    codes = torch.full((layout.codes,), ones, dtype=torch.int32, device=positions.device)
    codes[(skips_before + 1).cumsum(0) - 1] = (gaps - skips_before * ones).int()
    if layout.bits <= 8:
        return layout, bits.pack(codes.to(torch.uint8), layout.bits)
    high = bits.pack((codes >> 8).to(torch.uint8), layout.bits - 8)
    return layout, torch.cat(((codes & 255).to(torch.uint8), high))


def read(data: Tensor, layout: Layout, count: int) -> Tensor:
    """Reads what `write` wrote.

    Args:
        data: uint8 `[layout.size]`.
        layout: how they are written.
        count: how many positions there have to be.

    Returns:
        int64 `[count]`, ascending, below `layout.length`.

    Raises:
        CorruptPayload: these bytes are not so many positions.
    """
    positions = _read_codes(data, layout) if layout.bits else _read_bitmap(data, layout)
    if positions.numel() != count or int(positions[-1]) >= layout.length:
        raise CorruptPayload(
            f"{positions.numel()} positions are written where {count} are due, or too large ones"
        )
    return positions


def _read_bitmap(data: Tensor, layout: Layout) -> Tensor:
    return bits.unpack(data, 1, layout.length).view(torch.bool).nonzero().view(-1)


def _read_codes(data: Tensor, layout: Layout) -> Tensor:
    low = min(layout.bits, 8)
    split = bits.packed_size(layout.codes, low)
    codes = bits.unpack(data[:split], low, layout.codes).to(torch.int32)
    if layout.bits > 8:
        codes += bits.unpack(data[split:], layout.bits - 8, layout.codes).to(torch.int32) << 8
    meant = codes != (1 << layout.bits) - 1
    if not meant[-1]:
        raise CorruptPayload("the last of a tensor's positions is missing")
    return ((codes + meant).cumsum(0) - 1)[meant]
