"""Which failures may pass, and how long a client waits before it tries again."""

import random

import pytest

from edge.reconnect import FIRST_S, MOST_ODD, MOST_S, Patience, may_pass
from wire.errors import ConnectFailed, ConnectionLost, PeerError, StorageFailed, VersionMismatch, WireError

LOST = ConnectionLost("gone")
STALE = PeerError("stale_ticket", "greet, and resume")


class Clock:
    """Shows what it is set to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def waits_of(patience: Patience, *errors: WireError) -> list[float]:
    waits = [patience.failed(error) for error in errors]
    assert None not in waits
    return [wait_s for wait_s in waits if wait_s is not None]


def test_waits_double_up_to_a_limit_and_are_never_the_same() -> None:
    waits = waits_of(Patience(1e9, rng=random.Random(0)), *[LOST] * 50)
    for number, wait_s in enumerate(waits):
        longest = min(FIRST_S * 2.0**number, MOST_S)
        assert longest / 2 <= wait_s <= longest
    assert len(set(waits)) == 50


def test_client_gives_up_after_so_long_without_a_step() -> None:
    clock = Clock()
    patience = Patience(10.0, clock=clock)
    assert patience.failed(LOST) is not None
    clock.now_s = 9.0
    patience.progressed()
    assert patience.failed(LOST) is not None
    clock.now_s = 19.5
    assert patience.failed(LOST) is None


def test_damaged_streams_are_put_up_with_only_so_often() -> None:
    patience = Patience(1e9)
    odd = PeerError("bad_frame", "the stream is damaged")
    assert len(waits_of(patience, *[odd] * MOST_ODD)) == MOST_ODD
    assert patience.failed(odd) is None


def test_after_a_stale_ticket_nothing_is_waited_for_once() -> None:
    patience = Patience(1e9)
    waits = waits_of(patience, LOST, STALE, LOST, STALE, STALE, *[STALE] * (2 * MOST_ODD))
    assert [wait_s == 0.0 for wait_s in waits[:5]] == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("error", "may"),
    [
        (LOST, True),
        (STALE, True),
        (ConnectFailed("host", 1, "nothing is listening there"), True),
        (PeerError("busy", "full"), True),
        (PeerError("draining", "later"), True),
        (PeerError("refused", "no such model"), False),
        (PeerError("unknown_session", "unknown"), False),
        (VersionMismatch((3,), (2,)), False),
        (StorageFailed("/tmp", "full"), False),
    ],
)
def test_failures_that_may_pass_are_told_from_those_that_do_not(error: WireError, may: bool) -> None:
    assert may_pass(error) == may
