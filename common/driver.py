"""Runs a schedule for real: actions one after another, arrivals whenever they come."""

import asyncio
from collections.abc import Awaitable, Callable

from common.schedule import Action, Schedule, Wait


class Driver:
    """Feeds arrivals to a schedule and performs what it says, one action at a time.

    Args:
        schedule: from `common.schedule`.
        perform: does one action, for example on a compute thread, and returns when it is done.
    """

    def __init__(self, schedule: Schedule, perform: Callable[[Action], Awaitable[None]]) -> None:
        self._schedule = schedule
        self._perform = perform
        self._arrivals: list[Action] = []
        self._arrived = asyncio.Event()

    def arrive(self, action: Action) -> None:
        """Say that the input of an action is there. Call from the event loop's thread."""
        self._arrivals.append(action)
        self._arrived.set()

    async def run(self) -> None:
        """Perform the whole schedule.

        Raises:
            ValueError: an arrival that the schedule does not expect.
        """
        try:
            todo = next(self._schedule)
            while True:
                if isinstance(todo, Wait):
                    await self._arrived.wait()
                else:
                    await self._perform(todo)
                arrivals, self._arrivals = self._arrivals, []
                self._arrived.clear()
                todo = self._schedule.send(arrivals)
        except StopIteration:
            return
        finally:
            self._schedule.close()
