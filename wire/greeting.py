"""What either end answers until the welcome: versions, limits, and proofs that both know the token.

Without a token it is hello, welcome. With one it is hello, challenge, proof, welcome: first the client proves that it
knows the token and then, in the welcome, the server does. The token does not cross, and what does is of no use
to whoever listens: a proof is over nonces that the end which checks it has chosen.

A client that comes back with a ticket of the server's says rejoin instead of all that, and goes on at once.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Protocol

from wire.auth import CLIENT_TOKEN, SERVER_TOKEN, is_proof, prove
from wire.config import WireConfig
from wire.errors import AuthenticationFailed, StaleTicket, TokenMissing, VersionMismatch
from wire.messages import Challenge, Hello, Message, Proof, Rejoin, Welcome

__all__ = ["Door", "Greeting", "Redeem"]

Redeem = Callable[[Rejoin], bool]
"""Takes a ticket, which is of no use afterwards; says whether it was good, and the proof that came with it right."""

_NONCE_SIZE = 32


class Door(Protocol):
    """Whether a peer may try its token, and what came of it; `wire.limiter` has one."""

    def check(self) -> None:
        """Raise `TooManyAttempts` where the peer may not try now."""

    def wrong(self) -> None:
        """Its token was wrong."""


class _OpenDoor:
    def check(self) -> None:
        pass

    def wrong(self) -> None:
        pass


class Greeting:
    """One end's part of a greeting. Which message may come when is the protocol's table's to say.

    Args:
        config: settings.

    Attributes:
        door: of the server's: limits how often the peer may try.
        redeem: of the server's: takes tickets.
    """

    def __init__(self, config: WireConfig) -> None:
        self.door: Door = _OpenDoor()
        self.redeem: Redeem = lambda _: False
        self._config = config
        self._version = 0
        self._ours = secrets.token_bytes(_NONCE_SIZE)
        self._theirs: bytes | None = None

    def hello(self) -> Hello:
        """Return the client's first message."""
        limits = self._config.limits
        return Hello(self._config.versions, self._config.software, limits.max_header, limits.max_payload)

    def admit(self, message: Rejoin) -> None:
        """Let a client in that comes back, or raise `StaleTicket`."""
        if message.version not in self._config.versions or not self.redeem(message):
            raise StaleTicket("there is nothing to rejoin with this ticket; greet, and resume")

    def answer(self, message: Hello | Challenge | Proof | Welcome) -> list[Message]:
        """Return what has to be sent in answer to a message of the peer's.

        Raises:
            VersionMismatch: no version in common.
            AuthenticationFailed: the peer does not know the token.
            TokenMissing: it asks for a token and this end has none, or the other way round.
            TooManyAttempts: its address has tried too often.
        """
        match message:
            case Hello(versions):
                self._version = self._choose(versions)
                if self._config.token is None:
                    return [self._welcome(None)]
                self.door.check()
                return [Challenge(self._ours)]
            case Challenge(nonce):
                return [self._proof(nonce)]
            case Proof(nonce, mac):
                return [self._welcome(self._checked(nonce, mac))]
            case Welcome():
                self._check_welcome(message)
        return []

    def _choose(self, versions: Sequence[int]) -> int:
        common = [version for version in self._config.versions if version in versions]
        if not common:
            raise VersionMismatch(self._config.versions, tuple(versions))
        return common[0]

    def _proof(self, nonce: bytes) -> Proof:
        token = self._config.token
        if token is None:
            raise TokenMissing("the server wants a token; give --token-file")
        self._theirs = nonce
        return Proof(self._ours, prove(token, CLIENT_TOKEN, nonce, self._ours))

    def _checked(self, nonce: bytes, mac: bytes) -> bytes:
        """Check a client's proof and return the server's own."""
        token = self._config.token
        assert token is not None  # or there was no challenge
        self.door.check()  # once more: many connections may have been challenged at once
        if not is_proof(mac, token, CLIENT_TOKEN, self._ours, nonce):
            self.door.wrong()
            raise AuthenticationFailed(
                "the server does not know this token; give the --token-file that it was started with"
            )
        return prove(token, SERVER_TOKEN, nonce, self._ours)

    def _check_welcome(self, welcome: Welcome) -> None:
        if welcome.version not in self._config.versions:
            raise VersionMismatch(self._config.versions, (welcome.version,))
        token = self._config.token
        if token is None:
            return
        if self._theirs is None or welcome.mac is None:
            raise TokenMissing(
                "the server does not ask for the token, so it may be another than it seems; check the address, or "
                "leave out --token-file"
            )
        if not is_proof(welcome.mac, token, SERVER_TOKEN, self._ours, self._theirs):
            raise AuthenticationFailed("the server does not know the token, so it is not the one it seems")

    def _welcome(self, mac: bytes | None) -> Welcome:
        config = self._config
        return Welcome(
            version=self._version,
            software=config.software,
            max_header=config.limits.max_header,
            max_payload=config.limits.max_payload,
            nonce=secrets.token_bytes(_NONCE_SIZE),
            mac=mac,
            heartbeat_s=float(config.heartbeat_s),
            device=config.device,
        )
