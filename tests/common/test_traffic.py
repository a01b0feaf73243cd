"""What a side has sent, in sums and by kind of message."""

import math
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.traffic import Sent

FRAMES = st.lists(
    st.tuples(
        st.sampled_from(("0F", "2T", "1F", "1B")),
        st.integers(0, 4000),
        st.integers(0, 1 << 40),
        st.floats(0, 1e6),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(frames=FRAMES)
def test_sizes_are_means_by_kind_and_rate_is_over_all_frames(frames):
    sent = Sent()
    for kind, chunk, size, seconds in frames:
        sent.add(f"{kind}{chunk}", size, seconds)
    busy_s = sum(seconds for *_, seconds in frames)
    assert sent.busy_s == pytest.approx(busy_s)
    if sent.busy_s > 0:
        assert sent.rate_bit_s == sum(size for _, _, size, _ in frames) * 8 / sent.busy_s
    kinds = {kind for kind, *_ in frames}
    assert sent.take_sizes() == {k: fmean(size for kind, _, size, _ in frames if kind == k) for k in kinds}


def test_a_link_that_took_no_time_has_no_bound():
    sent = Sent()
    assert sent.rate_bit_s == math.inf
    sent.add("0F0", 1000, 0.0)
    assert sent.rate_bit_s == math.inf


def test_sizes_are_of_the_frames_since_they_were_last_taken_and_the_rate_of_all():
    sent = Sent()
    sent.add("0F0", 100, 1.0)
    sent.add("0F12", 300, 1.0)
    assert sent.take_sizes() == {"0F": 200}
    sent.add("2T0", 50, 2.0)
    assert sent.take_sizes() == {"2T": 50}
    assert sent.take_sizes() == {}
    assert (sent.busy_s, sent.rate_bit_s) == (4.0, 900.0)


def test_where_the_link_s_pace_is_known_it_counts_whatever_the_kernel_buffered():
    sent = Sent()
    sent.add("0F0", 1000, 0.0, 100.0)
    assert (sent.busy_s, sent.rate_bit_s) == (10.0, 800.0)
    sent.add("0F1", 1000, 30.0, 50.0)
    assert (sent.busy_s, sent.rate_bit_s) == (40.0, 400.0)
