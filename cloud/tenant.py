"""What the server keeps of one client's session between connections: in memory, and in a folder of its own.

::

    STATE_DIR/<session id>/session.json            what was asked for, and the secret that resuming takes
                          /step-….safetensors      checkpoints, the last few

A session in memory is at work or at rest; parked, only the folder is left of it.
"""

import asyncio
import json
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from cloud.limits import DiskFull
from cloud.monitoring import Monitor
from cloud.session import Session
from common.checkpoints import CheckpointFolder
from common.differences import check_same
from common.disk import write_private
from common.errors import CheckpointFailed, IsthmusError, UserError
from common.snapshot import flatten
from common.spec import JobSpec
from wire.auth import REJOIN, is_proof
from wire.messages import Rejoin

KEPT = 2
"""Checkpoints of a session that stay, besides the one that the client may still need."""

logger = logging.getLogger(__name__)

_DESCRIPTION = "session.json"

KeepRoom = Callable[[int], AbstractAsyncContextManager[None]]


class Tenant:
    """One client's session.

    Args:
        key: the session's id.
        secret: what resuming takes.
        spec: the job.
        folder: where it is kept on disk; None for nowhere.
        monitor: is told of checkpoints.
        keep_room: lets so many bytes more be kept on disk in its block, or raises an IsthmusError; None where all may.

    Attributes:
        session: at work or at rest; None while it is parked or not built yet.
        lock: whoever opens, resumes, parks or ends it holds this.
        checkpoints: on disk; None where nothing is kept.
        in_memory: it is, or is being built.
        memory_bytes: what it takes there.
        asked_to_save: the client has checkpoints of this session of its own.
        touched_s: when the client was last heard of, by `time.monotonic`.
        ticket: with which the client may rejoin, once.
    """

    def __init__(
        self,
        key: bytes,
        secret: bytes,
        spec: JobSpec,
        folder: Path | None,
        monitor: Monitor,
        keep_room: KeepRoom | None = None,
    ) -> None:
        self.key, self.secret, self.spec = key, secret, spec
        self.session: Session | None = None
        self.lock = asyncio.Lock()
        self.checkpoints: CheckpointFolder | None = None
        self.asked_to_save = self.in_memory = False
        self.memory_bytes = 0
        self.touched_s = time.monotonic()
        self.ticket: bytes | None = None
        self._folder = folder
        self._monitor = monitor
        self._keep_room = keep_room
        self._writing = asyncio.Lock()
        self._saving: set[asyncio.Task[None]] = set()
        self._parked: int | None = None  # the step of a checkpoint that was written for parking alone
        if folder is not None:
            self.checkpoints = CheckpointFolder(folder, keep=KEPT)

    @property
    def name(self) -> str:
        """What it is called in the log."""
        return self.key.hex()[:8]

    @property
    def idle_s(self) -> float:
        """Seconds since the client was last heard of."""
        return time.monotonic() - self.touched_s

    @property
    def is_worth_keeping(self) -> bool:
        """It has come further than to its first step, or its client counts on it."""
        session = self.session
        is_begun = session is not None and (session.concluded > 0 or session.pending is not None)
        return self.asked_to_save or is_begun

    def touch(self) -> None:
        """Take note that the client has been heard of."""
        self.touched_s = time.monotonic()

    def redeem(self, message: Rejoin) -> bool:
        """Take the ticket, where the client proves that it has it and that the session is its own."""
        ticket = self.ticket
        if ticket is None or not is_proof(
            message.mac, self.secret, REJOIN, ticket, message.nonce, message.session
        ):
            return False
        self.ticket = None
        return True

    def describe(self) -> None:
        """Write down what was asked for.

        Raises:
            IsthmusError: the disk is full, or the folder may not be written.
        """
        if self._folder is None:
            return
        description = {"secret": self.secret.hex(), "spec": self.spec.to_map()}
        try:
            write_private(self._folder / _DESCRIPTION, json.dumps(description))
        except OSError as error:
            raise IsthmusError(
                f"the server cannot keep the session on its disk: {error.strerror or error}"
            ) from error

    @classmethod
    def found(cls, key: bytes, folder: Path, monitor: Monitor, keep_room: KeepRoom) -> "Tenant | None":
        """Find a session on disk; None where there is none that can be read."""
        try:
            description = json.loads((folder / _DESCRIPTION).read_text())
            secret, spec = bytes.fromhex(description["secret"]), JobSpec.from_map(description["spec"])
            tenant = cls(key, secret, spec, folder, monitor, keep_room)
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return None
        tenant.asked_to_save = True
        return tenant

    async def steps(self) -> list[int]:
        """Return the steps of the checkpoints that the session can go back to; those of damaged files are not.

        Raises:
            CheckpointFailed: the folder cannot be read.
        """
        await self.saved()  # what is still being written counts
        if self.checkpoints is None:
            return []
        await asyncio.to_thread(self.checkpoints.check, logger.error)
        return await asyncio.to_thread(self.checkpoints.steps)

    async def restore(self, step: int) -> None:
        """Go back to a checkpoint.

        Raises:
            UserError: it is damaged, or of another job.
        """
        assert self.session is not None
        assert self.checkpoints is not None
        state, about = await asyncio.to_thread(self.checkpoints.read, step)
        check_same(self._about(), about, "the server's checkpoint")
        await self.session.restore(step, state)

    def save(self, *, keep: int | None = None) -> "asyncio.Task[None]":
        """Write a checkpoint of the session between two steps, as it stands with this call.

        Args:
            keep: a step whose checkpoint stays, besides the last few; None to remove nothing.
        """
        assert self.session is not None
        self.asked_to_save = self.asked_to_save or keep is not None
        if self._parked == self.session.concluded:
            self._parked = None
        return self._save(self.session.concluded, self.session.snapshot(), keep)

    def _save(self, step: int, snapshot: Any, keep: int | None) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(self._write(step, snapshot, keep))
        self._saving.add(task)
        task.add_done_callback(self._saving.discard)
        return task

    async def _write(self, step: int, snapshot: Any, keep: int | None) -> None:
        state = await snapshot
        if self.checkpoints is None:
            raise IsthmusError("the server keeps no checkpoints; start cloud-server with --state-dir")
        async with self._writing:
            began_s, ok = time.monotonic(), False
            try:
                async with AsyncExitStack() as taken:
                    # Parked, it is one that nobody uses, and may be forgotten to make room.
                    if keep is not None:
                        await self._take_room(taken, size_of(state), keep)
                    await asyncio.to_thread(self.checkpoints.write, step, state, self._about())
                ok = True
            finally:
                self._monitor.checkpoint_written(time.monotonic() - began_s, ok=ok)
            if keep is not None:
                try:
                    await asyncio.to_thread(self.checkpoints.prune, keep)
                except CheckpointFailed as error:  # the new one is there all the same
                    logger.error("session %s: %s", self.name, error)

    async def see_room(self, nbytes: int) -> None:
        """See that so much more may be kept on disk.

        Raises:
            IsthmusError: there is no room for it.
        """
        async with self._room(nbytes):
            pass

    def _room(self, nbytes: int) -> AbstractAsyncContextManager[None]:
        return nullcontext() if self._folder is None or self._keep_room is None else self._keep_room(nbytes)

    async def _take_room(self, taken: AsyncExitStack, nbytes: int, keep: int) -> None:
        """Have room for a checkpoint, if need be in the place of those before the one that has to stay."""
        try:
            await taken.enter_async_context(self._room(nbytes))
        except DiskFull as full:
            if full.for_good or not await asyncio.to_thread(self._drop_before, keep):
                raise
            await taken.enter_async_context(self._room(nbytes))

    def _drop_before(self, keep: int) -> bool:
        """Remove the checkpoints before one, where that is there; whether any has gone."""
        assert self.checkpoints is not None
        steps = self.checkpoints.steps()
        older = [step for step in steps if step < keep]
        if keep not in steps:
            return False
        for step in older:
            self.checkpoints.drop(step)
        return bool(older)

    def _about(self) -> dict[str, Any]:
        return {"part": "middle", "spec": self.spec.to_map()}

    async def park(self) -> None:
        """Leave nothing of the session in memory, once all of it is on disk. Call while nobody uses it.

        Raises:
            IsthmusError: it cannot be written; it stays in memory.
        """
        session = self.session
        assert session is not None
        await self.saved()
        if not session.broken and not session.middle.needs_weights:
            await self._save_to_park(session)
        await self.close()

    async def _save_to_park(self, session: Session) -> None:
        assert self.checkpoints is not None
        step, before = session.concluded, self._parked
        is_new = step not in await asyncio.to_thread(self.checkpoints.steps)
        await self._save(step, session.snapshot_at_rest(), None)
        self._parked = step if is_new or step == before else None
        if before is not None and before != step:
            await asyncio.to_thread(self.checkpoints.drop, before)

    async def saved(self) -> None:
        """Wait until what is being written is on disk, or has failed."""
        if self._saving:
            await asyncio.wait(self._saving)

    async def close(self) -> None:
        """Give up what is in memory."""
        await self.saved()
        session, self.session, self.ticket = self.session, None, None
        if session is not None:
            await session.close()
        self.in_memory, self.memory_bytes = False, 0

    def forget(self) -> None:
        """Remove what is on disk."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def resolved(self, memory_format: str) -> None:
        """Fix what was measured when the middle was built, for it has to be the same when it is built again."""
        self.spec = replace(self.spec, memory_format=memory_format)


def size_of(state: Any) -> int:
    """Return the bytes that a state takes on disk, but for some hundreds."""
    return sum(tensor.nbytes for tensor in flatten(state)[0].values())
