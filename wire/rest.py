"""How long to leave bytes in the kernel, so that many are taken at a time from a link that brings few."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Rest"]

_LEAST_NS, _MOST_NS = 1_000_000, 15_000_000
_MOST_BYTES = 32 * 1024  # well below what a kernel keeps for a program that does not read
_SHARE = 0.6  # of the time that a payload still takes: its end is not to be late where it comes sooner
_MEASURED_NS = _SLOW_NS = 4_000_000


class Rest:
    """Chooses how long not to read, from how fast bytes come in the middle of a payload.

    On a link of 10 Mbit/s a program that reads whatever comes is woken for nearly every packet, and the kernel
    acknowledges every second one; where the program rests it acknowledges all that have come by then, and the way back
    has more room. (`SO_RCVLOWAT` would not do: below that mark Linux acknowledges as ever.) Rests become shorter
    towards the end of a payload, so that it is not late. A link that would bring `_MOST_BYTES` in less than
    four milliseconds, some 65 Mbit/s, is read at once: there it saves nothing that could be measured.
    Of the fastest, `wire.sockets.LowWater` has the kernel gather.

    Args:
        clock_ns: a monotonic clock in nanoseconds.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._last_ns = 0
        self._amid = False  # a payload was arriving, so that what came since was not waited for in vain
        self._bytes = self._ns = 0
        self._bytes_per_ns = 0.0

    def after(self, nbytes: int, missing: int) -> float:
        """Return for how many seconds not to read, after bytes have come.

        Args:
            nbytes: how many came just now.
            missing: how many of a payload are still to come; 0 where a header is next.
        """
        now_ns = self._clock_ns()
        if self._amid:
            self._bytes += nbytes
            self._ns += now_ns - self._last_ns
            if self._ns >= _MEASURED_NS:
                self._measured()
        self._last_ns, self._amid = now_ns, missing > 0
        if not missing or not 0 < self._bytes_per_ns * _SLOW_NS < _MOST_BYTES:
            return 0.0
        rest_ns = min(min(missing * _SHARE, _MOST_BYTES) / self._bytes_per_ns, _MOST_NS)
        return rest_ns / 1e9 if rest_ns >= _LEAST_NS else 0.0

    def _measured(self) -> None:
        # Up at once, for a link that has become fast is held up by rests; down by halves, for the sender may pause.
        self._bytes_per_ns = max(self._bytes / self._ns, self._bytes_per_ns / 2)
        self._bytes = self._ns = 0
