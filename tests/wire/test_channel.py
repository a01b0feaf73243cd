"""Queues, flow control and endings, with streams, waiters and timers that do only what a test says."""

from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.pair import ROOMY, SAMPLES, as_sent, joined, read_frames, to_bytes
from wire import sender
from wire.channel import Channel
from wire.config import WireConfig
from wire.errors import (
    ConnectionLost,
    FrameError,
    LocalProtocolError,
    PeerError,
    RemoteProtocolError,
    WireError,
)
from wire.frames import PRELUDE_SIZE, FrameReader, Limits, encode_frame_head, split_frame_head
from wire.messages import Backward, Bye, Error, Forward, Message
from wire.protocol import Phase, Role
from wire.sender import Traits
from wire.serialize import decode, encode

pytestmark = pytest.mark.usefixtures("never_rests")

REASON = ConnectionLost("the test ends it")


class FakeWaiter:
    """Is waited on by a coroutine that a test resumes by hand."""

    def __init__(self) -> None:
        self.woken = False

    def done(self) -> bool:
        return self.woken

    def set_result(self, result: None, /) -> None:
        assert not self.woken
        self.woken = True

    def __await__(self) -> Generator[Any, None, None]:
        while not self.woken:
            yield


@dataclass
class FakeTimer:
    delay_s: float
    callback: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class FakeStream:
    """A stream over a kernel with little room.

    Attributes:
        room: bytes that the kernel takes before the stream has to buffer; None for no end.
        taken: what the kernel took.
        buffered: what it did not.
        writes: the buffers that were given, as they were given.
    """

    room: int | None = None
    taken: bytearray = field(default_factory=bytearray)
    buffered: bytearray = field(default_factory=bytearray)
    writes: list[Any] = field(default_factory=list)
    reading: bool = True
    eof: bool = False
    closed: bool = False
    aborted: bool = False
    channel: Any = None

    def write(self, data: memoryview, /) -> None:
        self.writelines([data])

    def writelines(self, buffers: list[Any], /) -> None:
        assert not self.is_closing(), "a write after the end"
        assert not self.eof, "a write after the end"
        self.writes += buffers
        self.buffered += joined(buffers)
        self._move()
        if self.buffered:
            self.channel.pause_writing()

    def drain(self, room: int | None = None) -> None:
        """The kernel has room again."""
        self.room = room
        before = bool(self.buffered)
        self._move()
        if before and not self.buffered:
            self.channel.resume_writing()

    def _move(self) -> None:
        count = len(self.buffered) if self.room is None else min(len(self.buffered), self.room)
        self.taken += self.buffered[:count]
        del self.buffered[:count]
        if self.room is not None:
            self.room -= count

    def write_eof(self) -> None:
        self.eof = True

    def get_write_buffer_size(self) -> int:
        return len(self.buffered)

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        self.reading = True

    def is_closing(self) -> bool:
        return self.closed or self.aborted

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.aborted = True


