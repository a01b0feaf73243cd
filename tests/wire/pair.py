"""Two protocol ends joined by a link that is nothing but bytes, and one message of every kind."""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import msgpack

from wire.auth import REJOIN, prove
from wire.buffers import BufferPool
from wire.config import PROTOCOL_VERSIONS, WireConfig
from wire.frames import Frame, FrameReader, Limits, encode_frame_head
from wire.messages import (
    Abort,
    Backward,
    Begin,
    Bye,
    Challenge,
    Commit,
    Committed,
    Error,
    Fetch,
    Forward,
    Hello,
    Message,
    Open,
    Ping,
    Pong,
    Proof,
    Ready,
    Rejoin,
    Resume,
    Save,
    Saved,
    Weights,
    Welcome,
)
from wire.protocol import Phase, Protocol, Role
from wire.serialize import encode

TOKEN = b"sixteen bytes or more"
ROOMY = Limits(max_header=1 << 20, max_payload=1 << 30)

DESC = {"dtype": "float32", "shape": [2, 3], "order": "C", "size": 24}
PAYLOAD = bytes(range(24)) + bytes(40)

SAMPLES: dict[str, Message] = {
    message.kind: message
    for message in (
        Hello([3], "test/1", 1 << 20, 1 << 30),
        Challenge(bytes(range(32))),
        Proof(bytes(range(32, 64)), b"\xaa" * 32),
        Welcome(3, "test/1", 1 << 20, 1 << 30, bytes(range(64, 96)), None, 5.0, "cpu"),
        Open(b"0123456789abcdef", b"\x5e" * 32, {"model": {"name": "net"}, "cuts": ["a", "b"]}),
        Resume(b"0123456789abcdef", b"\xbb" * 32, 7, True, None, [4, 6]),
        Rejoin(3, 1 << 20, 1 << 30, b"0123456789abcdef", bytes(range(96, 128)), b"\xcc" * 32, 7, True, None),
        Ready(7, True, False, "cpu", "contiguous", bytes(range(128, 160)), None, {"torch": "2.11"}),
        Weights(0, True, ["w"], [DESC], PAYLOAD),
        Fetch("weights"),
        Begin(1, 2, False),
        Forward(1, 0, False, ["x"], [DESC], PAYLOAD),
        Backward(1, 1, ["x"], [DESC], 2.5, PAYLOAD),
        Commit(1, 0.5),
        Committed(1, {"busy_s": {"compute": 0.25}}),
        Abort(1, "the loss is nan"),
        Save(7, 4),
        Saved(7, ""),
        Ping(123),
        Pong(123, 456, 789),
        Error("bad_frame", "what was that?"),
        Bye("done"),
    )
}


def rejoin_of(session: bytes, secret: bytes, ticket: bytes) -> Rejoin:
    """What its owner rejoins a session with that has made no step."""
    nonce = os.urandom(32)
    mac = prove(secret, REJOIN, ticket, nonce, session)
    return Rejoin(PROTOCOL_VERSIONS[0], 1 << 20, 1 << 30, session, nonce, mac, 0, True, None)


def to_bytes(message: Message) -> bytes:
    """A message's whole frame, whatever phase it belongs to."""
    return joined(encode(message, ROOMY)[0])


def joined(buffers: Iterable[Any]) -> bytes:
    return b"".join(bytes(buffer) for buffer in buffers)


def frame(header: object, payload: bytes = b"") -> bytes:
    """A frame around any header."""
    return encode_frame_head(msgpack.packb(header), len(payload)) + payload


def as_sent(message: Message) -> dict[str, Any]:
    """A message's fields with the payload as bytes and sequences as lists, to compare what was sent with what came."""
    fields = {name: getattr(message, name) for name in message.__slots__}
    if "payload" in fields:
        payload = fields["payload"]
        fields["payload"] = joined(payload) if isinstance(payload, list | tuple) else bytes(payload)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    return {"kind": message.kind, **plain}


