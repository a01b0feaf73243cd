"""A timeline adds up, and its picture fits its width."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cost import LANES
from common.schedule import Action
from common.timeline import Span, Timeline


def timeline_of(*spans, makespan_s=None):
    made = tuple(Span(lane, Action.parse(action), start_s, end_s) for lane, action, start_s, end_s in spans)
    return Timeline(
        spans=made,
        makespan_s=max((span.end_s for span in made), default=0.0) if makespan_s is None else makespan_s,
        max_in_flight=1,
    )


GAPPED = timeline_of(
    ("edge compute", "0F0", 1, 3), ("up", "0F0", 3, 4), ("edge compute", "0B0", 7, 8), makespan_s=10
)


def test_a_lane_is_busy_idle_and_has_a_bubble_between():
    assert GAPPED.busy_s("edge compute") == 3
    assert GAPPED.idle_s("edge compute") == 7
    assert GAPPED.bubbles_s("edge compute") == 4
    assert [str(span.action) for span in GAPPED.lane("edge compute")] == ["0F0", "0B0"]


def test_a_lane_without_work_is_idle_throughout_and_has_no_bubble():
    assert (GAPPED.busy_s("down"), GAPPED.idle_s("down"), GAPPED.bubbles_s("down")) == (0, 10, 0)
    assert GAPPED.lane("down") == []


def test_the_picture_has_a_row_for_each_lane_that_works():
    assert GAPPED.render(20).splitlines() == [
        "edge compute    [0F0        ==",
        "up                  ==",
        "              0 to 10 s",
    ]


def spans():
    """Spans of one lane after another, none overlapping within its lane."""

    def laid_out(drawn):
        lane, lengths = drawn
        now, made = 0.0, []
        for chunk, (gap, length) in enumerate(lengths):
            made.append(Span(lane, Action(0, "F", chunk), now + gap, now + gap + length))
            now += gap + length
        return made

    lengths = st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=1, max_size=12)
    return st.tuples(st.sampled_from(LANES), lengths).map(laid_out)


@settings(deadline=None)
@given(
    lanes=st.lists(spans(), min_size=1, max_size=8, unique_by=lambda made: made[0].lane),
    update_s=st.floats(0, 3),
    width=st.integers(1, 120),
)
def test_any_picture_fits_its_width_and_shows_every_lane_that_took_time(lanes, update_s, width):
    made = [span for lane in lanes for span in lane]
    end_s = max(span.end_s for span in made)
    timeline = Timeline(spans=tuple(made), makespan_s=end_s + update_s, max_in_flight=1)
    *rows, scale = timeline.render(width).splitlines()
    assert scale.split()[:2] == ["0", "to"]
    working = [lane for lane in LANES if any(s.end_s > s.start_s for s in timeline.lane(lane))]
    assert [row[:13].strip() for row in rows] == working
    assert all(len(row) <= 14 + width for row in rows)
    assert all(re.search(r"[=\[]", row[14:]) for row in rows)
    for lane in LANES:
        assert timeline.busy_s(lane) + timeline.idle_s(lane) == pytest.approx(timeline.makespan_s)
        assert timeline.bubbles_s(lane) <= timeline.idle_s(lane) + 1e-9
