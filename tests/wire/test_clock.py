"""How far the peer's clock is from ours."""

from hypothesis import given, settings
from hypothesis import strategies as st

from wire.clock import ClockEstimate


def exchange(clock: ClockEstimate, sent_ns: int, *, there_ns: int, back_ns: int, ahead_ns: int) -> None:
    """Ping at `sent_ns`; the peer takes 5 ns to answer and its clock is `ahead_ns` ahead."""
    received_ns = sent_ns + there_ns + ahead_ns
    clock.add(sent_ns, received_ns, received_ns + 5, sent_ns + there_ns + 5 + back_ns)


def test_nothing_is_known_before_the_first_sample() -> None:
    clock = ClockEstimate()
    assert (len(clock), clock.rtt_ns, clock.offset_ns) == (0, None, 0)


def test_even_delays_give_the_exact_offset() -> None:
    clock = ClockEstimate()
    exchange(clock, 1000, there_ns=40, back_ns=40, ahead_ns=123_456)
    assert (clock.rtt_ns, clock.offset_ns) == (80, 123_456)


def test_time_that_the_peer_took_is_no_part_of_the_round_trip() -> None:
    clock = ClockEstimate()
    clock.add(0, 10, 1010, 1020)
    assert clock.rtt_ns == 20


def test_fastest_exchange_counts() -> None:
    clock = ClockEstimate()
    exchange(clock, 0, there_ns=9000, back_ns=50, ahead_ns=777)
    exchange(clock, 100, there_ns=50, back_ns=50, ahead_ns=777)
    exchange(clock, 200, there_ns=50, back_ns=9000, ahead_ns=777)
    assert (clock.rtt_ns, clock.offset_ns) == (100, 777)


def test_old_exchanges_are_forgotten_for_clocks_drift() -> None:
    clock = ClockEstimate(window=4)
    exchange(clock, 0, there_ns=1, back_ns=1, ahead_ns=0)
    for number in range(4):
        exchange(clock, 100 * number, there_ns=10, back_ns=10, ahead_ns=50)
    assert (len(clock), clock.rtt_ns, clock.offset_ns) == (4, 20, 50)


def test_exchanges_that_cannot_have_been_are_left_out() -> None:
    clock = ClockEstimate()
    clock.add(100, 0, 0, 50)  # back before it left
    clock.add(0, 0, 100, 50)  # the peer took longer than the whole
    clock.add(0, 50, 20, 100)  # answered before it came
    assert len(clock) == 0


@settings(max_examples=100, deadline=None)
@given(
    st.integers(-(2**62), 2**62),
    st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1, max_size=20),
)
def test_offset_is_off_by_at_most_half_the_round_trip(ahead_ns: int, delays: list[tuple[int, int]]) -> None:
    clock = ClockEstimate()
    for number, (there_ns, back_ns) in enumerate(delays):
        exchange(clock, number * 10**10, there_ns=there_ns, back_ns=back_ns, ahead_ns=ahead_ns)
    assert clock.rtt_ns == min(there_ns + back_ns for there_ns, back_ns in delays)
    assert abs(clock.offset_ns - ahead_ns) <= clock.rtt_ns / 2 + 1
