"""How long each part worked within the steps, and nothing outside them."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.lanes import COMPUTE, DECODE, ENCODE
from edge.busy import BusyTimes, number


class Side:
    """What `BusyTimes` looks at, worked by hand."""

    def __init__(self):
        self.lanes = SimpleNamespace(busy_s={COMPUTE: 0.0, ENCODE: 0.0, DECODE: 0.0})
        self.link = SimpleNamespace(sent=SimpleNamespace(busy_s=0.0))

    def work(self, compute_s, send_s):
        self.lanes.busy_s[COMPUTE] += compute_s
        self.lanes.busy_s[ENCODE] += 100
        self.link.sent.busy_s += send_s


def test_only_what_is_done_within_the_steps_counts():
    busy, side = BusyTimes(), Side()
    side.work(10, 20)  # opening
    busy.begin(side.lanes, side.link)
    side.work(1, 2)
    busy.end(side.lanes, side.link)
    side.work(30, 40)  # an evaluation
    busy.begin(side.lanes, side.link)
    side.work(0.5, 0.25)
    busy.end(side.lanes, side.link)
    assert (busy.edge_s, busy.up_s) == (1.5, 2.25)


def test_the_cloud_s_steps_add_up():
    busy = BusyTimes()
    for detail in ({"busy_s": {COMPUTE: 2.0, "send": 1}}, {"busy_s": {COMPUTE: 0.5, DECODE: 9.0}}):
        busy.committed(detail)
        assert busy.cloud_detail is detail
    assert (busy.cloud_s, busy.down_s) == (2.5, 1.0)


@pytest.mark.parametrize(
    "detail", [{}, {"busy_s": None}, {"busy_s": [1, 2]}, {"busy_s": {COMPUTE: "2", "send": None}}]
)
def test_a_cloud_that_says_nothing_of_use_counts_nothing(detail):
    busy = BusyTimes()
    busy.committed(detail)
    assert (busy.cloud_s, busy.down_s) == (0, 0)


@settings(deadline=None)
@given(
    value=st.none()
    | st.text()
    | st.lists(st.integers())
    | st.dictionaries(st.text(), st.integers())
    | st.binary()
)
def test_what_is_no_number_is_nothing(value):
    assert number(value) == 0.0


@settings(deadline=None)
@given(value=st.integers(0, 10**17) | st.floats(0, 1e17))
def test_a_number_is_itself(value):
    assert number(value) == float(value)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 10**400, -(10**400), "3", None, [1]])
def test_what_is_no_number_of_something_counts_as_none(value):
    assert number(value) == 0.0
