"""How often an address may show a wrong token, by a clock that a test turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.errors import TooManyAttempts
from wire.limiter import AttemptLimiter, Attempts


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def refused_s(attempts: Attempts) -> float:
    try:
        attempts.check()
    except TooManyAttempts as error:
        return error.wait_s
    return 0.0


def guess(attempts: Attempts, times: int) -> None:
    for _ in range(times):
        attempts.wrong()


def test_five_wrong_tokens_in_a_minute_bring_a_refusal() -> None:
    clock = Clock()
    attempts = AttemptLimiter(clock).of("127.0.0.1")
    for number in range(5):
        assert refused_s(attempts) == 0
        clock.now_s = 14.5 * number
        attempts.wrong()
    assert refused_s(attempts) == 30
    clock.now_s += 29.5
    assert refused_s(attempts) == 0.5
    clock.now_s += 0.5
    assert refused_s(attempts) == 0


def test_few_wrong_tokens_now_and_then_bring_none() -> None:
    clock = Clock()
    attempts = AttemptLimiter(clock).of("127.0.0.1")
    for _ in range(100):
        attempts.wrong()
        clock.now_s += 15
        assert refused_s(attempts) == 0


def test_refusals_grow_up_to_ten_minutes() -> None:
    clock = Clock()
    attempts = AttemptLimiter(clock).of("198.51.100.1")
    lengths = []
    for _ in range(7):
        guess(attempts, 5)
        lengths.append(refused_s(attempts))
        clock.now_s += lengths[-1]
    assert lengths == [30, 60, 120, 240, 480, 600, 600]


def test_refusals_are_forgotten_after_ten_quiet_minutes() -> None:
    clock = Clock()
    attempts = AttemptLimiter(clock).of("198.51.100.1")
    for wait_s, length in ((0, 30), (30 + 599, 60), (60 + 600, 30)):
        clock.now_s += wait_s
        guess(attempts, 5)
        assert refused_s(attempts) == length


def test_other_addresses_are_not_concerned() -> None:
    limiter = AttemptLimiter(Clock())
    guess(limiter.of("198.51.100.1"), 5)
    assert refused_s(limiter.of("198.51.100.1")) > 0
    assert refused_s(limiter.of("198.51.100.2")) == 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:198.51.100.1", "198.51.100.1", True),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("?", "?", True),
    ],
)
def test_addresses_that_one_machine_may_have_count_as_one(one: str, other: str, same: bool) -> None:
    limiter = AttemptLimiter(Clock())
    guess(limiter.of(one), 5)
    assert (refused_s(limiter.of(other)) > 0) == same


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.floats(0, 200), st.integers(1, 6)),
        max_size=60,
    )
)
def test_memory_is_bounded_and_no_refusal_is_longer_than_ten_minutes(
    events: list[tuple[int, float, int]],
) -> None:
    clock = Clock()
    limiter = AttemptLimiter(clock, max_addresses=8)
    for host, pause_s, times in events:
        clock.now_s += pause_s
        attempts = limiter.of(f"198.51.100.{host}")
        before_s = refused_s(attempts)
        guess(attempts, times)
        assert before_s <= refused_s(attempts) <= 600 or times < 5
        assert (refused_s(attempts) > 0) >= (times >= 5)
        assert len(limiter) <= 8


@given(st.lists(st.floats(0, 300), min_size=1, max_size=200))
def test_who_guesses_whenever_it_may_gets_few_guesses(pauses_s: list[float]) -> None:
    """However it chooses its times, an address gets fewer than ten guesses a minute in the long run."""
    clock = Clock()
    attempts = AttemptLimiter(clock).of("198.51.100.1")
    guesses = []
    for pause_s in pauses_s:
        clock.now_s += pause_s
        if refused_s(attempts) == 0:
            attempts.wrong()
            guesses.append(clock.now_s)
    for at in guesses:
        assert sum(at <= other < at + 30 for other in guesses) <= 9
