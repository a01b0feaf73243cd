"""What the sans-I/O files want of an event loop: byte streams, timers and something to wait on.

asyncio's transports, timer handles and futures are such, and the tests have simpler ones.
"""

from __future__ import annotations

from collections.abc import Generator
from socket import socket
from typing import Any, Protocol

__all__ = ["Dialer", "Stream", "Timer", "Waiter", "wake"]


class Stream(Protocol):
    """A byte stream that buffers what it cannot send; asyncio's transports are such."""

    def write(self, data: memoryview, /) -> None: ...  # noqa: D102
    def writelines(self, buffers: list[Any], /) -> None: ...  # noqa: D102
    def write_eof(self) -> None: ...  # noqa: D102
    def get_write_buffer_size(self) -> int: ...  # noqa: D102
    def pause_reading(self) -> None: ...  # noqa: D102
    def resume_reading(self) -> None: ...  # noqa: D102
    def is_closing(self) -> bool: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102
    def abort(self) -> None: ...  # noqa: D102


class Timer(Protocol):
    """A call that is due at some time."""

    def cancel(self) -> None:
        """Make sure that it does not happen."""


class Dialer(Protocol):
    """Looks up and connects without blocking."""

    async def getaddrinfo(self, host: str, port: int, *, type: int) -> list[Any]: ...  # noqa: D102
    async def sock_connect(self, sock: socket, address: Any) -> None: ...  # noqa: D102
    async def sock_sendall(self, sock: socket, data: bytes) -> None: ...  # noqa: D102
    async def sock_recv(self, sock: socket, nbytes: int) -> bytes: ...  # noqa: D102


class Waiter(Protocol):
    """What an event loop gives those who wait; asyncio's futures are such."""

    def done(self) -> bool:
        """Whether it was woken or cancelled."""

    def set_result(self, result: None, /) -> None:
        """Wake whoever waits."""

    def __await__(self) -> Generator[Any, None, None]:
        """Wait."""


def wake(waiter: Waiter | None) -> None:
    """Wake whoever waits on a waiter, if somebody does."""
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
