"""Which failures of the link may pass, how long to wait before the next try, and when to give up."""

import random
import time
from collections.abc import Callable

from wire.errors import (
    ConnectFailed,
    ConnectionLost,
    LocalProtocolError,
    PeerError,
    RemoteProtocolError,
    StorageFailed,
    VersionMismatch,
    WireError,
)

FIRST_S, MOST_S = 0.1, 30.0
"""Of waiting before the next try: it doubles from the first to the most."""

MOST_ODD = 3
"""Failures in a row that no lost connection explains, with no step made between them."""

_PASSING = {"busy", "draining"}
_STALE = "stale_ticket"  # the next connection asks, as if there had never been a ticket
# What a stream that was damaged on its way looks like to either end.
_ODD = {"protocol_error", "bad_frame", "bad_header", "corrupt_payload", "limit_exceeded", "internal_error"}


def may_pass(error: WireError) -> bool:
    """Whether a failure may be gone with a new connection."""
    match error:
        case VersionMismatch() | LocalProtocolError() | StorageFailed():
            return False
        case PeerError():
            return error.code in (*_PASSING, *_ODD, _STALE)
        case RemoteProtocolError():
            return error.code in _ODD
        case _:
            return isinstance(error, ConnectionLost | ConnectFailed)


def is_turned_away(error: WireError) -> bool:
    """Whether the server is there and well, and cannot serve this client now."""
    return isinstance(error, PeerError) and error.code in _PASSING


def ends_session(error: WireError) -> bool:
    """Whether the server has ended the session in good order, and for good."""
    return isinstance(error, PeerError) and error.code == "stopped"


def is_odd(error: WireError) -> bool:
    """Whether it looks like a damaged stream, or like a defect, rather than like a lost connection."""
    if isinstance(error, ConnectFailed):
        return error.final
    return isinstance(error, PeerError | RemoteProtocolError) and error.code not in (*_PASSING, _STALE)


class Patience:
    """How long tries go on without anything coming of them.

    Args:
        give_up_after_s: seconds without progress.
        clock: seconds that only grow.
        rng: of the waits, so that many clients of one server do not come back at once.
    """

    def __init__(
        self,
        give_up_after_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._give_up_after_s = give_up_after_s
        self._clock = clock
        self._rng = rng or random.Random()
        self._since: float | None = None
        self._tries = self._odd = 0
        self._stale = False

    def progressed(self) -> None:
        """Something came of the last try: a step was made."""
        self._since = None
        self._tries = self._odd = 0

    def connected(self) -> None:
        """The last try led to a connection: the next one need not wait as long."""
        self._tries = 0

    def failed(self, error: WireError) -> float | None:
        """Take a failure in; return the seconds to wait before the next try, None where it is time to give up."""
        now = self._clock()
        if self._since is None:
            self._since = now
        self._odd += is_odd(error)
        if isinstance(error, PeerError) and error.code == _STALE and not self._stale:
            self._stale = True
            return 0.0
        self._stale = False
        wait_s = min(FIRST_S * 2.0 ** min(self._tries, 30), MOST_S) * self._rng.uniform(0.5, 1.0)
        self._tries += 1
        if self._odd > MOST_ODD or now + wait_s - self._since > self._give_up_after_s:
            return None
        return wait_s
