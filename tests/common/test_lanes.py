"""Lanes keep order, overlap each other, leave the event loop free, and know how long they worked."""

import asyncio
import threading
from contextlib import contextmanager

import pytest
import torch

from common import lanes as lanes_module
from common.lanes import COMPUTE, DECODE, ENCODE, Lanes
from common.trace import Tracer


@contextmanager
def opened(tracer=None, threads=1):
    lanes = Lanes(tracer or Tracer("edge", enabled=False), threads)
    try:
        yield lanes
    finally:
        lanes.close()


@pytest.fixture
def ticking(monkeypatch):
    """A clock that moves by one second whenever it is read."""
    ticks = iter(range(0, 10**15, 10**9))
    lock = threading.Lock()

    def tick():
        with lock:
            return next(ticks)

    monkeypatch.setattr(lanes_module.time, "monotonic_ns", tick)


def test_a_lane_works_in_the_order_in_which_it_was_asked():
    async def scenario(lanes):
        done = []
        await asyncio.gather(*(lanes.run(COMPUTE, f"0F{i}", done.append, i) for i in range(50)))
        return done

    with opened() as lanes:
        assert asyncio.run(scenario(lanes)) == list(range(50))


def test_lanes_overlap_and_the_event_loop_stays_free():
    async def scenario(lanes):
        together = threading.Barrier(4, timeout=30)  # three lanes and this very loop
        waiting = [lanes.run(lane, "0F0", together.wait) for lane in (COMPUTE, ENCODE, DECODE)]
        together.wait()
        return len(await asyncio.gather(*waiting))

    with opened() as lanes:
        assert asyncio.run(scenario(lanes)) == 3


def test_each_lane_has_one_thread_of_its_own():
    async def scenario(lanes):
        asked = [
            (lane, lanes.run(lane, "0F0", threading.get_ident)) for lane in (COMPUTE, ENCODE, DECODE) * 3
        ]
        return {(lane, await ident) for lane, ident in asked}

    with opened() as lanes:
        found = asyncio.run(scenario(lanes))
    assert len(found) == 3
    assert len({ident for _, ident in found} | {threading.get_ident()}) == 4


def test_only_the_compute_lane_has_all_of_torch_s_threads():
    async def scenario(lanes):
        return [await lanes.run(lane, "0F0", torch.get_num_threads) for lane in (COMPUTE, ENCODE, DECODE)]

    before = torch.get_num_threads()
    try:
        with opened(threads=3) as lanes:
            assert asyncio.run(scenario(lanes)) == [3, 1, 1]
    finally:
        torch.set_num_threads(before)


def test_a_result_comes_back_and_an_error_is_raised_where_it_is_awaited():
    async def scenario(lanes):
        assert await lanes.run(ENCODE, "0F0", divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await lanes.run(ENCODE, "0F1", divmod, 7, 0)
        return await lanes.run(ENCODE, "0F2", max, 1, 2)

    with opened() as lanes:
        assert asyncio.run(scenario(lanes)) == 2


@pytest.mark.usefixtures("ticking")
def test_time_is_counted_by_lane_and_by_kind_of_action_even_where_work_fails():
    async def scenario(lanes):
        await lanes.run(COMPUTE, "0F0", int)
        await lanes.run(COMPUTE, "0F11", int)
        await lanes.run(COMPUTE, "2T0", int)
        with pytest.raises(ZeroDivisionError):
            await lanes.run(DECODE, "0B0", divmod, 1, 0)

    with opened() as lanes:
        asyncio.run(scenario(lanes))
        assert lanes.busy_s == {ENCODE: 0, DECODE: 1, COMPUTE: 3}
        assert lanes.take_means() == {ENCODE: {}, DECODE: {"0B": 1}, COMPUTE: {"0F": 1, "2T": 1}}


@pytest.mark.usefixtures("ticking")
def test_means_are_of_what_was_done_since_they_were_last_taken():
    async def scenario(lanes):
        clock = lanes_module.time.monotonic_ns
        await lanes.run(COMPUTE, "0F0", int)
        await lanes.run(COMPUTE, "0F1", lambda: (clock(), clock()))  # two ticks longer
        first = lanes.take_means()
        await lanes.run(COMPUTE, "0F2", int)
        return first, lanes.take_means(), lanes.take_means()

    with opened() as lanes:
        first, second, third = asyncio.run(scenario(lanes))
        assert [means[COMPUTE] for means in (first, second, third)] == [{"0F": 2}, {"0F": 1}, {}]
        assert lanes.busy_s[COMPUTE] == 5  # taking the means forgets nothing of it


@pytest.mark.usefixtures("ticking")
def test_the_tracer_is_told_of_every_piece_of_work():
    async def scenario(lanes):
        await lanes.run(COMPUTE, "0F3", int)
        await lanes.run(ENCODE, "0F3", int)

    tracer = Tracer("edge")
    with opened(tracer) as lanes:
        asyncio.run(scenario(lanes))
    assert [(e.lane, e.name, e.end_ns - e.start_ns) for e in tracer.events] == [
        (COMPUTE, "0F3", 10**9),
        (ENCODE, "0F3", 10**9),
    ]


def test_closing_ends_what_runs_drops_what_waits_and_takes_nothing_more():
    async def scenario():
        done, begun, go_on = [], threading.Event(), threading.Event()

        def first():
            begun.set()
            assert go_on.wait(30)
            done.append("first")

        lanes = Lanes(Tracer("edge", enabled=False), 1)
        running = lanes.run(COMPUTE, "0F0", first)
        waiting = lanes.run(COMPUTE, "0F1", done.append, "second")
        assert begun.wait(30)
        closing = asyncio.get_running_loop().run_in_executor(None, lanes.close)
        with pytest.raises(asyncio.CancelledError):
            await waiting  # which says that closing has begun
        go_on.set()
        await asyncio.gather(running, closing)
        with pytest.raises(RuntimeError, match="shutdown"):
            lanes.run(COMPUTE, "0F2", int)
        return done

    assert asyncio.run(scenario()) == ["first"]
    assert not [t for t in threading.enumerate() if t.name.startswith((COMPUTE, ENCODE, DECODE))]


def test_only_actions_have_their_own_cores(monkeypatch):
    inside, made = [], []

    class Recorder:
        def __init__(self, threads):
            made.append(threads)

        def __enter__(self):
            inside.append("in")

        def __exit__(self, *_):
            inside.append("out")

    monkeypatch.setattr(lanes_module, "OwnCores", Recorder)
    done = []

    async def scenario(lanes):
        for lane, name in ((COMPUTE, "norm"), (ENCODE, "0F0"), (COMPUTE, "0F0"), (COMPUTE, "commit")):
            await lanes.run(lane, name, lambda: done.append(list(inside)))

    with opened(threads=2) as lanes:
        asyncio.run(scenario(lanes))
    assert made == [2]
    assert done == [[], [], ["in"], ["in", "out"]]
