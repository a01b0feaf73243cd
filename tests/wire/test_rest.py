"""How long a connection does not read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.rest import Rest

MS = 1_000_000
PACKET = 1448
PIECE = 30_000


class Received:
    """One end of a link that brings bytes at an even rate, under a clock that a test sets.

    Attributes:
        reads: how many times it read.
        late_ns: how long the last payload lay in the kernel, whole.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.now_ns = self.reads = self.late_ns = 0
        self.bytes_per_ns = bytes_per_s / 1e9
        self.rest = Rest(lambda: self.now_ns)

    def payload(self, nbytes: int, *, idle_ns: int = 0) -> None:
        """A payload comes, after a header and a time in which nothing does."""
        self.now_ns += idle_ns
        began_ns, read = self.now_ns, 0
        self.now_ns += int(self.rest.after(64, nbytes) * 1e9)
        while read < nbytes:
            come = min(nbytes, int((self.now_ns - began_ns) * self.bytes_per_ns) // PACKET * PACKET)
            if nbytes - come < PACKET and self.now_ns - began_ns >= nbytes / self.bytes_per_ns:
                come = nbytes
            if come == read:  # woken by the next packet
                self.now_ns += max(1, int(PACKET / self.bytes_per_ns))
                continue
            taken, read = come - read, come
            self.reads += 1
            self.now_ns += int(self.rest.after(taken, nbytes - read) * 1e9)
        self.late_ns = self.now_ns - began_ns - int(nbytes / self.bytes_per_ns)


def test_slow_link_is_read_seldom_and_no_payload_is_late() -> None:
    slow = Received(1.17e6)  # 10 Mbit/s
    slow.payload(PIECE)
    slow.reads = 0
    for _ in range(20):
        slow.payload(PIECE)
        assert slow.late_ns <= 3 * MS  # two packets' time
    assert slow.reads <= 20 * 8  # of 21 packets each


@pytest.mark.parametrize("bytes_per_s", [117e6, 11.7e6])
def test_link_of_100_megabits_a_second_and_more_is_read_at_once(bytes_per_s: float) -> None:
    fast = Received(bytes_per_s)
    for _ in range(20):
        fast.payload(4 << 20)
    assert [fast.rest.after(PACKET, missing) for missing in (1 << 20, PACKET)] == [0.0, 0.0]


def test_nothing_rests_before_the_rate_is_known_and_none_where_a_header_is_next() -> None:
    rest = Rest(lambda: 0)
    assert rest.after(PACKET, 1 << 20) == 0.0
    slow = Received(1.17e6)
    slow.payload(PIECE)
    assert slow.rest.after(PIECE, 0) == 0.0


def test_time_in_which_no_payload_was_arriving_says_nothing_of_the_rate() -> None:
    link = Received(5e6)
    for _ in range(5):
        link.payload(PIECE, idle_ns=1000 * MS)
    assert 0 < link.rest.after(64, PIECE) <= 0.6 * PIECE / 5e6 * 1.3  # and not fifteen milliseconds


@pytest.mark.parametrize("nbytes", [3_000, 30_000, 1 << 20])
def test_link_that_has_become_fast_is_soon_read_at_once(nbytes: int) -> None:
    """Small payloads too, which lay in the kernel whole while it rested: rests must not keep the rate low."""
    link = Received(1.17e6)
    for _ in range(5):
        link.payload(PIECE)
    link.bytes_per_ns = 117e6 / 1e9
    began_ns = link.now_ns
    for _ in range(40):
        link.payload(nbytes)
    assert link.rest.after(64, nbytes) == 0.0
    assert link.now_ns - began_ns <= 40 * nbytes / link.bytes_per_ns + 100 * MS


@given(
    st.lists(st.tuples(st.integers(0, 10**10), st.integers(0, 1 << 20), st.integers(0, 1 << 30)), max_size=40)
)
def test_rests_are_between_one_and_fifteen_milliseconds(arrivals: list[tuple[int, int, int]]) -> None:
    now_ns = 0
    rest = Rest(lambda: now_ns)
    for after_ns, nbytes, missing in arrivals:
        now_ns += after_ns
        seconds = rest.after(nbytes, missing)
        assert seconds == 0.0 or 0.001 <= seconds <= 0.015
        assert missing or not seconds
