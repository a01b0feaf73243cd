"""Throws noise and broken frames at a live server, before and after it has let the sender in.

The real frames are those of a real client, recorded through a proxy, so that this follows the protocol as it changes.
Each mutated frame goes on a connection of its own: the first one that is wrong ends it. Connections come from all over
127.0.0.0/8, or one that is shut out for its wrong tokens would hide what the others find.

`Findings` hold what was sent, how the server answered, and what it should not have done.
"""

from __future__ import annotations

import random
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgpack

from benchmarks.fault_plans import UP, Fault, Plan
from benchmarks.faulty_proxy import FaultyProxy
from benchmarks.mutations import MUTATIONS, RealFrame, prelude
from wire.errors import RemoteProtocolError
from wire.frames import Frame, FrameReader, Limits, encode_frame_head

PATIENCE_S = 20.0
_LIMITS = Limits(max_header=1 << 30, max_payload=1 << 40)
_GREETING = ("hello", "proof")
_HEARTBEATS = ("ping", "pong")
_NOISE_SIZES = (1, 23, 24, 25, 100, 1000, 10_000, 65_536)


@dataclass
class Findings:
    """What came of an attack.

    Attributes:
        noise_bytes: random bytes that were sent.
        frames: mutated frames that were sent.
        errors: codes of the errors that the server answered with, and how often; ``closed`` without one.
        hung: connections that the server did not end in time, by what was sent.
        refused: times the server let an honest beginning not through, by what it said.
    """

    noise_bytes: int = 0
    frames: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    hung: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def faults(self) -> list[str]:
        """What a server must not do."""
        untyped = (
            [f"{self.errors['internal_error']} internal errors"] if self.errors["internal_error"] else []
        )
        return untyped + [f"hung after {what}" for what in self.hung]


class Recorder(Plan):
    """Keeps what clients send, by connection."""

    def __init__(self) -> None:
        self.sent: dict[int, bytearray] = {}

    def look(self, connection: int, direction: str, data: bytes) -> Iterator[bytes | Fault]:
        """Pass all on."""
        if direction == UP:
            self.sent.setdefault(connection, bytearray()).extend(data)
        yield data


def record(server: str, train: Callable[[str], object]) -> list[RealFrame]:
    """Return all that a client sends on the connection that it trains on, heartbeats left out.

    Args:
        server: its address.
        train: runs a client against the address that it is given, for two steps or more.

    Raises:
        ValueError: no connection saw the beginning of a session and two of its steps.
    """
    plan = Recorder()
    with FaultyProxy(server, plan) as proxy:
        train(proxy.address)
    kinds = {}
    for connection, data in plan.sent.items():
        frames = [RealFrame(msgpack.unpackb(f.header), bytes(f.payload)) for f in read_frames(data)]
        kinds[connection] = [frame.kind for frame in frames]
        if "open" in kinds[connection] and kinds[connection].count("commit") > 1:
            return [frame for frame in frames if frame.kind not in _HEARTBEATS]
    raise ValueError(f"no whole session was recorded; there were {kinds}")


def read_frames(data: bytes | bytearray) -> Iterator[Frame]:
    """Yield the whole frames of a stream."""
    reader = FrameReader(_LIMITS)
    left = memoryview(data)
    while left:
        room = reader.next_buffer()
        count = min(len(room), len(left))
        room[:count] = left[:count]
        left = left[count:]
        reader.advance(count)
        while (frame := reader.next_frame()) is not None:
            yield frame


class Refused(Exception):
    """The server ended a connection that was honest so far."""


class Intruder:
    """A connection that begins as a real client's.

    Args:
        address: the server's.
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
        self._reader = FrameReader(_LIMITS)
        self._token, self._draw = token, draw
        self._hello = next(frame for frame in frames if frame.kind == "hello")
        self._open = next(frame for frame in frames if frame.kind == "open")

    def __enter__(self) -> Intruder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._draw.random() < 0.5:  # and by RST, which leaves no port waiting here
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def greet(self) -> None:
        """Come to the server's welcome."""
        self.socket.sendall(self._hello.encode())
        answer = self.receive("welcome", "challenge")
        if answer["kind"] == "challenge":
            self.socket.sendall(self.proof(answer).encode())
            self.receive("welcome")

    def proof(self, challenge: dict[str, Any]) -> RealFrame:
        """The answer to a challenge; a wrong one without the token."""
        from wire.auth import CLIENT_TOKEN, prove

        nonce = self._draw.randbytes(32)
        mac = prove(self._token or b"wrong", CLIENT_TOKEN, challenge["nonce"], nonce)
        return RealFrame({"kind": "proof", "nonce": nonce, "mac": mac}, b"")

    def open(self) -> None:
        """Come to a session of one's own, with the weights that it needs."""
        self.socket.sendall(self.own(self._open).encode())
        self.receive("ready")

    def play(self, frames: Sequence[RealFrame]) -> None:
        """Send frames of a session; each that has an answer waits for it."""
        for frame in frames:
            self.socket.sendall(frame.encode())
            if frame.kind in ("forward", "backward"):
                self.receive(frame.kind)

    def own(self, frame: RealFrame) -> RealFrame:
        """The frame for a session that no other has."""
        if "session" not in frame.header:
            return frame
        return frame._replace(header={**frame.header, "session": self._draw.randbytes(16)})

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

    def outcome(self, what: str, findings: Findings) -> None:
        """End sending, and note how the server ends the connection."""
        code = "closed"
        try:
            self.socket.shutdown(socket.SHUT_WR)
            while (header := self._next()) is not None:
                code = header["code"] if header["kind"] == "error" else code
        except TimeoutError:
            findings.hung.append(what)
        except OSError:
            pass
        findings.errors[code] += 1

    def _next(self) -> dict[str, Any] | None:
        while (frame := self._reader.next_frame()) is None:
            count = self.socket.recv_into(self._reader.next_buffer())
            if count == 0:
                return None
            self._reader.advance(count)
        header: dict[str, Any] = msgpack.unpackb(frame.header)
        return header