class End:
    """A channel, and everything around it faked.

    Attributes:
        held: what waits until the event loop is free; it is free at once where this is None.
    """

    held: list[Callable[[], None]] | None = None

    def __init__(
        self, role: Role = Role.SERVER, *, room: int | None = None, splits: bool = True, **settings: Any
    ) -> None:
        self.opened, self.lost = FakeWaiter(), FakeWaiter()
        self.timers: list[FakeTimer] = []
        self.config = WireConfig(**settings)
        self.channel = Channel(role, self.config, FakeWaiter, self._call_later, self.opened, self.lost)
        self.stream = FakeStream(room, channel=self.channel)
        self.splits = splits

    def _call_later(self, delay_s: float, callback: Callable[[], None]) -> FakeTimer:
        timer = FakeTimer(delay_s, callback)
        if delay_s:
            self.timers.append(timer)
        elif self.held is None:
            callback()
        else:
            self.held.append(callback)
        return timer

    @property
    def due(self) -> list[FakeTimer]:
        return [timer for timer in self.timers if not timer.cancelled]

    def fire(self) -> None:
        """Let the time pass after which the only timer is due."""
        (timer,) = self.due
        timer.cancel()
        timer.callback()

    def attach(self) -> "End":
        self.channel.attach(self.stream, Traits(splits=self.splits))
        self.channel.greet()
        return self

    def receive(self, *messages: Message) -> None:
        self.receive_bytes(b"".join(map(to_bytes, messages)))

    def receive_bytes(self, data: bytes) -> None:
        unread = memoryview(data)
        while unread:
            buffer = self.channel.protocol.next_buffer()
            count = min(len(buffer), len(unread))
            buffer[:count] = unread[:count]
            unread = unread[count:]
            self.channel.received(count)

    def hold(self) -> "End":
        """From now on the event loop is busy, but when `free` is called."""
        self.held = []
        return self

    def free(self) -> None:
        """The event loop is free for a moment."""
        while self.held:
            self.held.pop(0)()

    def running(self) -> "End":
        """A server's end, with a job on it; what it has said so far is forgotten."""
        room, self.stream.room = self.stream.room, None
        self.attach()
        self.receive(SAMPLES["hello"])
        self.receive(SAMPLES["open"])
        assert isinstance(self.channel.take(), type(SAMPLES["open"]))
        self.channel.queue(SAMPLES["ready"])
        assert self.channel.protocol.phase is Phase.RUNNING
        self.stream.taken.clear()
        self.stream.writes.clear()
        self.stream.room = room
        return self

    def sent(self) -> list[Message]:
        """The messages that the kernel has whole."""
        return [decode(frame) for frame in read_frames(FrameReader(ROOMY), bytes(self.stream.taken))]

    def sent_kinds(self) -> list[str]:
        return [message.kind for message in self.sent()]


def is_waiting(coroutine: Coroutine[Any, Any, Any]) -> bool:
    """Let a coroutine go on, and say whether it still waits."""
    try:
        coroutine.send(None)
    except StopIteration:
        return False
    return True


def large(nbytes: int = 1 << 20, *, backward: bool = False) -> Forward | Backward:
    """A message with a payload."""
    desc = {"dtype": "uint8", "shape": [nbytes], "order": "C", "size": nbytes}
    if backward:
        return Backward(1, 0, ["x"], [desc], None, np.zeros(nbytes, np.uint8))
    return Forward(1, 0, False, ["x"], [desc], np.zeros(nbytes, np.uint8))


# Beginning.


def test_client_greets_as_soon_as_the_stream_is_there() -> None:
    end = End(Role.CLIENT).attach()
    assert end.sent_kinds() == ["hello"]
    assert not end.opened.done()


@pytest.mark.parametrize(("role", "greeting"), [(Role.CLIENT, "welcome"), (Role.SERVER, "hello")])
def test_channel_is_open_once_both_ends_have_greeted(role: Role, greeting: str) -> None:
    end = End(role).attach()
    end.receive(SAMPLES[greeting])
    assert end.opened.done()
    assert end.channel.failure is None
    assert "ping" in end.sent_kinds()


def test_peer_that_does_not_greet_in_time_is_dropped() -> None:
    end = End(handshake_s=3.0).attach()
    assert [timer.delay_s for timer in end.due] == [3.0]
    end.fire()
    assert end.stream.aborted
    assert end.opened.done()
    assert "did not greet within 3 s" in str(end.channel.failure)


def test_greeting_ends_the_wait_for_it() -> None:
    end = End(handshake_s=3.0, heartbeat_s=7.0).attach()
    end.receive(SAMPLES["hello"])
    assert [timer.delay_s for timer in end.due] == [7.0]


# Sending.


