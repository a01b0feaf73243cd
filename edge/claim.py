"""A run's session on the server: asked for on every connection, until it has been had to its end.

Every answer brings a ticket. With that the next connection need not ask, and wait: it says where this side goes on,
and goes on.
"""

import secrets

from common.spec import JobSpec
from edge.config import TrainConfig
from edge.link import Link
from edge.outcome import Outcome
from edge.run_folder import RunFolder, SessionKey
from wire.auth import REJOIN, REJOINED, is_proof, prove
from wire.config import WireConfig
from wire.errors import AuthenticationFailed, PeerError, RemoteProtocolError, WireError
from wire.messages import Ready, Rejoin, Welcome
from wire.transport import ComingBack

_MOST_NAMED = 1024
"""Checkpoints that a resume message may name."""


class Claim:
    """What a run asks the server for.

    Args:
        config: of the run, which goes into its folder.
        key: the session of a run that goes on from its checkpoints; None for a new run.

    Attributes:
        remembers: what training has come to counts, and not only what was saved of it.
    """

    def __init__(self, config: TrainConfig, key: SessionKey | None) -> None:
        self._config = config
        self._key = key
        self._is_written = key is not None
        self._is_begun = True
        self._ticket: tuple[bytes, Welcome] | None = None
        self._coming_back: Rejoin | None = None
        self.remembers = key is None

    async def ask(self, link: Link, spec: JobSpec, last: Outcome, folder: RunFolder | None) -> Ready:
        """Open the session, or resume it where it was asked for before, and write down what resuming takes.

        Args:
            link: a new connection.
            spec: the job.
            last: of the last step concluded here.
            folder: where checkpoints are; None for nowhere.

        Raises:
            PeerError: the server refuses.
            CheckpointFailed: the folder cannot be written.
        """
        if self._key is None:
            self._key, self._is_written = SessionKey.new(), False
            ready = await link.open(self._key, spec)
        else:
            saved = [] if folder is None else folder.steps
            # Damaged ones count, or a run that has come far would be begun anew in their place.
            self._is_begun = last.step > 0 or (folder is not None and folder.came_to > 0)
            ready = await link.resume(self._key, last if self.remembers else None, saved[-_MOST_NAMED:])
        # Not before: what the server has not taken is no run. But the answer to the first question may be lost.
        if folder is not None and ready.saves and not self._is_written:
            folder.write_settings(self._config, self._key)
            self._is_written = True
        assert link.connection.welcome is not None
        self._ticket = ready.ticket, link.connection.welcome
        return ready

    def come_back(self, last: Outcome, wire: WireConfig) -> ComingBack | None:
        """Return what the next connection begins with; None where it has to ask.

        Args:
            last: of the last step concluded here.
            wire: settings of the connection.
        """
        if self._key is None or self._ticket is None or last.step == 0 or not self.remembers:
            return None
        if wire.token is not None and wire.tls is None:
            return None  # whoever answers has to prove that it knows the token, before anything of the data crosses
        ticket, welcome = self._ticket
        nonce = secrets.token_bytes(32)
        self._coming_back = Rejoin(
            version=welcome.version,
            max_header=wire.limits.max_header,
            max_payload=wire.limits.max_payload,
            session=self._key.session,
            nonce=nonce,
            mac=prove(self._key.secret, REJOIN, ticket, nonce, self._key.session),
            step=last.step,
            applied=last.applied,
            scale=last.scale,
        )
        return self._coming_back, welcome

    def spend(self) -> None:
        """Take note that what `come_back` returned is on its way: it is of no use again."""
        self._ticket = None

    def came_back(self, ready: Ready, link: Link) -> None:
        """Take the answer to what `come_back` returned.

        Raises:
            AuthenticationFailed: the server cannot have had this session.
            RemoteProtocolError: it goes on somewhere else.
        """
        asked, welcome = self._coming_back, link.connection.welcome
        assert asked is not None
        assert welcome is not None
        assert self._key is not None
        if ready.mac is None or not is_proof(ready.mac, self._key.secret, REJOINED, asked.nonce, asked.mac):
            raise AuthenticationFailed("the server does not know the session, so it is not the one it seems")
        if ready.step != asked.step or ready.need_weights:
            raise RemoteProtocolError(
                f"the server goes on after step {ready.step}, this side after {asked.step}"
            )
        self._ticket = ready.ticket, welcome

    def begins_anew(self, error: WireError) -> bool:
        """Whether a connection failed because the server lacks the session, and nothing is lost by opening another.

        The next `ask` does that then.
        """
        is_lacking = isinstance(error, PeerError) and error.code in ("unknown_session", "no_common_step")
        if self._is_begun or not is_lacking:
            return False
        self._key, self.remembers = None, True
        return True
