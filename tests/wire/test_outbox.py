"""What is sent first."""

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.pair import ROOMY, read_frames
from wire.errors import ConnectionLost
from wire.frames import FrameReader, encode_frame_head
from wire.messages import MESSAGE_TYPES
from wire.outbox import ENDLESS, Outbox, SendReceipt

URGENT = ["ping", "pong", "error", "abort"]
MOVABLE = ["backward", "forward", "weights"]
ORDERING = sorted(set(MESSAGE_TYPES) - {*URGENT, *MOVABLE})


def receipt(data: bytes = b"") -> SendReceipt:
    return SendReceipt([data], len(data), asyncio.Future)


def order(*kinds: str, lead: int = 0) -> list[str]:
    """The order in which messages of these kinds leave, numbered as they came; all are of one chunk."""
    outbox = Outbox(lead=lead)
    named = {}
    for number, kind in enumerate(kinds):
        one = receipt()
        named[id(one)] = one, f"{kind} {number}"
        outbox.push(kind, one)
    assert len(outbox) == len(kinds)
    return [named[id(outbox.take(1)[1])][1] for _ in kinds]


def test_messages_of_a_kind_keep_their_order() -> None:
    for kind in MESSAGE_TYPES:
        assert order(kind, kind, kind) == [f"{kind} 0", f"{kind} 1", f"{kind} 2"]


def test_backward_goes_before_forward_and_weights_go_last() -> None:
    assert order("weights", "forward", "backward", "forward") == [
        "backward 2",
        "forward 1",
        "forward 3",
        "weights 0",
    ]


def test_forward_goes_before_backward_where_activations_are_more_urgent() -> None:
    kinds = ("weights", "backward", "forward", "backward")
    assert order(*kinds, lead=ENDLESS) == ["forward 2", "backward 1", "backward 3", "weights 0"]


def large(*sizes: int) -> SendReceipt:
    buffers = [encode_frame_head(b"header", sum(sizes)), *(memoryview(bytes(size)) for size in sizes)]
    return SendReceipt(buffers, sum(map(len, buffers)), asyncio.Future)


@pytest.mark.parametrize(
    ("lead", "order"),
    [
        (0, "B0 B1 F1 F2 F3"),
        (1, "B0 F1 B1 F2 F3"),
        (2, "F1 B0 F2 B1 F3"),
        (ENDLESS, "F1 F2 F3 B0 B1"),
    ],
)
def test_activations_are_ahead_of_gradients_by_the_lead(lead: int, order: str) -> None:
    outbox = Outbox(lead=lead)
    named = {}
    for name in ("F1", "F2", "F3", "B0", "B1"):
        one = receipt()
        named[id(one)] = name, one
        outbox.push({"F": "forward", "B": "backward"}[name[0]], one, int(name[1]))
    assert " ".join(named[id(outbox.take(1)[1])][0] for _ in range(5)) == order


@pytest.mark.parametrize(("lead", "interrupted"), [(0, True), (1, False), (2, False)])
def test_activation_on_its_way_is_interrupted_only_for_a_gradient_that_is_before_it(
    lead: int, interrupted: bool
) -> None:
    outbox = Outbox(lead=lead)
    activation, gradient = large(300), large(100)
    outbox.push("forward", activation, 5)
    assert outbox.take(100)[1] is activation
    outbox.push("backward", gradient, 4)
    assert (outbox.take(100)[1] is gradient) is interrupted


PUSHES = st.tuples(st.sampled_from(["forward", "backward"]), st.integers(1, 400), st.integers(0, 6))


@settings(max_examples=200, deadline=None)
@given(st.lists(PUSHES | st.none(), max_size=30))
def test_whatever_the_lead_the_peer_puts_every_frame_together_again(
    events: list[tuple[str, int, int] | None],
) -> None:
    outbox, pushed, sent = Outbox(), {"forward": 0, "backward": 0}, b""
    for event in [*events, *[None] * 5 * len(events)]:  # None takes a piece, of which a frame has at most 4
        if event is not None:
            kind, size, outbox.lead = event
            outbox.push(kind, large(size), pushed[kind])
            pushed[kind] += 1
        elif outbox:
            sent += b"".join(map(bytes, outbox.take(100)[0]))
    assert not outbox
    assert len(read_frames(FrameReader(ROOMY), sent)) == sum(pushed.values())


