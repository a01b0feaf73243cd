"""One client's job on the server: builds the middle, runs its part of every step, answers until goodbye.

The connection's receive loop (`Session.run`) only sorts messages. Decoding, computing and encoding run on the
session's lanes; `Driver` orders the computing. Whatever fails anywhere ends the session with one typed error,
and the server goes on.
"""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from cloud.device import Device, LaneStreams, Placed
from cloud.middle import Middle
from cloud.passing import Passing
from cloud.streams import Streams, check_disk
from cloud.work import Work
from common.driver import Driver
from common.errors import IsthmusError
from common.groups import first_error
from common.lanes import COMPUTE, DECODE, ENCODE, Lanes
from common.schedule import Action, cloud_schedule
from common.spec import CUTS, JobSpec
from common.trace import Tracer
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
    Open,
    Ready,
    Weights,
)
from wire.streams import Encodings, WeightsReceiver, chunk_message, weights_messages
from wire.transport import Connection

MAX_EVALUATION_CHUNKS = 1 << 24


class Session:
    """One connection and the job on it.

    Args:
        connection: past its handshake.
        device: where the middle computes.
        threads: torch's threads for computing.
        disk_limit: bytes of disk that the client's codecs may take.
    """

    def __init__(self, connection: Connection, device: Device, threads: int, disk_limit: int) -> None:
        self._connection = connection
        self._device = device
        self._disk_limit = disk_limit
        self._tracer = Tracer("cloud", enabled=False)
        self._streams = LaneStreams(device)
        self._lanes = Lanes(self._tracer, threads)
        self._step = self._aborted = -1
        self._committed = 0
        self._passing: Passing | None = None
        self._sent = Sent()
        self._resources = ExitStack()
        self._incoming: WeightsReceiver | None = None
        self._tasks: asyncio.TaskGroup

    async def run(self) -> None:
        """Serve the job until the client says goodbye.

        Raises:
            WireError: the connection or the peer failed.
            IsthmusError: the job cannot be done; the message is for the client.
        """
        try:
            await self._open()
            async with asyncio.TaskGroup() as self._tasks:
                while not isinstance(message := await self._connection.receive(), Bye):
                    await self._take(message)
                self._cancel_step()
        except ExceptionGroup as group:
            raise first_error(group, IsthmusError, RemoteProtocolError, StorageFailed) from None
        finally:
            await asyncio.to_thread(self._lanes.close)  # waits for what is being computed
            self._resources.close()

    async def _open(self) -> None:
        message = await self._connection.receive()
        if not isinstance(message, Open):
            raise RemoteProtocolError(f"expected open, got {type(message).__name__.lower()}")
        spec = JobSpec.from_map(message.spec)
        self._spec = spec
        self._tracer.enabled = spec.trace
        self._middle = middle = await self._lanes.run(COMPUTE, "build", Middle, spec, self._device)
        self._work = Work(middle, self._streams, spec.seed)
        self._training = self._make_streams()
        check_disk(spec.codecs, {c: middle.crossing(c, gradients=False) for c in CUTS}, self._disk_limit)
        self._resources.callback(self._training.close)
        if middle.needs_weights:
            self._incoming = WeightsReceiver(middle.stage.partition.state_dict())
        await self._connection.send(
            Ready(
                need_weights=middle.needs_weights,
                device=self._device.name,
                memory_format=middle.memory_format,
                detail={"torch": torch.__version__},
            )
        )

    def _make_streams(self) -> Streams:
        return Streams.make(self._spec.codecs, self._middle.max_bytes())

    async def _take(self, message: Message) -> None:
        match message:
            case Weights():
                await self._take_weights(message)
            case _ if self._incoming is not None:
                raise RemoteProtocolError("the middle's weights must come before any step")
            case Begin():
                self._begin(message)
            case Forward() | Backward():
                self._take_tensors(message)
            case Commit():
                await self._commit(message)
            case Abort():
                await self._abort(message)
            case Fetch():
                await self._send_weights(message)
            case _:
                raise RemoteProtocolError(f"unexpected {type(message).__name__.lower()}")

    async def _take_weights(self, message: Weights) -> None:
        if self._incoming is None:
            raise RemoteProtocolError("weights came that were not asked for")
        state = self._incoming.take(message)
        if state is not None:
            self._incoming = None
            await self._lanes.run(COMPUTE, "load", self._work.between, self._middle.load, state)
            self._committed = self._middle.committed

    async def _send_weights(self, message: Fetch) -> None:
        if message.what != "weights" or self._passing is not None:
            raise RemoteProtocolError(
                f"{message.what!r} was asked for; there are weights to fetch, between steps"
            )
        state = await self._lanes.run(COMPUTE, "state", self._work.between, self._middle.state)
        for piece in weights_messages(state):
            await self._connection.send(piece)

    def _begin(self, message: Begin) -> None:
        if self._passing is not None:
            raise RemoteProtocolError(f"step {message.step} begins before step {self._passing.step} ended")
        limit = MAX_EVALUATION_CHUNKS if message.evaluate else self._spec.chunks
        if message.chunks > limit:
            raise RemoteProtocolError(f"a step of {message.chunks} chunks; the limit is {limit}")
        if not message.evaluate:
            if message.step <= self._step:
                raise RemoteProtocolError(f"step {message.step} begins after step {self._step}")
            self._step = message.step
            self._lanes.run(COMPUTE, "begin", self._work.between, self._middle.stage.begin_step)
        schedule = cloud_schedule(message.chunks, evaluate=message.evaluate)
        passing = Passing(
            step=message.step,
            evaluate=message.evaluate,
            committed=self._committed,
            chunks=message.chunks,
            most_in_flight=self._spec.in_flight,
            # An evaluation has streams of its own, so that it changes nothing of training.
            codecs=self._make_streams() if message.evaluate else self._training,
            driver=Driver(schedule, lambda action: self._perform(passing, action)),
            busy_before_s=self._busy_s(),
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
        passing = self._passing
        if passing is None:
            raise RemoteProtocolError(f"{message.kind} of step {message.step} came outside that step")
        action, cut = passing.accept(message)
        decoding = self._lanes.run(DECODE, str(action), self._work.decode, passing, message, cut)
        self._tasks.create_task(self._arrive(passing, action, decoding))

    async def _arrive(self, passing: Passing, action: Action, decoding: asyncio.Future[Placed]) -> None:
        placed = await decoding
        if passing is self._passing:  # else the step was aborted meanwhile
            passing.placed[action] = placed
            passing.driver.arrive(action)

    async def _perform(self, passing: Passing, action: Action) -> None:
        placed = passing.placed.pop(action)
        work = self._work.backward if action.backward else self._work.forward
        results, norm_sq = await self._lanes.run(COMPUTE, str(action), work, passing, action, placed)
        cut = 1 if action.backward else 2
        names = [info.name for info in self._middle.crossing(cut, gradients=action.backward)]
        encoding = self._lanes.run(
            ENCODE, str(action), self._work.encode, passing, action, cut, names, results
        )
        self._tasks.create_task(self._send(passing, action, names, encoding, norm_sq))

    async def _send(
        self,
        passing: Passing,
        action: Action,
        names: list[str],
        encoding: asyncio.Future[Encodings],
        norm_sq: float | None,
    ) -> None:
        message = chunk_message(
            await encoding,
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
            self._tracer.record("send", str(action), receipt.start_ns, receipt.end_ns, bytes=receipt.size)

    async def _commit(self, message: Commit) -> None:
        passing = self._training_step(message, "commit")
        if not passing.driving.done():
            raise RemoteProtocolError(f"commit of step {message.step} came before its last gradient had left")
        await passing.driving
        self._passing = None
        self._committed += 1
        applied = [
            self._lanes.run(COMPUTE, "commit", self._work.between, self._middle.commit, message.scale),
            *self._settle(applied=True),
        ]
        self._tasks.create_task(self._confirm(passing, applied))

    def _settle(self, *, applied: bool) -> list[asyncio.Future[None]]:
        """End a step for training's codecs, on the lanes that use them: after what is queued there."""
        what = "commit" if applied else "rollback"
        return [
            self._lanes.run(lane, what, stream.commit if applied else stream.rollback)
            for lane, streams in ((ENCODE, self._training.encoders), (DECODE, self._training.decoders))
            for stream in streams.values()
        ]

    async def _confirm(self, passing: Passing, applied: Sequence[asyncio.Future[None]]) -> None:
        await asyncio.gather(*applied)  # the next step may have begun meanwhile
        detail: dict[str, Any] = {
            "busy_s": {
                lane: seconds - passing.busy_before_s[lane] for lane, seconds in self._busy_s().items()
            },
            "mean_s": self._lanes.take_means(),
            "sizes": self._sent.take_sizes(),
            "rate_bit_s": self._sent.rate_bit_s,
        }
        if self._tracer.enabled:
            detail["events"] = self._tracer.to_plain(clear=True)
        await self._connection.send(Committed(step=passing.step, detail=detail))

    async def _abort(self, message: Abort) -> None:
        self._training_step(message, "abort")
        self._aborted = message.step
        self._cancel_step()
        undone = [
            self._lanes.run(COMPUTE, "rollback", self._work.between, self._middle.rollback),
            *self._settle(applied=False),
        ]
        await asyncio.gather(*undone)

    def _training_step(self, message: Commit | Abort, what: str) -> Passing:
        passing = self._passing
        if passing is None or passing.evaluate or message.step != passing.step:
            raise RemoteProtocolError(f"{what} of step {message.step}, which is not under way")
        return passing

    def _busy_s(self) -> dict[str, float]:
        return {**self._lanes.busy_s, "send": self._sent.busy_s}

    def _cancel_step(self) -> None:
        if self._passing is not None:
            self._passing.driving.cancel()
            self._passing = None
