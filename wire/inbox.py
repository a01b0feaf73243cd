"""What has been received and not yet taken: bounded, because the stream is not read while it is full."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from wire.errors import LocalProtocolError
from wire.loop import Stream, Waiter, wake
from wire.messages import Message

__all__ = ["Inbox"]


class Inbox:
    """A queue of messages.

    Args:
        most: how many may wait; the stream is read again once half of them are taken.
        new_waiter: makes something to wait on.

    Attributes:
        messages: those that wait, the oldest first.
        full: reading stopped, because too many wait.
        closed: no more come.
    """

    def __init__(self, most: int, new_waiter: Callable[[], Waiter]) -> None:
        self.messages: deque[Message] = deque()
        self.full = self.closed = False
        self._most = most
        self._new_waiter = new_waiter
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

    def arrived(self, stream: Stream) -> None:
        """Wake whoever waits for a message, and stop reading where too many wait."""
        if self.messages:
            wake(self._receiver)
            if len(self.messages) >= self._most and not self.closed:
                self.full = True
                stream.pause_reading()

    def close(self) -> None:
        """No more come; those that wait may still be taken."""
        self.closed = True
        wake(self._receiver)

    def clear(self, stream: Stream) -> None:
        """Forget what waits, and read on."""
        self.messages.clear()
        self._resume(stream)

    def _resume(self, stream: Stream) -> None:
        if self.full and not stream.is_closing():
            self.full = False
            stream.resume_reading()
