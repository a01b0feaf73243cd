"""Gives a stream what waits to be sent, the most urgent first.

The stream is given one frame at a time, small ones together and a large one in pieces, so that a more urgent frame
waits for at most what the link takes in the time of a piece. What carries a payload is not sent at once but when the
event loop is next free: by then there may be more, and the system is asked once for all of it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from wire.errors import WireError
from wire.loop import Stream
from wire.messages import Buffer
from wire.outbox import NUMBERS, Outbox, SendReceipt
from wire.pace import Ask, Pace

__all__ = ["Sender", "Traits"]

_SLICE = 256 * 1024  # what a stream that copies what it cannot send is given at once
_TOGETHER = 9 << 20  # small frames are given together up to so many bytes: a full queue of 1 MiB each


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a stream is like.

    Attributes:
        splits: give it frames in slices, because it copies what it cannot send at once.
        delivery: what of it has arrived, where that is known.
        overhead: bytes that it has sent beyond those it was given.
    """

    splits: bool
    delivery: Ask = lambda: None
    overhead: Callable[[], int] = lambda: 0


class _Part(NamedTuple):
    """What of a frame the stream is given at once.

    Attributes:
        receipt: the frame's.
        size: bytes.
        is_last: the frame ends here.
    """

    receipt: SendReceipt
    size: int
    is_last: bool


class Sender:
    """The sending half of a channel.

    Args:
        soon: has the event loop call `pump` when it is next free.
        lead: by how many chunks activations may be ahead of gradients, see `wire.outbox`.

    Attributes:
        paused: the stream buffers some of what it was given.
        pace: how fast the link takes it.
    """

    def __init__(self, soon: Callable[[], object], *, lead: int) -> None:
        self.paused = False
        self.pace = Pace(lambda: None)
        self._outbox = Outbox(lead=lead)
        self._stream: Stream
        self._overhead: Callable[[], int]
        self._slices: deque[memoryview] | None = None  # where the stream is to be given slices: those left
        self._sending: list[_Part] = []  # what the stream is being given
        self._size = 0  # bytes of all of that
        self._written = 0
        self._soon = soon
        self._is_due = False  # the event loop is going to pump

    def attach(self, stream: Stream, traits: Traits) -> None:
        """Begin to send to a stream."""
        self._stream = stream
        self._overhead = traits.overhead
        self.pace = Pace(traits.delivery)
        self._slices = deque() if traits.splits else None

    @property
    def waiting(self) -> int:
        """How many messages wait that are not urgent."""
        return self._outbox.ordinary

    @property
    def urgent(self) -> int:
        """How many urgent messages wait."""
        return self._outbox.urgent

    @property
    def idle(self) -> bool:
        """Nothing waits, and the stream buffers nothing."""
        return not (self._sending or self._outbox)

    @property
    def sent_bytes(self) -> int:
        """Bytes that the kernel took."""
        return self._written + self._overhead() - self._stream.get_write_buffer_size()

    def lead(self, chunks: int) -> None:
        """Change the lead, for what is pushed from now on."""
        self._outbox.lead = chunks

    def push(self, kind: str, receipt: SendReceipt, chunk: int) -> None:
        """Let a frame wait, and send it if it can be: now, or soon where it carries a payload."""
        self._outbox.push(kind, receipt, chunk)
        if self.paused:
            return
        if kind not in NUMBERS:
            self.pump()
        elif not self._is_due:
            self._is_due = True
            self._soon()

    def pump(self) -> None:
        """Give the stream frames until the kernel is full."""
        self._is_due = False
        while not (self.paused or self.idle or self._stream.is_closing()):
            if not self._sending:
                self._begin()
            while self._slices and not self.paused:
                self._written += len(self._slices[0])
                self._stream.write(self._slices.popleft())
            if not self.paused:
                self._end()

    def write_last(self, buffers: list[Buffer]) -> None:
        """Give the stream a frame after which nothing is sent, unless it has half of another."""
        if not self._slices and not self._stream.is_closing():
            self._written += sum(map(len, buffers))
            self._stream.writelines(buffers)

    def drop(self, error: WireError | None) -> None:
        """Forget everything that waits, because of an error."""
        for receipt in {*(part.receipt for part in self._sending), *self._outbox.drain()}:
            receipt.finish(error)
        self._sending = []
        if self._slices:
            self._slices.clear()

    def drop_waiting(self, error: WireError) -> None:
        """Forget what waits, and send what is on its way to its end."""
        for receipt in self._outbox.drain():
            receipt.finish(error)

    def _begin(self) -> None:
        buffers: list[Buffer] = []
        piece_bytes, now_ns = self.pace.piece_bytes, time.monotonic_ns()
        most = min(piece_bytes, _TOGETHER)
        self._size = 0
        while not self._sending or self._outbox.next_size <= most - self._size:
            taken, receipt, is_last = self._outbox.take(piece_bytes)
            if receipt.start_ns is None:
                receipt.start_ns = now_ns
            self._sending.append(_Part(receipt, sum(map(len, taken)), is_last))
            self._size += self._sending[-1].size
            buffers += taken
        self.pace.begin(self._size)
        if self._slices is None:
            self._written += self._size
            self._stream.writelines(buffers)
            return
        for buffer in buffers:
            view = memoryview(buffer)
            self._slices.extend(view[at : at + _SLICE] for at in range(0, len(view), _SLICE))

    def _end(self) -> None:
        took_ns = self.pace.end(self._size)
        sent, self._sending = self._sending, []
        for receipt, size, is_last in sent:
            receipt.busy_ns += took_ns * size // self._size
            if is_last:
                receipt.finish()