def test_large_frame_leaves_in_pieces_and_lets_others_between() -> None:
    outbox = Outbox()
    gradient, activation = large(50, 50), large(300)
    outbox.push("forward", activation, 1)
    assert outbox.take(100)[1:] == (activation, False)
    outbox.push("backward", gradient, 0)
    assert outbox.take(100)[1:] == (gradient, True)
    assert outbox.take(100)[1:] == (activation, False)
    assert outbox.take(100)[1:] == (activation, True)
    assert not outbox


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=6), st.integers(1, 4000))
def test_pieces_make_the_frame_again(sizes: list[int], piece_bytes: int) -> None:
    payload = [bytes([n]) * size for n, size in enumerate(sizes)]
    head = encode_frame_head(b"header", sum(sizes))
    one = SendReceipt([head, *map(memoryview, payload)], len(head) + sum(sizes), asyncio.Future)
    outbox = Outbox()
    outbox.push("weights", one)
    sent, done = b"", False
    while not done:
        buffers, taken, done = outbox.take(piece_bytes)
        assert taken is one
        sent += b"".join(map(bytes, buffers))
    (frame,) = read_frames(FrameReader(ROOMY), sent)
    assert bytes(frame.payload) == b"".join(payload)
    assert frame.size == one.size == len(sent)


@pytest.mark.parametrize("kind", URGENT)
def test_urgent_message_goes_before_everything(kind: str) -> None:
    assert order("begin", "backward", "forward", "weights", "commit", kind)[0] == f"{kind} 5"


@pytest.mark.parametrize("kind", ORDERING)
@pytest.mark.parametrize("movable", MOVABLE)
def test_nothing_passes_an_ordering_message_in_either_direction(kind: str, movable: str) -> None:
    assert order("weights", kind, movable) == ["weights 0", f"{kind} 1", f"{movable} 2"]
    assert order(movable, kind, "backward") == [f"{movable} 0", f"{kind} 1", "backward 2"]


def test_step_keeps_its_shape() -> None:
    assert order(
        "commit", "begin", "forward", "forward", "backward", "commit", "begin", "backward", "bye"
    ) == [
        "commit 0",
        "begin 1",
        "backward 4",
        "forward 2",
        "forward 3",
        "commit 5",
        "begin 6",
        "backward 7",
        "bye 8",
    ]


def test_ordering_messages_of_any_kind_keep_their_order() -> None:
    for one, other in itertools.permutations(ORDERING, 2):
        assert order(one, other) == [f"{one} 0", f"{other} 1"]


def test_urgent_messages_are_counted_apart() -> None:
    outbox = Outbox()
    for kind in ("forward", "ping", "begin", "abort"):
        outbox.push(kind, receipt())
    assert (len(outbox), outbox.urgent, outbox.ordinary) == (4, 2, 2)
    outbox.take(1)
    assert (len(outbox), outbox.urgent, outbox.ordinary) == (3, 1, 2)
    assert len(list(outbox.drain())) == 3
    assert (len(outbox), outbox.urgent, outbox.ordinary) == (0, 0, 0)


def test_nothing_is_taken_out_of_an_empty_outbox() -> None:
    with pytest.raises(IndexError):
        Outbox().take(1)
    assert list(Outbox().drain()) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(sorted(MESSAGE_TYPES)), max_size=20))
def test_every_message_leaves_once_and_only_passes_what_it_may(kinds: list[str]) -> None:
    left = [(kind, int(number)) for kind, number in map(str.split, order(*kinds))]
    assert sorted(number for _, number in left) == list(range(len(kinds)))
    place = {number: at for at, (_, number) in enumerate(left)}
    for first, second in itertools.combinations(range(len(kinds)), 2):
        if place[second] < place[first]:
            passed, passing = kinds[first], kinds[second]
            if passing in URGENT:
                assert passed not in URGENT
            else:
                assert passing in MOVABLE
                assert passed in MOVABLE
                assert MOVABLE.index(passing) < MOVABLE.index(passed)


# Receipts.


def test_receipt_is_done_when_the_kernel_has_the_frame() -> None:
    async def main() -> None:
        one = receipt(b"data")
        waiting = [asyncio.create_task(wait_for(one)) for _ in range(3)]
        await asyncio.sleep(0)
        assert one.buffers
        assert one.end_ns is None
        one.finish()
        assert await asyncio.gather(*waiting) == [one] * 3
        assert await one is one
        assert one.buffers == []
        assert one.end_ns is not None

    asyncio.run(main())


def test_receipt_of_a_frame_that_will_never_be_sent_raises() -> None:
    async def main() -> None:
        one = receipt()
        waiting = asyncio.create_task(wait_for(one))
        await asyncio.sleep(0)
        one.finish(ConnectionLost("gone"))
        for attempt in (waiting, wait_for(one)):
            with pytest.raises(ConnectionLost, match="gone"):
                await attempt
        assert one.end_ns is None

    asyncio.run(main())


def test_one_who_stops_waiting_does_not_disturb_the_others() -> None:
    async def main() -> None:
        one = receipt()
        patient, impatient = asyncio.create_task(wait_for(one)), asyncio.create_task(wait_for(one))
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.sleep(0)
        one.finish()
        assert await patient is one
        assert impatient.cancelled()

    asyncio.run(main())


async def wait_for(one: SendReceipt) -> SendReceipt:
    return await one