def test_message_is_sent_at_once_where_there_is_room() -> None:
    end = End().running()
    receipt = end.channel.queue(SAMPLES["committed"])
    assert end.sent() == [SAMPLES["committed"]]
    assert receipt.end_ns is not None
    assert receipt.start_ns is not None
    assert receipt.start_ns <= receipt.end_ns


def test_receipt_waits_until_the_kernel_has_the_whole_frame() -> None:
    end = End(room=100).running()
    receipt = end.channel.queue(large())
    assert receipt.start_ns is not None
    for _ in range(20):
        if receipt.end_ns is None:
            assert end.sent_kinds() == []
            end.stream.drain(100_000)
    assert receipt.end_ns is not None
    assert end.sent_kinds() == ["forward"]


def test_payload_is_given_to_the_stream_without_a_copy() -> None:
    for splits in (True, False):
        end = End(splits=splits).running()
        message = large()
        end.channel.queue(message)
        views = [np.frombuffer(buffer, np.uint8) for buffer in end.stream.writes]
        shared = [view for view in views if np.shares_memory(view, message.payload)]
        assert sum(map(len, shared)) == len(message.payload)


def test_stream_that_copies_is_given_small_pieces() -> None:
    end = End(splits=True).running()
    end.channel.queue(large())
    assert max(map(len, end.stream.writes)) == 256 * 1024
    assert end.sent_kinds() == ["forward"]


def test_stream_that_copies_holds_one_piece_at_most() -> None:
    end = End(room=0, splits=True).running()
    end.channel.queue(large())
    sizes = []
    while end.stream.buffered:
        sizes.append(end.stream.get_write_buffer_size())
        end.stream.drain(50_000)
    assert max(sizes) <= 256 * 1024
    assert end.sent_kinds() == ["forward"]


def test_payloads_wait_until_the_loop_is_free_and_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    end = End(splits=False).running().hold()
    writes: list[int] = []
    write = end.stream.writelines
    monkeypatch.setattr(end.stream, "writelines", lambda b: (writes.append(sum(map(len, b))), write(b)))
    receipts = [end.channel.queue(SAMPLES[kind]) for kind in ("forward", "backward", "forward")]
    assert writes == []
    assert [receipt.start_ns for receipt in receipts] == [None] * 3
    end.free()
    assert writes == [sum(receipt.size for receipt in receipts)]
    assert sorted(end.sent_kinds()) == ["backward", "forward", "forward"]
    assert all(receipt.end_ns is not None for receipt in receipts)
    assert sum(receipt.busy_ns for receipt in receipts) <= receipts[0].end_ns - receipts[0].start_ns  # type: ignore[operator]


def test_the_loop_is_asked_once_for_all_that_waits() -> None:
    end = End().running().hold()
    for _ in range(3):
        end.channel.queue(SAMPLES["forward"])
    assert end.held is not None
    assert len(end.held) == 1
    end.free()
    end.channel.queue(SAMPLES["forward"])
    assert len(end.held) == 1


def test_frames_go_together_only_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(to_bytes(SAMPLES["forward"]))
    monkeypatch.setattr(sender, "_TOGETHER", 2 * size)
    end = End(room=0, splits=False).running().hold()
    for _ in range(5):
        end.channel.queue(SAMPLES["forward"])
    end.free()
    sizes = []
    while end.stream.buffered:
        sizes.append(len(end.stream.buffered))
        end.stream.drain(sizes[-1])
    assert sizes == [2 * size, 2 * size, size]


def test_what_orders_the_others_is_sent_at_once_with_what_waits_before_it() -> None:
    end = End().running().hold()
    end.channel.queue(SAMPLES["forward"])
    end.channel.queue(SAMPLES["committed"])
    assert end.sent_kinds() == ["forward", "committed"]
    end.free()
    assert end.sent_kinds() == ["forward", "committed"]


