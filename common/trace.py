"""A timeline of everything both sides do, for chrome://tracing or https://ui.perfetto.dev.

Each side records its own `Event`s on its own monotonic clock. The cloud ships its list to the edge as plain
values (`Tracer.to_plain`); the edge shifts it by the measured difference of the two clocks (`Tracer.merge`)
and writes one file in Chrome's trace format, one process a side and one thread a lane.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = ["LANES", "Event", "Tracer", "clock_offset_ns"]

LANES: Final = ("compute", "encode", "decode", "send")
"""The lanes a side has, in the order they are shown; others come after them."""


class Event(NamedTuple):
    """One span of one lane.

    Attributes:
        lane: what was busy, usually one of `LANES`.
        name: what it did, usually an action such as `0F3`.
        start_ns: when it began, on the recording side's `time.monotonic_ns`.
        end_ns: when it ended.
        args: small plain values to show with it, such as `{"bytes": 4096}`.
    """

    lane: str
    name: str
    start_ns: int
    end_ns: int
    args: Mapping[str, Any]


class Tracer:
    """Records events from any thread; costs one comparison an event when not enabled.

    Attributes:
        side: `edge` or `cloud`: whose events these are.
        enabled: whether anything is recorded.
    """

    def __init__(self, side: str, *, enabled: bool = True) -> None:
        self.side = side
        self.enabled = enabled
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._merged: dict[str, list[Event]] = {}

    @property
    def events(self) -> list[Event]:
        """What this side has recorded so far, in the order it ended."""
        with self._lock:
            return list(self._events)

    def record(self, lane: str, name: str, start_ns: int, end_ns: int, **args: Any) -> None:
        """Record a span whose times the caller took with `time.monotonic_ns`."""
        if self.enabled:
            event = Event(lane, name, start_ns, end_ns, args)
            with self._lock:
                self._events.append(event)

    @contextmanager
    def span(self, lane: str, name: str, **args: Any) -> Iterator[None]:
        """Record the body of a `with`, also when it raises."""
        if not self.enabled:
            yield
            return
        start_ns = time.monotonic_ns()
        try:
            yield
        finally:
            self.record(lane, name, start_ns, time.monotonic_ns(), **args)

    def to_plain(self, *, clear: bool = False) -> list[list[Any]]:
        """This side's events as lists of plain values, to send to the peer.

        Args:
            clear: forget them, so that each is sent once and memory does not grow.
        """
        with self._lock:
            plain = [[e.lane, e.name, e.start_ns, e.end_ns, dict(e.args)] for e in self._events]
            if clear:
                self._events.clear()
        return plain

    def merge(self, side: str, plain: Sequence[Any], *, offset_ns: int) -> None:
        """Take in what the peer's `to_plain` gave.

        Args:
            side: the peer's name.
            plain: its events. They come from the network, so every field is checked.
            offset_ns: the peer's clock minus ours (`clock_offset_ns`), subtracted from its times.

        Raises:
            ValueError: if `plain` is not a list of events; nothing is taken in then.
        """
        events = [_shifted(_event_from_plain(item), -offset_ns) for item in plain]
        if self.enabled:
            with self._lock:
                self._merged.setdefault(side, []).extend(events)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write all events of both sides as one Chrome trace (JSON), whole or not at all.

        Times in the file are microseconds from the first event.

        Raises:
            OSError: if the file cannot be written.
        """
        with self._lock:
            sides = {self.side: list(self._events)} | {s: list(events) for s, events in self._merged.items()}
        _write_atomically(Path(path), json.dumps({"displayTimeUnit": "ms", "traceEvents": _chrome(sides)}))


def clock_offset_ns(sent_ns: int, received_ns: int, answered_ns: int, back_ns: int) -> int:
    """The peer's clock minus ours, from one exchange, as NTP computes it (RFC 5905, section 8).

    Off by at most half of the round trip; take the exchange with the shortest one.

    Args:
        sent_ns: our clock when the question left.
        received_ns: the peer's clock when it came.
        answered_ns: the peer's clock when the answer left.
        back_ns: our clock when the answer came.
    """
    return ((received_ns - sent_ns) + (answered_ns - back_ns)) // 2


def _event_from_plain(item: Any) -> Event:
    if not isinstance(item, list | tuple) or len(item) != 5:
        raise ValueError("a trace event is a list of lane, name, start, end and args")
    lane, name, start_ns, end_ns, args = item
    if not (isinstance(lane, str) and isinstance(name, str) and isinstance(args, dict)):
        raise ValueError("a trace event's lane and name are text and its args a map")
    if type(start_ns) is not int or type(end_ns) is not int or end_ns < start_ns:
        raise ValueError("a trace event's start and end are whole nanoseconds, the end not before the start")
    if not all(isinstance(key, str) and _is_plain(value) for key, value in args.items()):
        raise ValueError("a trace event's args are text, numbers or booleans by name")
    return Event(lane, name, start_ns, end_ns, args)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _shifted(event: Event, by_ns: int) -> Event:
    return event._replace(start_ns=event.start_ns + by_ns, end_ns=event.end_ns + by_ns)


def _chrome(sides: Mapping[str, Iterable[Event]]) -> list[dict[str, Any]]:
    """Chrome's trace events: metadata that names processes and threads, then spans in order of time."""
    first_ns = min((event.start_ns for events in sides.values() for event in events), default=0)
    named: list[dict[str, Any]] = []
    spans: list[dict[str, Any]] = []
    for pid, (side, side_events) in enumerate(sides.items(), start=1):
        events = list(side_events)
        named.append({"name": "process_name", "ph": "M", "pid": pid, "args": {"name": side}})
        known = [lane for lane in LANES if any(event.lane == lane for event in events)]
        lanes = known + sorted({event.lane for event in events} - set(known))
        for tid, lane in enumerate(lanes, start=1):
            thread = {"ph": "M", "pid": pid, "tid": tid}
            named.append({"name": "thread_name", **thread, "args": {"name": lane}})
            named.append({"name": "thread_sort_index", **thread, "args": {"sort_index": tid}})
        spans += [
            {
                "name": event.name,
                "cat": event.lane,
                "ph": "X",
                "pid": pid,
                "tid": lanes.index(event.lane) + 1,
                "ts": (event.start_ns - first_ns) / 1000,
                "dur": (event.end_ns - event.start_ns) / 1000,
                "args": dict(event.args),
            }
            for event in events
        ]
    return named + sorted(spans, key=lambda span: (span["ts"], span["pid"], span["tid"]))


def _write_atomically(path: Path, text: str) -> None:
    # In the same folder, since a rename replaces a file whole only within one file system.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
