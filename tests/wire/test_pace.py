"""How large pieces are."""

import pytest

from wire.pace import Pace


def paced(*taken: tuple[int, int]) -> Pace:
    """A pace after the kernel has taken some bytes in some milliseconds each."""
    now = [0]
    pace = Pace(lambda: now[0])
    for nbytes, milliseconds in taken:
        pace.begin()
        now[0] += milliseconds * 1_000_000
        assert pace.end(nbytes) == milliseconds * 1_000_000
    return pace


def test_pieces_are_small_until_the_pace_is_known() -> None:
    pace = paced((1 << 20, 100))
    assert pace.bytes_per_s is None
    assert pace.piece_bytes == 256 * 1024


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
    assert paced(fast, slow).bytes_per_s == 1_250_000
    assert paced(slow, fast).bytes_per_s == 50_000_000
