"""The edge's end of a job: opens it, sorts what comes back, keeps track of commits."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from torch import Tensor

from common.groups import first_error
from common.spec import JobSpec
from common.trace import Tracer
from common.traffic import Sent
from edge.outcome import Outcome
from edge.run_folder import SessionKey
from wire.auth import RESUME, prove
from wire.config import WireConfig
from wire.errors import ConnectionLost, RemoteProtocolError, WireError
from wire.messages import (
    Abort,
    Backward,
    Bye,
    Commit,
    Committed,
    Fetch,
    Forward,
    Message,
    Open,
    Ready,
    Resume,
    Save,
    Saved,
    Weights,
)
from wire.transport import ComingBack, Connection, SendReceipt, connect
from wire.weights import WeightsReceiver, weights_messages

T = TypeVar("T")
OnTensors = Callable[[Forward | Backward], None]
OnCommitted = Callable[[Committed], None]
OnReady = Callable[[Ready], None]

_CLOCK_S = 1e-3  # what two readings of one clock may be apart

READY_S = 600.0
"""Seconds that the server may take to build a job, or to find it again: a large model takes minutes."""


class Link:
    """An open connection with a job on it. Made by `open_link`.

    Attributes:
        connection: what it is made of.
        is_back: it goes on with the job of an earlier connection; `on_ready` is told that the server does, too.
        sent: how long sending took.
    """

    def __init__(
        self, connection: Connection, tracer: Tracer, tasks: asyncio.TaskGroup, *, is_back: bool = False
    ) -> None:
        self.connection, self.is_back = connection, is_back
        self.sent = Sent()
        self._tracer = tracer
        self._tasks = tasks
        self.on_tensors: OnTensors | None = None
        self.on_committed: OnCommitted | None = None
        self.on_ready: OnReady | None = None
        self._committing: asyncio.Future[None] | None = None
        self._committing_step = self._aborted_step = -1
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._saving: dict[int, asyncio.Future[Saved]] = {}
        self._fetching: WeightsReceiver | None = None
        self._fetched: asyncio.Future[dict[str, Tensor]] | None = None
        self._receiving: asyncio.Task[None] | None = None

    @property
    def shares_cores(self) -> bool:
        """Whether the server computes on the cores of this very machine, whatever stands between the two.

        Its clock tells: it counts from when the machine was started. An address would not: a tunnel's is this one's.
        """
        connection, welcome = self.connection, self.connection.welcome
        if welcome is None or welcome.device != "cpu" or connection.rtt_s is None:
            return False
        return abs(connection.clock_offset_ns) / 1e9 <= max(connection.rtt_s, _CLOCK_S)

    async def open(self, key: SessionKey, spec: JobSpec) -> Ready:
        """Ask for a job.

        Raises:
            PeerError: the server refuses; its message says why.
        """
        await self.send(Open(session=key.session, secret=key.secret, spec=spec.to_map()))
        return await self.taken_up()

    async def resume(self, key: SessionKey, outcome: Outcome | None, saved: Sequence[int]) -> Ready:
        """Ask for a job that the server had before.

        Args:
            key: whose it is.
            outcome: of the last step concluded; None where nothing is remembered but what was saved.
            saved: steps that there are checkpoints of.

        Raises:
            PeerError: the server refuses; its message says why.
        """
        welcome = self.connection.welcome
        assert welcome is not None
        last = outcome or Outcome()
        await self.send(
            Resume(
                session=key.session,
                mac=prove(key.secret, RESUME, welcome.nonce, key.session),
                step=None if outcome is None else last.step,
                applied=last.applied,
                scale=last.scale,
                saved=saved,
            )
        )
        return await self.taken_up()

    async def taken_up(self) -> Ready:
        """Wait until the server has the job ready; its heartbeats do not say that it will ever be.

        Raises:
            ConnectionLost: it takes too long, or the link failed.
        """
        try:
            async with asyncio.timeout(READY_S):
                return await self.answered(self._ready)
        except TimeoutError:
            raise ConnectionLost(f"the server did not have the job ready after {READY_S:.0f} s") from None

    async def send_weights(self, state: Mapping[str, Tensor]) -> None:
        """Send the middle's weights, which the server cannot make."""
        for piece in weights_messages(state):
            await (await self.connection.send(piece))  # to the end: steps would overtake queued weights

    async def send(self, message: Message, *, name: str = "") -> None:
        """Queue a message; waits while the queue is full. `name` is what the trace shows."""
        receipt = await self.connection.send(message)
        if name:
            self._tasks.create_task(self._time(name, receipt))

    async def _time(self, name: str, receipt: SendReceipt) -> None:
        await receipt
        if receipt.start_ns is not None and receipt.end_ns is not None:
            self.sent.add(name, receipt.size, receipt.busy_ns / 1e9, self.connection.bytes_per_s)
            self._tracer.record("send", name, receipt.start_ns, receipt.end_ns, bytes=receipt.size)

    async def commit(self, message: Commit) -> None:
        """Send a commit, once the one before is confirmed; `confirmed` waits for its answer."""
        await self.confirmed()
        self._committing = asyncio.get_running_loop().create_future()
        self._committing_step = message.step
        await self.send(message)

    async def abort(self, message: Abort) -> None:
        """Give a step up; what of it is still under way here is passed over."""
        self._aborted_step = message.step
        await self.send(message)

    async def confirmed(self) -> None:
        """Wait until the server has applied the last committed step, if any: or is ready, where this link is back."""
        if self.is_back:
            await self.answered(self._ready)
        if self._committing is not None:
            await self.answered(self._committing)
            self._committing = None

    async def save(self, step: int, keep: int) -> asyncio.Future[Saved]:
        """Ask for a checkpoint of the last step; return what will hold the answer.

        Args:
            step: the last one concluded.
            keep: a step whose checkpoint the server does not remove.
        """
        answer = self._saving[step] = asyncio.get_running_loop().create_future()
        await self.send(Save(step=step, keep=keep))
        return answer

    async def fetch_middle(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fetch the middle's state; `like` has its names, dtypes and shapes."""
        await self.confirmed()
        self._fetching = WeightsReceiver(like)
        self._fetched = asyncio.get_running_loop().create_future()
        await self.send(Fetch(what="weights"))
        return await self.answered(self._fetched)

    async def answered(self, answer: asyncio.Future[T]) -> T:
        """Wait for an answer of the server's, or for the end of the link.

        A task group that fails cancels its task, but a task that is just leaving another group does not notice:
        it may get here all the same, where no answer would ever come.
        """
        assert self._receiving is not None
        await asyncio.wait((answer, self._receiving), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            self._receiving.result()  # raises what ended the link
        return answer.result()

    def start_receiving(self) -> None:
        """Sort incoming messages from now on, until `stop_receiving` or an error, which ends the task group."""
        self._receiving = self._tasks.create_task(self._receive_forever())

    def stop_receiving(self) -> None:
        """Leave what comes from now on unread."""
        assert self._receiving is not None
        self._receiving.cancel()

    async def _receive_forever(self) -> None:
        """Sort incoming messages until cancelled.

        Raises:
            WireError: the link failed, or the server sent what nobody asked for.
        """
        while True:
            self._take(await self.connection.receive())

    def _take(self, message: Message) -> None:
        match message:
            case Forward(evaluate=False) | Backward() if message.step <= self._aborted_step:
                pass  # it left before the server knew
            case Forward() | Backward() if self.on_tensors is not None:
                self.on_tensors(message)
            case Committed() if self._committing is not None and message.step == self._committing_step:
                if self.on_committed is not None:
                    self.on_committed(message)
                if not self._committing.done():
                    self._committing.set_result(None)
            case Saved() if message.step in self._saving:
                self._saving.pop(message.step).set_result(message)
            case Ready() if not self._ready.done():
                if self.on_ready is not None:
                    self.on_ready(message)
                self._ready.set_result(message)
            case Weights() if self._fetching is not None and self._fetched is not None:
                state = self._fetching.take(message)
                if state is not None:
                    self._fetched.set_result(state)
                    self._fetching = None
            case Bye():
                raise ConnectionLost(f"the server said bye: {message.reason}")
            case _:
                raise RemoteProtocolError(f"the server sent {message.kind}, which nothing asked for")


@asynccontextmanager
async def open_link(
    host: str,
    port: int,
    tracer: Tracer,
    wire: WireConfig | None = None,
    coming_back: ComingBack | None = None,
) -> AsyncIterator[Link]:
    """Connect, and receive in the background while the block runs; close cleanly after it.

    Args:
        host: where the server is.
        port: where it listens.
        tracer: of what is sent.
        wire: settings of the connection.
        coming_back: what is said instead of asking for a job; the link's `on_ready` takes the answer.

    Raises:
        ConnectFailed: nobody there, or not an Isthmus server.
        WireError: the link failed while the block ran; the block is cancelled.
    """
    connection = await connect(host, port, wire, coming_back)
    try:
        async with asyncio.TaskGroup() as tasks:
            link = Link(connection, tracer, tasks, is_back=coming_back is not None)
            link.start_receiving()
            if link.is_back:
                tasks.create_task(link.taken_up())
            yield link
            link.stop_receiving()
    except BaseExceptionGroup as group:
        connection.abort()
        raise first_error(group, WireError) from None
    except BaseException:
        connection.abort()
        raise
    else:
        await connection.close("done")