@dataclass
class Attack:
    """Noise and mutated frames for one server.

    Attributes:
        address: the server's.
        frames: of a real client, see `record`.
        seed: of all randomness.
        token: the server's, for what happens behind it; None where it has none.
        lanes: connections at once.
    """

    address: str
    frames: Sequence[RealFrame]
    seed: int = 0
    token: bytes | None = None
    lanes: int = 4
    findings: Findings = field(default_factory=Findings)

    def __post_init__(self) -> None:
        kinds = [frame.kind for frame in self.frames]
        after = self.frames[kinds.index("open") + 1 :]
        ends = [number for number, frame in enumerate(after) if frame.kind == "commit"][:2]
        self._session = after[: ends[-1] + 1]
        self._rest = [frame for frame in after if frame.kind not in ("weights", "bye")][:40]
        self._before = [frame for frame in self.frames if frame.kind in ("hello", "open")]

    def noise(self, nbytes: int) -> None:
        """Send so many random bytes, at all depths of the handshake and behind it."""
        draw = random.Random(f"noise {self.seed}")
        sizes = []
        while sum(sizes) < nbytes:
            sizes.append(draw.choice(_NOISE_SIZES))
        self._each(self._noise_once, [(draw.random(), size) for size in sizes])

    def mutate(self, frames: int) -> None:
        """Send so many mutated frames: every third in a session, the others before there is one."""
        draw = random.Random(f"mutate {self.seed}")
        self._each(self._mutate_once, [(draw.random(), number % 3 == 0) for number in range(frames)])

    def _each(self, once: Callable[[random.Random, int], None], turns: Sequence[tuple[float, int]]) -> None:
        with ThreadPoolExecutor(self.lanes) as pool:
            for _ in pool.map(lambda turn: self._quietly(once, *turn), turns):
                pass

    def _quietly(self, once: Callable[[random.Random, int], None], seed: float, what: int) -> None:
        try:
            once(random.Random(seed), what)
        except Refused as refused:
            self.findings.refused[str(refused)[:60]] += 1
        except TimeoutError:
            self.findings.hung.append(f"{once.__name__} {what}")
        except (OSError, RemoteProtocolError) as error:
            self.findings.errors[type(error).__name__] += 1

    def _noise_once(self, draw: random.Random, size: int) -> None:
        depth = draw.choice(["bare", "magic", "prelude", "hello", "welcomed", "open"])
        noise = draw.randbytes(size)
        with Intruder(self.address, self.frames, draw, self.token) as intruder:
            if depth == "hello":
                intruder.socket.sendall(self._before[0].encode())
            if depth in ("welcomed", "open"):
                intruder.greet()
            if depth == "open":
                intruder.open()
            start = {"magic": b"ISTH", "prelude": prelude(draw.randrange(4097), draw.randrange(2**16))}
            if depth in ("hello", "welcomed", "open") and draw.random() < 0.5:
                # A right frame with noise for a header: nothing else comes as far as that.
                noise = encode_frame_head(noise[: draw.randrange(1, 4000)], 0)
            intruder.socket.sendall(start.get(depth, b"") + noise)
            self.findings.noise_bytes += len(noise)
            intruder.outcome(f"noise, {depth}", self.findings)

    def _mutate_once(self, draw: random.Random, inside: int) -> None:
        mutation = draw.choice(MUTATIONS)
        with Intruder(self.address, self.frames, draw, self.token) as intruder:
            if not inside:
                real = draw.choice(self._before)
                if real.kind == "open":
                    intruder.greet()
                elif draw.random() < 0.3 and self.token is not None:
                    intruder.socket.sendall(self._before[0].encode())
                    real = intruder.proof(intruder.receive("challenge"))
                others: Sequence[RealFrame] = self.frames
            else:
                intruder.greet()
                intruder.open()
                place = draw.randrange(len(self._session))
                intruder.play(self._session[:place])
                real, others = self._session[place], self._rest
            intruder.socket.sendall(mutation(draw, intruder.own(real), others))
            self.findings.frames += 1
            if draw.random() < 0.3:  # what comes after it
                intruder.socket.sendall(draw.choice(others).encode())
            intruder.outcome(f"{mutation.__name__} of {real.kind}", self.findings)
