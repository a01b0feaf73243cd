"""Frames: how messages are cut out of a stream of bytes.

A frame is a prelude of 24 bytes in network byte order, a header and a payload::

    offset  size  field
    0       4     magic, b"ISTH"
    4       1     frame format, 1
    5       1     flags: 0, SPLIT or PIECE
    6       2     number: 0 where flags is 0
    8       4     header_len, bytes
    12      8     payload_len, bytes
    20      4     CRC-32 (as zlib's) of prelude[0:20] followed by the header
    24      ...   header, then payload

A large frame can be sent in pieces, with other frames between them. Then its prelude and header go first, with
the flag SPLIT and a number that no other frame under way has, and no payload follows. The payload comes in
pieces, each after a prelude of its own with the flag PIECE, the same number, no header and the piece's length;
it is complete when as many bytes have come as the first prelude said.

`FrameReader` is made for readers that receive into given memory (`asyncio.BufferedProtocol`, `recv_into`).
A payload is received where it stays: its buffer is a little longer than itself, so that one system call
takes the rest of a payload and the beginning of the next frame. Only those few leftover bytes are copied.
Lengths are checked before anything is allocated.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import NamedTuple

from wire.buffers import BufferPool
from wire.errors import ForeignProtocol, FrameError, LimitExceeded
from wire.prelude import (
    CHECKSUM,
    FIELDS,
    FRAME_FORMAT,
    HANDSHAKE_LIMITS,
    MAGIC,
    MAX_SPLIT,
    PIECE,
    PRELUDE_SIZE,
    SPLIT,
    Limits,
    encode_frame_head,
    encode_piece_head,
    padding,
    split_frame_head,
)

__all__ = [
    "FRAME_FORMAT",
    "HANDSHAKE_LIMITS",
    "MAX_SPLIT",
    "PRELUDE_SIZE",
    "Frame",
    "FrameReader",
    "Limits",
    "encode_frame_head",
    "encode_piece_head",
    "padding",
    "split_frame_head",
]

_HEAD_SIZE = 4096  # what is read at once while no payload is due; so much of a payload is copied at most
_SLACK = 512  # room behind a payload for the next frame's prelude and header


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


@dataclass(slots=True)
class _Arriving:
    """A frame whose payload is being received.

    Attributes:
        header: msgpack bytes.
        block: receives the payload, and _SLACK more.
        payload_len: of the whole payload.
        size: bytes on the wire so far, the payload's not counted.
        filled: payload bytes received.
        end: `filled` at the end of what comes without another prelude.
    """

    header: bytes
    block: memoryview
    payload_len: int
    size: int
    filled: int = 0
    end: int = 0


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
        self._arriving: _Arriving | None = None  # what the next bytes belong to, unless to the head
        self._split: dict[int, _Arriving] = {}  # frames in pieces, by number
        self._first = True

    @property
    def mid_frame(self) -> bool:
        """A frame has begun to arrive and is not complete."""
        return self._arriving is not None or self._end > self._start or bool(self._split)

    @property
    def missing(self) -> int:
        """Payload bytes that are sure to come before any other prelude; 0 where a prelude is next."""
        return self._arriving.end - self._arriving.filled if self._arriving is not None else 0

    @property
    def progress(self) -> str:
        """How far the frame that is arriving has come, in words."""
        arriving = self._arriving or next(iter(self._split.values()), None)
        if arriving is not None:
            return f"{arriving.filled} of {arriving.payload_len} payload bytes had arrived"
        return f"{self._end - self._start} of at least {self._wanted} header bytes had arrived"

    def next_buffer(self) -> memoryview:
        """Return the memory that the next bytes of the stream belong into; never empty."""
        arriving = self._arriving
        if arriving is not None:
            return arriving.block[arriving.filled : arriving.end + _SLACK]
        room = max(self._wanted, _HEAD_SIZE)
        if self._start + room > len(self._head):
            self._compact(room)
        return self._head[self._end : self._start + room]

    def advance(self, nbytes: int) -> None:
        """Take note that `nbytes` were received into the buffer that `next_buffer` returned last."""
        if self._arriving is not None:
            self._arriving.filled += nbytes
        else:
            self._end += nbytes

    def next_frame(self) -> Frame | None:
        """Return the next complete frame, or None where more bytes are needed.

        Raises:
            FrameError: the bytes are no frame.
            LimitExceeded: a declared length is above `limits`; nothing was allocated for it.
        """
        while True:
            if self._arriving is None and not self._parse_head():
                return None
            arriving = self._arriving
            if arriving is None:
                continue  # the head of a frame in pieces
            leftover = arriving.filled - arriving.end
            if leftover < 0:
                return None
            if (
                leftover
            ):  # then the head is empty, for it is used up before a payload is received into its block
                self._head[:leftover] = arriving.block[arriving.end : arriving.filled]
                self._start, self._end = 0, leftover
                arriving.filled = arriving.end
            self._arriving = None  # lets go of the payload: only the frame refers to it now
            if arriving.filled == arriving.payload_len:
                payload = arriving.block[: arriving.payload_len]
                return Frame(arriving.header, payload, arriving.size + arriving.payload_len)

    def _parse_head(self) -> bool:
        """Parse prelude and header once they are complete, and prepare the payload's buffer."""
        have = self._end - self._start
        if have < self._wanted:
            if self._first and have >= len(MAGIC):
                self._check_magic()
            return False
        start = self._start
        prelude = self._head[start : start + PRELUDE_SIZE]
        magic, frame_format, flags, number, header_len, payload_len = FIELDS.unpack_from(prelude)
        if self._wanted == PRELUDE_SIZE:
            if magic != MAGIC:
                self._check_magic()
            self._check_prelude(frame_format, flags, number, header_len, payload_len)
            self._first = False
            if have < PRELUDE_SIZE + header_len:
                self._wanted = PRELUDE_SIZE + header_len
                return False
        head_end = start + PRELUDE_SIZE + header_len
        header = bytes(self._head[start + PRELUDE_SIZE : head_end])
        checksum = zlib.crc32(header, zlib.crc32(prelude[: FIELDS.size]))
        if checksum != CHECKSUM.unpack_from(prelude, FIELDS.size)[0]:
            raise FrameError("the checksum of a frame's header does not match: the stream is damaged")
        self._wanted = PRELUDE_SIZE
        self._start = head_end
        if flags == PIECE:
            arriving = self._split[number]
            arriving.end += payload_len
            arriving.size += PRELUDE_SIZE
            if arriving.end == arriving.payload_len:
                del self._split[number]
        else:
            block = self._pool.take(payload_len + _SLACK) if payload_len else self._head[:0]
            arriving = _Arriving(header, block, payload_len, PRELUDE_SIZE + header_len)
        if flags == SPLIT:
            self._split[number] = arriving
        else:
            self._receive(arriving, arriving.end if flags == PIECE else payload_len)
        if self._start == self._end:
            self._start = self._end = 0
        return True

    def _receive(self, arriving: _Arriving, end: int) -> None:
        """Let the next bytes belong to a payload, up to `end`; those of the head at once."""
        arriving.end = end
        self._arriving = arriving
        if at_hand := min(self._end - self._start, end - arriving.filled):
            filled, start = arriving.filled, self._start
            arriving.block[filled : filled + at_hand] = self._head[start : start + at_hand]
            arriving.filled += at_hand
            self._start += at_hand

    def _check_prelude(
        self, frame_format: int, flags: int, number: int, header_len: int, payload_len: int
    ) -> None:
        known = (flags == 0 and number == 0) or (flags in (SPLIT, PIECE) and payload_len > 0)
        if frame_format != FRAME_FORMAT or not known:
            raise FrameError(
                f"unknown frame format {frame_format}, flags {flags}, number {number}, payload {payload_len};"
                f" this program reads format {FRAME_FORMAT}, whole or in pieces"
            )
        if header_len > self.limits.max_header:
            raise LimitExceeded("header", header_len, self.limits.max_header)
        if payload_len > self.limits.max_payload:
            raise LimitExceeded("payload", payload_len, self.limits.max_payload)
        if flags == SPLIT and number in self._split:
            raise FrameError(f"two frames in pieces have the number {number}")
        if flags == SPLIT and len(self._split) == MAX_SPLIT:
            raise LimitExceeded("number of frames in pieces", MAX_SPLIT + 1, MAX_SPLIT)
        if flags == PIECE:
            whole = self._split.get(number)
            if whole is None or header_len or payload_len > whole.payload_len - whole.filled:
                raise FrameError(f"a piece came that is none of a frame with the number {number}")

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
