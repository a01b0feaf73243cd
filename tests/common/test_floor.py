"""The floor: closed forms where the link or one side bounds, and the definition itself where nothing is simple."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.cost import ChunkCost, Link, Message, StepModel
from common.floor import floor
from common.simulator import simulate

KINDS = ("0F", "1F", "2T", "1B", "0B")
FREE = Link(up_bit_s=1e15, down_bit_s=1e15)
SECONDS = st.integers(0, 8).map(lambda eighths: eighths / 8)  # exact in binary, so that sums are, too


def chunk_costs():
    message = st.builds(
        Message, size_bytes=st.integers(0, 8).map((125).__mul__), encode_s=SECONDS, decode_s=SECONDS
    )
    return st.builds(
        ChunkCost,
        seconds=st.fixed_dictionaries(dict.fromkeys((*KINDS, "2F"), SECONDS)),
        messages=st.fixed_dictionaries(dict.fromkeys(KINDS[:-1], message)),
    )


MODELS = st.builds(
    StepModel,
    chunks=st.lists(chunk_costs(), min_size=1, max_size=5).map(tuple),
    link=st.builds(Link, up_bit_s=st.just(1000.0), down_bit_s=st.just(500.0), delay_s=SECONDS),
    shared_cores=st.booleans(),
    update_s=SECONDS,
)


def bound_by_definition(model, *, evaluate):
    """The largest fill + work + drain over all resources and sets, from longest paths and without a schedule."""
    work = model.work(evaluate=evaluate)

    @cache
    def head(chunk, place):
        before = [0.0]
        if place:
            piece = work[chunk][place - 1]
            before.append(head(chunk, place - 1) + piece.seconds + piece.delay_s)
        if chunk:
            before.append(head(chunk - 1, place) + work[chunk - 1][place].seconds)
        return max(before)

    @cache
    def tail(chunk, place):
        after = [0.0]
        if place + 1 < len(work[chunk]):
            after.append(work[chunk][place].delay_s + work[chunk][place + 1].seconds + tail(chunk, place + 1))
        if chunk + 1 < len(work):
            after.append(work[chunk + 1][place].seconds + tail(chunk + 1, place))
        return max(after)

    jobs = [
        (model.resource(piece.lane), head(chunk, place), piece.seconds, tail(chunk, place))
        for chunk, chain in enumerate(work)
        for place, piece in enumerate(chain)
    ]
    best = 0.0
    for resource in {job[0] for job in jobs}:
        own = [job[1:] for job in jobs if job[0] == resource]
        # Of all sets with these least heads and tails the largest counts: everything that starts and ends later.
        for least_head, _, _ in own:
            for _, _, least_tail in own:
                chosen = [job for job in own if job[0] >= least_head and job[2] >= least_tail]
                if chosen:
                    heads, seconds, tails = zip(*chosen, strict=True)
                    best = max(best, min(heads) + sum(seconds) + min(tails))
    return best + model.update_s


@settings(deadline=None, max_examples=150)
@given(model=MODELS, evaluate=st.booleans())
def test_the_floor_is_the_largest_fill_work_and_drain_over_all_sets(model, evaluate):
    assert floor(model, evaluate=evaluate).total_s == pytest.approx(
        bound_by_definition(model, evaluate=evaluate), rel=1e-12, abs=1e-12
    )


@settings(deadline=None, max_examples=100)
@given(model=MODELS, evaluate=st.booleans())
def test_no_depth_beats_the_floor_and_both_count_the_update(model, evaluate):
    least_s = floor(model, evaluate=evaluate).total_s
    assert least_s >= model.update_s
    for depth in range(1, len(model.chunks) + 1):
        assert simulate(model, depth, evaluate=evaluate).makespan_s >= least_s - 1e-9


@settings(deadline=None, max_examples=50)
@given(model=MODELS, longer_s=SECONDS)
def test_a_longer_update_or_delay_lifts_the_floor_by_what_it_adds(model, longer_s):
    base = floor(model).total_s
    later = StepModel(
        chunks=model.chunks,
        link=model.link,
        shared_cores=model.shared_cores,
        update_s=model.update_s + longer_s,
    )
    assert floor(later).total_s == pytest.approx(base + longer_s)
    farther = Link(
        up_bit_s=model.link.up_bit_s,
        down_bit_s=model.link.down_bit_s,
        delay_s=model.link.delay_s + longer_s,
    )
    # A chunk's way crosses the link four times. The work before and after a set may be that of different chunks, so
    # that of several chunks together up to twice as many crossings count, and of a set on the cores perhaps none.
    most = 4 if len(model.chunks) == 1 else 8
    assert base - 1e-9 <= floor(model.with_link(farther)).total_s <= base + most * longer_s + 1e-9


@settings(deadline=None, max_examples=60)
@given(
    seconds=st.tuples(*[SECONDS] * 5),
    chunks=st.integers(1, 9),
    frame_s=st.integers(6, 40),  # at least all of a chunk's compute
    delay_s=st.integers(0, 20),
)
def test_the_floor_of_a_step_bound_by_the_link_up_is_bytes_over_rate_fill_and_drain(
    seconds, chunks, frame_s, delay_s
):
    cost = ChunkCost(
        seconds=dict(zip(KINDS, seconds, strict=True)),
        messages={"0F": Message(size_bytes=125 * frame_s)},
    )
    model = StepModel.even(cost, chunks, Link(up_bit_s=1000, down_bit_s=1e15, delay_s=delay_s))
    front_s, *rest_s = seconds
    bytes_up = chunks * 125 * frame_s
    # Fill: the first chunk's front. Drain: the last chunk's way through cloud, turn, cloud and front.
    assert floor(model).total_s == pytest.approx(front_s + bytes_up * 8 / 1000 + 4 * delay_s + sum(rest_s))


@settings(deadline=None, max_examples=60)
@given(chunks=st.integers(1, 9), frame_s=st.integers(1, 40), delay_s=st.integers(0, 20))
def test_the_deepest_schedule_reaches_the_floor_where_only_the_link_takes_time(chunks, frame_s, delay_s):
    cost = ChunkCost(seconds={}, messages={"0F": Message(size_bytes=125 * frame_s)})
    model = StepModel.even(cost, chunks, Link(up_bit_s=1000, down_bit_s=1e15, delay_s=delay_s))
    least = floor(model)
    assert least.total_s == chunks * frame_s + 4 * delay_s
    assert simulate(model, chunks).makespan_s == pytest.approx(least.total_s)


def test_both_messages_up_fill_the_link_one_after_the_other():
    cost = ChunkCost(
        seconds=dict.fromkeys(KINDS, 0.5),
        messages={kind: Message(size_bytes=1250) for kind in ("0F", "2T")},
    )
    least = floor(StepModel.even(cost, 4, Link(up_bit_s=1000, down_bit_s=1e15, delay_s=1)))
    # Fill: 0F0. Work: eight frames of ten seconds. Drain: the last gradient's way over, 1B, back, and 0B.
    assert (least.bound_by, least.fill_s, least.work_s, least.drain_s) == ("up", 0.5, 80, 0.5 + 0.5 + 2)


def test_a_step_bound_by_the_link_down_waits_for_the_first_frame_and_the_last_front():
    cost = ChunkCost(
        seconds=dict.fromkeys(KINDS, 0.5),
        messages={kind: Message(size_bytes=1250) for kind in ("1F", "1B")},
    )
    least = floor(StepModel.even(cost, 4, Link(up_bit_s=1e15, down_bit_s=1000, delay_s=1)))
    assert (least.bound_by, least.fill_s, least.work_s, least.drain_s) == ("down", 0.5 + 1 + 0.5, 80, 1 + 0.5)


def test_fill_and_work_are_of_the_set_that_bounds_and_not_of_what_ran_before_it():
    early = ChunkCost(
        seconds={"0F": 1},
        messages={"0F": Message(size_bytes=125), "2T": Message(size_bytes=125 * 20)},
    )
    late = ChunkCost(
        seconds={"0F": 10, "1F": 20, "2T": 20, "1B": 20}, messages={"0F": Message(size_bytes=125 * 30)}
    )
    least = floor(StepModel(chunks=(early, late), link=Link(up_bit_s=1000, down_bit_s=1e15)))
    # The link up is busy from second 1 on, with the first chunk's frames; what bounds is the second one's.
    assert (least.bound_by, least.fill_s, least.work_s) == ("up", 11, 30)
    assert least.drain_s == pytest.approx(60)


@pytest.mark.parametrize("side", ["edge", "cloud"])
def test_a_step_bound_by_one_side_is_its_compute_and_codecs(side):
    own = ("0F", "2T", "0B") if side == "edge" else ("1F", "1B")
    cost = ChunkCost(
        seconds=dict.fromkeys(own, 2.0),
        messages={kind: Message(encode_s=0.25, decode_s=0.5) for kind in KINDS[:-1]},
    )
    least = floor(StepModel.even(cost, 8, FREE))
    assert least.bound_by == side
    codecs_s = 2 * 0.25 + 2 * 0.5  # each side encodes two messages of a chunk and decodes two
    assert least.work_s + least.fill_s + least.drain_s >= 8 * (2 * len(own) + codecs_s)
    assert least.loads_s[side] == 8 * (2 * len(own) + codecs_s)


def test_the_loads_count_everything_and_evaluation_only_what_it_does():
    cost = ChunkCost(
        seconds=dict.fromkeys((*KINDS, "2F"), 1.0),
        messages={kind: Message(size_bytes=125) for kind in KINDS[:-1]},
    )
    model = StepModel.even(cost, 3, Link(up_bit_s=1000, down_bit_s=500))
    assert floor(model).loads_s == {"edge": 9, "up": 6, "cloud": 6, "down": 12}
    assert floor(model, evaluate=True).loads_s == {"edge": 6, "up": 3, "cloud": 3, "down": 6}
