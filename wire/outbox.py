"""What waits to be sent, the most urgent first.

Heartbeats, errors and aborts go before everything else. The messages that order the others (open, begin,
commit and the like) keep their place: nothing passes them in either direction. Between two of those, activations and
gradients go in the order of their chunks, in which activations have a lead of some chunks. From the server the lead is
without end: activations go first. From the client it is small, and chosen by `common.simulator`: none, and gradients
go first; one, and an activation that is on its way is not interrupted for the gradient of the chunk before. Weights
go last.

A large frame is sent in pieces. What is more urgent goes between two of them.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Generator, Iterator
from itertools import count
from typing import Any

from wire.errors import WireError
from wire.frames import PRELUDE_SIZE, encode_piece_head, split_frame_head
from wire.loop import Waiter, wake
from wire.messages import Buffer

__all__ = ["ENDLESS", "NUMBERS", "Outbox", "SendReceipt"]

_URGENT = frozenset({"ping", "pong", "error", "abort"})
# What carries a payload and goes in pieces, and the number of its frame: at most one of each kind is on its way,
# the oldest.
NUMBERS = {"backward": 1, "forward": 2, "weights": 3}
_LAST = 1 << 62  # after every chunk

ENDLESS = 1 << 32
"""A lead with which activations go before all gradients."""


class SendReceipt:
    """What became of a sent message. Awaiting it waits until the kernel has the whole frame, and returns it.

    Attributes:
        size: bytes of the frame, with the preludes of its pieces once they are on their way.
        start_ns: monotonic time at which its first byte was offered to the kernel; None before.
        end_ns: monotonic time at which the kernel had all of it; None before.
        busy_ns: how long the kernel took over it, without what went between its pieces.
        buffers: the frame, or what of its payload is not on its way yet; empty once it is sent.
        in_pieces: some of it is on its way.
    """

    __slots__ = (
        *("_error", "_new_waiter", "_waiters"),
        *("buffers", "busy_ns", "end_ns", "in_pieces", "size", "start_ns"),
    )

    def __init__(self, buffers: list[Buffer], size: int, new_waiter: Callable[[], Waiter]) -> None:
        self.buffers = buffers
        self.size = size
        self.start_ns: int | None = None
        self.end_ns: int | None = None
        self.busy_ns = 0
        self.in_pieces = False
        self._error: WireError | None = None
        self._new_waiter = new_waiter
        self._waiters: list[Waiter] | None = None

    def __await__(self) -> Generator[Any, None, SendReceipt]:
        if self.end_ns is None and self._error is None:
            waiter = self._new_waiter()
            self._waiters = [*(self._waiters or ()), waiter]
            yield from waiter.__await__()
        if self._error is not None:
            raise self._error
        return self

    def finish(self, error: WireError | None = None) -> None:
        """Let go of the frame: the kernel has it, or never will because of an error."""
        self.buffers = []
        if error is None:
            self.end_ns = time.monotonic_ns()
        self._error = error
        for waiter in self._waiters or ():
            wake(waiter)


class Outbox:
    """A priority queue of frames; the caller bounds it.

    Attributes:
        lead: by how many chunks activations may be ahead of gradients; for what is pushed from now on.
        urgent: how many urgent messages wait.
    """

    def __init__(self, *, lead: int = 0) -> None:
        self.lead = lead
        # Compared by era (the ordering messages so far; -1 for what is urgent), rank, whether it is on its way, number
        # of its kind, age.
        self._heap: list[tuple[int, int, bool, int, int, SendReceipt]] = []
        self._ages = count()
        self._era = 0
        self._ranks: dict[str, int] = {}  # of the last of each kind in this era
        self.urgent = 0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def ordinary(self) -> int:
        """How many messages wait that are not urgent."""
        return len(self._heap) - self.urgent

    @property
    def next_size(self) -> float:
        """Bytes of the frame that is to be sent next; without end where there is none, or only a part of one."""
        receipt = self._heap[0][-1] if self._heap else None
        return math.inf if receipt is None or receipt.in_pieces else receipt.size

    def push(self, kind: str, receipt: SendReceipt, chunk: int = 0) -> None:
        """Add the frame of a message of this kind, of this chunk."""
        number, rank, era = NUMBERS.get(kind, 0), 0, self._era
        if number:
            rank = {"backward": chunk, "forward": chunk - self.lead}.get(kind, _LAST)
            # Also where the lead has changed: none of a kind overtakes another, which may be on its way in pieces.
            rank = self._ranks[kind] = max(rank, self._ranks.get(kind, rank))
        elif kind in _URGENT:
            era = -1
            self.urgent += 1
        else:
            era += 1
            self._era += 2
            self._ranks = {}
        heapq.heappush(self._heap, (era, rank, True, number, next(self._ages), receipt))

    def take(self, piece_bytes: int) -> tuple[list[Buffer], SendReceipt, bool]:
        """Take what is to be sent next, IndexError where nothing waits.

        Args:
            piece_bytes: a payload that is much longer is cut into pieces of so many bytes. What is left of it
                keeps its place.

        Returns:
            What to send, the receipt of the frame that it belongs to, and whether that is now sent to its end.
        """
        era, rank, _, number, age, receipt = heapq.heappop(self._heap)
        if era < 0:
            self.urgent -= 1
        if number == 0 or not (receipt.in_pieces or _payload(receipt) > piece_bytes * 3 // 2):
            return receipt.buffers, receipt, True
        buffers: list[Buffer] = []
        if not receipt.in_pieces:
            head, *receipt.buffers = receipt.buffers
            buffers.append(split_frame_head(bytes(head), number))
            receipt.in_pieces = True
        piece = _cut(receipt, piece_bytes)
        buffers += [encode_piece_head(number, sum(map(len, piece))), *piece]
        receipt.size += PRELUDE_SIZE
        if receipt.buffers:
            heapq.heappush(self._heap, (era, rank, False, number, age, receipt))
        return buffers, receipt, not receipt.buffers

    def drain(self) -> Iterator[SendReceipt]:
        """Remove and yield everything."""
        while self._heap:
            yield heapq.heappop(self._heap)[-1]
        self.urgent = 0


def _payload(receipt: SendReceipt) -> int:
    return receipt.size - len(receipt.buffers[0])


def _cut(receipt: SendReceipt, piece_bytes: int) -> list[Buffer]:
    """Take the next piece off a receipt's buffers; what would be left over of less than half joins it."""
    left = sum(map(len, receipt.buffers))
    wanted = left if left < piece_bytes * 3 // 2 else piece_bytes
    piece: list[Buffer] = []
    while wanted:
        view = memoryview(receipt.buffers[0])
        piece.append(view[:wanted])
        if len(view) > wanted:
            receipt.buffers[0] = view[wanted:]
        else:
            del receipt.buffers[0]
        wanted -= len(piece[-1])
    return piece
