"""How far the peer's clock is from ours, from the pings that are sent anyway.

Cristian's algorithm with a minimum filter: the answer that came back fastest had the least time to be
delayed unevenly, so its offset is the best (Mills, RFC 5905, section 10). Only the newest samples count,
for clocks drift.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

__all__ = ["ClockEstimate"]


class _Sample(NamedTuple):
    rtt_ns: int
    offset_ns: int


class ClockEstimate:
    """Round-trip time and clock offset of the peer.

    Args:
        window: how many of the newest samples count.
    """

    def __init__(self, window: int = 64) -> None:
        self._samples: deque[_Sample] = deque(maxlen=window)

    def add(self, sent_ns: int, peer_received_ns: int, peer_sent_ns: int, received_ns: int) -> None:
        """Add a sample; the first and the last time are our clock's, the others the peer's.

        Samples that no honest exchange gives (a negative round trip) are left out.
        """
        rtt_ns = (received_ns - sent_ns) - (peer_sent_ns - peer_received_ns)
        offset_ns = ((peer_received_ns - sent_ns) + (peer_sent_ns - received_ns)) // 2
        if rtt_ns >= 0 and peer_sent_ns >= peer_received_ns:
            self._samples.append(_Sample(rtt_ns, offset_ns))

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def rtt_ns(self) -> int | None:
        """Shortest round-trip time among the newest samples; None before the first."""
        return min(self._samples).rtt_ns if self._samples else None

    @property
    def offset_ns(self) -> int:
        """The peer's monotonic clock minus ours; 0 before the first sample."""
        return min(self._samples).offset_ns if self._samples else 0
