"""The cloud server: takes connections and runs a session on each."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from cloud.device import Device
from cloud.security import Security
from cloud.session import Session
from common.errors import IsthmusError, UserError
from common.runtime import default_threads
from wire.config import WireConfig
from wire.errors import ConnectFailed, ConnectionLost, PeerError, StorageFailed, WireError
from wire.transport import Connection, Server, serve

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of a server; each is an option of ``cloud-server`` of the same name.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        gpu: index of the GPU to compute on; None for the CPU.
        threads: torch's threads for computing; None for one a core.
        max_sessions: clients served at once; more are refused.
        disk_limit: bytes of disk that one client's codecs may take.
        heartbeat_s: seconds between heartbeats; after three without a byte a client counts as lost.
        security: who may connect, and how.
    """

    host: str = "127.0.0.1"
    port: int = 7433
    gpu: int | None = None
    threads: int | None = None
    max_sessions: int = 8
    disk_limit: int = 16 << 30
    heartbeat_s: float = 5.0
    security: Security = field(default_factory=Security)


@asynccontextmanager
async def running_server(config: ServerConfig) -> AsyncIterator[Server]:
    """Serve while the block runs; the server's ``host`` and ``port`` say where. Sessions end with the block.

    Raises:
        UserError: no such GPU, a file of the security's that cannot be used, or an address that cannot be
            listened on.
    """
    config.security.check_host(config.host)
    device = Device(config.gpu)
    threads = config.threads or default_threads()

    async def on_connection(connection: Connection) -> None:
        await _serve_one(connection, device, threads, config.disk_limit)

    wire = WireConfig(
        device=device.name,
        max_connections=config.max_sessions,
        allocate=device.allocate,
        heartbeat_s=config.heartbeat_s,
    )
    wire = config.security.apply(wire)
    try:
        server = await serve(config.host, config.port, on_connection, wire)
    except ConnectFailed as error:
        raise UserError(f"cannot listen on {config.host}:{config.port}: {error.reason}") from error
    try:
        yield server
    finally:
        await server.close()


async def _serve_one(connection: Connection, device: Device, threads: int, disk_limit: int) -> None:
    logger.info("%s: connected", connection.peer)
    try:
        await Session(connection, device, threads, disk_limit).run()
    except IsthmusError as error:
        logger.warning("%s: refused: %s", connection.peer, error)
        await connection.fail("refused", str(error))
    except StorageFailed as error:
        logger.error("%s: %s", connection.peer, error)
        await connection.fail("refused", f"the server cannot go on: {error}")
    except ConnectionLost as error:
        logger.warning("%s: %s", connection.peer, error)
    except PeerError as error:
        logger.warning("%s: %s", connection.peer, error)
    except WireError as error:
        logger.warning("%s: broke the protocol: %s", connection.peer, error)
        await connection.fail(getattr(error, "code", "protocol_error"), str(error))
    else:
        logger.info("%s: done", connection.peer)


async def serve_until_signal(config: ServerConfig, *, owned: bool = False) -> None:
    """Serve until SIGINT or SIGTERM; the first line on standard output says where.

    Args:
        config: settings.
        owned: end with standard input, too: whoever started this has gone then.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with running_server(config) as server:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):
                loop.add_signal_handler(number, stop.set)
        if owned:
            threading.Thread(target=_when_input_ends, args=(loop, stop.set), daemon=True).start()
        sys.stdout.write(f"listening on {server.host}:{server.port}\n")
        sys.stdout.flush()
        await stop.wait()
        logger.info("shutting down")


def _when_input_ends(loop: asyncio.AbstractEventLoop, then: Callable[[], None]) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    with contextlib.suppress(RuntimeError):  # the loop has ended first
        loop.call_soon_threadsafe(then)
