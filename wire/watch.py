"""Time limits against peers that are alive but too slow, so that none holds memory or a place for ever.

Heartbeats show that a peer is there. They do not show that it goes on with the frame that it began to send, or that
it reads what it is sent: a peer that only ever answers pings would hold both for as long as it likes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from wire.config import WireConfig
from wire.errors import ConnectionLost

__all__ = ["Flow", "Watch"]


class Flow:
    """Whether bytes go on flowing while they should.

    Args:
        least_bytes_per_s: how many have to, on average over a window.
        window_s: seconds.
        clock_ns: a monotonic clock in nanoseconds.
    """

    def __init__(self, least_bytes_per_s: float, window_s: float, clock_ns: Callable[[], int]) -> None:
        self._least, self._window_s = least_bytes_per_s, window_s
        self._clock_ns = clock_ns
        self._since: tuple[int, int] | None = None  # time and bytes at the beginning of the window

    def rest(self) -> None:
        """Nothing has to flow just now."""
        self._since = None

    def is_slow(self, nbytes: int) -> bool:
        """Say whether too little has flown while something should.

        Args:
            nbytes: how many bytes have flown in all.
        """
        now_ns = self._clock_ns()
        since_ns, before = self._since = self._since or (now_ns, nbytes)
        took_s = (now_ns - since_ns) / 1e9
        if took_s < self._window_s:
            return False
        self._since = (now_ns, nbytes)
        return nbytes - before < self._least * took_s


class Watch:
    """The time limits of one connection that has been welcomed. Call `check` every now and then.

    Args:
        config: settings.
        clock_ns: a monotonic clock in nanoseconds.

    Attributes:
        period_s: how often to check at least, in seconds.
    """

    def __init__(self, config: WireConfig, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.period_s = min(config.slow_s, config.unread_s, config.open_s) / 2
        self._config = config
        self._clock_ns = clock_ns
        self._coming = Flow(config.least_bytes_per_s, config.slow_s, clock_ns)
        self._going = Flow(config.least_bytes_per_s, config.unread_s, clock_ns)
        self._unopened_ns: int | None = None

    def received(self, *, arriving: bool) -> None:
        """Bytes came; `arriving` is whether a frame is in the middle now."""
        if not arriving:
            self._coming.rest()

    def check(
        self, *, arriving: bool, received_bytes: int, waiting: bool, sent_bytes: int, unopened: bool
    ) -> None:
        """See whether the peer keeps within its limits.

        Args:
            arriving: a frame of the peer's is in the middle, and this end reads.
            received_bytes: that came so far, but for heartbeats.
            waiting: something waits to be sent.
            sent_bytes: that have gone so far.
            unopened: the peer has yet to say what it wants.

        Raises:
            ConnectionLost: it does not.
        """
        config = self._config
        if not arriving:
            self._coming.rest()
        elif self._coming.is_slow(received_bytes):
            raise ConnectionLost(
                f"the peer began a message and sent less than {config.least_bytes_per_s} bytes/s of it"
                f" for {config.slow_s:g} s"
            )
        if not waiting:
            self._going.rest()
        elif self._going.is_slow(sent_bytes):
            raise ConnectionLost(
                f"the peer took less than {config.least_bytes_per_s} bytes/s of what waits for it"
                f" for {config.unread_s:g} s"
            )
        if not unopened:
            self._unopened_ns = None
        elif self._unopened_ns is None:
            self._unopened_ns = self._clock_ns()
        elif self._clock_ns() - self._unopened_ns >= config.open_s * 1e9:
            raise ConnectionLost(f"the peer opened no job within {config.open_s:g} s")
