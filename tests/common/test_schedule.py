"""The schedule as a grid to look at, and its rules for all sizes, delays and orders of arrival."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.schedule import WAIT, Action, cloud_schedule, edge_schedule

ANSWERED_BY = {"0F": "1F", "1F": "2T", "2T": "1B", "1B": "0B"}
EVALUATION_ANSWERED_BY = {"0F": "1F", "1F": "2F"}


def grid(chunks: int, depth: int, *, delay: int = 0, evaluate: bool = False) -> list[str]:
    """Both sides in ticks: every action takes one, and a message `delay` more."""
    answered_by = EVALUATION_ANSWERED_BY if evaluate else ANSWERED_BY
    schedules = [edge_schedule(chunks, depth, evaluate=evaluate), cloud_schedule(chunks, evaluate=evaluate)]
    inboxes: list[list[tuple[int, Action]]] = [[], []]
    rows: list[list[str]] = [[], []]
    actions = [next(schedule) for schedule in schedules]
    ended = [False, False]
    for tick in range(20 * chunks * (1 + delay)):
        for side, action in enumerate(actions):
            if not ended[side]:
                rows[side].append(".. " if action is WAIT else str(action))
                if action is not WAIT and action.kind in answered_by:
                    answer = Action.parse(f"{answered_by[action.kind]}{action.chunk}")
                    inboxes[1 - side].append((tick + delay, answer))
        for side, schedule in enumerate(schedules):
            arrived = [answer for due, answer in inboxes[side] if due <= tick]
            inboxes[side] = [item for item in inboxes[side] if item[0] > tick]
            if not ended[side]:
                try:
                    actions[side] = schedule.send(arrived)
                except StopIteration:
                    ended[side] = True
        if all(ended):
            return [" ".join(row).rstrip() for row in rows]
    raise AssertionError("the schedules never end")


def test_four_chunks_in_flight_over_a_link_without_delay() -> None:
    assert grid(4, 4) == [
        "0F0 0F1 2T0 2T1 0F2 0F3 2T2 2T3 0B0 0B1 0B2 0B3",
        "..  1F0 1F1 1B0 1B1 1F2 1F3 1B2 1B3",
    ]


def test_depth_two_leaves_the_edge_waiting_for_a_slow_link() -> None:
    assert grid(4, 2, delay=1) == [
        "0F0 0F1 ..  ..  2T0 2T1 ..  ..  0B0 0F2 0B1 0F3 ..  2T2 ..  2T3 ..  0B2 ..  0B3",
        "..  ..  1F0 1F1 ..  ..  1B0 1B1 ..  ..  ..  1F2 ..  1F3 ..  1B2 ..  1B3",
    ]


def test_depth_four_fills_the_same_link() -> None:
    assert grid(4, 4, delay=1) == [
        "0F0 0F1 0F2 0F3 2T0 2T1 2T2 2T3 0B0 0B1 0B2 0B3",
        "..  ..  1F0 1F1 1F2 1F3 1B0 1B1 1B2 1B3",
    ]


def test_depth_one_runs_one_chunk_after_another() -> None:
    assert grid(2, 1) == [
        "0F0 ..  2T0 ..  0B0 0F1 ..  2T1 ..  0B1",
        "..  1F0 ..  1B0 ..  ..  1F1 ..  1B1",
    ]


def test_evaluation_goes_forward_only() -> None:
    assert grid(3, 2, evaluate=True) == [
        "0F0 0F1 2F0 2F1 0F2 ..  2F2",
        "..  1F0 1F1 ..  ..  1F2",
    ]


def test_a_turn_goes_first_and_a_front_backward_last_on_the_edge() -> None:
    schedule = edge_schedule(4, 3)
    assert [str(next(schedule)), str(schedule.send([]))] == ["0F0", "0F1"]
    assert str(schedule.send([Action.parse("2T0"), Action.parse("2T1")])) == "2T0"
    assert str(schedule.send([Action.parse("0B0")])) == "2T1"
    assert [str(schedule.send([])), str(schedule.send([]))] == ["0F2", "0B0"]


def test_a_front_backward_goes_first_where_no_more_chunks_may_be_in_flight() -> None:
    schedule = edge_schedule(3, 1)
    assert str(next(schedule)) == "0F0"
    assert str(schedule.send([Action.parse("2T0")])) == "2T0"
    assert [str(schedule.send([Action.parse("0B0")])), str(schedule.send([]))] == ["0B0", "0F1"]


def test_a_forward_goes_before_a_backward_on_the_cloud() -> None:
    schedule = cloud_schedule(3)
    assert next(schedule) is WAIT
    assert str(schedule.send([Action.parse("1F0"), Action.parse("1F1")])) == "1F0"
    assert str(schedule.send([Action.parse("1B0")])) == "1F1"
    assert str(schedule.send([])) == "1B0"


def test_messages_that_come_out_of_order_are_computed_in_order() -> None:
    schedule = cloud_schedule(3)
    next(schedule)
    assert schedule.send([Action.parse("1F2"), Action.parse("1F1")]) is WAIT
    assert [str(a) for a in (schedule.send([Action.parse("1F0")]), schedule.send([]), schedule.send([]))] == [
        "1F0",
        "1F1",
        "1F2",
    ]


@pytest.mark.parametrize(
    ("arrivals", "complaint"),
    [
        (["1F0"], "only 2T, 0B can arrive here"),
        (["2T9"], "the step has chunks 0 to 3"),
        (["2T3"], "before 0F3 was done"),
        (["2T0", "2T0"], "arrived twice"),
        (["0B0"], "before 2T0 was done"),
        (["2F0"], "only 2T, 0B can arrive here"),
    ],
)
def test_the_edge_refuses_what_it_does_not_await(arrivals: list[str], complaint: str) -> None:
    schedule = edge_schedule(4, 4)
    next(schedule)
    with pytest.raises(ValueError, match=complaint):
        schedule.send([Action.parse(text) for text in arrivals])


@pytest.mark.parametrize(
    ("arrivals", "complaint"), [(["1B0"], "before 1F0 was done"), (["1F4"], "chunks 0 to 3")]
)
def test_the_cloud_refuses_what_it_does_not_await(arrivals: list[str], complaint: str) -> None:
    schedule = cloud_schedule(4)
    next(schedule)
    with pytest.raises(ValueError, match=complaint):
        schedule.send([Action.parse(text) for text in arrivals])


def test_an_arrival_for_a_negative_chunk_is_refused() -> None:
    schedule = cloud_schedule(4)
    next(schedule)
    with pytest.raises(ValueError, match="chunks 0 to 3"):
        schedule.send([Action(1, "F", -1)])


@pytest.mark.parametrize(("chunks", "depth"), [(0, 1), (1, 0), (-1, 1)])
def test_a_step_of_nothing_is_refused_at_once(chunks: int, depth: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        edge_schedule(chunks, depth)


@given(st.sampled_from(["0F", "1F", "2T", "1B", "0B", "2F"]), st.integers(0, 10_000))
def test_an_action_reads_back_as_it_prints(kind: str, chunk: int) -> None:
    action = Action.parse(f"{kind}{chunk}")
    assert (str(action), repr(action), action.kind, action.chunk) == (f"{kind}{chunk}",) * 2 + (kind, chunk)


@pytest.mark.parametrize("text", ["", "0F", "3F1", "0T1", "0F-1", "0F1.5", "0F²"])
def test_text_that_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no action"):
        Action.parse(text)


@given(
    chunks=st.integers(1, 12),
    depth=st.integers(1, 14),
    delay=st.integers(0, 7),
    evaluate=st.booleans(),
)
def test_every_step_ends_in_order_and_within_depth(
    chunks: int, depth: int, delay: int, evaluate: bool
) -> None:
    edge, cloud = (row.split() for row in grid(chunks, depth, delay=delay, evaluate=evaluate))
    first, last = "0F", "2F" if evaluate else "0B"
    for row, kinds in (
        (edge, ("0F", "2F") if evaluate else ("0F", "2T", "0B")),
        (cloud, ("1F",) if evaluate else ("1F", "1B")),
    ):
        for kind in kinds:
            assert [cell for cell in row if cell.startswith(kind)] == [
                f"{kind}{chunk}" for chunk in range(chunks)
            ]
    in_flight = 0
    for cell in edge:
        in_flight += cell.startswith(first)
        assert in_flight <= depth
        in_flight -= cell.startswith(last)
    assert in_flight == 0


def test_the_schedule_and_the_simulator_import_without_torch() -> None:
    modules = "common.schedule, common.simulator, common.floor, common.trace, common.runtime"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