def test_what_waits_for_the_loop_is_forgotten_with_the_connection() -> None:
    end = End().running().hold()
    receipt = end.channel.queue(SAMPLES["forward"])
    end.channel.abort(REASON)
    end.free()
    assert end.sent_kinds() == []
    with pytest.raises(ConnectionLost):
        receipt.__await__().send(None)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 9000), st.booleans()), min_size=1, max_size=12),
    st.lists(st.integers(1, 30_000), max_size=12),
    st.booleans(),
)
def test_all_arrives_whatever_waits_and_goes_together(
    queued: list[tuple[bool, int, bool]], room: list[int], splits: bool
) -> None:
    end = End(room=0, splits=splits, send_queue=64).running().hold()
    end.channel._sender.pace.piece_bytes = 4096  # some go whole, some in pieces
    wanted: dict[str, list[Message]] = {"forward": [], "backward": []}
    receipts = []
    for backward, blocks, free in queued:
        message = large(blocks * 64, backward=backward)
        wanted[message.kind].append(message)
        receipts.append(end.channel.queue(message))
        if free:
            end.free()
    end.free()
    for nbytes in room:
        end.stream.drain(nbytes)
    end.stream.drain()
    end.free()
    sent = end.sent()
    for kind, messages in wanted.items():
        assert list(map(as_sent, (m for m in sent if m.kind == kind))) == list(map(as_sent, messages))
    assert all(receipt.end_ns is not None for receipt in receipts)
    assert sum(receipt.size for receipt in receipts) == len(end.stream.taken)


def test_only_one_frame_is_given_to_the_stream_at_a_time() -> None:
    end = End(room=0, splits=False).running()
    for name in ("committed", "forward", "forward"):
        end.channel.queue(SAMPLES[name])
    assert end.stream.get_write_buffer_size() == len(to_bytes(SAMPLES["committed"]))


def test_urgent_frame_waits_for_no_more_than_the_piece_under_way() -> None:
    end = End(room=0).running()
    end.channel.queue(large())
    end.channel.queue(SAMPLES["forward"])
    end.channel.queue(SAMPLES["backward"])
    end.receive(SAMPLES["ping"])
    end.stream.drain()
    assert end.sent_kinds() == ["pong", "forward", "forward", "backward"]


def test_server_sends_an_activation_between_the_pieces_of_a_gradient() -> None:
    end = End(room=0).running()
    end.channel.queue(large(backward=True))
    end.channel.queue(SAMPLES["forward"])
    end.stream.drain()
    assert end.sent_kinds() == ["forward", "backward"]


def test_receipt_is_done_after_the_last_piece_and_counts_every_prelude() -> None:
    end = End(room=0).running()
    receipt = end.channel.queue(large())
    whole = receipt.size
    end.stream.drain(600_000)
    assert receipt.end_ns is None
    end.stream.drain()
    assert receipt.end_ns is not None
    assert whole < receipt.size == len(end.stream.taken)


def test_sent_bytes_are_those_that_the_kernel_took() -> None:
    end = End(room=0).running()
    before = end.channel.sent_bytes
    receipt = end.channel.queue(large())
    assert end.channel.sent_bytes == before
    end.stream.drain(1000)
    assert end.channel.sent_bytes == before + 1000
    end.stream.drain()
    assert end.channel.sent_bytes == before + receipt.size


def test_malformed_message_is_refused_and_the_channel_goes_on() -> None:
    end = End().running()
    with pytest.raises(LocalProtocolError):
        end.channel.queue(SAMPLES["begin"])
    end.channel.queue(SAMPLES["committed"])
    assert end.sent_kinds() == ["committed"]


def test_queue_is_full_at_its_limit_and_has_room_after_one_has_gone() -> None:
    end = End(room=0, send_queue=2, splits=False).running()
    for _ in range(2):
        end.channel.queue(SAMPLES["forward"])  # the first is with the stream
        assert not end.channel.full
    end.channel.queue(SAMPLES["forward"])
    assert end.channel.full
    waiting = end.channel.room()
    assert is_waiting(waiting)
    end.stream.drain(len(to_bytes(SAMPLES["forward"])))
    assert not end.channel.full
    assert not is_waiting(waiting)


