"""Turns among threads: one at a time, handed on by whatever ends them, and lost by nobody's leaving."""

import asyncio
import random
import threading
from contextlib import ExitStack

import pytest

from cloud.turns import ShareLeft, Turns
from common.lanes import COMPUTE, DECODE, Lanes
from common.trace import Tracer


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def started():
    """Starts threads that are joined at the end; what they raise fails the test."""
    threads, errors = [], []

    def start(work, *args):
        def run():
            try:
                work(*args)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        threads.append(thread)
        thread.start()
        return thread

    yield start
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "it hangs"
    assert not errors, errors


def waits(turns, share):
    """Return once a share waits for its turn."""
    while True:
        with turns._lock:
            if share.account in turns._queue._waiting:
                return


def test_one_computes_at_a_time(started):
    turns = Turns()
    inside, seen = [], []

    def work(share, number):
        for _ in range(200):
            with share:
                inside.append(number)
                seen.append(tuple(inside))
                inside.remove(number)

    for number in range(6):
        started(work, turns.join(), number).name = str(number)
    for thread in threading.enumerate():
        if thread.name.isdigit():
            thread.join(60)
    assert len(seen) == 1200
    assert {len(present) for present in seen} == {1}


def test_as_many_compute_at_once_as_may(started):
    turns = Turns(at_once=3)
    together = threading.Barrier(3, timeout=30)

    def work(share):
        with share:
            together.wait()

    for _ in range(3):
        started(work, turns.join())


def test_a_turn_ends_with_its_work_even_where_that_fails(started):
    turns = Turns()
    first, second = turns.join(), turns.join()
    with pytest.raises(ZeroDivisionError), first:
        divmod(1, 0)
    with second:
        pass


def test_the_one_that_used_least_goes_next(started):
    clock = Clock()
    turns = Turns(clock=clock, patience_s=0.0)
    greedy, modest, holder = (turns.join() for _ in range(3))
    order = []

    def work(share, name):
        with share:
            order.append(name)

    for share, seconds in ((greedy, 5), (modest, 1), (greedy, 5)):
        with share:
            clock.now_s += seconds
    with holder:
        begun = [started(work, greedy, "greedy")]
        waits(turns, greedy)
        begun.append(started(work, modest, "modest"))
        waits(turns, modest)
    for thread in begun:
        thread.join(30)
    assert order == ["modest", "greedy"]


def test_one_that_leaves_while_it_waits_does_not_swallow_the_turn(started):
    turns = Turns()
    holder, leaver, other = (turns.join() for _ in range(3))
    done = threading.Event()

    def leave():
        with pytest.raises(ShareLeft), leaver:
            raise AssertionError("its work was begun")

    def work():
        with other:
            done.set()

    with holder:
        leaving = started(leave)
        waits(turns, leaver)
        started(work)
        waits(turns, other)
        leaver.leave()
        leaving.join(30)
        assert not done.is_set()
    assert done.wait(30)
    with pytest.raises(ShareLeft), leaver:
        pass


def test_one_that_leaves_while_it_computes_keeps_the_device_to_its_end(started):
    turns = Turns()
    holder, other = turns.join(), turns.join()
    done = threading.Event()

    def work():
        with other:
            done.set()

    with holder:
        started(work)
        waits(turns, other)
        holder.leave()
        assert not done.is_set()
    assert done.wait(30)


def test_the_device_settles_at_the_end_of_a_turn_only_while_others_wait(started):
    turns = Turns()
    settled = []
    here, there = turns.join(lambda: settled.append("here")), turns.join(lambda: settled.append("there"))

    def work():
        with there:
            pass

    with here:
        pass
    assert settled == []
    with here:
        thread = started(work)
        waits(turns, there)
    thread.join(30)
    assert settled == ["here"]


def test_a_device_that_fails_to_settle_does_not_keep_the_turn(started):
    turns = Turns()

    def fail():
        raise RuntimeError("the device is lost")

    here, there = turns.join(fail), turns.join()

    def work():
        with there:
            pass

    here.__enter__()
    thread = started(work)
    waits(turns, there)
    with pytest.raises(RuntimeError, match="device is lost"):
        here.__exit__(None, None, None)
    thread.join(30)


@pytest.mark.parametrize("seed", range(8))
def test_random_leaving_and_failing_stops_nobody(started, seed):
    rng = random.Random(seed)
    turns = Turns(at_once=rng.choice((1, 1, 2)), patience_s=rng.choice((0.0, 0.0005)))
    shares = [turns.join(lambda: None) for _ in range(8)]
    progress = threading.Semaphore(0)
    enough = threading.Event()

    def first_goes_on():
        for _ in range(20):
            assert progress.acquire(timeout=30)

    def work(number, luck):
        try:
            while not enough.is_set():
                try:
                    with shares[number]:
                        if number == 0:
                            progress.release()
                        if luck.random() < 0.1:
                            raise ZeroDivisionError
                except ZeroDivisionError:
                    pass
        except ShareLeft:
            assert number  # the first never leaves

    threads = [started(work, number, random.Random(rng.random())) for number in range(len(shares))]
    for number in range(1, len(shares)):
        first_goes_on()
        shares[number].leave()
        threads[number].join(30)
        assert not threads[number].is_alive()
    first_goes_on()
    enough.set()


def test_lanes_compute_in_turns_and_wait_outside_the_time_they_worked(started):
    async def scenario(lanes, turns, share, other):
        lanes.turn = share
        with other:
            computing = lanes.run(COMPUTE, "0F0", order.append, "computed")
            await lanes.run(DECODE, "0F0", order.append, "decoded")
            await asyncio.to_thread(waits, turns, share)
            order.append("given")
        await computing
        return lanes.take_means()[COMPUTE]

    order = []
    turns = Turns()
    with ExitStack() as stack:
        lanes = Lanes(Tracer("cloud", enabled=False), 1)
        stack.callback(lanes.close)
        means = asyncio.run(scenario(lanes, turns, turns.join(), turns.join()))
    assert order == ["decoded", "given", "computed"]
    assert means.keys() == {"0F"}


def test_a_cancelled_wait_for_the_result_keeps_the_turn_until_the_work_is_done(started):
    async def scenario(lanes, turns, share, other):
        lanes.turn = share
        begun, go_on, order = threading.Event(), threading.Event(), []

        def slow():
            begun.set()
            assert go_on.wait(30)
            order.append("slow")

        def after():
            with other:
                order.append("after")

        computing = lanes.run(COMPUTE, "0F0", slow)
        await asyncio.to_thread(begun.wait)
        computing.cancel()
        waiting = asyncio.get_running_loop().run_in_executor(None, after)
        await asyncio.to_thread(waits, turns, other)
        go_on.set()
        await waiting
        return order

    lanes, turns = Lanes(Tracer("cloud", enabled=False), 1), Turns()
    try:
        assert asyncio.run(scenario(lanes, turns, turns.join(), turns.join())) == ["slow", "after"]
    finally:
        lanes.close()
