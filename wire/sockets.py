"""Socket options for a link that carries big frames, and socket errors in plain words."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
import time
from collections.abc import Callable

from wire.errors import (
    ConnectionLost,
    ForeignProtocol,
    PeerError,
    RemoteProtocolError,
    TlsFailed,
    WireError,
)
from wire.loop import Dialer
from wire.pace import Delivery

__all__ = [
    "LowWater",
    "Unsent",
    "delivery",
    "dial",
    "explain",
    "explain_loss",
    "explain_refusal",
    "is_final",
    "spell_address",
    "tune",
]

_UNSENT_S = 0.02
_LEAST_UNSENT, _FIRST_UNSENT, _MOST_UNSENT = 32 * 1024, 64 * 1024, 1 << 20
# Of struct tcp_info in linux/tcp.h: tcpi_unacked, tcpi_bytes_acked, tcpi_notsent_bytes and tcpi_min_rtt; the last of
# them since Linux 4.6.
_INFO = struct.Struct("=24xI92xQ16xII")
_PASSING = frozenset(
    {"busy", "too_many_attempts", "internal_error"}
)  # errors of a server that may do better later
_GATHERED_NS = 2_000_000
_LEAST_GATHERED = 64 * 1024
_MOST_GATHERED = 256 * 1024


def tune(sock: socket.socket) -> None:
    """Send at once (no Nagle), where the platform can."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Unsent:
    """How many bytes may wait unsent in the kernel, where priorities no longer reach them.

    Enough for 20 ms, so that the link is not idle when this end is late, and at least 32 KiB.

    Args:
        sock: the connection's; where it has no such option, nothing happens.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._set = 0
        self._allow(_FIRST_UNSENT)

    def adjust(self, bytes_per_s: float | None) -> None:
        """Choose anew for a pace, None for one that is not known yet."""
        wanted = min(max(int((bytes_per_s or 0) * _UNSENT_S), _LEAST_UNSENT), _MOST_UNSENT)
        if bytes_per_s is not None and not self._set * 3 // 4 <= wanted <= self._set * 4 // 3:
            self._allow(wanted)

    def _allow(self, nbytes: int) -> None:
        self._set = nbytes
        option = getattr(socket, "TCP_NOTSENT_LOWAT", None)
        if option is not None:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.IPPROTO_TCP, option, nbytes)


def delivery(sock: socket.socket) -> Delivery | None:
    """Return what the kernel knows of what it sends, None where the system does not tell."""
    if sys.platform != "linux":
        return None
    try:
        told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    except OSError:
        return None
    if len(told) < _INFO.size:
        return None
    unacknowledged, acknowledged_bytes, unsent_bytes, rtt_us = _INFO.unpack_from(told)
    return Delivery(acknowledged_bytes, not (unacknowledged or unsent_bytes), rtt_us * 1000)


class LowWater:
    """How many bytes the kernel gathers before it wakes this end: as many as come in two milliseconds.

    Woken for every packet, at 1 Gbit/s thousands of times a second, the event loop takes a core from a thread
    that computes just as often, and torch's other threads wait for that one. Never more is waited for than is
    sure to come, the rest of a payload.

    Args:
        sock: the connection's; where it has no such option, nothing happens.
        clock_ns: a monotonic clock in nanoseconds.
    """

    def __init__(self, sock: socket.socket, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._sock = sock
        self._clock_ns = clock_ns
        self._last_ns = clock_ns()
        self._bytes_per_ns = 0.0
        self._set = 1

    def adjust(self, nbytes: int, missing: int) -> None:
        """Choose anew, after bytes have come.

        Args:
            nbytes: how many came just now.
            missing: how many of a payload are still to come; 0 where a header is next.
        """
        if (missing < _LEAST_GATHERED or nbytes >= _MOST_GATHERED // 2) and self._set == 1:
            return  # nothing to gather, or so much comes at once that nothing need be
        now_ns = self._clock_ns()
        rate = nbytes / max(now_ns - self._last_ns, 1)
        self._last_ns = now_ns
        # Down at once, for a link that has become slow; up with care, for what had waited came in no time.
        self._bytes_per_ns = min(rate, self._bytes_per_ns + (rate - self._bytes_per_ns) / 4)
        gathered = int(self._bytes_per_ns * _GATHERED_NS)
        wanted = min(missing, gathered, _MOST_GATHERED)
        if wanted < _LEAST_GATHERED or gathered > 2 * _MOST_GATHERED:
            # On a link faster than memory is copied, waiting would only keep both ends from copying at once.
            wanted = 1
        if wanted < self._set or wanted > self._set * 5 // 4:
            self._set = wanted
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)


async def dial(loop: Dialer, host: str, port: int) -> socket.socket:
    """Connect to the first of a host's addresses that answers.

    Raises:
        OSError: the last address's, where none answers.
    """
    last: OSError = socket.gaierror(f"no address for {host}")
    for family, kind, proto, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            last = error
        else:
            return sock
    raise last


async def speaks_http(loop: Dialer, host: str, port: int) -> bool:
    """Ask a port that did not answer a hello whether it is HTTP's: many such servers wait for the end of a line."""
    try:
        sock = await dial(loop, host, port)
    except OSError:
        return False
    with sock:
        try:
            await loop.sock_sendall(sock, b"HEAD / HTTP/1.0\r\n\r\n")
            return (await loop.sock_recv(sock, 16)).startswith(b"HTTP")
        except OSError:
            return False