class CountingPool(BufferPool):
    """A pool that notes what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[int] = []

    def take(self, nbytes: int) -> memoryview:
        self.taken.append(nbytes)
        return super().take(nbytes)


def read_frames(reader: FrameReader, data: bytes, pieces: Iterable[int] = ()) -> list[Frame]:
    """Feed a stream in pieces of the given sizes, the rest as large as the reader takes."""
    frames: list[Frame] = []
    sizes = iter(pieces)
    unread = memoryview(data)
    while unread:
        buffer = reader.next_buffer()
        count = min(len(buffer), len(unread), next(sizes, len(unread)))
        buffer[:count] = unread[:count]
        reader.advance(count)
        unread = unread[count:]
        while (found := reader.next_frame()) is not None:
            frames.append(found)
    return frames


def feed(end: Protocol, data: bytes) -> list[Message]:
    """Let an end receive bytes; returns what its application sees."""
    messages: list[Message] = []
    unread = memoryview(data)
    while unread:
        buffer = end.next_buffer()
        count = min(len(buffer), len(unread))
        buffer[:count] = unread[:count]
        end.advance(count)
        unread = unread[count:]
        while (message := end.next_message()) is not None:
            messages.append(message)
    return messages


class ProtocolPair:
    """A client and a server, in memory.

    Attributes:
        now_ns: what both clocks show, but for `server_ahead_ns`.
    """

    def __init__(
        self,
        client: WireConfig | None = None,
        server: WireConfig | None = None,
        *,
        server_ahead_ns: int = 0,
    ) -> None:
        self.now_ns = 0
        self.client = Protocol(Role.CLIENT, client or WireConfig(), lambda: self.now_ns)
        self.server = Protocol(Role.SERVER, server or WireConfig(), lambda: self.now_ns + server_ahead_ns)

    def end(self, role: Role) -> Protocol:
        return self.client if role is Role.CLIENT else self.server

    def other(self, end: Protocol) -> Protocol:
        return self.server if end is self.client else self.client

    def send(self, end: Protocol, message: Message) -> list[Message]:
        """Send a message and let the other end receive it."""
        buffers, size = end.send(message)
        data = joined(buffers)
        assert len(data) == size
        return feed(self.other(end), data)

    def deliver_replies(self, *, delay_ns: int = 0) -> list[str]:
        """Deliver what the ends send of their own accord, until both are still; returns the kinds, in order."""
        kinds = []
        while replies := [(end, reply) for end in (self.client, self.server) for reply in end.take_replies()]:
            self.now_ns += delay_ns
            for end, reply in replies:
                kinds.append(reply.kind)
                self.send(end, reply)
        return kinds

    def _send_next_reply(self) -> None:
        for end in (self.server, self.client):
            for reply in end.take_replies():
                self.send(end, reply)
                return

    def bring_to(self, phase: Phase) -> "ProtocolPair":
        """Bring both ends to a phase; with a token if it is one of proving that it is known."""
        proved = [Phase.CHALLENGED, Phase.PROVED] if phase in (Phase.CHALLENGED, Phase.PROVED) else []
        if proved:
            configs = [replace(end.config, token=TOKEN) for end in (self.client, self.server)]
            self.__init__(*configs)  # type: ignore[misc]
        self.server.greeting.redeem = lambda message: True
        if phase in (Phase.START, Phase.REJOINING):
            self.client.take_replies()
        if phase is Phase.REJOINING:
            self.client.rejoin(SAMPLES["rejoin"], SAMPLES["welcome"])  # type: ignore[arg-type]
            self._send_next_reply()
            assert self.client.phase is self.server.phase is phase
            return self
        steps: list[tuple[Phase, Callable[[], object]]] = [
            (Phase.START, lambda: None),
            (Phase.GREETED, lambda: self.send(self.client, *self.client.take_replies())),
            *((step, self._send_next_reply) for step in proved),
            (Phase.WELCOMED, self._send_next_reply),
            (Phase.OPENING, lambda: self.send(self.client, SAMPLES["open"])),
            (Phase.RUNNING, lambda: self.send(self.server, SAMPLES["ready"])),
            (Phase.CLOSED, lambda: self.send(self.client, SAMPLES["bye"])),
        ]
        for reached, step in steps:
            step()
            if reached is phase:
                break
        assert self.client.phase is self.server.phase is phase
        return self