def test_heartbeats_do_not_fill_the_queue() -> None:
    end = End(room=0, send_queue=2).running()
    end.channel.queue(large())
    end.receive(*[SAMPLES["ping"]] * 50)
    assert not end.channel.full


def test_peer_that_floods_with_pings_and_reads_no_answers_is_dropped() -> None:
    end = End(room=0).running()
    end.channel.queue(large())
    for _ in range(256):
        end.receive(SAMPLES["ping"])
    assert not end.stream.aborted
    end.receive(SAMPLES["ping"])
    assert end.stream.aborted
    assert "floods" in str(end.channel.failure)


def test_who_waits_for_room_is_woken_by_a_failure() -> None:
    end = End(room=0, send_queue=1).running()
    for _ in range(2):
        end.channel.queue(large())
    waiting = end.channel.room()
    assert is_waiting(waiting)
    end.channel.abort(REASON)
    assert not is_waiting(waiting)


# Receiving.


def test_messages_are_taken_in_the_order_in_which_they_came() -> None:
    end = End().running()
    end.receive(SAMPLES["begin"], SAMPLES["ping"], SAMPLES["fetch"])
    assert [end.channel.take().kind for _ in range(2)] == ["begin", "fetch"]
    with pytest.raises(IndexError):
        end.channel.take()


def test_who_waits_for_a_message_is_woken_by_one() -> None:
    end = End().running()
    waiting = end.channel.arrival()
    assert is_waiting(waiting)
    end.receive(SAMPLES["ping"])
    assert is_waiting(waiting)
    end.receive(SAMPLES["begin"])
    assert not is_waiting(waiting)


def test_only_one_can_wait_for_a_message() -> None:
    end = End().running()
    first, second = end.channel.arrival(), end.channel.arrival()
    assert is_waiting(first)
    with pytest.raises(LocalProtocolError, match="only one receive"):
        second.send(None)
    first.close()
    third = end.channel.arrival()
    assert is_waiting(third)
    third.close()


def test_reading_stops_while_too_much_waits_to_be_taken() -> None:
    end = End(receive_queue=4).running()
    for count in range(1, 5):
        end.receive(SAMPLES["begin"])
        assert end.stream.reading == (count < 4)
    end.channel.take()
    assert not end.stream.reading
    end.channel.take()
    assert end.stream.reading


def test_heartbeats_are_answered_until_reading_stops() -> None:
    end = End(receive_queue=4).running()
    end.receive(SAMPLES["begin"], SAMPLES["ping"])
    assert end.sent_kinds() == ["pong"]


def test_silence_of_a_peer_that_is_not_read_is_no_loss() -> None:
    end = End(receive_queue=1).running()
    end.receive(SAMPLES["begin"])
    assert not end.stream.reading
    end.channel.protocol.config = WireConfig(timeout_s=1e-9)
    end.fire()
    assert end.channel.failure is None
    end.channel.take()
    end.fire()
    assert "nothing came from the peer" in str(end.channel.failure)
    assert end.stream.aborted


# Heartbeats.


def test_channel_pings_at_every_heartbeat() -> None:
    end = End(heartbeat_s=2.0).running()
    for _ in range(3):
        assert [timer.delay_s for timer in end.due] == [2.0]
        end.fire()
    assert end.sent_kinds() == ["ping"] * 3


def test_channel_looks_twice_within_a_short_timeout() -> None:
    end = End(heartbeat_s=10.0, timeout_s=1.0).running()
    assert [timer.delay_s for timer in end.due] == [0.5]


# Peers that are too slow. A window of a microsecond is over whenever the timer is due.


