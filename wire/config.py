"""What a connection can be told."""

from __future__ import annotations

from dataclasses import dataclass

from wire.buffers import Allocate, allocate_numpy
from wire.frames import Limits

__all__ = ["DEFAULT_LIMITS", "PROTOCOL_VERSIONS", "WireConfig"]

PROTOCOL_VERSIONS = (2,)
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
        handshake_s: seconds for connecting and for saying hello.
        close_s: seconds that a closing connection waits for its last bytes to go and for the peer's end.
        send_queue: messages that may wait to be sent; `Connection.send` waits for room.
        receive_queue: messages that may wait to be received; beyond that the peer is slowed down.
        max_connections: connections that a server serves at once; it refuses more.
        allocate: where receive buffers come from; pinned memory on a machine with a GPU.
        versions: protocol versions that this end speaks.
    """

    software: str = "isthmus/0.1.0"
    device: str = "cpu"
    limits: Limits = DEFAULT_LIMITS
    heartbeat_s: float = 5.0
    timeout_s: float | None = None
    handshake_s: float = 10.0
    close_s: float = 10.0
    send_queue: int = 8
    receive_queue: int = 8
    max_connections: int = 64
    allocate: Allocate = allocate_numpy
    versions: tuple[int, ...] = PROTOCOL_VERSIONS

    def __post_init__(self) -> None:
        for name in (
            "heartbeat_s",
            "handshake_s",
            "close_s",
            "send_queue",
            "receive_queue",
            "max_connections",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} has to be above 0; it is {getattr(self, name)}")
