"""Which sessions there are, in memory and on disk, and which have to go."""

import asyncio
import contextlib
import logging
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from cloud.conversation import Conversation
from cloud.monitoring import Monitor
from cloud.streams import GIB
from cloud.tenant import Tenant
from common.errors import IsthmusError
from common.runtime import release_memory
from wire.errors import WireError
from wire.transport import Connection

logger = logging.getLogger(__name__)

FAILURES = (IsthmusError, WireError, OSError)
"""What may go wrong with one session, and is no reason to give up others."""

_SWEEP_S = 5.0
_LOST_S = 60.0
"""A session that is kept nowhere may go after so long without its client, where another needs the room."""
_MOST_UNUSED = 1000
"""Sessions on disk that are not in memory; the one that was not used for longest is forgotten first."""


class Refused(IsthmusError):
    """A client cannot be served.

    Args:
        code: one word for the client's program.
        message: one line for people.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


class TooLarge(Refused):
    """A session takes more memory than all of them may have."""

    def __init__(self, message: str) -> None:
        super().__init__("refused", message)


class Crowded(Refused):
    """There is no memory for a session while others have theirs."""

    def __init__(self, message: str) -> None:
        super().__init__("busy", message)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What sessions may take.

    Attributes:
        sessions: at work or at rest in memory.
        memory_bytes: that all sessions in memory may take.
        disk_bytes: of disk that one client's codecs may take.
        park_s: seconds without a word from a client until its session leaves memory.
        forget_s: seconds until nothing is left of it.
    """

    sessions: int
    memory_bytes: int
    disk_bytes: int
    park_s: float
    forget_s: float


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
    """

    def __init__(self, limits: Limits, folder: Path | None, monitor: Monitor) -> None:
        self.tenants: dict[bytes, Tenant] = {}
        self.visits: dict[bytes, Visit] = {}
        self.limits = limits
        self.monitor = monitor
        self._folder = folder
        self._admission = asyncio.Lock()
        self._memory = threading.Lock()
        self._most_in_memory = 0  # since the last sweep

    def folder_of(self, key: bytes) -> Path | None:
        """Return where a session is kept on disk."""
        return None if self._folder is None else self._folder / key.hex()

    def find(self, key: bytes) -> Tenant | None:
        """Return a session, in memory or on disk."""
        tenant = self.tenants.get(key)
        if tenant is None and self._folder is not None:
            tenant = Tenant.found(key, self._folder / key.hex(), self.monitor)
        return tenant

    async def admit(self, tenant: Tenant) -> None:
        """Let a session into memory, at the cost of one that nobody uses where there is no room.

        Raises:
            Refused: all are used.
        """
        async with self._admission:
            await self._make_room()
            tenant.in_memory = True
            self._most_in_memory = max(
                self._most_in_memory, sum(tenant.in_memory for tenant in self.tenants.values())
            )

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
        while sum(tenant.in_memory for tenant in self.tenants.values()) >= self.limits.sessions:
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
        parked = sum(tenant.session is None for tenant in self.tenants.values())
        self.monitor.set_sessions(active=len(self.visits), parked=parked)

    async def sweep(self) -> None:
        """Park and forget, for ever, what its clients have left."""
        while True:
            for tenant in list(self.tenants.values()):
                try:
                    await self._sweep(tenant)
                except FAILURES as error:
                    logger.error("session %s cannot be parked: %s", tenant.name, error)
            self.count()
            in_memory = sum(tenant.in_memory for tenant in self.tenants.values())
            if in_memory < self._most_in_memory:
                await asyncio.to_thread(release_memory)
            self._most_in_memory = in_memory
            try:
                await asyncio.to_thread(self._forget_old)
            except OSError as error:
                logger.error("old sessions cannot be looked for: %s", error)
            await asyncio.sleep(min(_SWEEP_S, self.limits.park_s / 2))

    async def _sweep(self, tenant: Tenant) -> None:
        if tenant.lock.locked() or tenant.key in self.visits or tenant.idle_s < self.limits.park_s:
            return
        if tenant.idle_s > self.limits.forget_s:
            async with tenant.lock:
                await self.end(tenant)
        elif tenant.session is not None and tenant.checkpoints is not None:
            await self._rest(tenant)

    def _forget_old(self) -> None:
        """Remove the folders of sessions that nobody has used for long."""
        if self._folder is None:
            return
        oldest_s = time.time() - self.limits.forget_s
        unused: list[tuple[float, Path]] = []
        for folder in self._folder.iterdir():
            with contextlib.suppress(OSError, ValueError):
                if bytes.fromhex(folder.name) not in self.tenants:
                    unused.append((folder.stat().st_mtime, folder))
        unused.sort(reverse=True)
        for number, (used_s, folder) in enumerate(unused):
            if used_s < oldest_s or number >= _MOST_UNUSED:
                shutil.rmtree(folder, ignore_errors=True)

    async def end(self, tenant: Tenant) -> None:
        """Give a session up whose client has nothing of it yet."""
        await tenant.close()
        tenant.forget()
        self.tenants.pop(tenant.key, None)  # last: until nothing is left, nobody finds it again