def test_frame_that_stops_coming_ends_the_connection() -> None:
    end = End(slow_s=1e-6).running()
    end.fire()
    end.receive_bytes(to_bytes(SAMPLES["forward"])[:-10])
    end.fire()
    assert end.channel.failure is None
    end.fire()
    assert end.stream.aborted
    assert "began a message and sent less" in str(end.channel.failure)


def test_heartbeats_between_the_pieces_of_a_frame_do_not_stand_for_them() -> None:
    head = split_frame_head(bytes(encode(large(), ROOMY)[0][0]), 2)
    end = End(slow_s=1e-6).running()
    end.receive_bytes(head)
    end.fire()
    end.receive(*[SAMPLES["ping"]] * 5000)
    end.fire()
    assert "began a message and sent less" in str(end.channel.failure)


def test_frame_that_stops_coming_because_it_is_not_read_is_no_fault_of_the_peer() -> None:
    end = End(slow_s=1e-6, receive_queue=1).running()
    end.receive_bytes(to_bytes(SAMPLES["begin"]) + to_bytes(SAMPLES["forward"])[:-10])
    assert not end.stream.reading
    for _ in range(3):
        end.fire()
    assert end.channel.failure is None
    end.channel.take()
    end.fire()
    end.fire()
    assert "began a message and sent less" in str(end.channel.failure)


def test_peer_that_does_not_read_is_dropped_with_all_that_waits_for_it() -> None:
    end = End(room=0, unread_s=1e-6).running()
    receipt = end.channel.queue(large())
    end.fire()
    end.receive(SAMPLES["ping"])
    assert end.channel.failure is None
    end.fire()
    assert end.stream.aborted
    with pytest.raises(ConnectionLost, match="took less than 1024 bytes/s of what waits"):
        next(receipt.__await__())


def test_client_that_opens_no_job_is_dropped_and_a_server_is_not() -> None:
    for role, greeting in ((Role.SERVER, "hello"), (Role.CLIENT, "welcome")):
        end = End(role, open_s=1e-6).attach()
        end.receive(SAMPLES[greeting])
        end.fire()
        assert end.stream.aborted == (role is Role.SERVER)
        assert ("opened no job" in str(end.channel.failure)) == (role is Role.SERVER)


def test_time_limits_are_looked_at_often_enough() -> None:
    end = End(heartbeat_s=3600.0, timeout_s=7200.0, slow_s=30.0).running()
    assert [timer.delay_s for timer in end.due] == [15.0]


def test_peer_that_reads_next_to_nothing_does_not_hold_up_the_end() -> None:
    end = End(room=0, close_s=4.0).running()
    end.channel.queue(large())
    end.channel.leave(Bye("done"), REASON)
    end.stream.drain(1000)
    end.fire()
    assert end.stream.aborted


# Ending.


def lose(end: End, error: Exception | None = None) -> None:
    """The stream ends, as it does after it was closed or aborted."""
    end.channel.detach(error)


def test_bye_goes_after_everything_that_is_queued() -> None:
    end = End(room=0).running()
    for name in ("forward", "backward", "committed"):
        end.channel.queue(SAMPLES[name])
    end.channel.leave(Bye("done"), REASON)
    end.stream.drain()
    assert end.sent_kinds() == ["forward", "backward", "committed", "bye"]
    assert end.stream.eof
    assert not end.stream.closed


def test_error_goes_before_everything_that_is_queued_and_nothing_follows_it() -> None:
    end = End(room=0).running()
    receipts = [end.channel.queue(SAMPLES[name]) for name in ("committed", "backward", "forward")]
    end.channel.leave(Error("internal_error", "sorry"), REASON)
    end.stream.drain()
    assert end.sent_kinds() == ["committed", "error"]
    assert end.stream.eof
    for receipt in receipts[1:]:
        assert receipt.end_ns is None
        with pytest.raises(ConnectionLost, match="the test ends it"):
            next(receipt.__await__())


