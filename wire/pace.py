"""How fast the kernel takes what is sent, and so how large the pieces of a large frame should be."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Pace"]

_PIECE_S = 0.025  # so long a more urgent message waits for the piece that is on its way
_LEAST_PIECE = 16 * 1024
_FIRST_PIECE = 256 * 1024  # until the pace is known
_MEASURED_NS = 200_000_000


class Pace:
    """Measures while the link is the bottleneck: an idle link says nothing about its rate.

    Args:
        clock_ns: a monotonic clock in nanoseconds.

    Attributes:
        piece_bytes: what the kernel takes in about 25 ms, and never less than 16 KiB.
        bytes_per_s: the pace last measured; None before the first 0.2 s of sending.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.piece_bytes = _FIRST_PIECE
        self.bytes_per_s: float | None = None
        self._clock_ns = clock_ns
        self._began_ns = 0
        self._bytes = self._busy_ns = 0

    def begin(self) -> None:
        """Something is given to the kernel."""
        self._began_ns = self._clock_ns()

    def end(self, nbytes: int) -> int:
        """The kernel has taken it all; returns the nanoseconds since `begin`."""
        took_ns = self._clock_ns() - self._began_ns
        self._bytes += nbytes
        self._busy_ns += took_ns
        if self._busy_ns >= _MEASURED_NS:
            self.bytes_per_s = self._bytes * 1e9 / self._busy_ns
            self.piece_bytes = max(_LEAST_PIECE, int(self.bytes_per_s * _PIECE_S))
            self._bytes = self._busy_ns = 0
        return took_ns
