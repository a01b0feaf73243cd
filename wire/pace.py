"""How fast the kernel takes what is sent, and so how large the pieces of a large frame should be."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

__all__ = ["Ask", "Delivery", "Pace"]

_PIECE_S = 0.025  # so long a more urgent message waits for the piece that is on its way
_LEAST_PIECE = 16 * 1024
_FIRST_PIECE = 256 * 1024  # until the pace is known
_MEASURED_NS = 200_000_000
# The first measurement ends sooner where so many are through: small pieces and asking cost a fast link a lot.
_FIRST_BYTES = 8 << 20
_KEPT = 0.7  # what earlier measurements count beside a new one
_SMALL = (
    20  # so many in a piece: asking the kernel would take a good part of the time that sending them takes
)
_SLOW_NS = 1_000_000


class Delivery(NamedTuple):
    """What the kernel knows of what it sends.

    Attributes:
        bytes: how many the peer's kernel has acknowledged so far.
        idle: none are on their way.
        rtt_ns: the shortest round-trip time so far.
    """

    bytes: int
    idle: bool
    rtt_ns: int


Ask: TypeAlias = Callable[[], Delivery | None]


class Pace:
    """Measures while the link is the bottleneck: an idle link says nothing about its rate.

    Args:
        delivery: what has arrived; None where that is not to be had, and the bytes that our kernel takes count
            instead, of which it may buffer many.
        clock_ns: a monotonic clock in nanoseconds.

    Attributes:
        piece_bytes: what the link takes in about 25 ms, and never less than 16 KiB.
        bytes_per_s: the pace last measured; None before the first 0.2 s of waiting for the link, or the first 8 MiB.
    """

    def __init__(self, delivery: Ask, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.piece_bytes = _FIRST_PIECE
        self.bytes_per_s: float | None = None
        self._delivery = delivery
        self._clock_ns = clock_ns
        self._began_ns = 0
        self._asks = self._is_slow = False
        self._before: Delivery | None = None
        # How long no acknowledgement can come yet: a round trip, once an idle link is used.
        self._silent_ns = 0
        self._bytes = self._busy_ns = 0
        self._sum_bytes = self._sum_ns = 0.0

    def begin(self, nbytes: int) -> None:
        """So many bytes are given to the kernel."""
        # Small ones are passed over, unless one has just taken long: the link may have become another.
        self._asks = self._is_slow or self.bytes_per_s is None or nbytes * _SMALL >= self.piece_bytes
        self._before = self._delivery() if self._asks else None
        if self._before is not None and self._before.idle:
            self._silent_ns = self._before.rtt_ns
        self._began_ns = self._clock_ns()

    def end(self, nbytes: int) -> int:
        """The kernel has taken it all; returns the nanoseconds since `begin`."""
        took_ns = self._clock_ns() - self._began_ns
        if not self._asks:
            self._is_slow = took_ns >= _SLOW_NS
            return took_ns
        after = self._delivery()
        if after is not None and self._before is not None:
            nbytes = after.bytes - self._before.bytes
        silent_ns = min(self._silent_ns, took_ns)
        self._silent_ns -= silent_ns
        self._bytes += nbytes
        self._busy_ns += took_ns - silent_ns
        known_fast = self.bytes_per_s is None and self._bytes >= _FIRST_BYTES and self._busy_ns > 0
        if known_fast or self._busy_ns >= _MEASURED_NS:
            self._measured()
        return took_ns

    def _measured(self) -> None:
        self._sum_bytes = self._sum_bytes * _KEPT + self._bytes
        self._sum_ns = self._sum_ns * _KEPT + self._busy_ns
        self._bytes = self._busy_ns = 0
        self._is_slow = False
        if self._sum_bytes > 0:
            self.bytes_per_s = self._sum_bytes / self._sum_ns * 1e9
            self.piece_bytes = max(_LEAST_PIECE, int(self.bytes_per_s * _PIECE_S))
