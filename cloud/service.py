"""Many clients' sessions on one device: opened, found again, parked, and brought to an end."""

import asyncio
import contextlib
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cloud.conversation import Conversation
from cloud.device import Device
from cloud.meeting import meet
from cloud.session import Session
from cloud.tenant import Tenant
from cloud.turns import Turns
from common.errors import IsthmusError
from common.spec import JobSpec
from wire.auth import RESUME, is_proof
from wire.errors import RemoteProtocolError
from wire.messages import Open, Ready, Resume
from wire.transport import Connection

logger = logging.getLogger(__name__)

_SWEEP_S = 5.0


class Refused(IsthmusError):
    """A client cannot be served.

    Args:
        code: one word for the client's program.
        message: one line for people.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What sessions may take.

    Attributes:
        sessions: at work or at rest in memory.
        disk_bytes: of disk that one client's codecs may take.
        park_s: seconds without a word from a client until its session leaves memory.
        forget_s: seconds until nothing is left of it.
    """

    sessions: int
    disk_bytes: int
    park_s: float
    forget_s: float


class Service:
    """The sessions of one server.

    Args:
        device: where middles compute.
        threads: torch's threads for computing.
        limits: what sessions may take.
        folder: where they are kept on disk; None for nowhere.
    """

    def __init__(self, device: Device, threads: int, limits: Limits, folder: Path | None) -> None:
        self._device = device
        self._threads = threads
        self._limits = limits
        self._folder = folder
        self._tenants: dict[bytes, Tenant] = {}
        self._visits: dict[bytes, tuple[Connection, Conversation, asyncio.Event]] = {}
        self._admission = asyncio.Lock()
        self._turns = Turns()
        self.draining = False

    async def attend(self, connection: Connection) -> None:
        """Serve one connection to its end.

        Raises:
            WireError: the connection or the peer failed.
            IsthmusError: the client cannot be served; the message is for it.
        """
        message = await connection.receive()
        match message:
            case Open():
                tenant, ready = await self._open(message)
            case Resume():
                tenant, ready = await self._resume(message, connection)
            case _:
                raise RemoteProtocolError(f"expected open or resume, got {message.kind}")
        conversation = Conversation(connection, tenant)
        gone = asyncio.Event()
        self._visits[tenant.key] = connection, conversation, gone
        tenant.lock.release()
        logger.info("%s: session %s after step %d", connection.peer, tenant.name, ready.step)
        try:
            await connection.send(ready)
            if self.draining:
                conversation.leave()
            await conversation.run()
            if not conversation.said_bye:
                await self._send_away(connection, tenant)
        finally:
            tenant.touch()
            gone.set()
            if self._visits[tenant.key][1] is conversation:
                del self._visits[tenant.key]
                await self._left(tenant, for_good=conversation.said_bye)

    async def _send_away(self, connection: Connection, tenant: Tenant) -> None:
        if self.draining and tenant.checkpoints is None:
            await connection.fail(
                "stopped", "the server was stopped, and keeps nothing on disk to go on with"
            )
        else:
            await connection.close(
                "the server is shutting down" if self.draining else "nothing was done for long"
            )

    # Beginning. Both return with the tenant's lock held, so that nobody else takes the session up.

    async def _open(self, message: Open) -> tuple[Tenant, Ready]:
        if self._find(message.session) is not None:
            raise Refused("session_exists", "there is a session of that id already")
        if self.draining:
            raise Refused("draining", "the server is shutting down; come back later")
        spec = JobSpec.from_map(message.spec)
        folder = None if self._folder is None else self._folder / message.session.hex()
        tenant = Tenant(message.session, message.secret, spec, folder)
        await tenant.lock.acquire()
        self._tenants[tenant.key] = tenant
        try:
            await self._build(tenant)
            assert tenant.session is not None
            tenant.resolved(tenant.session.middle.memory_format)
            tenant.describe()
        except BaseException:
            await self._end(tenant)
            tenant.lock.release()
            raise
        return tenant, self._ready(tenant)

    async def _resume(self, message: Resume, connection: Connection) -> tuple[Tenant, Ready]:
        tenant = self._find(message.session)
        if tenant is None:
            raise Refused("unknown_session", "the server does not know this session any more")
        assert connection.welcome is not None
        if not is_proof(message.mac, tenant.secret, RESUME, connection.welcome.nonce, tenant.key):
            raise Refused("wrong_secret", "the secret is not this session's")
        if self.draining:
            raise Refused("draining", "the server is shutting down; come back later")
        tenant = self._tenants.setdefault(tenant.key, tenant)
        await tenant.lock.acquire()
        self._tenants[tenant.key] = tenant  # it may have been on its way out
        try:
            await self._dismiss_visitor(tenant)
            await self._meet(tenant, message)
        except BaseException:
            tenant.lock.release()
            raise
        return tenant, self._ready(tenant)

    async def _dismiss_visitor(self, tenant: Tenant) -> None:
        """End a connection that the client has given up, though this end may not have noticed."""
        while (visit := self._visits.get(tenant.key)) is not None:
            connection, _, gone = visit
            connection.abort()
            await gone.wait()

    async def _meet(self, tenant: Tenant, message: Resume) -> None:
        """Bring a session to where both ends can go on."""
        saved = [] if tenant.checkpoints is None else await asyncio.to_thread(tenant.checkpoints.steps)
        if tenant.session is None:
            if not saved:
                raise Refused("unknown_session", "the server does not know this session any more")
            await self._build(tenant)
            await tenant.restore(max(saved))
        session = tenant.session
        assert session is not None
        meeting = meet(
            message.step,
            message.saved,
            applied=message.applied,
            concluded=session.concluded,
            pending=session.pending,
            saved=saved,
        )
        if meeting is None:
            ours = ", ".join(map(str, saved)) or "none"
            raise Refused(
                "no_common_step", f"client and server have no checkpoint of the same step; here are: {ours}"
            )
        if meeting.stored:
            assert tenant.checkpoints is not None
            await tenant.restore(meeting.step)
            await asyncio.to_thread(tenant.checkpoints.drop_after, meeting.step)
        await session.meet(meeting.step, applied=message.applied, scale=message.scale)

    def _ready(self, tenant: Tenant) -> Ready:
        session = tenant.session
        assert session is not None
        return Ready(
            step=session.concluded,
            need_weights=session.middle.needs_weights,
            saves=tenant.checkpoints is not None,
            device=self._device.name,
            memory_format=session.middle.memory_format,
            detail={"torch": torch.__version__},
        )

    def _find(self, key: bytes) -> Tenant | None:
        tenant = self._tenants.get(key)
        if tenant is None and self._folder is not None:
            tenant = Tenant.found(key, self._folder / key.hex())
        return tenant

    async def _build(self, tenant: Tenant) -> None:
        """Build a session, where there is room for one more."""
        async with self._admission:
            await self._make_room()
            tenant.in_memory = True
        tenant.session = await Session.build(
            tenant.spec,
            self._device,
            self._turns,
            threads=self._threads,
            disk_limit=self._limits.disk_bytes,
        )

    async def _make_room(self) -> None:
        """See that one more session may be in memory, at the cost of one that nobody uses."""
        while sum(tenant.in_memory for tenant in self._tenants.values()) >= self._limits.sessions:
            resting = [tenant for tenant in self._tenants.values() if self._may_go(tenant)]
            if not resting:
                raise Refused("busy", f"the server already serves {self._limits.sessions} clients; try later")
            await self._rest(min(resting, key=lambda tenant: tenant.touched_s))

    def _may_go(self, tenant: Tenant) -> bool:
        """Whether a session may leave memory where another needs the room."""
        if tenant.session is None or tenant.key in self._visits or tenant.lock.locked():
            return False
        return tenant.checkpoints is not None or tenant.idle_s > self._limits.park_s

    async def _rest(self, tenant: Tenant) -> None:
        """Park a session; one that is kept nowhere is lost."""
        async with tenant.lock:
            if tenant.checkpoints is None:
                logger.warning("session %s is given up: nobody came back for it", tenant.name)
                await self._end(tenant)
            elif tenant.session is not None and tenant.key not in self._visits:
                await tenant.park()
                logger.info(
                    "session %s is parked after %.0f s without its client", tenant.name, tenant.idle_s
                )

    # Ending.

    async def _left(self, tenant: Tenant, *, for_good: bool) -> None:
        session = tenant.session
        if for_good or (session is not None and session.broken):
            async with tenant.lock:
                if tenant.key in self._visits:
                    return  # somebody has come back for it
                await tenant.close()
                self._tenants.pop(tenant.key, None)
                if for_good and not tenant.asked_to_save:
                    tenant.forget()

    async def sweep(self) -> None:
        """Park and forget, for ever, what its clients have left."""
        while True:
            for tenant in list(self._tenants.values()):
                try:
                    await self._sweep(tenant)
                except IsthmusError as error:
                    logger.error("session %s cannot be parked: %s", tenant.name, error)
            await asyncio.to_thread(self._forget_old)
            await asyncio.sleep(min(_SWEEP_S, self._limits.park_s / 2))

    async def _sweep(self, tenant: Tenant) -> None:
        visit = self._visits.get(tenant.key)
        if tenant.lock.locked() or tenant.idle_s < self._limits.park_s:
            return
        if visit is not None:
            # Alive, but it trains nothing: it is told to come back, and the session is brought back then.
            visit[1].leave(at_once=True)
        elif tenant.idle_s > self._limits.forget_s:
            async with tenant.lock:
                await self._end(tenant)
        elif tenant.session is not None and tenant.checkpoints is not None:
            await self._rest(tenant)

    def _forget_old(self) -> None:
        """Remove the folders of sessions that nobody has used for long."""
        if self._folder is None:
            return
        oldest_s = time.time() - self._limits.forget_s
        for folder in self._folder.iterdir():
            with contextlib.suppress(OSError, ValueError):
                if bytes.fromhex(folder.name) in self._tenants or folder.stat().st_mtime > oldest_s:
                    continue
                shutil.rmtree(folder, ignore_errors=True)

    async def drain(self, limit_s: float) -> None:
        """Let every client finish its step, send it away, and park all sessions.

        Args:
            limit_s: seconds that steps under way are given.
        """
        self.draining = True
        visits = list(self._visits.values())
        for _, conversation, _ in visits:
            conversation.leave()
        ends = [asyncio.ensure_future(gone.wait()) for _, _, gone in visits]
        if ends:
            _, late = await asyncio.wait(ends, timeout=limit_s)
            for _, conversation, gone in visits:
                if not gone.is_set():
                    conversation.leave(at_once=True)
            if late:
                await asyncio.wait(late)
        for tenant in list(self._tenants.values()):
            async with tenant.lock:
                try:
                    if tenant.session is not None and tenant.checkpoints is not None:
                        await tenant.park()
                except IsthmusError as error:
                    logger.error("session %s is lost: %s", tenant.name, error)
                await tenant.close()

    async def _end(self, tenant: Tenant) -> None:
        """Give a session up whose client has nothing of it yet."""
        self._tenants.pop(tenant.key, None)
        await tenant.close()
        tenant.forget()