def explain(error: OSError) -> str:
    """Say in one line why a connection could not be made, and what to do about it."""
    if isinstance(error, socket.gaierror):
        return "there is no host of that name; check the spelling and the network"
    if isinstance(error, ConnectionRefusedError):
        return "nothing is listening there; start cloud-server, or check host and port"
    if isinstance(error, TimeoutError):
        return "the host does not answer; check the address and any firewall between"
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return "there is no route to that host; check the network"
    if error.errno == errno.EADDRINUSE:
        return "another program listens on that port; choose another one, or --port 0 for any"
    if error.errno == errno.EADDRNOTAVAIL:
        return "that address is not this machine's"
    return error.strerror or str(error) or type(error).__name__


def explain_loss(error: OSError) -> str:
    """Say in a few words how a connection was lost."""
    if isinstance(error, ConnectionResetError):
        return "the connection was reset"
    if isinstance(error, BrokenPipeError):
        return "the peer had closed the connection"
    if isinstance(error, TimeoutError):
        return "the network stopped delivering"
    return error.strerror or type(error).__name__


def explain_refusal(error: WireError) -> str:
    """Say in one line why a connection that was made came to nothing before the welcome."""
    if isinstance(error, ForeignProtocol) and error.tls:
        return "that port speaks TLS; give --tls-fingerprint, --tls or --tls-ca"
    if isinstance(error, ForeignProtocol):
        speaks = "HTTP" if error.http else "something else"
        return f"that port speaks {speaks}, not the Isthmus protocol; check the port number"
    if isinstance(error, PeerError):
        return error.message
    if isinstance(error, TlsFailed):
        return error.reason
    if isinstance(error, ConnectionLost):
        return "the other side hung up before saying welcome; check that a cloud-server listens there"
    return str(error)


def is_final(error: WireError) -> bool:
    """Say whether connecting again is of no use before somebody changes something, after such a refusal."""
    if isinstance(error, PeerError):
        return error.code not in _PASSING
    return error.final if isinstance(error, TlsFailed) else isinstance(error, RemoteProtocolError)


def spell_address(address: object) -> str:
    """Write a socket's address as host:port."""
    if isinstance(address, tuple) and len(address) >= 2:
        host = f"[{address[0]}]" if ":" in str(address[0]) else address[0]
        return f"{host}:{address[1]}"
    return "?"
