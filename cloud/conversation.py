"""What one connection and the session behind it say to each other, until goodbye or the connection breaks.

The receive loop (`Conversation.run`) only sorts messages. Decoding, computing and encoding run on the session's
lanes; `Driver` orders the computing. Whatever fails anywhere ends the conversation with one typed error; the
session comes to rest, and the server goes on.
"""

import asyncio
import time
from typing import Any

from cloud.device import Placed
from cloud.monitoring import Monitor
from cloud.passing import Passing
from cloud.tenant import Tenant
from common.driver import Driver
from common.errors import IsthmusError
from common.groups import first_error
from common.lanes import COMPUTE, DECODE, ENCODE
from common.schedule import Action, cloud_schedule
from common.traffic import Sent
from wire.errors import RemoteProtocolError, StorageFailed
from wire.messages import (
    Abort,
    Backward,
    Begin,
    Bye,
    Commit,
    Committed,
    Fetch,
    Forward,
    Message,
    Save,
    Saved,
    Weights,
)
from wire.streams import Encodings, chunk_message
from wire.transport import Connection
from wire.weights import WeightsReceiver, weights_messages

MAX_EVALUATION_CHUNKS = 1 << 24


class Conversation:
    """One connection's use of a session.

    Args:
        connection: on which both ends know where they go on.
        tenant: whose session it is.
        monitor: is told of steps.

    Attributes:
        said_bye: the client has ended it on purpose.
    """

    def __init__(self, connection: Connection, tenant: Tenant, monitor: Monitor) -> None:
        self._connection = connection
        self._tenant = tenant
        self._monitor = monitor
        self._aborted = -1
        self._passing: Passing | None = None
        self._sent = Sent()
        self._incoming: WeightsReceiver | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self._tasks: asyncio.TaskGroup
        self._leaving = asyncio.Event()
        self._asked_to_leave = self.said_bye = False
        assert tenant.session is not None
        self._session = tenant.session
        self._counted = (0, 0, self._session.lanes.busy_s[COMPUTE])
        middle = self._session.middle
        if middle.needs_weights:
            self._incoming = WeightsReceiver(middle.stage.partition.state_dict())

    async def run(self) -> None:
        """Serve until the client says goodbye, or `leave` was called and no step is under way.

        Raises:
            WireError: the connection or the peer failed.
            IsthmusError: the job cannot go on; the message is for the client.
        """
        try:
            async with asyncio.TaskGroup() as self._tasks:
                receiving = self._tasks.create_task(self._receive())
                leaving = self._tasks.create_task(self._leaving.wait())
                await asyncio.wait((receiving, leaving), return_when=asyncio.FIRST_COMPLETED)
                receiving.cancel()
                leaving.cancel()
                if self._passing is not None:
                    self._passing.driving.cancel()
        except ExceptionGroup as group:
            raise first_error(group, IsthmusError, RemoteProtocolError, StorageFailed) from None
        finally:
            self._count()
            await asyncio.shield(self._session.suspend(self._passing))

    def leave(self, *, at_once: bool = False) -> None:
        """End: as soon as no training step is under way, or at once."""
        self._asked_to_leave = True
        if at_once:
            self._leaving.set()
        self._leave_if_asked()

    def _leave_if_asked(self) -> None:
        if self._asked_to_leave and (self._passing is None or self._passing.evaluate):
            self._leaving.set()

    async def _receive(self) -> None:
        while not isinstance(message := await self._connection.receive(), Bye):
            self._tenant.touch()
            await self._take(message)
        self.said_bye = True

    async def _take(self, message: Message) -> None:
        match message:
            case Weights():
                await self._take_weights(message)
            case _ if self._incoming is not None:
                raise RemoteProtocolError("the middle's weights must come before any step")
            case Begin():
                await self._begin(message)
            case Forward() | Backward():
                self._take_tensors(message)
            case Commit():
                await self._commit(message)
            case Abort():
                await self._abort(message)
            case Save():
                await self._save(message)
            case Fetch():
                await self._send_weights(message)
            case _:
                raise RemoteProtocolError(f"unexpected {type(message).__name__.lower()}")
        self._leave_if_asked()

    async def _take_weights(self, message: Weights) -> None:
        if self._incoming is None:
            raise RemoteProtocolError("weights came that were not asked for")
        state = self._incoming.take(message)
        if state is not None:
            self._incoming = None
            await self._session.load(state)

    async def _send_weights(self, message: Fetch) -> None:
        if message.what != "weights" or self._passing is not None:
            raise RemoteProtocolError(
                f"{message.what!r} was asked for; there are weights to fetch, between steps"
            )
        for piece in weights_messages(await self._session.weights()):
            await self._connection.send(piece)

    async def _save(self, message: Save) -> None:
        if self._passing is not None or message.step != self._session.concluded:
            raise RemoteProtocolError(
                f"a checkpoint of step {message.step} was asked for, after step {self._session.concluded}"
            )
        await self._tenant.saved()  # one at a time: a slow disk slows the client, and does not fill memory
        saving = self._tenant.save(keep=message.keep)
        self._tasks.create_task(self._say_saved(message.step, saving))

    async def _say_saved(self, step: int, saving: asyncio.Task[None]) -> None:
        error = ""
        try:
            await asyncio.shield(saving)
        except IsthmusError as failed:
            error = str(failed)
        await self._connection.send(Saved(step=step, error=error[:1024]))

    async def _begin(self, message: Begin) -> None:
        session = self._session
        if self._sending and self._passing is None:  # `Passing.accept` counts only what is of its own step
            await asyncio.wait(self._sending)
        if self._passing is not None:
            raise RemoteProtocolError(f"step {message.step} begins before step {self._passing.step} ended")
        limit = MAX_EVALUATION_CHUNKS if message.evaluate else session.spec.chunks
        if message.chunks > limit:
            raise RemoteProtocolError(f"a step of {message.chunks} chunks; the limit is {limit}")
        if not message.evaluate:
            if message.step <= session.concluded:
                raise RemoteProtocolError(f"step {message.step} begins after step {session.concluded}")
            self._tasks.create_task(session.begin())
        passing = Passing(
            step=message.step,
            evaluate=message.evaluate,
            committed=session.applied,
            chunks=message.chunks,
            most_in_flight=session.spec.in_flight,
            codecs=session.new_streams() if message.evaluate else session.training,
            driver=Driver(
                cloud_schedule(message.chunks, evaluate=message.evaluate),
                lambda action: self._perform(passing, action),
            ),
            busy_before_s=session.busy_s(self._sent),
        )
        passing.driving = self._tasks.create_task(self._drive(passing))
        self._passing = passing

    async def _drive(self, passing: Passing) -> None:
        try:
            await passing.driver.run()
        except ValueError as error:
            raise RemoteProtocolError(str(error)) from error
        if passing.evaluate:
            self._passing = None

    def _take_tensors(self, message: Forward | Backward) -> None:
        evaluates = isinstance(message, Forward) and message.evaluate
        if message.step <= self._aborted and not evaluates:
            return  # it was under way when its step was aborted
        passing, session = self._passing, self._session
        if passing is None:
            raise RemoteProtocolError(f"{message.kind} of step {message.step} came outside that step")
        action, cut = passing.accept(message)
        decoding = session.lanes.run(DECODE, str(action), session.work.decode, passing, message, cut)
        self._tasks.create_task(self._arrive(passing, action, decoding))

    async def _arrive(self, passing: Passing, action: Action, decoding: asyncio.Future[Placed]) -> None:
        placed = await decoding
        if passing is self._passing:  # else the step was aborted meanwhile
            passing.placed[action] = placed
            passing.driver.arrive(action)

    async def _perform(self, passing: Passing, action: Action) -> None:
        session, placed = self._session, passing.placed.pop(action)
        work = session.work.backward if action.backward else session.work.forward
        results, norm_sq = await session.lanes.run(COMPUTE, str(action), work, passing, action, placed)
        cut = 1 if action.backward else 2
        names = [info.name for info in session.middle.crossing(cut, gradients=action.backward)]
        encoding = session.lanes.run(
            ENCODE, str(action), session.work.encode, passing, action, cut, names, results
        )
        self._tenant.touch()  # it is the server that the client waits for
        sending = self._tasks.create_task(self._send(passing, action, names, encoding, norm_sq))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)

    async def _send(
        self,
        passing: Passing,
        action: Action,
        names: list[str],
        encoding: asyncio.Future[Encodings],
        norm_sq: float | None,
    ) -> None:
        encodings = await encoding
        passing.encoded += 1
        message = chunk_message(
            encodings,
            names,
            passing.step,
            action.chunk,
            backward=action.backward,
            evaluate=passing.evaluate,
            norm_sq=norm_sq,
        )
        receipt = await (await self._connection.send(message))
        passing.answered(action)
        if receipt.start_ns is not None and receipt.end_ns is not None:
            self._sent.add(str(action), receipt.size, receipt.busy_ns / 1e9, self._connection.bytes_per_s)
            self._session.tracer.record(
                "send", str(action), receipt.start_ns, receipt.end_ns, bytes=receipt.size
            )

    async def _commit(self, message: Commit) -> None:
        passing = self._training_step(message, "commit")
        if not passing.driving.done():
            raise RemoteProtocolError(f"commit of step {message.step} came before its last gradient had left")
        await passing.driving
        self._passing = None
        concluding = self._session.conclude(message.step, applied=True, scale=message.scale)
        self._tasks.create_task(self._confirm(passing, concluding))

    async def _confirm(self, passing: Passing, concluding: asyncio.Future[Any]) -> None:
        await asyncio.shield(concluding)  # the next step may have begun meanwhile
        self._monitor.stepped(time.monotonic() - passing.began_s)
        self._count()
        await self._connection.send(Committed(passing.step, self._session.detail(passing, self._sent)))

    async def _abort(self, message: Abort) -> None:
        passing = self._training_step(message, "abort")
        self._aborted = message.step
        passing.driving.cancel()
        self._passing = None
        await asyncio.shield(self._session.conclude(message.step, applied=False))

    def _training_step(self, message: Commit | Abort, what: str) -> Passing:
        passing = self._passing
        if passing is None or passing.evaluate or message.step != passing.step:
            raise RemoteProtocolError(f"{what} of step {message.step}, which is not under way")
        return passing

    def _count(self) -> None:
        """Tell what has been carried and computed since this was told last."""
        connection, busy_s = self._connection, self._session.lanes.busy_s[COMPUTE]
        received, sent, computed_s = self._counted
        self._counted = connection.received_bytes, connection.sent_bytes, busy_s
        self._monitor.transferred(
            received=connection.received_bytes - received, sent=connection.sent_bytes - sent
        )
        self._monitor.computed(busy_s - computed_s)
