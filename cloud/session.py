"""One client's job on the server: the middle, its codecs and where they stand, whatever becomes of connections.

A step ends in one of two ways, and always in one piece: applied or dropped, `Session.conclude`. When the
connection breaks in between, the session comes to rest (`suspend`): a step that has not come through is undone,
but one that only lacks the client's word is kept as *pending*, for the client may have applied it already.
"""

import asyncio
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from cloud.device import Device, LaneStreams
from cloud.middle import Middle, Reserve
from cloud.passing import Passing
from cloud.streams import Streams, check_disk
from cloud.turns import Turns
from cloud.work import Work
from common.coders import Coders
from common.lanes import COMPUTE, DECODE, ENCODE, Lanes
from common.snapshot import copy_of
from common.spec import CUTS, JobSpec
from common.trace import Tracer
from common.traffic import Sent

State = dict[str, Any]


class Session:
    """A job at work; `Session.build` makes it.

    Args:
        spec: the job.
        device: where the middle computes.
        turns: of the sessions at it.
        threads: torch's threads for computing.

    Attributes:
        spec: the job.
        lanes: compute, encode and decode threads.
        tracer: of what they do.
        middle: what is trained.
        work: what the lanes do with chunks.
        training: the ends of training's streams.
        concluded: the last step that was applied or dropped; 0 before the first.
        pending: the step after it, where that only lacks the client's word.
        applied: steps applied so far, which what crosses may depend on.
        broken: it was changed halfway, by a step that began or ended or by a snapshot; only `restore` makes it usable
            again.
    """

    def __init__(self, spec: JobSpec, device: Device, turns: Turns, threads: int) -> None:
        self.spec = spec
        self.tracer = Tracer("cloud", enabled=spec.trace)
        self.lanes = Lanes(self.tracer, threads)
        self.concluded = self.applied = 0
        self.pending: int | None = None
        self.broken = False
        self.middle: Middle
        self.work: Work
        self.training: Streams
        self._coders: Coders
        self._device = device
        self._streams = LaneStreams(device)
        self._share = turns.join(self._streams.settle)
        self._resources = ExitStack()
        self._concluding: asyncio.Future[Any] | None = None
        self._stored: State | None = None  # what makes the pending step complete, where that is not at work

    @classmethod
    async def build(
        cls, spec: JobSpec, device: Device, turns: Turns, *, threads: int, disk_limit: int, reserve: Reserve
    ) -> "Session":
        """Build the middle of a job.

        Args:
            spec: the job.
            device: where the middle computes.
            turns: of the sessions at it.
            threads: torch's threads for computing.
            disk_limit: bytes of disk that its codecs may take.
            reserve: is told how many bytes of memory it will take, before it does; may refuse.

        Raises:
            UserError: the job cannot be done; says why.
        """
        session = cls(spec, device, turns, threads)
        try:
            await session._build(disk_limit, reserve)
        except BaseException:
            await session.close()
            raise
        return session

    async def _build(self, disk_limit: int, reserve: Reserve) -> None:
        self.middle = middle = await self.lanes.run(
            COMPUTE, "build", partial(Middle, self.spec, self._device, reserve=reserve)
        )
        self.applied = middle.committed
        self.lanes.turn = self._share  # building takes long, and whoever is training does not wait for it
        self.work = Work(middle, self._streams, self.spec.seed)
        self.training = self.new_streams()
        check_disk(self.spec.codecs, {c: middle.crossing(c, gradients=False) for c in CUTS}, disk_limit)
        self._coders = Coders(self.lanes, self.training.encoders.values(), self.training.decoders.values())
        self._resources.callback(self.training.close)

    async def close(self) -> None:
        """Give everything up, once what is being computed is done."""
        self._share.leave()
        await asyncio.to_thread(self.lanes.close)
        self._resources.close()

    def new_streams(self) -> Streams:
        """Make the ends of the streams of an evaluation, so that it changes nothing of training."""
        return Streams.make(self.spec.codecs, self.middle.max_bytes())

    async def load(self, weights: Mapping[str, Tensor]) -> None:
        """Start from the client's weights.

        Raises:
            CorruptPayload: they do not fit together.
        """
        await self.lanes.run(COMPUTE, "load", self.work.between, self.middle.load, weights)

    async def weights(self) -> dict[str, Tensor]:
        """Return parameters and buffers, by name, in host memory."""
        return await self.lanes.run(COMPUTE, "state", self.work.between, self.middle.state)

    def begin(self) -> Coroutine[Any, Any, None]:
        """Begin a training step, in order with what is queued when this is called; await that it has begun."""
        beginning = self.lanes.run(COMPUTE, "begin", self.work.between, self.middle.stage.begin_step)
        beginning.add_done_callback(self._ended)
        return _carried_through(beginning)

    def conclude(self, step: int, *, applied: bool, scale: float | None = None) -> asyncio.Future[Any]:
        """End a step, in order with what is queued; shield the result, so that it is carried through.

        Args:
            step: its number.
            applied: apply it, or drop it.
            scale: what gradients are multiplied by, where it is given.
        """
        self.concluded, self.pending = step, None
        self.applied += applied
        end = (self.middle.commit, scale) if applied else (self.middle.drop,)
        self._concluding = asyncio.gather(
            self.lanes.run(COMPUTE, "commit" if applied else "rollback", self.work.between, *end),
            *self._coders.settle(applied=applied),
        )
        self._concluding.add_done_callback(self._ended)
        return self._concluding

    def _ended(self, change: asyncio.Future[Any]) -> None:
        self.broken |= change.cancelled() or change.exception() is not None

    def busy_s(self, sent: Sent) -> dict[str, float]:
        """Return the seconds that each lane has worked, and the connection was sending."""
        return {**self.lanes.busy_s, "send": sent.busy_s}

    def detail(self, passing: Passing, sent: Sent) -> State:
        """Say how long a step took here, what it sent, and, for a trace, when; since this was said last."""
        busy = {lane: s - passing.busy_before_s[lane] for lane, s in self.busy_s(sent).items()}
        detail = {
            "busy_s": busy,
            "mean_s": self.lanes.take_means(),
            "sizes": sent.take_sizes(),
            "rate_bit_s": sent.rate_bit_s,
        }
        return {**detail, "events": self.tracer.to_plain(clear=True)} if self.tracer.enabled else detail

    async def suspend(self, passing: Passing | None) -> None:
        """Come to rest, after the connection and with it everything that waited for the lanes has gone.

        Args:
            passing: what was under way.
        """
        if self._concluding is not None:
            await asyncio.wait((self._concluding,))
        # The lanes work in order: behind this, nothing of the connection's is left on them.
        await asyncio.gather(*(self.lanes.run(lane, "rest", _nothing) for lane in (COMPUTE, ENCODE, DECODE)))
        if passing is None or passing.evaluate:
            return
        if passing.complete:
            self.pending = passing.step
        else:
            await self._undo()

    async def meet(self, step: int, *, applied: bool, scale: float | None) -> None:
        """Bring the session to the step that the client has concluded.

        Args:
            step: the last one concluded, or the one after it.
            applied: whether the client has applied it; then it has to be pending where it is the one after.
            scale: what it multiplied gradients by.
        """
        stored, self._stored = self._stored, None
        if step > self.concluded:
            if applied and stored is not None:
                await self._take_up(stored)
            await asyncio.shield(self.conclude(step, applied=applied, scale=scale))
        elif self.pending is not None:
            await self._undo()

    async def _take_up(self, stored: State) -> None:
        """Make a step complete again that was pending when a snapshot was taken."""
        restore = self.middle.stage.restore_pending
        await self.lanes.run(COMPUTE, "restore", self.work.between, restore, stored["stage"])
        await self._coders.restore(stored["streams"])

    async def _undo(self) -> None:
        """Bring everything back to the last step concluded."""
        self.pending = None
        undone = self.lanes.run(COMPUTE, "rollback", self.work.between, self.middle.stage.rollback)
        try:
            await asyncio.gather(undone, *self._coders.settle(applied=False))
        except BaseException:
            self.broken = True
            raise

    def snapshot(self) -> Awaitable[State]:
        """Copy everything that the session is between two steps: now, before what is queued after this call."""
        parts = (
            self.lanes.run(COMPUTE, "snapshot", self.work.between, copy_of, self.middle.snapshot),
            *self._coders.copies(),
        )
        return self._together(self.applied, parts)

    async def _together(self, applied: int, parts: Sequence[Awaitable[Any]]) -> State:
        middle, *streams = await asyncio.gather(*parts)
        return {"applied": applied, "middle": middle, "streams": streams, "pending": None}

    async def snapshot_at_rest(self) -> State:
        """Copy everything, a pending step too, while no connection is there."""
        if self.pending is not None and self._stored is None:
            copying = self.lanes.run(
                COMPUTE, "snapshot", self.work.between, copy_of, self.middle.stage.pending
            )
            step, streams = self.pending, await asyncio.gather(*self._coders.copies())
            self._stored = {"stage": await copying, "streams": streams}
            await self._undo()
            self.pending = step
        stored = None if self._stored is None else {"step": self.pending, **self._stored}
        return {**await self.snapshot(), "pending": stored}

    async def restore(self, step: int, state: State) -> None:
        """Take a snapshot over.

        Args:
            step: the last one concluded then.
            state: what was copied.
        """
        restore = self.middle.restore
        self.broken = True  # until all of it is there
        await self.lanes.run(COMPUTE, "restore", self.work.between, restore, state["middle"])
        await self._coders.restore(state["streams"])
        self.concluded, self.applied, self._stored = step, state["applied"], state["pending"]
        self.pending = None if self._stored is None else self._stored["step"]
        self.broken = False


async def _carried_through(change: asyncio.Future[None]) -> None:
    await asyncio.shield(change)


def _nothing() -> None:
    pass
