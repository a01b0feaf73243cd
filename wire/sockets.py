"""Socket options for a link that carries big frames, and socket errors in plain words."""

from __future__ import annotations

import contextlib
import errno
import socket

from wire.errors import ConnectionLost, ForeignProtocol, PeerError, WireError
from wire.loop import Dialer

__all__ = ["dial", "explain", "explain_loss", "explain_refusal", "spell_address", "tune"]

_UNSENT_BYTES = 1 << 20  # what may wait unsent in the kernel, where priorities no longer reach it


def tune(sock: socket.socket) -> None:
    """Send at once (no Nagle) and keep little unsent in the kernel, where the platform can."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    unsent = getattr(socket, "TCP_NOTSENT_LOWAT", None)
    if unsent is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, unsent, _UNSENT_BYTES)


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
    if isinstance(error, ForeignProtocol):
        speaks = "HTTP" if error.http else "something else"
        return f"that port speaks {speaks}, not the Isthmus protocol; check the port number"
    if isinstance(error, PeerError):
        return error.message
    if isinstance(error, ConnectionLost):
        return "the other side hung up before saying welcome; check that a cloud-server listens there"
    return str(error)


def spell_address(address: object) -> str:
    """Write a socket's address as host:port."""
    if isinstance(address, tuple) and len(address) >= 2:
        host = f"[{address[0]}]" if ":" in str(address[0]) else address[0]
        return f"{host}:{address[1]}"
    return "?"
