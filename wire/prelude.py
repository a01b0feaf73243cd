"""Preludes and headers: what stands before a payload, and how long it may be.

See `wire.frames` for their layout.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from struct import Struct

from wire.buffers import ALIGNMENT

MAGIC = b"ISTH"
FRAME_FORMAT = 1
FIELDS = Struct("!4sBBHIQ")
CHECKSUM = Struct("!I")
PRELUDE_SIZE = FIELDS.size + CHECKSUM.size
_ZEROS = bytes(ALIGNMENT)
SPLIT, PIECE = 1, 2
MAX_SPLIT = 4
"""Frames in pieces that may be under way at once."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest frame that an end accepts.

    Attributes:
        max_header: bytes of header.
        max_payload: bytes of payload.
    """

    max_header: int
    max_payload: int


HANDSHAKE_LIMITS = Limits(max_header=4096, max_payload=0)
"""In force until both sides have said hello."""


def padding(nbytes: int) -> bytes:
    """Return the zero bytes that bring `nbytes` to the next multiple of 64."""
    return _ZEROS[: -nbytes % ALIGNMENT]


def encode_frame_head(header: bytes, payload_len: int) -> bytes:
    """Return prelude and header of a frame; `payload_len` bytes have to follow them."""
    return _encode_head(0, 0, header, payload_len)


def split_frame_head(head: bytes, number: int) -> bytes:
    """Return what `encode_frame_head` returned as the head of the same frame sent in pieces."""
    *_, payload_len = FIELDS.unpack_from(head)
    return _encode_head(SPLIT, number, head[PRELUDE_SIZE:], payload_len)


def encode_piece_head(number: int, piece_len: int) -> bytes:
    """Return the prelude of a piece; `piece_len` bytes have to follow it."""
    return _encode_head(PIECE, number, b"", piece_len)


def _encode_head(flags: int, number: int, header: bytes, payload_len: int) -> bytes:
    fields = FIELDS.pack(MAGIC, FRAME_FORMAT, flags, number, len(header), payload_len)
    return b"".join((fields, CHECKSUM.pack(zlib.crc32(header, zlib.crc32(fields))), header))
