"""A client of a service in this process: a connection without a socket, which says what a test wants said."""

import asyncio
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from wire.auth import RESUME, prove
from wire.errors import ConnectionLost
from wire.messages import Message, Open, Resume


@dataclass
class Receipt:
    """Of a message that was sent."""

    left: asyncio.Event
    size: int = 0
    busy_ns: int = 0
    start_ns: int | None = None
    end_ns: int | None = None

    def __await__(self) -> Any:
        yield from self.left.wait().__await__()
        return self


class Client:
    """One connection, as a service sees it.

    Attributes:
        sent: what the service has said.
        reads: set while the client takes what is sent.
        busy: whether a message is on its way.
        ended: why the service ended the connection; None while it has not.
    """

    peer = "test"
    received_bytes = sent_bytes = 0
    bytes_per_s = None

    def __init__(self, key: bytes | None = None, secret: bytes | None = None) -> None:
        self.key, self.secret = key or os.urandom(16), secret or os.urandom(32)
        self.welcome = SimpleNamespace(nonce=os.urandom(32))
        self.sent: list[Message] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.busy = False
        self.ended: str | None = None
        self._came = asyncio.Event()
        self._said: asyncio.Queue[Message | None] = asyncio.Queue()

    def say(self, *messages: Message | None) -> None:
        for message in messages:
            self._said.put_nowait(message)

    def opens(self, spec: Any) -> None:
        self.say(Open(self.key, self.secret, spec.to_map()))

    def resumes(self, step: int | None, *saved: int, applied: bool = True) -> None:
        mac = prove(self.secret, RESUME, self.welcome.nonce, self.key)
        self.say(Resume(self.key, mac, step, applied, None, saved))

    async def until(self, kind: type[Message], count: int = 1) -> Any:
        """The message of a kind that comes next, or as the count says."""
        async with asyncio.timeout(30):
            while len(found := [message for message in self.sent if isinstance(message, kind)]) < count:
                self._came.clear()
                await self._came.wait()
        return found[count - 1]

    async def receive(self) -> Message:
        message = await self._said.get()
        if message is None:
            self.say(None)
            raise ConnectionLost("gone")
        return message

    async def send(self, message: Message) -> Receipt:
        if self.ended is not None:
            raise ConnectionLost("gone")
        self.sent.append(message)
        self._came.set()
        return Receipt(self.reads)

    def abort(self) -> None:
        self.ended = "aborted"
        self.say(None)

    async def close(self, reason: str = "done") -> None:
        self.ended = reason
