"""The file that holds the token: one secret, the same on both ends."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

__all__ = ["LEAST_TOKEN", "read_token"]

LEAST_TOKEN = 16
"""Bytes of the shortest token taken. Proofs can be listened to without TLS, and a short token then be guessed."""
_MOST = 4096
logger = logging.getLogger("isthmus.wire")


def read_token(path: Path) -> bytes:
    """Return the token in a file, without the white space around it.

    A warning is logged where others may read the file.

    Raises:
        ValueError: there is none; the message says why and what to do, in one line.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read(_MOST + 1).strip()
    except FileNotFoundError:
        raise ValueError(f"there is no token file {path}; write one: openssl rand -hex 32 > {path}") from None
    except OSError as error:
        raise ValueError(f"the token file {path} cannot be read: {error.strerror or error}") from None
    if len(token) < LEAST_TOKEN:
        raise ValueError(
            f"the token in {path} has {len(token)} bytes and needs {LEAST_TOKEN} at least; write one: openssl rand"
            f" -hex 32 > {path}"
        )
    if len(token) > _MOST:
        raise ValueError(f"{path} is too long for a token; it may have {_MOST} bytes")
    if os.name == "posix" and stat.S_ISREG(mode) and mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning("others can read the token in %s; chmod 600 %s", path, path)
    return token
