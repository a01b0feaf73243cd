"""How large pieces are."""

import pytest

from wire.pace import Delivery, Pace


def paced(*taken: tuple[int, int]) -> Pace:
    """A pace after the kernel has taken some bytes in some milliseconds each."""
    now = [0]
    pace = Pace(lambda: None, lambda: now[0])
    for nbytes, milliseconds in taken:
        pace.begin(nbytes)
        now[0] += milliseconds * 1_000_000
        assert pace.end(nbytes) == milliseconds * 1_000_000
    return pace


def test_pieces_are_small_until_the_pace_is_known() -> None:
    pace = paced((1 << 20, 100))
    assert pace.bytes_per_s is None
    assert pace.piece_bytes == 256 * 1024


def test_fast_link_is_known_as_one_after_few_bytes() -> None:
    pace = paced(*[(256 * 1024, 0)] * 31, (256 * 1024, 4))
    assert pace.bytes_per_s == (8 << 20) / 0.004
    assert paced(*[(256 * 1024, 1)] * 31).bytes_per_s is None


def test_what_a_buffer_took_in_no_time_is_no_pace() -> None:
    assert paced((64 << 20, 0)).bytes_per_s is None


@pytest.mark.parametrize(
    ("bytes_per_s", "piece_bytes"),
    [(1_250_000, 31_250), (100_000, 16_384), (12_500_000, 312_500), (10**9, 25_000_000)],
)
def test_piece_is_what_the_link_takes_in_25_milliseconds(bytes_per_s: int, piece_bytes: int) -> None:
    pace = paced(*[(bytes_per_s // 10, 100)] * 2)
    assert pace.bytes_per_s == bytes_per_s
    assert pace.piece_bytes == piece_bytes


def test_pace_follows_a_link_that_changes() -> None:
    fast, slow = (10_000_000, 200), (250_000, 200)
    assert paced(fast, *[slow] * 20).bytes_per_s == pytest.approx(1_250_000, rel=0.05)
    assert paced(slow, *[fast] * 20).bytes_per_s == pytest.approx(50_000_000, rel=0.05)


def test_pace_is_a_mean_over_the_last_second() -> None:
    some, more = (200_000, 200), (300_000, 200)
    assert paced(*[some, more] * 10).bytes_per_s == pytest.approx(1_250_000, rel=0.1)


class Kernel:
    """What a kernel tells, and the time."""

    def __init__(self, *, rtt_ms: int = 0) -> None:
        self.now_ns = self.delivered = 0
        self.idle = False
        self.pace = Pace(
            lambda: Delivery(self.delivered, self.idle, rtt_ms * 1_000_000), clock_ns=lambda: self.now_ns
        )

    def take(self, after_ms: int, delivered: int) -> None:
        """Take a megabyte, after some time in which some bytes arrived."""
        self.pace.begin(1 << 20)
        self.now_ns += after_ms * 1_000_000
        self.delivered += delivered
        self.pace.end(1 << 20)
        self.idle = False


def test_what_the_kernel_buffers_says_nothing_about_the_link() -> None:
    kernel = Kernel()
    for _ in range(10):
        kernel.take(0, 0)
        kernel.take(50, 10_000)
    assert kernel.pace.bytes_per_s == 200_000


def test_round_trip_before_anything_is_acknowledged_does_not_count() -> None:
    kernel = Kernel(rtt_ms=40)
    for _ in range(10):
        kernel.idle = True
        kernel.take(0, 0)
        kernel.take(30, 0)
        kernel.take(30, 4000)
        kernel.take(30, 6000)
    assert kernel.pace.bytes_per_s == 200_000


def test_link_that_delivers_nothing_for_a_while_has_no_pace_of_zero() -> None:
    kernel = Kernel()
    kernel.take(1000, 0)
    assert kernel.pace.bytes_per_s is None


class Counting(Kernel):
    """A kernel that counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.pace = Pace(self.ask, clock_ns=lambda: self.now_ns)

    def ask(self) -> Delivery:
        self.asked += 1
        return Delivery(self.delivered, False, 0)

    def send(self, nbytes: int, microseconds: int) -> None:
        self.pace.begin(nbytes)
        self.now_ns += microseconds * 1000
        self.delivered += nbytes
        self.pace.end(nbytes)


def test_small_messages_on_a_fast_link_are_sent_without_asking_the_kernel() -> None:
    kernel = Counting()
    for _ in range(20):
        kernel.send(100_000_000, 100_000)
    assert kernel.pace.piece_bytes == 25_000_000
    kernel.asked = 0
    for _ in range(100):
        kernel.send(64 * 1024, 20)
    assert kernel.asked == 0
    assert kernel.pace.bytes_per_s == 10**9


def test_a_fast_link_that_becomes_slow_is_noticed_by_small_messages_too() -> None:
    kernel = Counting()
    for _ in range(20):
        kernel.send(100_000_000, 100_000)
    for _ in range(200):
        kernel.send(64 * 1024, 52_000)
    assert kernel.pace.bytes_per_s == pytest.approx(64 * 1024 / 0.052, rel=0.01)
