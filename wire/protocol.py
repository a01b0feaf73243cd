"""One end of a connection, without the connection: bytes in, messages out, messages in, bytes out.

Two rules hold:

1. Both ends share one phase. A message moves it as TRANSITIONS says; what is not in the table is a
   `LocalProtocolError` when we send it and a `RemoteProtocolError` when the peer does.
2. `ping` and `pong` may come at any time after the handshake; `error` and `bye` may come at any time and are
   the last message of their sender.

The greeting (`wire.greeting`), ping and pong are dealt with here; what the application sees are the other
messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum

from wire.buffers import BufferPool
from wire.clock import ClockEstimate
from wire.config import WireConfig
from wire.errors import (
    ConnectionLost,
    ForeignProtocol,
    LocalProtocolError,
    PeerError,
    RemoteProtocolError,
    WireError,
)
from wire.frames import HANDSHAKE_LIMITS, FrameReader, Limits
from wire.greeting import Greeting
from wire.messages import Buffer, Challenge, Error, Hello, Message, Ping, Pong, Proof, Rejoin, Welcome
from wire.serialize import decode, encode

__all__ = ["TRANSITIONS", "Phase", "Protocol", "Role"]


class Role(Enum):
    """Which end this is."""

    CLIENT = "client"
    SERVER = "server"


class Phase(Enum):
    """How far the two ends have come."""

    START = "start"
    GREETED = "greeted"
    CHALLENGED = "challenged"
    PROVED = "proved"
    WELCOMED = "welcomed"
    OPENING = "opening"
    REJOINING = "rejoining"
    RUNNING = "running"
    CLOSED = "closed"


_UP = ("weights", "fetch", "begin", "forward", "backward", "commit", "abort", "save")
_DOWN = ("weights", "forward", "backward", "committed", "abort", "saved")

TRANSITIONS: dict[Phase, dict[Role, dict[str, Phase]]] = {
    Phase.START: {Role.CLIENT: {"hello": Phase.GREETED, "rejoin": Phase.REJOINING}, Role.SERVER: {}},
    Phase.GREETED: {
        Role.CLIENT: {},
        Role.SERVER: {"challenge": Phase.CHALLENGED, "welcome": Phase.WELCOMED},
    },
    Phase.CHALLENGED: {Role.CLIENT: {"proof": Phase.PROVED}, Role.SERVER: {}},
    Phase.PROVED: {Role.CLIENT: {}, Role.SERVER: {"welcome": Phase.WELCOMED}},
    Phase.WELCOMED: {Role.CLIENT: {"open": Phase.OPENING, "resume": Phase.OPENING}, Role.SERVER: {}},
    Phase.OPENING: {Role.CLIENT: {}, Role.SERVER: {"ready": Phase.RUNNING}},
    Phase.REJOINING: {
        Role.CLIENT: dict.fromkeys(_UP, Phase.REJOINING),
        Role.SERVER: {"ready": Phase.RUNNING},
    },
    Phase.RUNNING: {
        Role.CLIENT: dict.fromkeys(_UP, Phase.RUNNING),
        Role.SERVER: dict.fromkeys(_DOWN, Phase.RUNNING),
    },
    Phase.CLOSED: {Role.CLIENT: {}, Role.SERVER: {}},
}
"""Phase, who sends, what it sends: the next phase."""
_ESTABLISHED = frozenset({Phase.WELCOMED, Phase.OPENING, Phase.REJOINING, Phase.RUNNING})
for _phase, _rows in TRANSITIONS.items():
    for _row in _rows.values():
        if _phase in _ESTABLISHED:
            _row["ping"] = _row["pong"] = _phase
        if _phase is not Phase.CLOSED:
            _row["error"] = _row["bye"] = Phase.CLOSED

_FIRST_PINGS = 8  # sent one after another at the start, for a good clock estimate


class Protocol:
    """One end of a connection.

    Receive into `next_buffer`, call `advance`, then `next_message` until it returns None. Send what
    `take_replies` returns after that, and after `heartbeat`.

    Args:
        role: which end this is.
        config: settings.
        clock_ns: a monotonic clock in nanoseconds.

    Attributes:
        phase: how far the two ends have come.
        hello: what the client said first; None before it did.
        welcome: what the server said, at an earlier time to a client that rejoins; None before it did.
        greeting: answers what comes before the welcome, and the welcome.
        clock: round-trip time and offset of the peer's clock.
        received_bytes: bytes that came in so far, headers included.
        heartbeat_bytes: those of them that were pings and pongs.
        replies: what is to be sent without the application's doing; `take_replies` empties it.
    """

    def __init__(
        self, role: Role, config: WireConfig, clock_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.role = role
        self.peer_role = Role.SERVER if role is Role.CLIENT else Role.CLIENT
        self.config = config
        self._move(Phase.START)
        self.hello: Hello | Rejoin | None = None
        self.welcome: Welcome | None = None
        self.greeting = Greeting(config)
        self.clock = ClockEstimate()
        self.received_bytes = self.heartbeat_bytes = 0
        self._clock_ns = clock_ns
        self._heard_ns = clock_ns()
        self._reader = FrameReader(HANDSHAKE_LIMITS, BufferPool(config.allocate))
        self._peer_limits = HANDSHAKE_LIMITS
        self.replies: list[Message] = [self.greeting.hello()] if role is Role.CLIENT else []
        self._discarded: memoryview | None = None

    @property
    def established(self) -> bool:
        """Both ends have said hello, or the client has said rejoin, and nobody has said bye."""
        return self.phase in _ESTABLISHED

    @property
    def heartbeat_s(self) -> float:
        """Seconds between two pings."""
        return self.welcome.heartbeat_s if self.welcome else self.config.heartbeat_s

    @property
    def timeout_s(self) -> float:
        """Seconds of silence after which the peer counts as lost."""
        timeout_s = self.config.timeout_s if self.config.timeout_s is not None else 3 * self.heartbeat_s
        if self.role is Role.CLIENT and self.phase is Phase.REJOINING and not self.received_bytes:
            return min(timeout_s, self.config.handshake_s)  # nobody has answered yet
        return timeout_s if self.established else self.config.handshake_s

    @property
    def arriving(self) -> bool:
        """A frame has begun to come and is not complete."""
        return self.phase is not Phase.CLOSED and self._reader.mid_frame

    @property
    def missing(self) -> int:
        """Bytes that have still to come of the payload that is arriving; 0 where none is."""
        return 0 if self.phase is Phase.CLOSED else self._reader.missing

    def rejoin(self, message: Rejoin, welcome: Welcome) -> None:
        """Begin, as a client, with this message instead of a hello; `welcome` came on an earlier connection."""
        self.replies, self.welcome = [message], welcome

    def send(self, message: Message) -> tuple[list[Buffer], int]:
        """Return the buffers to send for a message, and their size in bytes.

        Raises:
            LocalProtocolError: the message is not allowed now, is malformed, or too large for the peer.
        """
        phase = self._may_send.get(message.kind)
        if phase is None:
            raise LocalProtocolError(
                f"the {self.role.value} cannot send {message.kind} in phase {self.phase.value}"
            )
        encoded = encode(message, self._peer_limits)
        self._enter(phase, message)
        return encoded

    def take_replies(self) -> list[Message]:
        """Return what has to be sent in answer to what was received, at once."""
        replies, self.replies = self.replies, []
        return replies

    def next_buffer(self) -> memoryview:
        """Return the memory that the next bytes belong into; never empty."""
        if self.phase is Phase.CLOSED:
            # Nobody waits for these bytes any more; they are read so that the peer's end closes cleanly.
            if self._discarded is None:
                self._discarded = memoryview(bytearray(65_536))
            return self._discarded
        return self._reader.next_buffer()

    def advance(self, nbytes: int) -> None:
        """Take `nbytes` that were received into `next_buffer`."""
        self.received_bytes += nbytes
        self._heard_ns = self._clock_ns()
        if self.phase is not Phase.CLOSED:
            self._reader.advance(nbytes)

    def next_message(self) -> Message | None:
        """Return the next message for the application, or None where more bytes are needed.

        Raises:
            RemoteProtocolError: the peer broke the protocol.
            PeerError: the peer reports an error.
        """
        while self.phase is not Phase.CLOSED and (frame := self._reader.next_frame()) is not None:
            message = decode(frame, self._check_kind)
            phase = self._may_receive[message.kind]
            if type(message) in (Ping, Pong):
                self.heartbeat_bytes += frame.size
            self._enter(phase, message)
            if not self._answer(message):
                return message
        return None

    def receive_eof(self) -> ConnectionLost:
        """Say what it means that the peer sends nothing more."""
        if self.phase is Phase.CLOSED:
            return ConnectionLost("the connection was closed")
        if self._reader.mid_frame:
            return ConnectionLost(f"the peer went away in the middle of a frame: {self._reader.progress}")
        return ConnectionLost("the peer went away without saying bye")

    def fail(self, error: WireError) -> list[Buffer]:
        """End the connection for an error; return the frame that tells the peer, empty where it is no use."""
        closed = self.phase is Phase.CLOSED
        self._move(Phase.CLOSED)
        if closed or isinstance(error, ForeignProtocol) or not isinstance(error, RemoteProtocolError):
            return []
        return encode(Error(error.code, str(error)[:512]), HANDSHAKE_LIMITS)[0]

    def heartbeat(self, *, listening: bool = True) -> None:
        """Put a ping among the replies, unless the peer has been silent for too long.

        Call it every `heartbeat_s` seconds.

        Args:
            listening: False while this end does not read, so that silence says nothing about the peer.

        Raises:
            ConnectionLost: nothing was received for `timeout_s`.
        """
        now_ns = self._clock_ns()
        if not listening:
            self._heard_ns = now_ns
        silent_s = (now_ns - self._heard_ns) / 1e9
        if silent_s >= self.timeout_s:
            raise ConnectionLost(f"nothing came from the peer for {silent_s:.1f} s")
        if self.established:
            self.replies.append(Ping(now_ns))

    def _check_kind(self, kind: str) -> None:
        if kind not in self._may_receive:
            raise RemoteProtocolError(f"the {self.peer_role.value} sent {kind} in phase {self.phase.value}")

    def _move(self, phase: Phase) -> None:
        self.phase = phase
        self._may_send = TRANSITIONS[phase][self.role]
        self._may_receive = TRANSITIONS[phase][self.peer_role]

    def _enter(self, phase: Phase, message: Message) -> None:
        """Move to the phase that a message, sent or received, leads to."""
        if phase is not self.phase:
            self._move(phase)
        if isinstance(message, (Hello, Rejoin)):
            self.hello = message
        elif isinstance(message, Welcome):
            self.welcome = message
        else:
            return
        if not isinstance(message, Hello):
            self._reader.limits = self.config.limits
        theirs = self.welcome if self.role is Role.CLIENT else self.hello
        if theirs is not None:
            self._peer_limits = Limits(theirs.max_header, theirs.max_payload)

    def _answer(self, message: Message) -> bool:
        """Deal with a message that the application does not see; False for the others."""
        match message:
            case Ping(t_ns):
                self.replies.append(Pong(t_ns, self._heard_ns, self._clock_ns()))
            case Pong(t_ns, received_ns, sent_ns):
                self.clock.add(t_ns, received_ns, sent_ns, self._heard_ns)
                if len(self.clock) < _FIRST_PINGS:
                    self.replies.append(Ping(self._clock_ns()))
            case Hello() | Challenge() | Proof() | Welcome():
                self.replies += self.greeting.answer(message)
            case Rejoin():
                self.greeting.admit(message)
                return False
            case Error(code, text):
                raise PeerError(code, text)
            case _:
                return False
        return True
