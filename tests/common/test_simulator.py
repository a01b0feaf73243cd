"""The dry run: it ends, keeps its bounds, agrees with arithmetic, and never beats the floor."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cost import ChunkCost, Link, Message, StepModel
from common.floor import floor
from common.schedule import WAIT, Action, Schedule, cloud_schedule
from common.simulator import DeadlockError, simulate

SECONDS = st.floats(0, 10) | st.just(0.0)
BYTES = st.integers(0, 10_000_000)
MESSAGES = st.builds(Message, size_bytes=BYTES, encode_s=SECONDS, decode_s=SECONDS)
COSTS = st.builds(
    ChunkCost,
    seconds=st.fixed_dictionaries(dict.fromkeys(("0F", "1F", "2T", "1B", "0B", "2F"), SECONDS)),
    messages=st.fixed_dictionaries(dict.fromkeys(("0F", "1F", "2T", "1B"), MESSAGES)),
)
LINKS = st.builds(
    Link, up_bit_s=st.floats(1e6, 1e9), down_bit_s=st.floats(1e6, 1e9), delay_s=st.floats(0, 5) | st.just(0.0)
)
UNEVEN = st.builds(
    StepModel,
    chunks=st.lists(COSTS, min_size=1, max_size=6).map(tuple),
    link=LINKS,
    shared_cores=st.booleans(),
    update_s=SECONDS,
)
EVEN = st.builds(
    lambda cost, chunks, link, share: StepModel(
        chunks=(cost,) * (chunks - 1) + (cost.scaled(share),), link=link
    ),
    COSTS,
    st.integers(1, 9),
    LINKS,
    st.floats(0.1, 1),
)
MODELS = UNEVEN | EVEN

UNIT = ChunkCost(seconds=dict.fromkeys(("0F", "1F", "2T", "1B", "0B"), 1.0), messages={})
FAST = Link(up_bit_s=1e12, down_bit_s=1e12)


@settings(deadline=None)
@given(model=MODELS, depth=st.integers(1, 8), lead=st.integers(0, 9), evaluate=st.booleans())
def test_no_schedule_deadlocks_or_beats_the_floor_or_exceeds_its_depth(
    model: StepModel, depth: int, lead: int, evaluate: bool
) -> None:
    timeline = simulate(model, depth, lead=lead, evaluate=evaluate)
    assert timeline.max_in_flight <= depth
    least = floor(model, evaluate=evaluate)
    assert least.total_s <= timeline.makespan_s * (1 + 1e-9) + 1e-9
    assert least.total_s >= max(least.loads_s.values()) - 1e-9


@settings(deadline=None)
@given(model=MODELS, depth=st.integers(1, 8))
def test_each_lane_does_one_thing_at_a_time_and_all_of_it(model: StepModel, depth: int) -> None:
    timeline = simulate(model, depth)
    wanted = {(piece.lane, piece.action): piece.seconds for chain in model.work() for piece in chain}
    # What crosses cut 1 may be on its way in several parts.
    assert {(span.lane, span.action) for span in timeline.spans} == wanted.keys()
    for lane in ("up", "down"):
        for action in {span.action for span in timeline.lane(lane)}:
            seconds = sum(span.end_s - span.start_s for span in timeline.lane(lane) if span.action == action)
            assert seconds == pytest.approx(wanted[lane, action], abs=1e-6)
    for lane in {lane for lane, _ in wanted}:
        spans = timeline.lane(lane)
        assert all(before.end_s <= after.start_s for before, after in pairwise(spans))
        assert timeline.idle_s(lane) >= -1e-9
        assert timeline.idle_s(lane) >= timeline.bubbles_s(lane) - 1e-9


@settings(deadline=None)
@given(model=MODELS, depth=st.integers(1, 8))
def test_a_chunk_goes_its_way_piece_by_piece(model: StepModel, depth: int) -> None:
    spans = {(span.lane, span.action): span for span in simulate(model, depth).spans}
    for chain in model.work():
        for before, after in pairwise(chain):
            earliest_s = spans[before.lane, before.action].end_s + before.delay_s
            assert spans[after.lane, after.action].start_s >= earliest_s - 1e-9


def test_unit_actions_over_a_free_link_take_the_grid_s_twelve_ticks() -> None:
    timeline = simulate(StepModel.even(UNIT, 4, FAST), 4)
    assert timeline.makespan_s == 12
    computed = " ".join(str(span.action) for span in timeline.lane("edge compute"))
    assert computed == "0F0 0F1 2T0 2T1 0F2 0F3 2T2 2T3 0B0 0B1 0B2 0B3"
    assert timeline.idle_s("edge compute") == 0
    assert timeline.bubbles_s("cloud compute") == 0


def test_one_chunk_takes_its_whole_way_and_the_floor_says_so() -> None:
    cost = ChunkCost(
        seconds={"0F": 1, "1F": 2, "2T": 3, "1B": 4, "0B": 5},
        messages={k: Message(size_bytes=125, encode_s=0.25, decode_s=0.5) for k in ("0F", "1F", "2T", "1B")},
    )
    model = StepModel.even(cost, 1, Link(up_bit_s=1000, down_bit_s=500, delay_s=10))
    way_s = 15 + 4 * (0.25 + 0.5) + 2 * 1 + 2 * 2 + 4 * 10
    assert simulate(model, 1).makespan_s == pytest.approx(way_s)
    assert floor(model).total_s == pytest.approx(way_s)


def test_the_floor_of_a_link_bound_step_is_fill_bytes_and_drain() -> None:
    # Only the first activation is large: the link up is full from the end of 0F0 until 0F7 has left.
    cost = ChunkCost(
        seconds={"0F": 1, "1F": 1, "2T": 1, "1B": 1, "0B": 1}, messages={"0F": Message(size_bytes=1000)}
    )
    model = StepModel.even(cost, 8, Link(up_bit_s=100, down_bit_s=1e12, delay_s=3))
    least = floor(model)
    assert (least.bound_by, least.fill_s, least.work_s) == ("up", 1, 8 * 80)
    assert least.drain_s == 4 + 4 * 3
    assert simulate(model, 8).makespan_s == pytest.approx(least.total_s)


def test_what_crosses_cut_2_goes_between_parts_of_what_crosses_cut_1() -> None:
    # Large messages at cut 1, in both directions; without interruption the turn of 0 would wait for all of 0F1.
    sizes = {"0F": 1000, "1F": 10, "2T": 10, "1B": 1000}
    cost = ChunkCost(seconds={}, messages={kind: Message(size_bytes=size) for kind, size in sizes.items()})
    timeline = simulate(StepModel.even(cost, 4, Link(up_bit_s=8, down_bit_s=8)), 4)
    parts = [span for span in timeline.lane("up") if span.action.kind == "0F" and span.action.chunk == 1]
    assert [(part.start_s, part.end_s) for part in parts] == [(1000, 1010), (1020, 2010)]
    assert timeline.makespan_s == floor(StepModel.even(cost, 4, Link(up_bit_s=8, down_bit_s=8))).total_s


def test_the_floor_of_shared_cores_is_the_sum_of_both_sides() -> None:
    model = StepModel.even(UNIT, 8, FAST, shared_cores=True)
    assert floor(model).total_s == 8 * 5
    assert floor(model).bound_by == "cores"
    assert simulate(model, 8).makespan_s == pytest.approx(8 * 5)


def test_the_update_comes_after_everything() -> None:
    model = StepModel(chunks=(UNIT,), link=FAST, update_s=2)
    assert simulate(model, 1).makespan_s == floor(model).total_s == 7


def test_gradients_overtake_activations_on_the_link() -> None:
    cost = ChunkCost(
        seconds={"0F": 0.1, "1F": 0.1, "2T": 0.1, "1B": 0.1, "0B": 0.1},
        messages={"0F": Message(size_bytes=1000), "2T": Message(size_bytes=10)},
    )
    sent = simulate(StepModel.even(cost, 4, Link(up_bit_s=8000, down_bit_s=1e12)), 4).lane("up")
    assert [str(span.action) for span in sent][:3] == ["0F0", "0F1", "2T0"]


def test_activations_have_the_lead_on_the_link_up() -> None:
    cost = ChunkCost(
        seconds={"0F": 0.1, "1F": 0.1, "2T": 0.1, "1B": 0.1, "0B": 0.1},
        messages={"0F": Message(size_bytes=1000), "2T": Message(size_bytes=10)},
    )
    model = StepModel.even(cost, 4, Link(up_bit_s=8000, down_bit_s=1e12))
    whole = {
        0: "0F0 0F1 2T0 0F1",
        1: "0F0 0F1 2T0 0F2",
        2: "0F0 0F1 2T0 0F2",
        3: "0F0 0F1 0F2 2T0",
        9: "0F0 0F1 0F2 0F3",
    }
    for lead, order in whole.items():
        sent = simulate(model, 4, lead=lead).lane("up")
        assert " ".join(str(span.action) for span in sent[:4]) == order


def waiting_for_ever() -> Schedule:
    yield Action.parse("0F0")
    while True:
        yield WAIT


def computing_too_early() -> Schedule:
    yield Action.parse("2T0")


def leaving_early() -> Schedule:
    yield Action.parse("0F0")


@pytest.mark.parametrize("schedule", [waiting_for_ever, computing_too_early, leaving_early])
def test_a_schedule_that_cannot_end_is_found_out(schedule: "type") -> None:
    with pytest.raises(DeadlockError):
        simulate(StepModel.even(UNIT, 2, FAST), 2, edge=schedule())


def test_a_cloud_that_ends_is_not_a_deadlock() -> None:
    assert simulate(StepModel.even(UNIT, 2, FAST), 2, cloud=cloud_schedule(2)).makespan_s > 0


def test_the_gantt_shows_every_lane_that_works() -> None:
    cost = ChunkCost(
        seconds={"0F": 2, "1F": 2, "2T": 2, "1B": 2, "0B": 2}, messages={"0F": Message(size_bytes=250)}
    )
    drawn = simulate(StepModel.even(cost, 2, Link(up_bit_s=1000, down_bit_s=1e12)), 2).render(42)
    assert drawn.splitlines() == [
        "edge compute  [0F0==[0F1==      [2T0==[2T1==[0B0==[0B1==",
        "up                  [0F0==[0F1==",
        "cloud compute             [1F0==[1F1==[1B0==[1B1==",
        "              0 to 14 s",
    ]


def test_costs_that_cannot_be_are_refused() -> None:
    for wrong in (
        lambda: Message(size_bytes=-1),
        lambda: ChunkCost(seconds={"0F": -1.0}, messages={}),
        lambda: Link(up_bit_s=0, down_bit_s=1),
        lambda: StepModel(chunks=(), link=FAST),
    ):
        with pytest.raises(ValueError, match=r"not negative|above 0|at least 1"):
            wrong()
