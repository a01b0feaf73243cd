"""Proofs that an end knows a secret which does not cross: HMAC-SHA256 over nonces that the other end chose.

Each proof says what it is for, so that none can be taken for another::

    client, of the token    server's challenge nonce, client's nonce
    server, of the token    client's nonce, server's challenge nonce
    client, of a session    server's welcome nonce, session id
    client, of a session    server's ticket, client's nonce, session id
    server, of a session    client's nonce, that proof of the client's
"""

from __future__ import annotations

import hashlib
import hmac

__all__ = ["CLIENT_TOKEN", "REJOIN", "REJOINED", "RESUME", "SERVER_TOKEN", "is_proof", "prove"]

CLIENT_TOKEN = b"isthmus client token"
SERVER_TOKEN = b"isthmus server token"
RESUME = b"isthmus resume"
REJOIN = b"isthmus rejoin"
REJOINED = b"isthmus rejoined"


def prove(secret: bytes, what: bytes, *nonces: bytes) -> bytes:
    """Return the proof, 32 bytes.

    Args:
        secret: what both ends know.
        what: one of this file's constants.
        nonces: of fixed sizes.
    """
    return hmac.digest(secret, b"\0".join((what, *nonces)), hashlib.sha256)


def is_proof(mac: bytes, secret: bytes, what: bytes, *nonces: bytes) -> bool:
    """Say whether a peer's proof is right, in a time that tells nothing of where it is wrong."""
    return hmac.compare_digest(mac, prove(secret, what, *nonces))
