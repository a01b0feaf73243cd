"""A client that can leave the protocol at any point, and the frames of a real one that it is made of.

The real frames are recorded through a proxy, so that this follows the protocol as it changes.
"""

from __future__ import annotations

import random
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from benchmarks.fault_plans import UP, CutFrames, Fault, FrameCut, Plan
from benchmarks.faulty_proxy import FaultyProxy
from benchmarks.mutations import RealFrame
from wire.auth import CLIENT_TOKEN, REJOIN, RESUME, prove
from wire.config import DEFAULT_LIMITS
from wire.errors import RemoteProtocolError
from wire.frames import Frame, FrameReader, Limits
from wire.messages import Proof, Rejoin, Resume

PATIENCE_S = 20.0
HEARTBEATS = ("ping", "pong")
_LIMITS = Limits(max_header=1 << 30, max_payload=1 << 40)
_ANSWERS = {"forward": "forward", "backward": "backward", "commit": "committed"}


class Recorder(Plan):
    """Keeps what clients send, by connection.

    Args:
        plan: what else becomes of it.
    """

    def __init__(self, plan: Plan) -> None:
        self.sent: dict[int, bytearray] = {}
        self._plan = plan

    def look(self, connection: int, direction: str, data: bytes) -> Iterator[bytes | Fault]:
        """Keep what the plan passes on."""
        for part in self._plan.look(connection, direction, data):
            if direction == UP and isinstance(part, bytes):
                self.sent.setdefault(connection, bytearray()).extend(part)
            yield part

    def rest(self, connection: int, direction: str) -> bytes:
        """Return what the plan has held back."""
        return self._plan.rest(connection, direction)


def record(server: str, train: Callable[[str], object]) -> list[RealFrame]:
    """Return all that a client sends on the connection that it trains on, heartbeats left out.

    Args:
        server: its address.
        train: runs a client against the address that it is given, for two steps or more.

    Raises:
        ValueError: no connection saw the beginning of a session and two of its steps.
    """
    connections = _recorded(server, train, Plan())
    return [frame for frame in _whole_session(connections) if frame.kind not in HEARTBEATS]


def record_with_return(server: str, train: Callable[[str], object]) -> list[RealFrame]:
    """Return all that a client sends that loses its connection after three steps and comes back.

    Args:
        server: its address.
        train: runs a client against the address that it is given, for four steps or more.

    Returns:
        The frames of the connection that was lost, then those of the later ones. Of heartbeats, the first of a kind.

    Raises:
        ValueError: the session was not begun, not lost, or not taken up again.
    """
    connections = _recorded(server, train, CutFrames([FrameCut("commit", 1 << 30, skip=2)]))
    first = _whole_session(connections)
    later = [frame for frames in connections if frames is not first for frame in frames]
    if not any(frame.kind == "commit" for frame in later):
        raise ValueError("the client did not come back to its session")
    seen: Counter[str] = Counter()
    kept = []
    for frame in first + later:
        seen[frame.kind] += 1
        if frame.kind not in HEARTBEATS or seen[frame.kind] == 1:
            kept.append(frame)
    return kept


def _recorded(server: str, train: Callable[[str], object], plan: Plan) -> list[list[RealFrame]]:
    recorder = Recorder(plan)
    with FaultyProxy(server, recorder) as proxy:
        train(proxy.address)
    return [
        [RealFrame(msgpack.unpackb(frame.header), bytes(frame.payload)) for frame in read_frames(sent)]
        for sent in recorder.sent.values()
    ]


def _whole_session(connections: Sequence[list[RealFrame]]) -> list[RealFrame]:
    kinds = [[frame.kind for frame in frames] for frames in connections]
    for frames, seen in zip(connections, kinds, strict=True):
        if "open" in seen and seen.count("commit") > 1:
            return frames
    raise ValueError(f"no whole session was recorded; there were {kinds}")


def read_frames(data: bytes | bytearray, reader: FrameReader | None = None) -> Iterator[Frame]:
    """Yield the whole frames of a stream.

    Args:
        data: the stream.
        reader: what cuts it; one with wide limits where none is given.
    """
    reader = reader or FrameReader(_LIMITS)
    left = memoryview(data)
    while left:
        room = reader.next_buffer()
        count = min(len(room), len(left))
        room[:count] = left[:count]
        left = left[count:]
        reader.advance(count)
        while (frame := reader.next_frame()) is not None:
            yield frame


def is_unfinished(data: bytes) -> bool:
    """Whether a server that has received this waits for the rest of a frame."""
    reader = FrameReader(DEFAULT_LIMITS)
    try:
        for _ in read_frames(data, reader):
            pass
    except RemoteProtocolError:
        return False
    return reader.mid_frame


class Refused(Exception):
    """The server ended a connection that was honest so far."""


@dataclass
class Held:
    """A session of the intruder's own on the server, to come back to.

    Attributes:
        key: its id.
        secret: what resuming takes.
        step: the last one that both ends have concluded for sure.
        needs_weights: it has none yet, and can begin no step.
        ticket: what rejoining takes.
    """

    key: bytes
    secret: bytes
    step: int
    needs_weights: bool
    ticket: bytes


