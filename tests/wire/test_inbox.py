"""When a stream is not read: while too many messages wait, while it rests, and while both are so."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.wire.pair import SAMPLES
from wire.inbox import Inbox
from wire.loop import Timer


class Stream:
    reading = True
    closing = False

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        assert not self.closing
        self.reading = True

    def is_closing(self) -> bool:
        return self.closing


class Resting:
    """An inbox that is told when to rest, and for how long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream: Any = Stream()
        self.waits: list[tuple[float, Callable[[], None]]] = []
        self.rest_s = 0.0
        monkeypatch.setattr("wire.rest.Rest.after", lambda *_: self.rest_s)
        self.inbox = Inbox(2, self.never, self.call_later)

    def never(self) -> Any:
        raise AssertionError("nobody waits")

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        self.waits.append((delay_s, callback))
        return None  # type: ignore[return-value]

    def arrived(self, messages: int = 0, *, rest_s: float = 0.0) -> None:
        self.rest_s = rest_s
        self.inbox.messages.extend([SAMPLES["ping"]] * messages)
        self.inbox.arrived(self.stream, 1000, 1000)

    def rested(self) -> None:
        ((_, callback),) = self.waits
        self.waits.clear()
        callback()


@pytest.fixture
def resting(monkeypatch: pytest.MonkeyPatch) -> Resting:
    return Resting(monkeypatch)


def test_stream_is_read_again_after_its_rest(resting: Resting) -> None:
    resting.arrived()
    assert resting.stream.reading
    resting.arrived(rest_s=0.01)
    assert not resting.stream.reading
    assert resting.waits[0][0] == 0.01
    resting.rested()
    assert resting.stream.reading


def test_rest_that_ends_while_too_many_messages_wait_changes_nothing(resting: Resting) -> None:
    resting.arrived(2, rest_s=0.01)
    resting.rested()
    assert not resting.stream.reading
    resting.inbox.take(resting.stream)
    assert resting.stream.reading


def test_messages_taken_in_a_rest_do_not_end_it(resting: Resting) -> None:
    resting.arrived(2, rest_s=0.01)
    resting.inbox.take(resting.stream)
    assert not resting.stream.reading
    resting.rested()
    assert resting.stream.reading


def test_bytes_that_were_under_way_when_a_rest_began_do_not_begin_another(resting: Resting) -> None:
    resting.arrived(rest_s=0.01)
    resting.arrived(rest_s=0.01)  # read before the loop stopped
    resting.rested()
    assert resting.stream.reading


def test_stream_that_ended_in_a_rest_is_left_alone(resting: Resting) -> None:
    resting.arrived(rest_s=0.01)
    resting.stream.closing = True
    resting.rested()
    assert not resting.stream.reading


def test_nothing_rests_after_the_end(resting: Resting) -> None:
    resting.inbox.close()
    resting.arrived(rest_s=0.01)  # what still comes is read, so that the peer can close
    assert resting.stream.reading
