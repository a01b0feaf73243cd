"""The edge's end of a link, with a connection that does what a test wants."""

import asyncio
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import TrainingStopped
from common.schedule import Action, Schedule, edge_schedule
from common.trace import Tracer
from edge.link import Link, open_link
from edge.passes import Pass
from edge.reconnect import may_pass
from edge.run_folder import SessionKey
from wire.errors import ConnectionLost
from wire.messages import Forward, Message


class Connection:
    """Takes everything, answers what it is told to, and breaks when told to."""

    def __init__(self) -> None:
        self.broken = asyncio.Event()
        self.answers: asyncio.Queue[Message] = asyncio.Queue()

    async def receive(self) -> Any:
        answer, broken = asyncio.create_task(self.answers.get()), asyncio.create_task(self.broken.wait())
        await asyncio.wait((answer, broken), return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
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


def test_server_that_never_has_the_job_ready_counts_as_a_lost_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Its heartbeats were answered, and the client waited for ever.
    async def opens() -> None:
        connection: Any = Connection()
        connection.welcome = SimpleNamespace(nonce=bytes(32))
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            link = Link(connection, Tracer("edge", enabled=False), tasks)
            link.start_receiving()
            job: Any = SimpleNamespace(to_map=dict)
            for asked in (link.open(SessionKey.new(), job), link.resume(SessionKey.new(), None, ())):
                with pytest.raises(ConnectionLost, match="did not have the job ready after") as lost:
                    await asked
                assert may_pass(lost.value)
            link.stop_receiving()

    monkeypatch.setattr("edge.link.READY_S", 0.01)
    asyncio.run(opens())


def test_server_that_never_answers_who_comes_back_counts_as_a_lost_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def connect(*_: object) -> Any:
        connection: Any = Connection()
        connection.abort = connection.broken.set
        return connection

    async def come_back() -> None:
        back: Any = object()
        async with asyncio.timeout(30), open_link("there", 1, Tracer("edge", enabled=False), None, back):
            await asyncio.Event().wait()

    monkeypatch.setattr("edge.link.READY_S", 0.01)
    monkeypatch.setattr("edge.link.connect", connect)
    with pytest.raises(ConnectionLost, match="did not have the job ready after"):
        asyncio.run(come_back())


class Stuck(Pass):
    """A pass whose first action never ends."""

    async def _perform(self, action: Action) -> None:
        await asyncio.Event().wait()


def test_what_still_comes_for_a_cancelled_step_is_dropped() -> None:
    # A second Ctrl-C ended in an error, once: until the link was closed, the server went on answering.
    async def train() -> None:
        connection = Connection()
        async with asyncio.TaskGroup() as tasks:
            link = Link(connection, Tracer("edge", enabled=False), tasks)  # type: ignore[arg-type]
            link.start_receiving()
            context: Any = SimpleNamespace(link=link, encoders={}, decoders={})
            step = asyncio.create_task(Stuck(context, 1).run(edge_schedule(2, 2)))
            await asyncio.sleep(0)
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            connection.answers.put_nowait(Forward(step=1, chunk=0, evaluate=False, names=(), tensors=()))
            for _ in range(10):
                await asyncio.sleep(0)
            link.stop_receiving()

    asyncio.run(train())


class Quick(Pass):
    """A pass whose actions take no time."""

    async def _perform(self, action: Action) -> None:
        self.arrived[Action(1, "F", action.chunk)] = ()


def test_pass_that_is_done_is_freed_at_once_with_all_that_it_holds() -> None:
    # Batches of 38 MB piled up, once, until the garbage collector came by.
    def first_action() -> Schedule:
        yield Action(0, "F", 0)

    async def train() -> None:
        connection = Connection()
        async with asyncio.TaskGroup() as tasks:
            link = Link(connection, Tracer("edge", enabled=False), tasks)  # type: ignore[arg-type]
            context: Any = SimpleNamespace(link=link, encoders={}, decoders={})
            this = Quick(context, 1)
            await this.run(first_action())
            assert this.arrived
            held = weakref.ref(this)
            del this
            assert held() is None

    gc.disable()
    try:
        asyncio.run(train())
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("device", "offset_ns", "rtt_s", "shares"),
    [
        ("cpu", 20_000, 1e-4, True),
        ("cpu", -900_000, 1e-5, True),  # this end was held up between two readings
        ("cpu", 5_000_000, 0.02, True),  # a tunnel that ends here again
        (
            "cpu",
            3_600_000_000_000,
            0.04,
            False,
        ),  # a tunnel's end here, to a machine that was started an hour later
        ("cuda:0", 20_000, 1e-4, False),
        ("cpu", 0, None, False),  # nothing is known yet
    ],
)
def test_the_clock_tells_whether_the_server_is_on_this_machine(
    device: str, offset_ns: int, rtt_s: float | None, shares: bool
) -> None:
    welcome = SimpleNamespace(device=device)
    connection: Any = SimpleNamespace(welcome=welcome, clock_offset_ns=offset_ns, rtt_s=rtt_s)

    async def says() -> bool:
        async with asyncio.TaskGroup() as tasks:
            return Link(connection, Tracer("edge", enabled=False), tasks).shares_cores

    assert asyncio.run(says()) is shares
