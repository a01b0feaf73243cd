"""Which sessions there are, in memory and on disk, and which have to go."""

import asyncio
import contextlib
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from cloud.conversation import Conversation
from cloud.limits import Crowded, Limits, Refused, TooLarge
from cloud.monitoring import Monitor
from cloud.state_folder import StateFolder
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
_MOST_UNUSED = 1000
"""Sessions on disk that are not in memory; the one that was not used for longest is forgotten first."""


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
        self._folder = None if folder is None else StateFolder(folder, limits.state_bytes)
        self._kept: frozenset[bytes] = frozenset()  # on disk, when that was last looked at
        self._forgetting = asyncio.Lock()
        self._admission = asyncio.Lock()
        self._memory = threading.Lock()
        self._most_in_memory = 0  # since the last sweep

    def new(self, key: bytes, secret: bytes, spec: JobSpec) -> Tenant:
        """Make a session, with a folder where sessions are kept on disk."""
        folder = None if self._folder is None else self._folder.of(key)
        return Tenant(key, secret, spec, folder, self.monitor, self.keep_room)

    def find(self, key: bytes) -> Tenant | None:
        """Return a session, in memory or on disk."""
        tenant = self.tenants.get(key)
        if tenant is None and self._folder is not None:
            tenant = Tenant.found(key, self._folder.of(key), self.monitor, self.keep_room)
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
        parked = {key for key, tenant in self.tenants.items() if tenant.session is None}
        parked |= self._kept - self.tenants.keys()
        self.monitor.set_sessions(active=len(self.visits), parked=len(parked))

    async def sweep(self) -> None:
        """Park and forget, for ever, what its clients have left."""
        while True:
            for tenant in list(self.tenants.values()):
                try:
                    await self._sweep(tenant)
                except FAILURES as error:
                    logger.error("session %s cannot be parked: %s", tenant.name, error)
            try:
                await self._forget_old()
            except OSError as error:
                logger.error("old sessions cannot be looked for: %s", error)
            self.count()
            in_memory = sum(tenant.in_memory for tenant in self.tenants.values())
            if in_memory < self._most_in_memory:
                await asyncio.to_thread(release_memory)
            self._most_in_memory = in_memory
            await asyncio.sleep(min(_SWEEP_S, self.limits.park_s / 2))

    async def _sweep(self, tenant: Tenant) -> None:
        if tenant.lock.locked() or tenant.key in self.visits or tenant.idle_s < self.limits.park_s:
            return
        if tenant.idle_s > self.limits.forget_s:
            async with tenant.lock:
                await self.end(tenant)
        elif tenant.session is not None and tenant.checkpoints is not None:
            await self._rest(tenant)

    async def keep_room(self, nbytes: int) -> None:
        """See that so much more may be kept on disk, at the cost of sessions that nobody uses.

        Raises:
            TooLarge: it is more than all may take.
            Refused: those that are used take too much.
        """
        if self._folder is None:
            return
        most = f"{self._folder.most_bytes / GIB:.3g} GiB (--state-limit)"
        if nbytes > self._folder.most_bytes:
            raise TooLarge(
                f"{nbytes / GIB:.3g} GiB are to be kept on the server's disk, which has {most} for all"
            )
        try:
            excess = await self._forget_old(nbytes)
        except OSError as error:
            raise Refused("busy", f"the server's --state-dir fails: {error.strerror or error}") from error
        if excess > 0:
            raise Refused(
                "busy", f"sessions in use take all that the server keeps on disk, {most}; try later"
            )

    async def _forget_old(self, more: int = 0) -> int:
        """Remove sessions from disk that nobody has used for long, or that others need the room of, oldest first.

        Args:
            more: bytes that there has to be room for. Nothing goes where that would not suffice.

        Returns:
            Bytes by which that fails; at most 0 where it does not.

        Raises:
            OSError: they cannot be looked for.
        """
        if self._folder is None:
            return 0
        async with self._forgetting:
            kept = await asyncio.to_thread(self._folder.look)
            excess = more + sum(each.nbytes for each in kept) - self._folder.most_bytes
            # No waiting from here: a client that comes finds its session whole and in use, or does not find it.
            unused = [each for each in kept if self._is_unused(each.key)]
            if more and excess > sum(each.nbytes for each in unused):
                return excess
            oldest_s = time.time() - self.limits.forget_s
            gone = set()
            for left, each in zip(range(len(unused), 0, -1), unused, strict=True):
                is_old = each.used_s < oldest_s
                if is_old or left > _MOST_UNUSED or excess > 0:
                    with contextlib.suppress(OSError):
                        self._folder.set_aside(each.key)
                        self.tenants.pop(each.key, None)
                        gone.add(each.key)
                        excess -= each.nbytes
                        why = "nobody came back for it" if is_old else "others need its room on disk"
                        logger.warning("session %s is forgotten: %s", each.key.hex()[:8], why)
            self._kept = frozenset(each.key for each in kept) - gone
        await asyncio.to_thread(self._folder.clear)
        return excess

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
