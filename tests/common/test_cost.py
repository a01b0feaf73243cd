"""The cost model: what is refused, how a chunk's way is laid out, and what shares what."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cost import LANES, ChunkCost, Link, Message, StepModel
from common.timeline import Timeline

LINK = Link(up_bit_s=8000, down_bit_s=4000, delay_s=0.5)
KINDS = ("0F", "1F", "2T", "1B", "0B")
COST = ChunkCost(
    seconds={kind: 1.0 + index for index, kind in enumerate(KINDS)},
    messages={kind: Message(size_bytes=1000, encode_s=0.25, decode_s=0.75) for kind in KINDS[:-1]},
)


def test_a_chunk_goes_from_lane_to_lane_and_crosses_the_link_four_times():
    (chain,) = StepModel.even(COST, 1, LINK).work()
    assert [f"{piece.action} {piece.lane}" for piece in chain] == [
        *("0F0 edge compute", "0F0 edge encode", "0F0 up", "0F0 cloud decode"),
        *("1F0 cloud compute", "1F0 cloud encode", "1F0 down", "1F0 edge decode"),
        *("2T0 edge compute", "2T0 edge encode", "2T0 up", "2T0 cloud decode"),
        *("1B0 cloud compute", "1B0 cloud encode", "1B0 down", "1B0 edge decode"),
        "0B0 edge compute",
    ]
    assert [piece.place for piece in chain] == list(range(17))
    assert {piece.lane for piece in chain} == set(LANES)


def test_each_piece_takes_what_its_message_or_action_costs():
    (chain,) = StepModel.even(COST, 1, LINK).work()
    assert [piece.seconds for piece in chain if "compute" in piece.lane] == [1, 2, 3, 4, 5]
    assert {piece.seconds for piece in chain if "encode" in piece.lane} == {0.25}
    assert {piece.seconds for piece in chain if "decode" in piece.lane} == {0.75}
    # 1000 bytes are 8000 bits: a second up and two down. Only what crosses is delayed.
    assert [(p.seconds, p.delay_s) for p in chain if p.lane == "up"] == [(1, 0.5)] * 2
    assert [(p.seconds, p.delay_s) for p in chain if p.lane == "down"] == [(2, 0.5)] * 2
    assert all(piece.delay_s == 0 for piece in chain if piece.lane not in ("up", "down"))


def test_an_evaluation_goes_forward_only_and_crosses_the_link_twice():
    (chain,) = StepModel.even(COST, 1, LINK).work(evaluate=True)
    assert [str(piece.action) for piece in chain if "compute" in piece.lane] == ["0F0", "1F0", "2F0"]
    assert [piece.lane for piece in chain if piece.delay_s] == ["up", "down"]


def test_what_is_missing_costs_nothing():
    (chain,) = StepModel.even(ChunkCost(seconds={}, messages={}), 1, LINK).work()
    assert sum(piece.seconds for piece in chain) == 0


@pytest.mark.parametrize(
    ("shared", "resources"),
    [(False, {"edge", "cloud", "up", "down"}), (True, {"cores", "up", "down"})],
)
def test_lanes_of_a_side_share_its_cores_and_both_sides_may(shared, resources):
    model = StepModel.even(COST, 1, LINK, shared_cores=shared)
    assert {model.resource(lane) for lane in LANES} == resources
    assert model.resource("edge encode") == model.resource("edge compute")
    assert (model.resource("edge compute") == model.resource("cloud compute")) is shared


@settings(deadline=None)
@given(share=st.floats(0, 1))
def test_a_smaller_chunk_costs_its_share(share):
    smaller = COST.scaled(share)
    assert smaller.seconds == {kind: seconds * share for kind, seconds in COST.seconds.items()}
    for kind, message in smaller.messages.items():
        whole = COST.messages[kind]
        assert abs(message.size_bytes - whole.size_bytes * share) <= 0.5
        assert (message.encode_s, message.decode_s) == (whole.encode_s * share, whole.decode_s * share)


def test_another_link_changes_nothing_else():
    model = StepModel(chunks=(COST, COST.scaled(0.5)), link=LINK, shared_cores=True, update_s=3)
    other = model.with_link(Link(up_bit_s=1, down_bit_s=1))
    assert (other.chunks, other.shared_cores, other.update_s) == (model.chunks, True, 3)
    assert other.link.up_bit_s == 1


@pytest.mark.parametrize("number", [-1, -1e-9, math.nan, math.inf])
def test_a_cost_that_is_no_finite_number_of_seconds_is_refused(number):
    for wrong in (
        lambda: Message(encode_s=number),
        lambda: Message(decode_s=number),
        lambda: Message(size_bytes=number),
        lambda: ChunkCost(seconds={"0F": 1.0, "1F": number}, messages={}),
        lambda: StepModel(chunks=(COST,), link=LINK, update_s=number),
        lambda: Link(up_bit_s=1, down_bit_s=1, delay_s=number),
    ):
        with pytest.raises(ValueError, match=r"costs are finite|an update of|a delay of"):
            wrong()


@pytest.mark.parametrize("rate", [0, -1, math.nan])
def test_a_link_that_carries_nothing_is_refused(rate):
    for rates in ({"up_bit_s": rate, "down_bit_s": 1}, {"up_bit_s": 1, "down_bit_s": rate}):
        with pytest.raises(ValueError, match="rates above 0"):
            Link(**rates)


def test_a_step_without_chunks_is_refused():
    with pytest.raises(ValueError, match="at least 1 chunk"):
        StepModel.even(COST, 0, LINK)


def test_a_step_of_nothing_draws_as_an_empty_timeline():
    assert Timeline(spans=(), makespan_s=0, max_in_flight=0).render(10).split() == ["0", "to", "0", "s"]