def test_closed_channel_waits_for_the_peer_and_then_closes() -> None:
    end = End(close_s=4.0).running()
    end.channel.leave(Bye("done"), REASON)
    assert [timer.delay_s for timer in end.due] == [4.0]
    assert not end.stream.closed
    end.channel.received_eof()
    lose(end)
    assert end.lost.done()
    assert end.due == []


def test_peer_that_does_not_close_is_not_waited_for_for_ever() -> None:
    end = End(close_s=4.0).running()
    end.channel.leave(Bye("done"), REASON)
    end.fire()
    assert end.stream.closed
    assert not end.stream.aborted


def test_slow_peer_is_waited_for_as_long_as_it_reads() -> None:
    end = End(room=0, close_s=4.0).running()
    end.channel.queue(large())
    end.channel.leave(Bye("done"), REASON)
    for _ in range(3):
        end.stream.drain(100_000)
        end.fire()
        assert not end.stream.is_closing()
    end.fire()
    assert end.stream.aborted


def test_everything_fails_with_the_first_reason() -> None:
    end = End(room=0).running()
    receipt = end.channel.queue(large())
    end.channel.abort(REASON)
    end.channel.abort(ConnectionLost("another reason"))
    lose(end, ConnectionResetError())
    assert end.channel.failure is REASON
    with pytest.raises(ConnectionLost, match="the test ends it"):
        next(receipt.__await__())


def test_aborted_channel_sends_nothing_more() -> None:
    end = End(room=0).running()
    end.channel.queue(large())
    end.channel.queue(SAMPLES["committed"])
    end.channel.abort(REASON)
    assert end.stream.aborted
    end.channel.leave(Bye("done"), ConnectionLost("too late"))
    assert end.channel.failure is REASON


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (None, "the peer went away without saying bye"),
        (ConnectionResetError(), "the connection was reset: the peer went away"),
        (BrokenPipeError(), "the peer had closed the connection: the peer went away"),
        (TimeoutError(), "the network stopped delivering: the peer went away"),
    ],
)
def test_loss_says_how_it_came_about(error: Exception | None, says: str) -> None:
    end = End().running()
    waiting = end.channel.arrival()
    assert is_waiting(waiting)
    lose(end, error)
    assert not is_waiting(waiting)
    assert str(end.channel.failure).startswith(says)
    assert end.lost.done()
    assert end.due == []


def test_bye_of_the_peer_is_seen_and_answered_by_closing() -> None:
    end = End(room=0).running()
    receipt = end.channel.queue(large())
    end.channel.queue(SAMPLES["committed"])
    end.receive(Bye("that was all"))
    assert end.channel.take() == Bye("that was all")
    assert "that was all" in str(end.channel.failure)
    with pytest.raises(ConnectionLost):
        next(receipt.__await__())


def test_messages_before_a_bye_can_still_be_taken() -> None:
    end = End(receive_queue=100).running()
    end.receive(SAMPLES["begin"], SAMPLES["forward"], Bye("x"), SAMPLES["begin"])
    assert [message.kind for message in end.channel.inbox] == ["begin", "forward", "bye"]


def test_messages_before_an_error_can_still_be_taken() -> None:
    end = End().running()
    end.receive(SAMPLES["begin"], Error("broken", "sorry"))
    assert isinstance(end.channel.failure, PeerError)
    assert [message.kind for message in end.channel.inbox] == ["begin"]
    assert end.sent_kinds() == []
    assert end.stream.eof


def test_peer_that_breaks_the_protocol_is_told_and_left() -> None:
    end = End(close_s=4.0).running()
    end.receive_bytes(b"GARBAGE" * 10)
    (error,) = end.sent()
    assert isinstance(error, Error)
    assert error.code == "bad_frame"
    assert end.stream.eof
    assert isinstance(end.channel.failure, FrameError)
    end.channel.received_eof()
    lose(end)
    assert isinstance(end.channel.failure, FrameError)


