"""Throws noise and broken frames at a live server, before and after it has let the sender in.

Each mutated frame is a real client's in the phase of the protocol in which it may come, and goes on a connection of
its own that was honest so far: the first one that is wrong ends it. Several lanes do that at once. Building a model
takes longer than everything else, so each lane has sessions that it comes back to, as a client does that has lost
its connection, and opens another only where the server does not go on with one.

What counts as sent is what the server has read: it answered with an error, or closed after everything that came.
What came to nothing is tried again, and listed.

`Findings` hold what was sent, how the server answered, and what it should not have done.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields

from benchmarks.intruder import Held, Intruder, Refused, is_unfinished
from benchmarks.mutations import MUTATIONS, RealFrame, prelude
from wire.config import PROTOCOL_VERSIONS
from wire.errors import RemoteProtocolError
from wire.frames import encode_frame_head
from wire.messages import Abort, Error, Fetch, Rejoin, Resume
from wire.protocol import TRANSITIONS, Phase, Role

_NOISE_SIZES = (1, 23, 24, 25, 100, 1000, 10_000, 65_536)
_INSIDE = (Phase.REJOINING, Phase.RUNNING)  # a session
_ANY_TIME = ("ping", "pong", "error", "bye")
_MADE = (
    Abort(step=1, reason="not finite"),
    Error("failed", "no reason"),
    Resume(bytes(16), bytes(32), step=1, applied=True, scale=None, saved=[]),
    Rejoin(PROTOCOL_VERSIONS[0], 4096, 0, bytes(16), bytes(32), bytes(32), step=1, applied=True, scale=None),
)
"""Right messages of kinds that the client which was recorded need not have sent."""


@dataclass
class Findings:
    """What came of an attack.

    Attributes:
        noise_bytes: random bytes that the server has read.
        frames: mutated frames that it has read, by phase and kind.
        errors: codes of the errors that it answered with, and how often; ``closed`` without one.
        hung: what was sent on connections that it did not end in time.
        lost: tries that came to nothing, by what it said.
        opened: sessions that were opened to attack from within.
    """

    noise_bytes: int = 0
    frames: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    hung: list[str] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    opened: int = 0

    def __add__(self, other: Findings) -> Findings:
        return Findings(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def faults(self) -> list[str]:
        """What a server must not do."""
        untyped = (
            [f"{self.errors['internal_error']} internal errors"] if self.errors["internal_error"] else []
        )
        return untyped + [f"hung after {what}" for what in self.hung]


Target = tuple[Phase, str]


def targets_of(*, has_token: bool) -> list[Target]:
    """Return which kinds of frames a client sends in which phases, those that may come at any time once there."""
    rows = {phase: TRANSITIONS[phase][Role.CLIENT] for phase in TRANSITIONS}
    return [
        (phase, kind)
        for phase, row in rows.items()
        if row.keys() - set(_ANY_TIME) and (has_token or phase is not Phase.CHALLENGED)
        for kind in row
    ]


class Attack:
    """Noise and mutated frames for one server.

    Args:
        address: the server's.
        frames: of a real client, see `record_with_return`.
        seed: of all randomness.
        token: the server's, for what happens behind it; None where it has none.
        lanes: connections at once.

    Raises:
        ValueError: a client may send a kind of frame of which there is no real one.
    """

    def __init__(
        self,
        address: str,
        frames: Sequence[RealFrame],
        seed: int = 0,
        token: bytes | None = None,
        lanes: int = 4,
    ) -> None:
        self.targets = targets_of(has_token=token is not None)
        samples = [*frames, *map(RealFrame.of, _MADE)]
        if missing := {kind for _, kind in self.targets} - {frame.kind for frame in samples}:
            raise ValueError(f"no real frame of these kinds was recorded: {', '.join(sorted(missing))}")
        self._lanes = [_Lane(address, samples, self.targets, f"{seed} {n}", token) for n in range(lanes)]

    @property
    def findings(self) -> Findings:
        """What has come of it so far."""
        return sum((lane.findings for lane in self._lanes), Findings())

    @property
    def missed(self) -> list[str]:
        """Phases and kinds of which no mutated frame has been read yet."""
        return sorted({_name(*target) for target in self.targets} - self.findings.frames.keys())

    def noise(self, nbytes: int) -> None:
        """Send so many random bytes, at all depths of the handshake and behind it."""
        self._each(_Lane.noise, nbytes)

    def mutate(self, frames: int) -> None:
        """Send so many mutated frames: every second in a session, the others before there is one."""
        self._each(_Lane.mutate, frames)

    def _each(self, once: Callable[[_Lane, random.Random], int], amount: int) -> None:
        """Let each lane send its part."""
        share = -(-amount // len(self._lanes))
        with ThreadPoolExecutor(len(self._lanes)) as pool:
            for done in [pool.submit(lane.repeat, once, share) for lane in self._lanes]:
                done.result()


class _Lane:
    """One connection after another, each attack drawn from the lane's seed and its number."""

    def __init__(
        self,
        address: str,
        frames: Sequence[RealFrame],
        targets: Sequence[Target],
        seed: str,
        token: bytes | None,
    ) -> None:
        self.findings = Findings()
        self._address, self._frames, self._seed, self._token = address, frames, seed, token
        self._turns = self._mutated = 0
        self._held: dict[bool, Held] = {}  # by whether it has its weights
        kinds = [frame.kind for frame in frames]
        self._step = frames[kinds.index("begin") : kinds.index("commit") + 1]
        self._step = [frame for frame in self._step if frame.kind not in _ANY_TIME]
        after = frames[kinds.index("open") + 1 : kinds.index("begin")]
        self._weights = [frame for frame in after if frame.kind == "weights"]
        self._others = [frame for frame in frames if frame.kind not in ("weights", "bye", "error")]
        inside = [_by_weight([target for target in targets if target[0] is phase]) for phase in _INSIDE]
        outside = _by_weight([target for target in targets if target[0] not in _INSIDE])
        self._targets = [*inside, outside, outside]

    def repeat(self, once: Callable[[_Lane, random.Random], int], amount: int) -> None:
        """Attack until so much has been read; not for ever, where the server lets nothing through."""
        most = self._turns + 20 + 2 * amount
        while amount > 0 and self._turns < most:
            self._turns += 1
            draw = random.Random(f"{self._seed} {self._turns}")
            try:
                amount -= once(self, draw)
            except Refused as refused:
                self.findings.lost[str(refused)[:60]] += 1
            except (OSError, RemoteProtocolError) as error:
                self.findings.lost[type(error).__name__] += 1

    def noise(self, draw: random.Random) -> int:
        """Send noise; return how many bytes of it have been read."""
        depth = draw.choice(["bare", "magic", "prelude", "hello", "welcomed", "running"])
        noise = draw.randbytes(draw.choice(_NOISE_SIZES))
        with Intruder(self._address, self._frames, draw, self._token) as intruder:
            if depth == "hello":
                intruder.send(self._frames[0])
            if depth in ("welcomed", "running"):
                intruder.greet()
            if depth == "running":
                self._enter(intruder, has_weights=True)
            start = {"magic": b"ISTH", "prelude": prelude(draw.randrange(4097), draw.randrange(2**16))}
            if depth in ("hello", "welcomed", "running") and draw.random() < 0.5:
                # A right frame with noise for a header: nothing else comes as far as that.
                noise = encode_frame_head(noise[: draw.randrange(1, 4000)], 0)
            was_read = self._send(intruder, start.get(depth, b"") + noise, f"noise, {depth}")
        count = len(noise) if was_read else 0
        self.findings.noise_bytes += count
        return count

    def mutate(self, draw: random.Random) -> int:
        """Send a mutated frame; return 1 where it has been read, else 0."""
        turn, where = divmod(self._mutated, len(self._targets))
        self._mutated += 1
        targets = self._targets[where]
        phase, kind = targets[turn % len(targets)]
        mutation = draw.choice(MUTATIONS)
        with Intruder(self._address, self._frames, draw, self._token) as intruder:
            last = b""
            others: Sequence[RealFrame] = self._frames
            if phase in _INSIDE:
                come = self._come_to_running if phase is Phase.RUNNING else self._come_to_rejoining
                held, real = come(intruder, kind, draw)
                others = [_numbered(frame, held) for frame in self._others]
                # Aborting waits for what came before to be computed, and the second is no good, ever.
                for message in (Abort(step=held.step + 1, reason=""), Fetch("nothing")):
                    last += RealFrame.of(message).encode()
            else:
                real = self._come_to(intruder, phase, kind, draw)
            while (data := mutation(draw, real, others)) == real.encode():  # a payload's, where there is none
                mutation = draw.choice(MUTATIONS)
            if draw.random() < 0.3:  # what comes after it
                data += draw.choice(others).encode()
            waits = phase in _INSIDE and not is_unfinished(data + last)
            what = _name(phase, kind)
            was_read = self._send(intruder, data + last, f"{mutation.__name__} of {what}", waits=waits)
        self.findings.frames[what] += was_read
        return int(was_read)

    def _send(self, intruder: Intruder, data: bytes, what: str, *, waits: bool = False) -> bool:
        """Send what is wrong, and say whether it has been read."""
        try:
            code = intruder.outcome(data, waits=waits)
        except TimeoutError:
            self.findings.hung.append(what)
            return False
        if code is None:
            self.findings.lost["dropped"] += 1
            return False
        self.findings.errors[code] += 1
        return True

    def _come_to(self, intruder: Intruder, phase: Phase, kind: str, draw: random.Random) -> RealFrame:
        """Come to a phase before there is a session; return a right frame for it."""
        if phase is Phase.CHALLENGED:
            proof = intruder.challenge()
            if kind == "proof":
                return proof
        elif phase is Phase.WELCOMED:
            held = self._some_session() if kind == "resume" else None
            intruder.greet()
            if held is not None:
                return intruder.resumption(held)
            if kind == "open":
                return intruder.opening()
        else:
            assert phase is Phase.START, f"nothing here comes to the phase {phase.value}"
            if kind == "rejoin":
                return intruder.rejoining(self._with_ticket())
        return self._real(kind, draw)

    def _come_to_running(self, intruder: Intruder, kind: str, draw: random.Random) -> tuple[Held, RealFrame]:
        """Come to a place in a session where a frame of that kind is right; return that frame."""
        intruder.greet()
        held = self._enter(intruder, has_weights=kind != "weights")
        if kind == "weights":
            place = draw.randrange(len(self._weights))
            intruder.play(self._weights[:place])
            return held, self._weights[place]
        if draw.random() < 0.2:
            intruder.play([_numbered(frame, held) for frame in self._step])
            held.step += 1
        step = [_numbered(frame, held) for frame in self._step]
        places = [place for place, frame in enumerate(step) if frame.kind == kind]
        if places:
            place = draw.choice(places)
            intruder.play(step[:place])
            return held, step[place]
        if kind == "abort" or kind in _ANY_TIME:  # as right in a step
            intruder.play(step[: draw.randrange(1, len(step))])
        return held, _numbered(self._real(kind, draw), held)

    def _come_to_rejoining(
        self, intruder: Intruder, kind: str, draw: random.Random
    ) -> tuple[Held, RealFrame]:
        """Rejoin a session, and wait for nothing on the way to such a frame; return that frame."""
        held = self._with_ticket()
        intruder.send(intruder.rejoining(held))
        step = [_numbered(frame, held) for frame in self._step]
        places = [place for place, frame in enumerate(step) if frame.kind == kind]
        place = draw.choice(places) if places else draw.randrange(len(step))
        for frame in step[:place]:
            intruder.send(frame)
        if places:
            return held, step[place]
        return held, _numbered(self._real(kind, draw), held)

    def _real(self, kind: str, draw: random.Random) -> RealFrame:
        return draw.choice([frame for frame in self._frames if frame.kind == kind])

    def _with_ticket(self) -> Held:
        """A session whose ticket has not been used."""
        draw = random.Random(f"{self._seed} {self._turns} before")
        with Intruder(self._address, self._frames, draw, self._token) as intruder:
            intruder.greet()
            return self._enter(intruder, has_weights=True)

    def _enter(self, intruder: Intruder, *, has_weights: bool) -> Held:
        """Come to the session that this lane has, or to a new one where it has none."""
        held = self._held.pop(has_weights, None)  # it is put back if the server goes on with it
        if held is None:
            held = intruder.open()
            self.findings.opened += 1
        else:
            intruder.resume(held)
        if has_weights and held.needs_weights:
            intruder.play(self._weights)
            held.needs_weights = False
        if has_weights is held.needs_weights:
            raise Refused("a mutated frame has brought the session its weights")
        self._held[has_weights] = held
        return held

    def _some_session(self) -> Held:
        """A session to resume."""
        return self._held[True] if True in self._held else self._with_ticket()


def _name(phase: Phase, kind: str) -> str:
    return f"{phase.value} {kind}"


def _by_weight(targets: Sequence[Target]) -> list[Target]:
    """Each once, and those again and again that there is more to be wrong with."""
    return [target for turn in range(4) for target in targets if turn == 0 or target[1] not in _ANY_TIME]


def _numbered(frame: RealFrame, held: Held) -> RealFrame:
    """The frame for where a session is: of its next step, or for a checkpoint of its last."""
    header = dict(frame.header)
    if "step" in header:
        header["step"] = held.step + (frame.kind != "save")
    if "keep" in header:
        header["keep"] = held.step
    return frame._replace(header=header)
