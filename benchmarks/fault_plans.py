"""What a faulty proxy does to the connections that pass through it, and when.

A plan is asked about each connection and about each piece of data; it answers with what to pass on and which fault
to make in between, in that order::

    Plan                no faults
    ├── RandomFaults    so many, at random bytes of either direction, all from one seed
    ├── CutBytes        one cut, after exactly so many bytes of a connection's direction
    └── CutFrames       cuts at given bytes of given frames, one after another; keeps the times of all frames

Faults, by kind: ``cut`` ends both sides, by RST or FIN. ``truncate`` ends one direction, whose last segment was not
passed on whole, or both. ``stall`` is silence in both directions with nothing closed; where it lasts longer than the
heartbeat's timeout, it is a half-open link, and what was on it arrives when nobody waits for it any more. ``delay``
is a pause of milliseconds. ``duplicate`` replays all that the client has sent on this connection on a new one.
``blackhole`` cuts, and the next connection is accepted and never served.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgpack

from wire.prelude import FIELDS, PRELUDE_SIZE, SPLIT

UP, DOWN = "up", "down"
WEIGHTS = {"cut": 3, "truncate": 2, "stall": 3, "delay": 4, "duplicate": 3, "blackhole": 1}
LONG_STALLS = 0.2
"""So many stalls are longer than the heartbeat's timeout."""


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: see above.
        how: ``rst`` or ``fin`` for a cut, ``one`` or ``both`` directions for a truncation.
        seconds: how long a stall, a delay or a black hole lasts.
    """

    kind: str
    how: str = ""
    seconds: float = 0.0


class Plan:
    """No faults; the others extend it. A plan serves one proxy, and its methods are called in one thread.

    Attributes:
        needs_record: whether what the client sends has to be kept, for a replay.
    """

    needs_record = False

    def on_connect(self, connection: int) -> Fault | None:
        """Say what becomes of a new connection, counted from 1: None lets it through."""
        return None

    def look(self, connection: int, direction: str, data: bytes) -> Iterator[bytes | Fault]:
        """Say what to do where these bytes came: bytes to pass on and faults to make, in their order."""
        yield data

    def rest(self, connection: int, direction: str) -> bytes:
        """Return what `look` has held back, once nothing more comes."""
        return b""


class RandomFaults(Plan):
    """Faults at random bytes, from a seed; after the last the proxy is a plain one.

    Args:
        seed: of everything that is random here.
        faults: how many.
        mean_gap: mean bytes, of both directions together, from one fault to the next; they are exponential.
        timeout_s: seconds of silence after which an end gives a connection up; some stalls are longer.
        weights: how often each kind comes, in proportion.
    """

    def __init__(
        self,
        seed: int,
        faults: int,
        mean_gap: float,
        *,
        timeout_s: float = 1.0,
        weights: dict[str, int] | None = None,
    ) -> None:
        self._random = random.Random(seed)
        self._timeout_s = timeout_s
        weights = WEIGHTS if weights is None else weights
        kinds = self._random.choices(list(weights), list(weights.values()), k=faults)
        self._coming = deque(
            (int(self._random.expovariate(1 / mean_gap)), self._draw(kind)) for kind in kinds
        )
        self._left = self._coming[0][0] if self._coming else 0
        self._blackhole: Fault | None = None

    @property
    def left(self) -> int:
        """Faults that have not happened yet."""
        return len(self._coming)

    @property
    def needs_record(self) -> bool:  # type: ignore[override]
        """Whether a duplicate is still to come."""
        return any(fault.kind == "duplicate" for _, fault in self._coming)

    def on_connect(self, connection: int) -> Fault | None:
        """Swallow the connection after a black hole's cut."""
        fault, self._blackhole = self._blackhole, None
        return fault

    def look(self, connection: int, direction: str, data: bytes) -> Iterator[bytes | Fault]:
        """Count down to the next fault."""
        while self._coming and self._left < len(data):
            before, data = data[: self._left], data[self._left :]
            _, fault = self._coming.popleft()
            self._left = self._coming[0][0] if self._coming else 0
            if before:
                yield before
            if fault.kind == "blackhole":
                self._blackhole = fault
            yield fault
        self._left -= len(data)
        if data:
            yield data

    def _draw(self, kind: str) -> Fault:
        draw = self._random
        match kind:
            case "cut":
                return Fault(kind, draw.choice(("rst", "fin")))
            case "truncate":
                return Fault(kind, draw.choice(("one", "both")))
            case "stall" if draw.random() < LONG_STALLS:
                return Fault(kind, seconds=self._timeout_s * draw.uniform(1.1, 1.8))
            case "stall" | "blackhole":
                return Fault(kind, seconds=self._timeout_s * draw.uniform(0.05, 0.5))
            case "delay":
                return Fault(kind, seconds=draw.uniform(0.001, 0.02))
            case _:
                return Fault(kind)


CONNECT_BYTES = 3000
"""Greeting, resuming and the first heartbeats of a connection take about so many, in both directions."""


