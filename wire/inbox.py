"""What has been received and not yet taken: bounded, because the stream is not read while it is full.

Nor is it for a while after it has brought little, see `wire.rest`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from wire.errors import LocalProtocolError
from wire.loop import Stream, Timer, Waiter, wake
from wire.messages import Message
from wire.rest import Rest

__all__ = ["Inbox"]


class Inbox:
    """A queue of messages.

    Args:
        most: how many may wait; the stream is read again once half of them are taken.
        new_waiter: makes something to wait on.
        call_later: calls a function after so many seconds.

    Attributes:
        messages: those that wait, the oldest first.
        full: reading stopped, because too many wait.
        closed: no more come.
    """

    def __init__(
        self,
        most: int,
        new_waiter: Callable[[], Waiter],
        call_later: Callable[[float, Callable[[], None]], Timer],
    ) -> None:
        self.messages: deque[Message] = deque()
        self.full = self.closed = False
        self._most = most
        self._new_waiter = new_waiter
        self._call_later = call_later
        self._rest = Rest()
        self._resting = False
        self._receiver: Waiter | None = None

    async def arrival(self) -> None:
        """Wait until a message has come, or no more come.

        Raises:
            LocalProtocolError: somebody waits already.
        """
        if self._receiver is not None:
            raise LocalProtocolError("only one receive() at a time can wait on a connection")
        while not self.messages and not self.closed:
            self._receiver = self._new_waiter()
            try:
                await self._receiver
            finally:
                self._receiver = None

    def take(self, stream: Stream) -> Message:
        """Remove and return the oldest message; IndexError where there is none."""
        message = self.messages.popleft()
        if 2 * len(self.messages) <= self._most:
            self._resume(stream)
        return message

    def arrived(self, stream: Stream, nbytes: int, missing: int) -> None:
        """Wake whoever waits for a message, and stop reading where too many wait, or for a while.

        Args:
            stream: what they come from.
            nbytes: how many bytes came just now.
            missing: how many of a payload are still to come.
        """
        reading = not (self.full or self._resting)
        if self.messages:
            wake(self._receiver)
            self.full |= len(self.messages) >= self._most and not self.closed
        rest_s = self._rest.after(nbytes, missing)
        if rest_s and reading and not self.closed:
            self._resting = True
            self._call_later(rest_s, lambda: self._rested(stream))
        if reading and (self.full or self._resting):
            stream.pause_reading()

    def close(self) -> None:
        """No more come; those that wait may still be taken."""
        self.closed = True
        wake(self._receiver)

    def clear(self, stream: Stream) -> None:
        """Forget what waits, and read on."""
        self.messages.clear()
        self._resume(stream)

    def _rested(self, stream: Stream) -> None:
        self._resting = False
        self._read_on(stream)

    def _resume(self, stream: Stream) -> None:
        if self.full and not stream.is_closing():
            self.full = False
            self._read_on(stream)

    def _read_on(self, stream: Stream) -> None:
        if not (self.full or self._resting or stream.is_closing()):
            stream.resume_reading()