def test_error_is_not_put_into_the_middle_of_a_frame() -> None:
    end = End(room=0, splits=True).running()
    end.channel.queue(large())
    end.receive(SAMPLES["committed"])  # which only a server may send
    end.stream.drain()
    assert isinstance(end.channel.failure, RemoteProtocolError)
    assert len(end.stream.taken) == 256 * 1024 or end.sent_kinds() == []
    assert b"error" not in end.stream.taken


def test_oversized_payload_is_refused_before_it_is_allocated() -> None:
    taken = []

    def allocate(nbytes: int) -> bytearray:
        taken.append(nbytes)
        return bytearray(nbytes)

    end = End(limits=Limits(1 << 20, 1000), allocate=allocate).running()
    taken.clear()
    end.receive_bytes(to_bytes(large())[:200])
    (error,) = end.sent()
    assert isinstance(error, Error)
    assert error.code == "limit_exceeded"
    assert taken == []


def test_nothing_is_sent_to_a_peer_that_speaks_another_protocol() -> None:
    end = End().attach()
    end.receive_bytes(b"GET / HTTP/1.1\r\n\r\n")
    assert end.stream.taken == b""
    assert end.stream.eof
    assert end.opened.done()


def test_greeting_with_garbage_behind_it_opens_nothing() -> None:
    end = End().attach()
    end.receive_bytes(to_bytes(SAMPLES["hello"]) + b"GARBAGE" * 10)
    assert end.opened.done()
    assert isinstance(end.channel.failure, FrameError)
    assert end.sent_kinds() == ["error"]


def test_messages_that_were_not_taken_are_dropped_on_leaving() -> None:
    end = End(receive_queue=1).running()
    end.receive(SAMPLES["begin"])
    assert not end.stream.reading
    end.channel.leave(Bye("done"), REASON)
    assert not end.channel.inbox
    assert end.stream.reading  # so that the peer's end is seen


def test_end_of_the_peer_in_the_middle_of_a_frame_is_told() -> None:
    end = End().running()
    end.receive_bytes(to_bytes(SAMPLES["forward"])[:-10])
    end.channel.received_eof()
    assert "in the middle of a frame: 54 of 64 payload bytes" in str(end.channel.failure)


# For all inputs.


def changed_header(kind: str, at: int, byte: int) -> bytes:
    """A frame with one byte of its header changed and a checksum that matches all the same."""
    data = to_bytes(SAMPLES[kind])
    header_end = PRELUDE_SIZE + int.from_bytes(data[8:12], "big")
    header = bytearray(data[PRELUDE_SIZE:header_end])
    header[at % len(header)] = byte
    return encode_frame_head(bytes(header), len(data) - header_end) + data[header_end:]


FRAMES = st.sampled_from(sorted(SAMPLES)).map(lambda kind: to_bytes(SAMPLES[kind]))
CHANGED = st.builds(
    changed_header, st.sampled_from(sorted(SAMPLES)), st.integers(0, 999), st.integers(0, 255)
)


@settings(max_examples=200, deadline=None)
@given(st.booleans(), st.lists(FRAMES | CHANGED | st.binary(max_size=60), max_size=6), st.booleans())
def test_whatever_the_peer_sends_the_channel_goes_on_or_ends_in_good_order(
    running: bool, stream: list[bytes], eof: bool
) -> None:
    end = End(receive_queue=100).running() if running else End(receive_queue=100).attach()
    end.receive_bytes(b"".join(stream))
    if eof:
        end.channel.received_eof()
    lost = end.channel.failure
    assert lost is None or isinstance(lost, WireError)
    assert not isinstance(lost, LocalProtocolError)
    assert end.stream.eof == (lost is not None)
    assert len(end.due) == 1  # the next heartbeat, or the patience with a peer that does not close
    if isinstance(lost, RemoteProtocolError) and end.stream.taken:
        assert end.sent_kinds()[-1] == "error"
