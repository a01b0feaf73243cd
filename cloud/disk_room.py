"""Who has room on disk: what is written there now, and which sessions are forgotten for it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from cloud.limits import DiskFull, Limits, Refused
from cloud.state_folder import Kept, StateFolder
from cloud.streams import GIB
from cloud.tenant import Tenant

logger = logging.getLogger(__name__)

_GRACE_S = 600.0
"""A client may be away for so long, and the server have been, before a session goes for those that need its room."""
_MOST_UNUSED = 1000
"""Sessions on disk that are not in memory; the one that was not used for longest is forgotten first."""


@dataclass(frozen=True, eq=False)
class _Promise:
    """Bytes that a session may write, and may not have written yet."""

    key: bytes
    nbytes: int


class DiskRoom:
    """The room that the sessions of one server have on disk.

    Args:
        path: where they are kept.
        limits: what they may take.
        tenants: by key; those that the server knows of, in memory or not. Forgotten ones are removed from it.
        is_unused: whether a session is on disk alone, and nobody asks for it.

    Attributes:
        folder: where they are kept.
        kept: keys of those that were on disk when that was last looked at.

    Raises:
        UserError: the folder cannot be read.
    """

    def __init__(
        self, path: Path, limits: Limits, tenants: dict[bytes, Tenant], is_unused: Callable[[bytes], bool]
    ) -> None:
        self.folder = StateFolder(path, limits.state_bytes)
        self.kept: frozenset[bytes] = frozenset()
        self._limits = limits
        self._tenants = tenants
        self._is_unused = is_unused
        self._forgetting = asyncio.Lock()
        self._promises: set[_Promise] = set()
        self._began_s = time.monotonic()

    @asynccontextmanager
    async def room(self, key: bytes, nbytes: int) -> AsyncIterator[None]:
        """Let a session keep so much more on disk while the block runs, at the cost of some that nobody uses.

        Raises:
            DiskFull: it is more than all may take, or those that are used take too much.
            Refused: the folder fails.
        """
        most = f"{self.folder.most_bytes / GIB:.3g} GiB (--state-limit)"
        if nbytes > self.folder.most_bytes:
            raise DiskFull(
                f"{nbytes / GIB:.3g} GiB are to be kept on the server's disk, which has {most} for all",
                for_good=True,
            )
        promise = _Promise(key, nbytes)
        try:
            try:
                excess = await self.forget_old(promise)
            except OSError as error:
                raise Refused("busy", f"the server's --state-dir fails: {error.strerror or error}") from error
            if excess > 0:
                raise DiskFull(
                    "sessions that are in use, or were a moment ago, take all that the server keeps on disk, "
                    f"{most}; try later"
                )
            yield
        finally:
            self._promises.discard(promise)

    async def forget_old(self, wanted: _Promise | None = None) -> int:
        """Remove sessions from disk that nobody has used for long, or that others need the room of, oldest first.

        Args:
            wanted: what there has to be room for; it is promised where there is. Nothing goes where that would not
                suffice.

        Returns:
            Bytes by which that fails; at most 0 where it does not.

        Raises:
            OSError: they cannot be looked for.
        """
        async with self._forgetting:
            # Listed first: what is written meanwhile rather counts twice than not at all.
            promises = list(self._promises)
            kept = await asyncio.to_thread(self.folder.look)
            excess = sum(each.nbytes for each in kept) - self.folder.most_bytes
            if wanted is not None:
                excess += wanted.nbytes + _to_come(promises, kept)
            # No waiting from here: a client that comes finds its session whole and in use, or does not find it.
            unused = [each for each in kept if self._is_unused(each.key)]
            unused.sort(key=self._unused_s, reverse=True)
            if wanted is not None and excess > sum(each.nbytes for each in unused if self._may_go(each)):
                return excess
            gone = set()
            for left, each in zip(range(len(unused), 0, -1), unused, strict=True):
                is_old = self._is_old(each)
                if is_old or left > _MOST_UNUSED or (excess > 0 and self._may_go(each)):
                    with contextlib.suppress(OSError):
                        self.folder.set_aside(each.key)
                        self._tenants.pop(each.key, None)
                        gone.add(each.key)
                        excess -= each.nbytes
                        why = "nobody came back for it" if is_old else "others need its room on disk"
                        logger.warning("session %s is forgotten: %s", each.key.hex()[:8], why)
            self.kept = frozenset(each.key for each in kept) - gone
            if wanted is not None and excess <= 0:
                self._promises.add(wanted)
        await asyncio.to_thread(self.folder.clear)
        return excess

    def _unused_s(self, each: Kept) -> float:
        """Seconds since a session was written, or its client heard of."""
        tenant = self._tenants.get(each.key)
        written_s = time.time() - each.used_s
        return written_s if tenant is None else min(written_s, tenant.idle_s)

    def _is_old(self, each: Kept) -> bool:
        return self._unused_s(each) > self._limits.forget_s

    def _may_go(self, each: Kept) -> bool:
        """Whether a session that nobody uses may go where others need its room."""
        # While the server was away no client could come back.
        away_s = min(self._unused_s(each), time.monotonic() - self._began_s)
        return self._is_old(each) or away_s >= min(self._limits.park_s, _GRACE_S)


def _to_come(promises: list[_Promise], kept: list[Kept]) -> int:
    """Bytes that were promised and are not in what was found on disk."""
    there: Mapping[bytes, int] = {each.key: each.unfinished for each in kept}
    return sum(max(0, promise.nbytes - there.get(promise.key, 0)) for promise in promises)
