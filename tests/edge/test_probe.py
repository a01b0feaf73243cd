"""How fast both sides are, as a comparison with this machine."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.cost import ChunkCost, Link, Message
from edge.probe import Speeds, Steps

LOCAL = ChunkCost(
    seconds={"0F": 1.0, "1F": 2.0, "2T": 3.0, "1B": 4.0, "0B": 5.0},
    messages={
        "0F": Message(size_bytes=10, encode_s=0.1, decode_s=0.2),
        "1F": Message(size_bytes=20, encode_s=0.3, decode_s=0.4),
        "2T": Message(size_bytes=30, encode_s=0.5, decode_s=0.6),
        "1B": Message(size_bytes=40, encode_s=0.7, decode_s=0.8),
    },
)


def test_each_side_s_work_takes_its_own_time():
    scaled = Speeds(edge=2, cloud=10, edge_codecs=3, cloud_codecs=5).scaled(LOCAL)
    assert scaled.seconds == {"0F": 2, "1F": 20, "2T": 6, "1B": 40, "0B": 10}
    assert [message.size_bytes for message in scaled.messages.values()] == [10, 20, 30, 40]
    # What goes up the edge encodes and the cloud decodes.
    encoded = [scaled.messages[kind].encode_s for kind in ("0F", "2T", "1F", "1B")]
    assert encoded == pytest.approx([0.3, 1.5, 1.5, 3.5])
    decoded = [scaled.messages[kind].decode_s for kind in ("0F", "2T", "1F", "1B")]
    assert decoded == pytest.approx([1.0, 3.0, 1.2, 2.4])


SHARES = st.floats(1e-3, 1e3)


@given(speeds=st.builds(Speeds, edge=SHARES, cloud=SHARES, edge_codecs=SHARES, cloud_codecs=SHARES))
def test_what_was_scaled_compares_as_it_was_scaled(speeds):
    found = Speeds.between(speeds.scaled(LOCAL), LOCAL)
    assert vars(found) == pytest.approx(vars(speeds))


def test_what_was_not_measured_is_taken_for_this_machine_s():
    silent = replace(LOCAL, seconds={**LOCAL.seconds, "1F": 0.0, "1B": 0.0})
    assert Speeds.between(silent, LOCAL).cloud == 1
    nothing = ChunkCost(seconds=LOCAL.seconds, messages=dict.fromkeys(LOCAL.messages, Message()))
    assert Speeds.between(LOCAL, nothing).edge_codecs == 1


def steps(*, up_bit_s=1e12, down_bit_s=1e12, delay_s=0.0, step_s=0.0):
    link = Link(up_bit_s=up_bit_s, down_bit_s=down_bit_s, delay_s=delay_s)
    return Steps(cost=LOCAL, chunks=2, step_s=step_s, paced=link, shared_cores=False)


WORK_S = 15 + 3.6  # of a chunk: computing, encoding and decoding


def test_a_chunk_is_on_its_way_when_nobody_works_on_it():
    assert steps(step_s=2 * WORK_S).moving_s == pytest.approx(0)
    assert steps(step_s=2 * WORK_S + 3, delay_s=0.1).moving_s == pytest.approx(1.5 - 4 * 0.1)
    assert steps(step_s=1).moving_s == 0


def test_a_pace_is_believed_where_chunks_took_no_longer_than_that():
    # 40 bytes up at 320 bit/s and 60 down at 480: a second each.
    paced = steps(up_bit_s=320, down_bit_s=480, delay_s=0.1, step_s=2 * (WORK_S + 2.4 + 1.5))
    assert paced.moving_s == pytest.approx(3.5)
    assert paced.link == paced.paced


def test_a_pace_at_which_chunks_would_have_been_there_sooner_is_not():
    unpaced = steps(up_bit_s=320e3, down_bit_s=480e3, step_s=2 * (WORK_S + 2))
    assert unpaced.link.up_bit_s == pytest.approx(320)
    assert unpaced.link.down_bit_s == pytest.approx(480)
