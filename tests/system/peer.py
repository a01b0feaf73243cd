"""A client written by hand over a plain socket, which says whatever a test wants said."""

import os
import select
import socket
import time
from collections import deque
from typing import Any

import msgpack

from tests.system.processes import PATIENCE_S
from wire.frames import FrameReader, Limits, encode_frame_head
from wire.messages import Error, Forward, Message, Open, Ping, Pong, Ready, Welcome
from wire.serialize import decode, encode

HELLO = {"kind": "hello", "versions": [3], "software": "test", "max_header": 1 << 20, "max_payload": 1 << 30}
_LIMITS = Limits(max_header=1 << 30, max_payload=1 << 40)


class Hung(Exception):
    """The other end takes nothing more."""


class Peer:
    """One connection.

    Attributes:
        welcome: what the server said of itself, after `greet`.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
        self._reader = FrameReader(_LIMITS)
        self._received: deque[Message] = deque()
        self.welcome: Welcome

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    def greet(self) -> Welcome:
        self.send_bytes(encode_frame_head(msgpack.packb(HELLO), 0))
        welcome = self.receive()
        assert isinstance(welcome, Welcome), welcome
        self.welcome = welcome
        return welcome

    def open(self, spec: dict[str, Any]) -> Ready:
        self.send(Open(os.urandom(16), os.urandom(32), spec))
        ready = self.receive()
        assert isinstance(ready, Ready), ready
        return ready

    def send(self, message: Message, *, within_s: float = PATIENCE_S) -> None:
        """Send a message; `Hung` if the other end does not take it in time, `ConnectionError` if it has gone."""
        buffers, _ = encode(message, _LIMITS)
        self.send_bytes(b"".join(bytes(buffer) for buffer in buffers), within_s=within_s)

    def send_unchecked(self, message: Forward) -> None:
        """Send a message whose descriptions need not fit its payload."""
        header = {"kind": message.kind, **{name: getattr(message, name) for name in message.__slots__}}
        payload = b"".join(bytes(buffer) for buffer in header.pop("payload"))
        self.send_bytes(encode_frame_head(msgpack.packb(header), len(payload)) + payload)

    def send_bytes(self, data: bytes, *, within_s: float = PATIENCE_S) -> None:
        unsent = memoryview(data)
        deadline = time.monotonic() + within_s
        while unsent:
            _, writable, _ = select.select([], [self._socket], [], max(0.0, deadline - time.monotonic()))
            if not writable:
                raise Hung
            self._socket.setblocking(False)
            try:
                unsent = unsent[self._socket.send(unsent) :]
            except BlockingIOError:
                continue
            finally:
                self._socket.settimeout(PATIENCE_S)

    def end_sending(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def receive(self) -> Message | None:
        """The next message that is no heartbeat, which is answered; None at the end."""
        while True:
            while (frame := self._reader.next_frame()) is not None:
                message = decode(frame)
                if isinstance(message, Ping):
                    self.send(Pong(message.t_ns, time.monotonic_ns(), time.monotonic_ns()))
                elif not isinstance(message, Pong):
                    return message
            try:
                count = self._socket.recv_into(self._reader.next_buffer())
            except ConnectionResetError:
                return None
            if count == 0:
                return None
            self._reader.advance(count)

    def error(self) -> Error:
        """The error that ends the connection, past results that were under way."""
        while not isinstance(message := self.receive(), Error):
            assert isinstance(message, Forward), f"{message} came, and no error"
        return message

    def drain(self) -> None:
        """Read to the end."""
        while self.receive() is not None:
            pass
