"""What waits to be sent, the most urgent first.

Heartbeats, errors and aborts go before everything else. The messages that order the others (open, begin,
commit and the like) keep their place: nothing passes them in either direction. Between two of those,
backward frames go before forward frames, for they free memory and finish the step, and weights go last.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Generator, Iterator
from itertools import count
from typing import Any

from wire.errors import WireError
from wire.loop import Waiter, wake
from wire.messages import Buffer

__all__ = ["Outbox", "SendReceipt"]

_URGENT = frozenset({"ping", "pong", "error", "abort"})
_RANKS = {"backward": 1, "forward": 2, "weights": 3}


class SendReceipt:
    """What became of a sent message. Awaiting it waits until the kernel has the whole frame, and returns it.

    Attributes:
        size: bytes of the frame.
        start_ns: monotonic time at which its first byte was offered to the kernel; None before.
        end_ns: monotonic time at which the kernel had all of it; None before.
        buffers: the frame; empty once it is sent.
    """

    __slots__ = ("_error", "_new_waiter", "_waiters", "buffers", "end_ns", "size", "start_ns")

    def __init__(self, buffers: list[Buffer], size: int, new_waiter: Callable[[], Waiter]) -> None:
        self.buffers = buffers
        self.size = size
        self.start_ns: int | None = None
        self.end_ns: int | None = None
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
        urgent: how many urgent messages wait.
    """

    def __init__(self) -> None:
        # Compared by era (the ordering messages so far; -1 for what is urgent), then rank, then age.
        self._heap: list[tuple[int, int, int, SendReceipt]] = []
        self._numbers = count()
        self._era = 0
        self.urgent = 0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def ordinary(self) -> int:
        """How many messages wait that are not urgent."""
        return len(self._heap) - self.urgent

    def push(self, kind: str, receipt: SendReceipt) -> None:
        """Add the frame of a message of this kind."""
        rank = _RANKS.get(kind)
        if rank is not None:
            era = self._era
        elif kind in _URGENT:
            era, rank = -1, 0
            self.urgent += 1
        else:
            era, rank = self._era + 1, 0
            self._era += 2
        heapq.heappush(self._heap, (era, rank, next(self._numbers), receipt))

    def pop(self) -> SendReceipt:
        """Remove and return what is to be sent next; IndexError where nothing waits."""
        era, _, _, receipt = heapq.heappop(self._heap)
        if era < 0:
            self.urgent -= 1
        return receipt

    def drain(self) -> Iterator[SendReceipt]:
        """Remove and yield everything."""
        while self._heap:
            yield self.pop()
