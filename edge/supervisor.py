"""Keeps a run connected: connects, and connects again for as long as there is hope."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from common.trace import Tracer
from edge.config import TrainConfig, parse_address
from edge.link import Link, open_link
from edge.progress import Progress
from edge.reconnect import Patience, ends_session, is_turned_away, may_pass
from edge.security import wire_config
from wire.config import WireConfig
from wire.errors import ConnectFailed, ConnectionLost, WireError
from wire.transport import ComingBack

T = TypeVar("T")

_MOST_HUNG_UP = 3
"""Tries after which a first connection that is lost before its greeting is given up."""


class Supervisor:
    """The connections of one run.

    Args:
        config: where the server is, and when to give up.
        progress: is told when the link is lost and back.
        tracer: of what is sent.
        lost: is called with a connection that is lost, and comes to rest; None where none could be made.
        come_back: returns what a connection begins with that need not ask for the session; None where it has to.
        begins_anew: says whether a failure is that of a session which the run can do without.
        where: says how far the run has come, as in "after step 3 of 10".

    Raises:
        UserError: the settings of the connection do not go together, or a file that they name cannot be used.
    """

    def __init__(
        self,
        config: TrainConfig,
        progress: Progress,
        tracer: Tracer,
        *,
        lost: Callable[[Link | None], Awaitable[None]],
        come_back: Callable[[WireConfig], ComingBack | None],
        begins_anew: Callable[[WireError], bool],
        where: Callable[[], str],
    ) -> None:
        self._config = config
        self._address, self._wire = parse_address(config.server), wire_config(config)
        self._progress = progress
        self._tracer = tracer
        self._lost = lost
        self._come_back = come_back
        self._begins_anew = begins_anew
        self._where = where
        self._patience = Patience(config.give_up_after)
        self._stopping = asyncio.Event()
        self._was_connected = False
        self._hung_up = 0
        self._lost_s: float | None = None

    @property
    def stopping(self) -> bool:
        """The run is to end."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Do not connect again."""
        self._stopping.set()

    async def run(self, use: Callable[[Link], Awaitable[T]]) -> T:
        """Use one connection after the other until one has been used to the end.

        Raises:
            WireError: the first could not be made, or there is no hope any more.
        """
        while True:
            link: Link | None = None
            try:
                back = self._come_back(self._wire)
                async with open_link(*self._address, self._tracer, self._wire, back) as link:
                    self._was_connected = True
                    return await use(link)
            except WireError as error:
                await self._survive(error, link)

    def taken_up(self) -> None:
        """Both sides know where they go on."""
        self._patience.connected()
        if self._lost_s is not None:
            lasted_s = time.monotonic() - self._lost_s
            self._progress.note(f"the link is back after {lasted_s:.1f} s; going on {self._where()}")
            self._lost_s = None

    def progressed(self) -> None:
        """Something has come of the connection that need not be done again."""
        self._patience.progressed()

    async def _survive(self, error: WireError, link: Link | None) -> None:
        """Come to rest, and wait before the next try.

        Raises:
            WireError: there is none.
        """
        await self._lost(link)
        if self._was_connected:
            hopeful = self._begins_anew(error) or may_pass(error)
        else:  # whoever is there and hangs up may be no server at all, or a line that just broke
            self._hung_up += 1
            hopeful = isinstance(error, ConnectFailed) and error.hung_up and self._hung_up <= _MOST_HUNG_UP
        wait_s = self._patience.failed(error) if hopeful else None
        if wait_s is None or self.stopping:
            raise self._final(error) if hopeful or (self._was_connected and ends_session(error)) else error
        if self._lost_s is None:
            self._lost_s = time.monotonic()
            what = (
                "the server cannot take this run now"
                if is_turned_away(error)
                else f"the link was lost {self._where()}"
            )
            self._progress.note(f"{what}: {error}; trying again")
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), wait_s)
            raise self._final(error)

    def _final(self, error: WireError) -> ConnectionLost:
        folder = self._config.checkpoint
        hint = "" if folder is None else f"; go on by edge-client --resume {folder}"
        return ConnectionLost(f"the link to {self._config.server} was lost {self._where()}: {error}{hint}")
