"""Time limits against peers that are alive but too slow, by a clock that a test turns."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.config import WireConfig
from wire.errors import ConnectionLost
from wire.watch import Flow, Watch


class Scene:
    """A watch, and what it is told."""

    def __init__(self, **settings: Any) -> None:
        self.now_s = 0.0
        self.watch = Watch(WireConfig(**settings), lambda: int(self.now_s * 1e9))
        self.told: dict[str, Any] = {
            "arriving": False,
            "received_bytes": 0,
            "waiting": False,
            "sent_bytes": 0,
            "unopened": False,
        }

    def after(self, seconds: float, **told: Any) -> str:
        """Let time pass, and say how the watch ends the connection, if it does."""
        self.now_s += seconds
        self.told.update(told)
        try:
            self.watch.check(**self.told)
        except ConnectionLost as lost:
            return str(lost)
        return ""


def test_frame_that_stops_coming_ends_the_connection() -> None:
    scene = Scene()
    assert scene.after(0, arriving=True) == ""
    assert scene.after(29, received_bytes=20_000) == ""
    assert "sent less than 1024 bytes/s of it for 30 s" in scene.after(1)


def test_slow_frame_may_take_as_long_as_it_keeps_coming() -> None:
    scene = Scene()
    for window in range(100):
        assert scene.after(30, arriving=True, received_bytes=window * 30 * 1024) == ""


def test_heartbeats_do_not_stand_for_the_rest_of_a_frame() -> None:
    scene = Scene()
    scene.after(0, arriving=True)
    ends = [scene.after(5, received_bytes=beat * 60) for beat in range(1, 7)]
    assert ends[:5] == [""] * 5
    assert "sent less" in ends[5]


def test_time_between_frames_does_not_count() -> None:
    scene = Scene()
    for frame in range(10):
        assert scene.after(20, arriving=True, received_bytes=frame) == ""
        scene.watch.received(arriving=False)
        assert scene.after(0, arriving=True) == ""
        scene.watch.received(arriving=False)


def test_time_in_which_this_end_does_not_read_does_not_count() -> None:
    scene = Scene()
    scene.after(0, arriving=True)
    assert scene.after(29, arriving=False) == ""
    assert scene.after(500) == ""
    assert scene.after(10, arriving=True) == ""
    assert scene.after(29) == ""
    assert "sent less" in scene.after(1)


def test_peer_that_does_not_read_ends_the_connection() -> None:
    scene = Scene()
    scene.after(0, waiting=True, sent_bytes=10**6)
    assert scene.after(119) == ""
    assert "took less than 1024 bytes/s of what waits for it for 120 s" in scene.after(1)


def test_peer_that_reads_slowly_is_waited_for() -> None:
    scene = Scene()
    for window in range(20):
        assert scene.after(120, waiting=True, sent_bytes=window * 120 * 1024) == ""


def test_sending_nothing_is_no_slowness() -> None:
    scene = Scene()
    for _ in range(100):
        assert scene.after(60) == ""
        assert scene.after(60, waiting=True) == ""
        assert scene.after(60, waiting=False) == ""


def test_client_that_opens_no_job_is_let_go() -> None:
    scene = Scene(open_s=600)
    assert scene.after(0, unopened=True) == ""
    assert scene.after(599) == ""
    assert "opened no job within 600 s" in scene.after(1)


def test_client_that_opened_a_job_may_take_its_time() -> None:
    scene = Scene()
    scene.after(0, unopened=True)
    assert scene.after(599, unopened=False) == ""
    assert scene.after(10_000) == ""


@pytest.mark.parametrize("name", ["slow_s", "unread_s", "open_s", "least_bytes_per_s"])
def test_limits_can_be_set(name: str) -> None:
    assert Watch(WireConfig(**{name: 1})).period_s <= 15
    with pytest.raises(ValueError, match=f"{name} has to be above 0"):
        WireConfig(**{name: 0})


@given(st.lists(st.tuples(st.floats(0.1, 5), st.integers(0, 20_000)), min_size=1, max_size=100))
def test_flow_is_slow_only_if_too_little_flowed_for_a_whole_window(steps: list[tuple[float, int]]) -> None:
    now_ns = nbytes = 0
    flow = Flow(1000, 10, lambda: now_ns)
    history = [(0, 0)]
    flow.is_slow(0)
    for seconds, more in steps:
        now_ns += int(seconds * 1e9)
        nbytes += more
        history.append((now_ns, nbytes))
        slow = flow.is_slow(nbytes)
        # Over every stretch of at least two windows and a step, some whole window was checked.
        enough = [b for t, b in history if now_ns - t >= 10e9]
        if slow:
            assert enough
            assert any(nbytes - b < 1000 * (now_ns - t) / 1e9 for t, b in history if now_ns - t >= 10e9)
            return
        stuck = [b for t, b in history if now_ns - t >= 25e9]
        assert not stuck or nbytes > stuck[-1]