class Intruder:
    """A connection that begins as a real client's.

    Args:
        address: the server's. Connections to 127.0.0.0/8 come from all over it, or one that is shut out for its
            wrong tokens would hide what the others find.
        frames: what a real client sends.
        draw: randomness.
        token: what the server wants to be proved; None where it asks for nothing.
    """

    def __init__(
        self, address: str, frames: Sequence[RealFrame], draw: random.Random, token: bytes | None = None
    ) -> None:
        host, _, port = address.rpartition(":")
        source = f"127.{draw.randint(1, 254)}.{draw.randint(0, 254)}.{draw.randint(1, 254)}"
        local = host.startswith("127.")
        self.socket = socket.create_connection(
            (host, int(port)), PATIENCE_S, source_address=(source, 0) if local else None
        )
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = FrameReader(_LIMITS)
        self._token, self._draw = token, draw
        self._hello = next(frame for frame in frames if frame.kind == "hello")
        self._open = next(frame for frame in frames if frame.kind == "open")
        self._nonce = b""

    def __enter__(self) -> Intruder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._draw.random() < 0.5:  # and by RST, which leaves no port waiting here
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def send(self, frame: RealFrame) -> None:
        """Send a frame."""
        self.socket.sendall(frame.encode())

    def challenge(self) -> RealFrame:
        """Come to the server's challenge; return the proof that answers it."""
        self.send(self._hello)
        return self.proof(self.receive("challenge"))

    def greet(self) -> None:
        """Come to the server's welcome."""
        self.send(self._hello)
        answer = self.receive("welcome", "challenge")
        if answer["kind"] == "challenge":
            self.send(self.proof(answer))
            answer = self.receive("welcome")
        self._nonce = answer["nonce"]

    def proof(self, challenge: dict[str, Any]) -> RealFrame:
        """The answer to a challenge; a wrong one without the token."""
        nonce = self._draw.randbytes(32)
        mac = prove(self._token or b"wrong", CLIENT_TOKEN, challenge["nonce"], nonce)
        return RealFrame.of(Proof(nonce, mac))

    def opening(self) -> RealFrame:
        """What opens a session that no other has."""
        own = {"session": self._draw.randbytes(16), "secret": self._draw.randbytes(32)}
        return self._open._replace(header={**self._open.header, **own})

    def open(self) -> Held:
        """Come to a session of one's own."""
        opening = self.opening()
        self.send(opening)
        ready = self.receive("ready")
        key, secret = opening.header["session"], opening.header["secret"]
        return Held(key, secret, ready["step"], ready["need_weights"], ready["ticket"])

    def resumption(self, held: Held) -> RealFrame:
        """What resumes a session, as a client that has dropped the step which may have been under way.

        Whether the server has concluded that step, or knows of none, it can go on after it.
        """
        mac = prove(held.secret, RESUME, self._nonce, held.key)
        step = held.step + (not held.needs_weights)
        return RealFrame.of(Resume(held.key, mac, step, applied=False, scale=None, saved=[]))

    def resume(self, held: Held) -> None:
        """Come to a session again."""
        self.send(self.resumption(held))
        ready = self.receive("ready")
        held.step, held.needs_weights, held.ticket = ready["step"], ready["need_weights"], ready["ticket"]

    def rejoining(self, held: Held) -> RealFrame:
        """What rejoins a session in place of `greet` and `resume`, right after `ready` told its step."""
        nonce = self._draw.randbytes(32)
        mac = prove(held.secret, REJOIN, held.ticket, nonce, held.key)
        own = {"session": held.key, "nonce": nonce, "mac": mac}
        limits = {"max_header": DEFAULT_LIMITS.max_header, "max_payload": DEFAULT_LIMITS.max_payload}
        version = self._hello.header["versions"][0]
        return RealFrame.of(
            Rejoin(version=version, **limits, **own, step=held.step, applied=True, scale=None)
        )

    def play(self, frames: Sequence[RealFrame]) -> None:
        """Send frames of a session; each that has an answer waits for it."""
        for frame in frames:
            self.send(frame)
            if frame.kind in _ANSWERS:
                self.receive(_ANSWERS[frame.kind])

    def receive(self, *kinds: str) -> dict[str, Any]:
        """The header of the next frame of one of these kinds.

        Raises:
            Refused: an error or the end came first.
        """
        while (header := self._next()) is not None and header["kind"] not in kinds:
            if header["kind"] in ("error", "bye"):
                raise Refused(str(header.get("message", header.get("reason"))))
        if header is None:
            raise Refused("closed")
        return header

    def outcome(self, data: bytes, *, waits: bool = False) -> str | None:
        """Send the last bytes, and see how the server ends the connection.

        Args:
            data: bytes.
            waits: let the server end it by itself, which it then has to; else this end sends no more.

        Returns:
            The code of the error that it answers; ``closed`` where it closes once it has read everything; None where
            it drops the connection, so that nobody knows what it has read.

        Raises:
            TimeoutError: it does not end the connection.
        """
        code = None
        try:
            self.socket.sendall(data)
            if not waits:
                self.socket.shutdown(socket.SHUT_WR)
        except TimeoutError:
            raise
        except OSError:  # it has had enough before the end; what it says of that is still to be read
            pass
        try:
            while (header := self._next()) is not None:
                code = header["code"] if header["kind"] == "error" else code
        except TimeoutError:
            raise
        except OSError:
            return code
        return code or "closed"

    def _next(self) -> dict[str, Any] | None:
        while (frame := self._reader.next_frame()) is None:
            count = self.socket.recv_into(self._reader.next_buffer())
            if count == 0:
                return None
            self._reader.advance(count)
        header: dict[str, Any] = msgpack.unpackb(frame.header)
        return header
