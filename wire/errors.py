"""What can go wrong on the wire.

::

    WireError
    ├── LocalProtocolError      this program broke the protocol: a defect here
    ├── RemoteProtocolError     the peer broke the protocol
    │   ├── FrameError          the bytes are no frame
    │   ├── LimitExceeded       a declared size is above what was agreed
    │   ├── HeaderError         the frame's header is no valid message
    │   ├── VersionMismatch     no protocol version in common
    │   ├── AuthenticationFailed  one end cannot prove that it knows the other's token
    │   ├── TokenMissing        one end wants a token and the other has none
    │   ├── TooManyAttempts     too many wrong tokens came from the peer's address
    │   ├── StaleTicket         a rejoin is not possible; a new greeting may be
    │   └── CorruptPayload      the payload does not fit its description
    ├── PeerError               the peer sent an `error` message
    ├── ConnectionLost          the connection ended
    │   └── TlsFailed           no TLS, or none with the right certificates
    ├── ConnectFailed           the connection was never made
    └── StorageFailed           what a codec keeps on disk cannot be kept
    SpecError (a ValueError)    a compression spec does not parse

Every message is one line that says what happened and, where somebody can act, what to do.
"""

from __future__ import annotations

import math
from typing import ClassVar


class WireError(Exception):
    """Base of all errors of this package but `SpecError`."""


class LocalProtocolError(WireError):
    """This program asked for something that the protocol forbids; nothing was sent."""


class RemoteProtocolError(WireError):
    """The peer broke the protocol; the connection ends.

    Attributes:
        code: what the `error` message to the peer carries.
    """

    code: ClassVar[str] = "protocol_error"


class FrameError(RemoteProtocolError):
    """The bytes are no frame: wrong magic, unknown frame format, or a checksum that does not match."""

    code = "bad_frame"


class ForeignProtocol(FrameError):
    """The first bytes are no frame at all: the peer speaks something else, such as HTTP.

    Attributes:
        http: the bytes look like HTTP.
        tls: they look like TLS.
    """

    def __init__(self, first_bytes: bytes) -> None:
        self.http = first_bytes in _HTTP_STARTS
        self.tls = first_bytes[:2] in (b"\x16\x03", b"\x15\x03")  # its handshake, its alert
        super().__init__(
            "the peer speaks HTTP, not the Isthmus protocol"
            if self.http
            else "the peer speaks TLS, and this end does not"
            if self.tls
            else "the peer does not speak the Isthmus protocol"
        )


_HTTP_STARTS = frozenset(
    {b"HTTP", b"GET ", b"POST", b"HEAD", b"PUT ", b"OPTI", b"DELE", b"CONN", b"PATC", b"PRI "}
)


class LimitExceeded(RemoteProtocolError):
    """A declared size is above the limit in force.

    Args:
        what: what was too large, such as "payload".
        size: the declared size in bytes.
        limit: the largest size accepted, in bytes.
    """

    code = "limit_exceeded"

    def __init__(self, what: str, size: int, limit: int) -> None:
        self.what, self.size, self.limit = what, size, limit
        super().__init__(f"a {what} of {size} bytes was declared and the limit is {limit}")


class HeaderError(RemoteProtocolError):
    """A frame's header is not msgpack, or not a message of this protocol."""

    code = "bad_header"


class VersionMismatch(RemoteProtocolError):
    """The two sides have no protocol version in common.

    Args:
        ours: versions that this program speaks.
        theirs: versions that the peer speaks.
    """

    code = "version_mismatch"

    def __init__(self, ours: tuple[int, ...], theirs: tuple[int, ...]) -> None:
        self.ours, self.theirs = ours, theirs
        super().__init__(
            f"no protocol version in common: one side speaks {_spell(ours)}, the other {_spell(theirs)};"
            " upgrade the older one"
        )


class AuthenticationFailed(RemoteProtocolError):
    """The peer cannot prove that it knows the token."""

    code = "wrong_token"


class TokenMissing(RemoteProtocolError):
    """One end wants to see a token proved, and the other knows none or does not ask for it."""

    code = "no_token"


class TooManyAttempts(RemoteProtocolError):
    """Too many wrong tokens came from the peer's address.

    Args:
        wait_s: seconds until it may try again.
    """

    code = "too_many_attempts"

    def __init__(self, wait_s: float) -> None:
        self.wait_s = wait_s
        super().__init__(f"too many wrong tokens came from this address; try again in {math.ceil(wait_s)} s")


class StaleTicket(RemoteProtocolError):
    """A client cannot rejoin its session with this ticket, but may greet and resume."""

    code = "stale_ticket"


class CorruptPayload(RemoteProtocolError):
    """A payload does not fit its description."""

    code = "corrupt_payload"


class PeerError(WireError):
    """The peer sent an `error` message and closed the connection.

    Args:
        code: one word for programs, such as "bad_frame".
        message: one line for people.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(f"the other side reports: {message} ({code})")


class ConnectionLost(WireError):
    """The connection ended.

    Args:
        reason: how, in one line.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class TlsFailed(ConnectionLost):
    """There is no TLS with the peer, or not with the right certificates.

    Args:
        reason: why, and what to do, in one line.
        final: trying again is of no use.
    """

    def __init__(self, reason: str, *, final: bool = True) -> None:
        self.final = final
        super().__init__(reason)


class ConnectFailed(WireError):
    """No connection could be made.

    Args:
        host: the host that was asked for.
        port: the port that was asked for.
        reason: why, and what to do, in one line.
        final: trying again is of no use before somebody changes something.
        hung_up: somebody was there, and was lost before the end of the greeting.
    """

    def __init__(
        self, host: str, port: int, reason: str, *, final: bool = False, hung_up: bool = False
    ) -> None:
        self.host, self.port, self.reason, self.final, self.hung_up = host, port, reason, final, hung_up
        super().__init__(f"cannot connect to {host}:{port}: {reason}")


class StorageFailed(WireError):
    """What a codec keeps on disk cannot be kept.

    Args:
        folder: where it is kept.
        reason: why not, in one line.
    """

    def __init__(self, folder: str, reason: str) -> None:
        self.folder, self.reason = folder, reason
        super().__init__(
            f"what delta keeps of the samples cannot be kept in {folder}: {reason}; free some space there, set TMPDIR"
            " to a folder on another disk, or give delta a lower limit"
        )


class SpecError(ValueError):
    """A compression spec does not parse.

    Args:
        reason: what is wrong and what would be right, in one line.
        text: the whole spec.
        position: index into `text` of the stage at fault.
    """

    def __init__(self, reason: str, text: str, position: int = 0) -> None:
        self.reason, self.text, self.position = reason, text, position
        super().__init__(reason)


def _spell(versions: tuple[int, ...]) -> str:
    return "version " + ", ".join(map(str, versions)) if versions else "no version"
