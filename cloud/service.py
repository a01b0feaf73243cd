"""Serves the clients of one device: opens their sessions, finds them again, and sends them away."""

import asyncio
import logging
import secrets
from collections.abc import Sequence
from functools import partial

import torch

from cloud.conversation import Conversation
from cloud.device import Device
from cloud.limits import Crowded, Refused
from cloud.meeting import meet
from cloud.register import FAILURES, Register, Visit
from cloud.session import Session
from cloud.tenant import Tenant, size_of
from cloud.turns import Turns
from common.spec import JobSpec
from wire.auth import REJOINED, RESUME, is_proof, prove
from wire.errors import RemoteProtocolError
from wire.messages import Bye, Open, Ready, Rejoin, Resume
from wire.transport import Connection

logger = logging.getLogger(__name__)

_BUILDS_AT_ONCE = 2
"""Tracing a model is Python's work: many at once keep the event loop, and with it everybody, waiting."""

_UNKNOWN = (
    "the server does not know this session any more; start it with the --state-dir it had, or begin a new run"
)


class Service:
    """The sessions of one server.

    Args:
        device: where middles compute.
        threads: torch's threads for computing.
        register: which sessions there are.
    """

    def __init__(self, device: Device, threads: int, register: Register) -> None:
        self._device = device
        self._threads = threads
        self._register = register
        self._turns = Turns()
        self._building = asyncio.Semaphore(_BUILDS_AT_ONCE)
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
            case Rejoin():
                tenant, ready = await self._rejoin(message)
            case Bye():
                return  # whoever only wanted to know whether there is a server
            case _:
                raise RemoteProtocolError(f"expected open or resume, got {message.kind}")
        conversation = Conversation(connection, tenant, self._register.monitor)
        visit = Visit(connection, conversation, asyncio.Event())
        self._register.visits[tenant.key] = visit
        self._register.count()
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
            visit.gone.set()
            if self._register.visits[tenant.key] is visit:
                del self._register.visits[tenant.key]
                self._register.count()
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

    # Beginning. Each returns with the tenant's lock held, so that nobody else takes the session up.

    async def _open(self, message: Open) -> tuple[Tenant, Ready]:
        if self._register.find(message.session) is not None:
            raise Refused("session_exists", "there is a session of that id already")
        if self.draining:
            raise Refused("draining", "the server is shutting down; come back later")
        spec = JobSpec.from_map(message.spec)
        tenant = self._register.new(message.session, message.secret, spec)
        await tenant.lock.acquire()
        self._register.tenants[tenant.key] = tenant
        try:
            await tenant.see_room(1)  # before others make way for it
            await self._build(tenant)
            assert tenant.session is not None
            # With two checkpoints the next one can replace the older.
            await tenant.see_room(2 * size_of(tenant.session.middle.stage.partition.state_dict()))
            tenant.resolved(tenant.session.middle.memory_format)
            tenant.describe()
        except BaseException:
            await self._register.end(tenant)
            tenant.lock.release()
            raise
        return tenant, self._ready(tenant)

    async def _resume(self, message: Resume, connection: Connection) -> tuple[Tenant, Ready]:
        assert connection.welcome is not None
        tenant = await self._claim(message, connection.welcome.nonce)
        await self._take_up(tenant, message, message.saved)
        return tenant, self._ready(tenant)

    async def _rejoin(self, message: Rejoin) -> tuple[Tenant, Ready]:
        """Go on where the client does, who has not waited to hear of it: so there is nothing to choose."""
        try:
            tenant = await self._claim(message)
            await self._take_up(tenant, message, ())
        except Refused as refused:
            if refused.code in ("unknown_session", "no_common_step"):
                raise Refused("stale_ticket", str(refused)) from None
            raise
        mac = prove(tenant.secret, REJOINED, message.nonce, message.mac)
        return tenant, self._ready(tenant, mac)

    def redeem(self, message: Rejoin) -> bool:
        """Take a client's ticket; whether it may rejoin."""
        tenant = self._register.tenants.get(message.session)
        return tenant is not None and tenant.redeem(message)

    async def _take_up(self, tenant: Tenant, message: Resume | Rejoin, saved: Sequence[int]) -> None:
        """Bring a session to where both go on; its lock is held, and released where that fails."""
        try:
            await self._dismiss_visitor(tenant)
            await self._meet(tenant, message, saved)
        except BaseException:
            tenant.lock.release()
            raise

    async def _claim(self, message: Resume | Rejoin, nonce: bytes | None = None) -> Tenant:
        """Find a session for its owner, who has proved that it is his or does so by this nonce, and take its lock."""
        while True:
            tenant = self._register.find(message.session)
            if tenant is None:
                raise Refused("unknown_session", _UNKNOWN)
            if nonce is not None and not is_proof(message.mac, tenant.secret, RESUME, nonce, tenant.key):
                raise Refused("wrong_secret", "the secret is not this session's")
            if self.draining:
                raise Refused("draining", "the server is shutting down; come back later")
            tenant = self._register.tenants.setdefault(tenant.key, tenant)
            tenant.touch()  # though it be refused now: it comes back
            # The newest connection has the session: none that comes late gets in before it.
            tenant.ticket = None
            await tenant.lock.acquire()
            if self._register.tenants.get(tenant.key) is tenant and not self.draining:
                return tenant
            tenant.lock.release()  # whoever had the lock has given the session up

    async def _dismiss_visitor(self, tenant: Tenant) -> None:
        """End a connection that the client has given up, though this end may not have noticed."""
        while (visit := self._register.visits.get(tenant.key)) is not None:
            visit.connection.abort()
            await visit.gone.wait()

    async def _meet(self, tenant: Tenant, message: Resume | Rejoin, theirs: Sequence[int]) -> None:
        """Bring a session to where both ends can go on."""
        saved = await tenant.steps()
        if tenant.session is not None and tenant.session.broken:
            await tenant.close()
        was_stored = tenant.session is None
        if was_stored:
            if not saved:
                self._register.tenants.pop(tenant.key, None)
                raise Refused("unknown_session", _UNKNOWN)
            await self._build(tenant)
            await tenant.restore(max(saved))
        session = tenant.session
        assert session is not None
        meeting = meet(
            message.step,
            theirs,
            applied=message.applied,
            concluded=session.concluded,
            pending=session.pending,
            saved=saved,
        )
        if meeting is None:
            has, have = (", ".join(map(str, sorted(steps)[-5:])) or "none" for steps in (theirs, saved))
            raise Refused(
                "no_common_step",
                f"client and server have no checkpoint of the same step: the client has {has}, the server {have}",
            )
        if meeting.stored:
            assert tenant.checkpoints is not None
            await tenant.restore(meeting.step)
            await asyncio.to_thread(tenant.checkpoints.drop_after, meeting.step)
        self._register.monitor.resumed("checkpoint" if was_stored or meeting.stored else "memory")
        await session.meet(meeting.step, applied=message.applied, scale=message.scale)

    def _ready(self, tenant: Tenant, mac: bytes | None = None) -> Ready:
        session = tenant.session
        assert session is not None
        tenant.ticket = secrets.token_bytes(32)
        return Ready(
            step=session.concluded,
            need_weights=session.middle.needs_weights,
            saves=tenant.checkpoints is not None,
            device=self._device.name,
            memory_format=session.middle.memory_format,
            ticket=tenant.ticket,
            mac=mac,
            detail={"torch": torch.__version__},
        )

    async def _build(self, tenant: Tenant) -> None:
        """Build a session, where there is room for one more."""
        await self._register.admit(tenant)
        try:
            while tenant.session is None:
                try:
                    async with self._building:
                        tenant.session = await Session.build(
                            tenant.spec,
                            self._device,
                            self._turns,
                            threads=self._threads,
                            disk_limit=self._register.limits.disk_bytes,
                            reserve=partial(self._register.reserve, tenant),
                        )
                except Crowded:
                    if not await self._register.make_way():
                        raise
        except BaseException:
            await tenant.close()  # it has nothing, but may have reserved it
            raise

    # Ending.

    async def _left(self, tenant: Tenant, *, for_good: bool) -> None:
        session = tenant.session
        if for_good or (session is not None and session.broken):
            async with tenant.lock:
                if tenant.key in self._register.visits:
                    return  # somebody has come back for it
                await tenant.close()
                self._register.tenants.pop(tenant.key, None)
                if for_good and not tenant.asked_to_save:
                    tenant.forget()

    async def drain(self, limit_s: float) -> None:
        """Let every client finish its step, send it away, and park all sessions.

        Args:
            limit_s: seconds that steps under way are given.
        """
        self.draining = True
        self._register.monitor.drain()
        visits = list(self._register.visits.values())
        for visit in visits:
            visit.conversation.leave()
        ends = [asyncio.ensure_future(visit.gone.wait()) for visit in visits]
        if ends:
            _, late = await asyncio.wait(ends, timeout=limit_s)
            for visit in visits:
                visit.conversation.leave(at_once=True)
            if late:
                await asyncio.wait(late)
        for tenant in list(self._register.tenants.values()):
            async with tenant.lock:
                if (late_visit := self._register.visits.get(tenant.key)) is not None:  # it came meanwhile
                    late_visit.conversation.leave(at_once=True)
                    await late_visit.gone.wait()
                try:
                    if tenant.session is not None and tenant.checkpoints is not None:
                        await tenant.park()
                except FAILURES as error:
                    logger.error("session %s is not kept as it stands: %s", tenant.name, error)
                await tenant.close()
