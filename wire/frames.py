"""Frames: how messages are cut out of a stream of bytes.

A frame is a prelude of 24 bytes in network byte order, a header and a payload::

    offset  size  field
    0       4     magic, b"ISTH"
    4       1     frame format, 1
    5       1     flags, 0
    6       2     reserved, 0
    8       4     header_len, bytes
    12      8     payload_len, bytes
    20      4     CRC-32 (as zlib's) of prelude[0:20] followed by the header
    24      ...   header, then payload

`FrameReader` is made for readers that receive into given memory (`asyncio.BufferedProtocol`, `recv_into`).
A payload is received where it stays: its buffer is a little longer than itself, so that one system call
takes the rest of a payload and the beginning of the next frame. Only those few leftover bytes are copied.
Lengths are checked before anything is allocated.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

from wire.buffers import ALIGNMENT, BufferPool
from wire.errors import ForeignProtocol, FrameError, LimitExceeded

__all__ = [
    "HANDSHAKE_LIMITS",
    "PRELUDE_SIZE",
    "Frame",
    "FrameReader",
    "Limits",
    "encode_frame_head",
    "padding",
]

MAGIC = b"ISTH"
FRAME_FORMAT = 1
_FIELDS = Struct("!4sBBHIQ")
_CHECKSUM = Struct("!I")
PRELUDE_SIZE = _FIELDS.size + _CHECKSUM.size

_HEAD_SIZE = 4096  # what is read at once while no payload is due; so much of a payload is copied at most
_SLACK = 512  # room behind a payload for the next frame's prelude and header
_ZEROS = bytes(ALIGNMENT)


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


class Frame(NamedTuple):
    """A received frame.

    Attributes:
        header: msgpack bytes.
        payload: a view of the buffer it was received into; dropping all views frees the buffer.
        size: bytes on the wire.
    """

    header: bytes
    payload: memoryview
    size: int


def padding(nbytes: int) -> bytes:
    """Return the zero bytes that bring `nbytes` to the next multiple of 64."""
    return _ZEROS[: -nbytes % ALIGNMENT]


def encode_frame_head(header: bytes, payload_len: int) -> bytes:
    """Return prelude and header of a frame; `payload_len` bytes have to follow them."""
    fields = _FIELDS.pack(MAGIC, FRAME_FORMAT, 0, 0, len(header), payload_len)
    return b"".join((fields, _CHECKSUM.pack(zlib.crc32(header, zlib.crc32(fields))), header))


class FrameReader:
    """Cuts a stream of bytes into frames.

    Receive into `next_buffer`, tell `advance` how many bytes came, then call `next_frame` until it
    returns None.

    Args:
        limits: what is accepted; may be replaced between frames.
        pool: where payload buffers come from.
    """

    def __init__(self, limits: Limits, pool: BufferPool | None = None) -> None:
        self.limits = limits
        self._pool = pool if pool is not None else BufferPool()
        self._head = memoryview(bytearray(_HEAD_SIZE))
        self._start = self._end = 0  # what of the head is received and not yet used
        self._wanted = PRELUDE_SIZE  # bytes from _start on that the next thing to do needs
        self._header: bytes | None = None  # of the frame whose payload is being received
        self._block = memoryview(b"")  # receives the payload, and _SLACK more
        self._payload_len = self._filled = 0
        self._first = True

    @property
    def mid_frame(self) -> bool:
        """A frame has begun to arrive and is not complete."""
        return self._header is not None or self._end > self._start

    @property
    def progress(self) -> str:
        """How far the frame that is arriving has come, in words."""
        if self._header is not None:
            return f"{self._filled} of {self._payload_len} payload bytes had arrived"
        return f"{self._end - self._start} of at least {self._wanted} header bytes had arrived"

    def next_buffer(self) -> memoryview:
        """Return the memory that the next bytes of the stream belong into; never empty."""
        if self._header is not None:
            return self._block[self._filled :]
        room = max(self._wanted, _HEAD_SIZE)
        if self._start + room > len(self._head):
            self._compact(room)
        return self._head[self._end : self._start + room]

    def advance(self, nbytes: int) -> None:
        """Take note that `nbytes` were received into the buffer that `next_buffer` returned last."""
        if self._header is not None:
            self._filled += nbytes
        else:
            self._end += nbytes

    def next_frame(self) -> Frame | None:
        """Return the next complete frame, or None where more bytes are needed.

        Raises:
            FrameError: the bytes are no frame.
            LimitExceeded: a declared length is above `limits`; nothing was allocated for it.
        """
        if self._header is None and not self._parse_head():
            return None
        if self._filled < self._payload_len:
            return None
        assert self._header is not None
        frame = Frame(
            self._header,
            self._block[: self._payload_len],
            PRELUDE_SIZE + len(self._header) + self._payload_len,
        )
        leftover = self._filled - self._payload_len
        if leftover:  # then the head is empty, for it is used up before a payload is received into its block
            self._head[:leftover] = self._block[self._payload_len : self._filled]
            self._start, self._end = 0, leftover
        self._header = None
        self._block = self._head[:0]  # lets go of the payload: only the frame refers to it now
        self._payload_len = self._filled = 0
        return frame

    def _parse_head(self) -> bool:
        """Parse prelude and header once they are complete, and prepare the payload's buffer."""
        have = self._end - self._start
        if have < self._wanted:
            if self._first and have >= len(MAGIC):
                self._check_magic()
            return False
        start = self._start
        prelude = self._head[start : start + PRELUDE_SIZE]
        magic, frame_format, flags, reserved, header_len, payload_len = _FIELDS.unpack_from(prelude)
        if self._wanted == PRELUDE_SIZE:
            if magic != MAGIC:
                self._check_magic()
            if frame_format != FRAME_FORMAT or flags or reserved:
                raise FrameError(
                    f"unknown frame format {frame_format}, flags {flags}, reserved {reserved};"
                    f" this program reads format {FRAME_FORMAT} with zeros"
                )
            if header_len > self.limits.max_header:
                raise LimitExceeded("header", header_len, self.limits.max_header)
            if payload_len > self.limits.max_payload:
                raise LimitExceeded("payload", payload_len, self.limits.max_payload)
            self._first = False
            if have < PRELUDE_SIZE + header_len:
                self._wanted = PRELUDE_SIZE + header_len
                return False
        head_end = start + PRELUDE_SIZE + header_len
        header = bytes(self._head[start + PRELUDE_SIZE : head_end])
        checksum = zlib.crc32(header, zlib.crc32(prelude[: _FIELDS.size]))
        if checksum != _CHECKSUM.unpack_from(prelude, _FIELDS.size)[0]:
            raise FrameError("the checksum of a frame's header does not match: the stream is damaged")
        self._wanted = PRELUDE_SIZE
        self._header = header
        self._payload_len = payload_len
        at_hand = min(self._end - head_end, payload_len)
        if payload_len:
            self._block = self._pool.take(payload_len + _SLACK)
            self._block[:at_hand] = self._head[head_end : head_end + at_hand]
        self._filled = at_hand
        self._start = head_end + at_hand
        if self._start == self._end:
            self._start = self._end = 0
        return True

    def _check_magic(self) -> None:
        first_bytes = bytes(self._head[self._start : self._start + len(MAGIC)])
        if first_bytes == MAGIC:
            return
        if self._first:
            raise ForeignProtocol(first_bytes)
        raise FrameError("a frame does not begin with the protocol's magic: the stream is damaged")

    def _compact(self, room: int) -> None:
        """Move what is unread to the front of a head of `room` bytes."""
        have = self._end - self._start
        head = self._head if len(self._head) >= room else memoryview(bytearray(room))
        head[:have] = self._head[self._start : self._end]
        if len(head) > _HEAD_SIZE >= room:  # a large header has passed
            head = memoryview(bytearray(head[:_HEAD_SIZE]))
        self._head, self._start, self._end = head, 0, have
