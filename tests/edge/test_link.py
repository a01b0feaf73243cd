"""The edge's end of a link, with a connection that does what a test wants."""

import asyncio
from typing import Any

import pytest

from common.errors import TrainingStopped
from common.trace import Tracer
from edge.link import Link
from wire.errors import ConnectionLost


class Connection:
    """Takes everything, answers nothing, and breaks when told to."""

    def __init__(self) -> None:
        self.broken = asyncio.Event()

    async def receive(self) -> Any:
        await self.broken.wait()
        raise ConnectionLost("broken")

    async def send(self, message: Any) -> None:
        pass


def test_link_that_breaks_while_a_step_fails_is_noticed() -> None:
    # A hang, once: the loss was not a number, and while the step's tasks ended the link broke. The cancellation
    # that should have said so was lost, as the task was just leaving the step's task group, and the trainer went
    # on to fetch the last good weights, which nobody would ever send.
    async def step(connection: Connection) -> None:
        async def break_the_link_while_ending() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                connection.broken.set()
                for _ in range(10):
                    await asyncio.sleep(0)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(break_the_link_while_ending())
            await asyncio.sleep(0)
            raise TrainingStopped("the loss is nan")

    async def train() -> None:
        connection = Connection()
        async with asyncio.TaskGroup() as tasks:
            link = Link(connection, Tracer("edge", enabled=False), tasks)  # type: ignore[arg-type]
            link.start_receiving()
            with pytest.raises(ExceptionGroup, match="unhandled"):
                await step(connection)
            await link.fetch_middle({})

    async def in_time() -> None:
        async with asyncio.timeout(30):
            await train()

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(in_time())
    assert caught.group_contains(ConnectionLost, match="broken")
