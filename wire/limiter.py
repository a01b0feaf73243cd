"""How often an address may show a wrong token.

After five wrong ones in a minute it is refused for half a minute, after five more for twice as long, and so on up to
ten minutes. All of that is forgotten once it has been quiet for ten minutes after a refusal's end. Right
tokens change nothing: whoever guesses may share an address with somebody who knows.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from wire.errors import TooManyAttempts

__all__ = ["AttemptLimiter", "Attempts"]

_FIRST_S = 30.0


@dataclass(slots=True)
class _Record:
    """What is known of an address.

    Attributes:
        wrong_s: when its newest wrong tokens came.
        refused_until_s: the end of the last refusal.
        refusals: how many there were in a row.
    """

    wrong_s: deque[float] = field(default_factory=deque)
    refused_until_s: float = float("-inf")
    refusals: int = 0


class AttemptLimiter:
    """Counts wrong tokens by address; remembers a bounded number of addresses, those that were wrong last.

    Args:
        clock_s: a monotonic clock in seconds.
        most: wrong tokens within `within_s` that bring a refusal.
        within_s: seconds.
        longest_s: the longest refusal, and the quiet after one that makes it forgotten.
        max_addresses: how many are remembered.
    """

    def __init__(
        self,
        clock_s: Callable[[], float] = time.monotonic,
        *,
        most: int = 5,
        within_s: float = 60.0,
        longest_s: float = 600.0,
        max_addresses: int = 4096,
    ) -> None:
        self._clock_s = clock_s
        self._most, self._within_s, self._longest_s = most, within_s, longest_s
        self._max_addresses = max_addresses
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def of(self, host: str) -> Attempts:
        """Return what limits the peer at an address.

        Args:
            host: an IP address. Those of one IPv6 network of 64 bits count as one: a single machine has them all.
        """
        return Attempts(self, _network(host))

    def refused_s(self, network: str) -> float:
        """Return for how many seconds more an address is refused; 0 where it is not."""
        record = self._records.get(network)
        return 0.0 if record is None else max(0.0, record.refused_until_s - self._clock_s())

    def wrong(self, network: str) -> None:
        """Count a wrong token."""
        now_s = self._clock_s()
        record = self._records.pop(network, None) or _Record()
        self._records[network] = record
        if len(self._records) > self._max_addresses:
            self._records.popitem(last=False)
        if now_s >= record.refused_until_s + self._longest_s:
            record.refusals = 0
        record.wrong_s.append(now_s)
        while record.wrong_s[0] <= now_s - self._within_s:
            record.wrong_s.popleft()
        if len(record.wrong_s) >= self._most:
            refused_s = min(_FIRST_S * 2.0**record.refusals, self._longest_s)
            record.refused_until_s = now_s + refused_s
            # Counted no further than needed: for ever, it would overflow in the end.
            record.refusals += refused_s < self._longest_s
            record.wrong_s.clear()


class Attempts:
    """The attempts of one address."""

    def __init__(self, limiter: AttemptLimiter, network: str) -> None:
        self._limiter, self._network = limiter, network

    def check(self) -> None:
        """Raise `TooManyAttempts` where the address is refused."""
        wait_s = self._limiter.refused_s(self._network)
        if wait_s > 0:
            raise TooManyAttempts(wait_s)

    def wrong(self) -> None:
        """Count a wrong token."""
        self._limiter.wrong(self._network)


def _network(host: str) -> str:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
