"""What a connection can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wire.buffers import Allocate, allocate_numpy
from wire.frames import Limits

if TYPE_CHECKING:
    from ssl import SSLContext

__all__ = ["DEFAULT_LIMITS", "PROTOCOL_VERSIONS", "WireConfig"]

PROTOCOL_VERSIONS = (3,)
"""Protocol versions that this program speaks, the preferred one first."""


DEFAULT_LIMITS = Limits(max_header=1 << 20, max_payload=1 << 30)
"""1 MiB of header, 1 GiB of payload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WireConfig:
    """Settings of one end of a connection.

    Attributes:
        software: name and version of this program, for the peer's log.
        device: where this end computes, such as "cpu" or "cuda:0"; a server's welcome carries it.
        limits: the largest frame that this end accepts.
        heartbeat_s: seconds between pings; the server's value holds for both ends.
        timeout_s: seconds of silence after which the connection is given up; None for three heartbeats.
        handshake_s: seconds for connecting, for TLS and for the greeting.
        open_s: seconds that a client which was welcomed may take to open or resume a job.
        least_bytes_per_s: how fast a frame that has begun has to come, and what waits to be sent has to go.
        slow_s: seconds over which `least_bytes_per_s` is measured of what comes.
        unread_s: the same of what goes: longer, because a peer that computes may take its time to read.
        close_s: seconds that a closing connection waits for its last bytes to go and for the peer's end.
        send_queue: messages that may wait to be sent; `Connection.send` waits for room.
        receive_queue: messages that may wait to be received; beyond that the peer is slowed down.
        max_connections: connections that a server serves at once; it refuses more.
        max_strangers: connections not welcomed yet, or on their way out, that a server keeps; the oldest go.
        allocate: where receive buffers come from; pinned memory on a machine with a GPU.
        versions: protocol versions that this end speaks.
        token: a secret that both ends have to know; None for none.
        tls: makes the connection one over TLS, see `wire.tls`; None for plain TCP.
        tls_fingerprint: SHA-256 of the certificate that the server has to show, 32 bytes; None for any that `tls`
            accepts.
    """

    software: str = "isthmus/0.1.0"
    device: str = "cpu"
    limits: Limits = DEFAULT_LIMITS
    heartbeat_s: float = 5.0
    timeout_s: float | None = None
    handshake_s: float = 10.0
    open_s: float = 600.0
    least_bytes_per_s: int = 1024
    slow_s: float = 30.0
    unread_s: float = 120.0
    close_s: float = 10.0
    send_queue: int = 8
    receive_queue: int = 8
    max_connections: int = 64
    max_strangers: int = 256
    allocate: Allocate = allocate_numpy
    versions: tuple[int, ...] = PROTOCOL_VERSIONS
    token: bytes | None = field(default=None, repr=False)
    tls: SSLContext | None = None
    tls_fingerprint: bytes | None = None

    def __post_init__(self) -> None:
        for name in (
            "heartbeat_s",
            "handshake_s",
            "open_s",
            "least_bytes_per_s",
            "slow_s",
            "unread_s",
            "close_s",
            "send_queue",
            "receive_queue",
            "max_connections",
            "max_strangers",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} has to be above 0; it is {getattr(self, name)}")
