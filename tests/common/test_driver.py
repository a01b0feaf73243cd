"""The driver performs a schedule, whenever and in whatever order things arrive."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.driver import Driver
from common.schedule import Action, cloud_schedule, edge_schedule

TURNS_AFTER = {"0F": "2T", "2T": "0B"}


def actions(text):
    return [Action.parse(word) for word in text.split()]


async def run_both_sides(chunks, depth, turns):
    """Drive both sides against each other; a message takes as many turns of the event loop as `turns` gives."""
    loop = asyncio.get_running_loop()
    done = {"edge": [], "cloud": []}
    delays = iter(turns)

    def deliver(driver, action, left):
        if left:
            loop.call_soon(deliver, driver, action, left - 1)
        else:
            driver.arrive(action)

    async def on_edge(action):
        done["edge"].append(str(action))
        if action.kind != "0B":
            answer = Action(1, "F" if action.kind == "0F" else "B", action.chunk)
            deliver(cloud, answer, next(delays, 0))

    async def on_cloud(action):
        done["cloud"].append(str(action))
        answer = Action(2, "T", action.chunk) if action.kind == "1F" else Action(0, "B", action.chunk)
        deliver(edge, answer, next(delays, 0))

    edge = Driver(edge_schedule(chunks, depth), on_edge)
    cloud = Driver(cloud_schedule(chunks), on_cloud)
    async with asyncio.timeout(30):
        await asyncio.gather(edge.run(), cloud.run())
    return done


@settings(deadline=None, max_examples=50)
@given(
    chunks=st.integers(1, 6),
    depth=st.integers(1, 7),
    turns=st.lists(st.integers(0, 5), max_size=24),
)
def test_two_drivers_end_a_step_whatever_the_link_does(chunks, depth, turns):
    done = asyncio.run(run_both_sides(chunks, depth, turns))
    for side, kinds in (("edge", ("0F", "2T", "0B")), ("cloud", ("1F", "1B"))):
        for kind in kinds:
            assert [text for text in done[side] if text[:2] == kind] == [f"{kind}{i}" for i in range(chunks)]
        assert len(done[side]) == len(kinds) * chunks


def test_one_action_runs_at_a_time_and_arrivals_meanwhile_are_kept():
    async def scenario():
        running, performed = 0, []
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def perform(action):
            nonlocal running
            running += 1
            assert running == 1
            performed.append(str(action))
            if action.chunk == 0:
                begun.set()
                await go_on.wait()
            running -= 1

        driver = Driver(cloud_schedule(3, evaluate=True), perform)
        driver.arrive(Action.parse("1F0"))
        run = asyncio.ensure_future(driver.run())
        await begun.wait()
        for action in actions("1F2 1F1"):  # while 1F0 is being computed, and in the wrong order
            driver.arrive(action)
        go_on.set()
        await run
        return performed

    assert asyncio.run(scenario()) == ["1F0", "1F1", "1F2"]


def test_an_arrival_before_the_run_begins_is_not_lost():
    async def scenario():
        performed = []

        async def perform(action):
            performed.append(str(action))

        driver = Driver(cloud_schedule(1, evaluate=True), perform)
        driver.arrive(Action.parse("1F0"))
        async with asyncio.timeout(30):
            await driver.run()
        return performed

    assert asyncio.run(scenario()) == ["1F0"]


@pytest.mark.parametrize("arrivals", ["1B0", "1F7", "1F0 1F0", "2T0"])
def test_an_arrival_that_the_schedule_does_not_expect_ends_the_run(arrivals):
    async def scenario():
        async def perform(action):
            raise AssertionError(f"{action} was performed")

        schedule = cloud_schedule(2)
        driver = Driver(schedule, perform)
        for action in actions(arrivals):
            driver.arrive(action)
        with pytest.raises(ValueError, match="arrived"):
            await driver.run()
        return schedule.gi_frame

    assert asyncio.run(scenario()) is None  # the schedule is closed


def test_an_action_that_fails_ends_the_run_and_closes_the_schedule():
    async def scenario():
        async def perform(action):
            raise ArithmeticError(str(action))

        schedule = edge_schedule(2, 2)
        with pytest.raises(ArithmeticError, match="0F0"):
            await Driver(schedule, perform).run()
        return schedule.gi_frame

    assert asyncio.run(scenario()) is None


def test_a_run_that_waits_can_be_cancelled():
    async def scenario():
        async def perform(action):
            raise AssertionError(f"{action} was performed")

        schedule = cloud_schedule(1)
        run = asyncio.ensure_future(Driver(schedule, perform).run())
        await asyncio.sleep(0)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        return schedule.gi_frame

    assert asyncio.run(scenario()) is None