def mean_gap(step_bytes: float, faults_a_step: float) -> float:
    """Return the mean gap for `RandomFaults` with which a run meets about so many faults in each of its steps.

    A step that a fault interrupts is run again after a new connection was made, and these bytes meet faults too. Where
    a try of n bytes is cut every g bytes, it is made exp(n/g) times until it comes through.

    Args:
        step_bytes: bytes of a step in both directions.
        faults_a_step: faults over steps.
    """
    all_kinds = sum(WEIGHTS.values())
    fatal = WEIGHTS["cut"] + WEIGHTS["truncate"] + WEIGHTS["blackhole"] + LONG_STALLS * WEIGHTS["stall"]
    share = fatal / all_kinds
    a_try = step_bytes + share * CONNECT_BYTES * min(1.0, faults_a_step)
    return share * a_try / math.log1p(share * faults_a_step)


class CutBytes(Plan):
    """One cut, by FIN, after exactly so many bytes.

    Args:
        connection: on which, counted from 1.
        direction: UP or DOWN.
        after: bytes that are still passed on.
    """

    def __init__(self, connection: int, direction: str, after: int) -> None:
        self._where, self._left = (connection, direction), after
        self.done = False

    def look(self, connection: int, direction: str, data: bytes) -> Iterator[bytes | Fault]:
        """Count down to the cut."""
        if self.done or (connection, direction) != self._where or self._left > len(data):
            if (connection, direction) == self._where:
                self._left -= len(data)
            yield data
            return
        self.done = True
        yield data[: self._left]
        yield Fault("cut", "fin")


@dataclass(frozen=True)
class FrameCut:
    """Where to cut.

    Attributes:
        kind: of the message, such as ``commit``.
        after: bytes of its prelude and header that are still passed on; all of them where it has fewer.
        step: the message's step; None for any.
        skip: so many such frames pass first.
    """

    kind: str
    after: int
    step: int | None = None
    skip: int = 0

    def fits(self, header: dict[str, Any]) -> bool:
        """Whether this is the frame."""
        return header.get("kind") == self.kind and self.step in (None, header.get("step"))


class Seen(NamedTuple):
    """A frame that passed: when (monotonic seconds), its kind and step, and the bytes of its prelude and header."""

    at_s: float
    kind: str
    step: int | None
    size: int


class CutFrames(Plan):
    """Cuts inside given frames, by FIN; each is armed once the one before has been made.

    Args:
        cuts: where; with none it only watches.
        keep: kinds of frames that `seen` keeps; None for all.

    Attributes:
        cuts: those that are still to come.
        seen: frames that came by, also those that were cut.
    """

    def __init__(self, cuts: Iterable[FrameCut] = (), *, keep: Iterable[str] | None = None) -> None:
        self.cuts = deque(cuts)
        self.seen: list[Seen] = []
        self._keep = None if keep is None else frozenset(keep)
        self._passed = 0
        self._walkers: dict[tuple[int, str], FrameWalker] = {}

    def look(self, connection: int, direction: str, data: bytes) -> Iterator[bytes | Fault]:
        """Pass on whole heads and payloads, up to the cut."""
        for part, header in self._walker(connection, direction).feed(data):
            if header is not None:
                self._note(header, len(part))
                if self._is_due(header):
                    yield part[: self.cuts.popleft().after]
                    yield Fault("cut", "fin")
                    return
            yield part

    def rest(self, connection: int, direction: str) -> bytes:
        """Return the beginning of a head that never came whole."""
        return self._walker(connection, direction).held

    def sizes(self, kind: str) -> list[int]:
        """Bytes of prelude and header of all frames of a kind."""
        return [seen.size for seen in self.seen if seen.kind == kind]

    def times(self, kind: str) -> dict[int, float]:
        """When the frame of a kind came by first (monotonic seconds), by step."""
        times: dict[int, float] = {}
        for seen in self.seen:
            if seen.kind == kind and seen.step is not None:
                times.setdefault(seen.step, seen.at_s)
        return times

    def _note(self, header: dict[str, Any], size: int) -> None:
        kind = header.get("kind", "")
        if self._keep is None or kind in self._keep:
            self.seen.append(Seen(time.monotonic(), kind, header.get("step"), size))

    def _is_due(self, header: dict[str, Any]) -> bool:
        if not self.cuts or not self.cuts[0].fits(header):
            return False
        self._passed += 1
        if self._passed <= self.cuts[0].skip:
            return False
        self._passed = 0
        return True

    def _walker(self, connection: int, direction: str) -> FrameWalker:
        return self._walkers.setdefault((connection, direction), FrameWalker())


class FrameWalker:
    """Walks along a stream of frames without keeping payloads.

    Attributes:
        held: the beginning of a head, of which the rest has not come.
    """

    def __init__(self) -> None:
        self.held = b""
        self._payload_left = 0

    def feed(self, data: bytes) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
        """Yield the stream again, in parts: whole heads with their header, and payload with None.

        The prelude of a piece counts as payload.
        """
        data = self.held + data
        self.held = b""
        while data:
            if self._payload_left:
                part, data = data[: self._payload_left], data[self._payload_left :]
                self._payload_left -= len(part)
                yield part, None
                continue
            size = PRELUDE_SIZE
            if len(data) >= size:
                _, _, flags, _, header_len, payload_len = FIELDS.unpack_from(data)
                size += header_len
            if len(data) < size:
                self.held = data
                return
            part, data = data[:size], data[size:]
            self._payload_left = 0 if flags == SPLIT else payload_len
            yield part, msgpack.unpackb(part[PRELUDE_SIZE:]) if size > PRELUDE_SIZE else None
