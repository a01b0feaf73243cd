"""Which sessions there are, in memory and on disk, and which have to go."""

import asyncio
import contextlib
import logging
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cloud.conversation import Conversation
from cloud.disk_room import DiskRoom
from cloud.limits import Crowded, Limits, Refused, TooLarge
from cloud.monitoring import Monitor
from cloud.streams import GIB
from cloud.tenant import Tenant
from common.errors import IsthmusError
from common.runtime import release_memory
from common.spec import JobSpec
from wire.errors import WireError
from wire.transport import Connection

logger = logging.getLogger(__name__)

FAILURES = (IsthmusError, WireError, OSError)
"""What may go wrong with one session, and is no reason to give up others."""

_SWEEP_S = 5.0
_LOST_S = 60.0
"""A session that is kept nowhere may go after so long without its client, where another needs the room."""


@dataclass(frozen=True)
class Visit:
    """A client that is here.

    Attributes:
        connection: on which it is.
        conversation: with its session.
        gone: it has left.
    """

    connection: Connection
    conversation: Conversation
    gone: asyncio.Event


class Register:
    """The sessions of one server.

    Args:
        limits: what they may take.
        folder: where they are kept on disk; None for nowhere.
        monitor: is told what happens.

    Attributes:
        tenants: by key; those in memory, and those on disk that were asked for.
        visits: by key; of the clients that are here.
        disk: the room where they are kept; None for nowhere.

    Raises:
        UserError: the folder cannot be read.
    """

    def __init__(self, limits: Limits, folder: Path | None, monitor: Monitor) -> None:
        self.tenants: dict[bytes, Tenant] = {}
        self.visits: dict[bytes, Visit] = {}
        self.limits = limits
        self.monitor = monitor
        self.disk = None if folder is None else DiskRoom(folder, limits, self.tenants, self._is_unused)
        self._stopping = asyncio.Event()
        self._admission = asyncio.Lock()
        self._memory = threading.Lock()
        self._most_in_memory = 0  # since the last sweep

    def new(self, key: bytes, secret: bytes, spec: JobSpec) -> Tenant:
        """Make a session, with a folder where sessions are kept on disk."""
        if self.disk is None:
            return Tenant(key, secret, spec, None, self.monitor)
        return Tenant(key, secret, spec, self.disk.folder.of(key), self.monitor, partial(self.disk.room, key))

    def find(self, key: bytes) -> Tenant | None:
        """Return a session, in memory or on disk."""
        tenant = self.tenants.get(key)
        if tenant is None and self.disk is not None:
            tenant = Tenant.found(key, self.disk.folder.of(key), self.monitor, partial(self.disk.room, key))
        return tenant

    @property
    def _in_memory(self) -> int:
        return sum(tenant.in_memory for tenant in self.tenants.values())

    async def admit(self, tenant: Tenant) -> None:
        """Let a session into memory, at the cost of one that nobody uses where there is no room.

        Raises:
            Refused: all are used.
        """
        async with self._admission:
            await self._make_room()
            tenant.in_memory = True
            self._most_in_memory = max(self._most_in_memory, self._in_memory)

    def reserve(self, tenant: Tenant, nbytes: int) -> None:
        """Take note of what a session takes in memory; in any thread.

        Raises:
            TooLarge: more than there is.
            Crowded: others have too much of it now.
        """
        if nbytes > self.limits.memory_bytes:
            raise TooLarge(
                f"the job takes about {nbytes / GIB:.3g} GiB of the server's memory, and there are "
                f"{self.limits.memory_bytes / GIB:.3g} GiB for it: use more chunks or a lower --depth, smaller samples "
                "or batches"
            )
        with self._memory:
            # Listed at once, for the event loop's thread adds and removes some meanwhile.
            others = sum(other.memory_bytes for other in list(self.tenants.values()) if other is not tenant)
            if others + nbytes > self.limits.memory_bytes:
                raise Crowded("the server's memory is taken by other clients; try later")
            tenant.memory_bytes = nbytes

    async def make_way(self) -> bool:
        """Let a session go that nobody uses, or whose client has not trained for long; False where none can go."""
        by_use = sorted(self.tenants.values(), key=lambda tenant: tenant.touched_s)
        for tenant in by_use:
            if self._may_go(tenant) and await self._has_gone(tenant):
                return True
        for tenant in by_use:
            if self._is_idle(tenant):
                # Alive, but it keeps others out: it is told to come back, and the session is brought back then.
                visit = self.visits[tenant.key]
                visit.conversation.leave(at_once=True)
                await visit.gone.wait()
                if self._may_go(tenant) and await self._has_gone(tenant):
                    return True
        return False

    async def _has_gone(self, tenant: Tenant) -> bool:
        """Let a session go; False where that fails, which is no fault of whoever needs the room."""
        try:
            await self._rest(tenant)
        except FAILURES as error:
            logger.error("session %s cannot be parked: %s", tenant.name, error)
            return False
        return True

    def _is_idle(self, tenant: Tenant) -> bool:
        visit = self.visits.get(tenant.key)
        if (
            visit is None or visit.connection.busy or tenant.session is None
        ):  # busy: a large message on a slow link
            return False
        return tenant.checkpoints is not None and tenant.idle_s > self.limits.park_s

    async def _make_room(self) -> None:
        """See that one more session may be in memory, at the cost of one that nobody uses."""
        while self._in_memory >= self.limits.sessions:
            if not await self.make_way():
                raise Refused(
                    "busy",
                    f"the server already serves as many clients as it may ({self.limits.sessions}); try later",
                )

    def _may_go(self, tenant: Tenant) -> bool:
        """Whether a session may leave memory where another needs the room."""
        if tenant.session is None or tenant.key in self.visits or tenant.lock.locked():
            return False
        kept = tenant.checkpoints is not None or not tenant.is_worth_keeping
        return kept or tenant.idle_s > min(self.limits.park_s, _LOST_S)

    async def _rest(self, tenant: Tenant) -> None:
        """Park a session; one that is kept nowhere is lost."""
        async with tenant.lock:
            if tenant.key in self.visits:
                return
            if tenant.checkpoints is None or not tenant.is_worth_keeping:
                logger.warning("session %s is given up: nobody came back for it", tenant.name)
                await self.end(tenant)
            elif tenant.session is not None:
                await tenant.park()
                logger.info(
                    "session %s is parked after %.0f s without its client", tenant.name, tenant.idle_s
                )

    def count(self) -> None:
        """Tell how many sessions there are."""
        parked = {key for key in self.tenants if self._is_unused(key)}
        if self.disk is not None:
            parked |= self.disk.kept - self.tenants.keys()
        self.monitor.set_sessions(active=len(self.visits), parked=len(parked))

    async def sweep(self) -> None:
        """Park and forget what its clients have left, until that is to stop."""
        while not self._stopping.is_set():
            for tenant in list(self.tenants.values()):
                try:
                    await self._sweep(tenant)
                except FAILURES as error:
                    logger.error("session %s cannot be parked: %s", tenant.name, error)
            try:
                if self.disk is not None and not self._stopping.is_set():
                    await self.disk.forget_old()
            except OSError as error:
                logger.error("old sessions cannot be looked for: %s", error)
            self.count()
            in_memory = self._in_memory
            if in_memory < self._most_in_memory:
                await asyncio.to_thread(release_memory)
            self._most_in_memory = in_memory
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_SWEEP_S, self.limits.park_s / 2)):
                    await self._stopping.wait()

    def stop_sweeping(self) -> None:
        """Forget no more sessions; one that is being parked is."""
        self._stopping.set()

    async def _sweep(self, tenant: Tenant) -> None:
        if tenant.lock.locked() or tenant.key in self.visits or tenant.idle_s < self.limits.park_s:
            return
        if tenant.idle_s > self.limits.forget_s:
            async with tenant.lock:
                await self.end(tenant)
        elif tenant.session is not None and tenant.checkpoints is not None:
            await self._rest(tenant)

    def _is_unused(self, key: bytes) -> bool:
        """Whether a session is on disk alone, and nobody asks for it."""
        tenant = self.tenants.get(key)
        if tenant is None:
            return True
        return not (tenant.in_memory or tenant.lock.locked() or key in self.visits)

    async def end(self, tenant: Tenant) -> None:
        """Give a session up whose client has nothing of it yet."""
        await tenant.close()
        tenant.forget()
        self.tenants.pop(tenant.key, None)  # last: until nothing is left, nobody finds it again
