"""The cloud server: takes connections and runs a session on each."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cloud.device import Device
from cloud.endpoint import monitoring_endpoint
from cloud.limits import Crowded, DiskFull, Limits, TooLarge
from cloud.monitoring import Monitor
from cloud.register import Register
from cloud.security import Security
from cloud.service import Service
from common.disk import sole_user
from common.errors import IsthmusError, UserError
from common.runtime import default_threads, machine_bytes
from wire.config import WireConfig
from wire.errors import (
    AuthenticationFailed,
    ConnectFailed,
    ConnectionLost,
    PeerError,
    StorageFailed,
    TokenMissing,
    WireError,
)
from wire.transport import Connection, Server, serve

logger = logging.getLogger(__name__)

_REASONS = {
    "busy": "capacity",
    "draining": "draining",
    "unknown_session": "other",
    "stale_ticket": "other",
    "no_common_step": "other",
    "session_exists": "authentication",
    "wrong_secret": "authentication",
    "wrong_token": "authentication",
    "no_token": "authentication",
    "too_many_attempts": "rate",
}
"""Why a client was refused, as metrics have it, by the code of the error."""

MEMORY_SHARE = 0.85
"""Of the memory that there is, for sessions, unless something else is asked for."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of a server; each is an option of ``cloud-server`` of the same name.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        gpu: index of the GPU to compute on; None for the CPU.
        threads: torch's threads for computing; None for one a core.
        max_sessions: clients' sessions in memory at once; more are refused.
        memory_limit: bytes of memory (of the GPU's, where there is one) that all sessions may take; None for most of
            what there is.
        disk_limit: bytes of disk that one client's codecs may take.
        state_dir: where sessions are kept, so that they outlive this process; None for nowhere.
        state_limit: bytes of disk that all of them may take there; None for half of what nothing else takes at the
            start.
        park_after: seconds without a word from a client until its session leaves memory for `state_dir`.
        forget_after: seconds until nothing is left of it.
        metrics_port: port of Prometheus metrics and the health endpoint; None for none, 0 for a free one.
        metrics_host: address that it listens on.
        drain_s: seconds that steps under way have to end when the server is told to.
        heartbeat_s: seconds between heartbeats; after three without a byte a client counts as lost.
        security: who may connect, and how.
    """

    host: str = "127.0.0.1"
    port: int = 7433
    gpu: int | None = None
    threads: int | None = None
    max_sessions: int = 8
    memory_limit: int | None = None
    disk_limit: int = 16 << 30
    state_dir: Path | None = None
    state_limit: int | None = None
    park_after: float = 600.0
    forget_after: float = 7 * 24 * 3600.0
    metrics_port: int | None = None
    metrics_host: str = "127.0.0.1"
    drain_s: float = 60.0
    heartbeat_s: float = 5.0
    security: Security = field(default_factory=Security)


@asynccontextmanager
async def running_server(config: ServerConfig) -> AsyncIterator[Server]:
    """Serve while the block runs; the server's ``host`` and ``port`` say where.

    After the block, clients finish the step under way, and sessions are kept where there is a folder for them.

    Raises:
        UserError: no such GPU, a file or folder that cannot be used, or an address that cannot be listened on.
    """
    config.security.check_host(config.host)
    device = Device(config.gpu)
    limits = Limits(
        sessions=config.max_sessions,
        memory_bytes=config.memory_limit or int(MEMORY_SHARE * machine_bytes(config.gpu)),
        disk_bytes=config.disk_limit,
        park_s=config.park_after,
        forget_s=config.forget_after,
        state_bytes=config.state_limit,
    )
    monitor = Monitor(device.name)
    with claimed(config.state_dir) as folder:
        register = Register(limits, folder, monitor)
        service = Service(device, config.threads or default_threads(), register)

        def refused(error: WireError) -> None:
            if isinstance(error, AuthenticationFailed | TokenMissing):
                monitor.authentication_failed()
            monitor.refused(_REASONS.get(getattr(error, "code", ""), "protocol"))

        async def on_connection(connection: Connection) -> None:
            await _serve_one(connection, service, monitor)

        wire = WireConfig(
            device=device.name,
            max_connections=4 * config.max_sessions,
            allocate=device.allocate,
            heartbeat_s=config.heartbeat_s,
        )
        wire = config.security.apply(wire)
        try:
            server = await serve(config.host, config.port, on_connection, wire, refused, service.redeem)
        except ConnectFailed as error:
            raise UserError(f"cannot listen on {config.host}:{config.port}: {error.reason}") from error
        sweeping = asyncio.create_task(register.sweep())
        try:
            async with _watched(monitor, config):
                try:
                    yield server
                finally:  # still watched: whoever asks is told that the server drains
                    server.stop_listening()
                    register.stop_sweeping()  # what is written now is for clients that come back
                    await service.drain(config.drain_s)
        finally:
            sweeping.cancel()
            await server.close()


@asynccontextmanager
async def _watched(monitor: Monitor, config: ServerConfig) -> AsyncIterator[None]:
    """Answer those who watch over the server, where that is asked for."""
    if config.metrics_port is None:
        yield
        return
    async with monitoring_endpoint(monitor, config.metrics_port, host=config.metrics_host):
        yield


@contextmanager
def claimed(folder: Path | None) -> Iterator[Path | None]:
    """Make a folder, if need be, and keep other servers out of it while the block runs.

    Raises:
        UserError: it cannot be made or written, or another server uses it.
    """
    if folder is None:
        yield None
        return
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"--state-dir {folder} cannot be used: {error.strerror or error}") from error
    with sole_user(lock, f"another cloud-server uses --state-dir {folder}; give each its own"):
        yield folder


async def _serve_one(connection: Connection, service: Service, monitor: Monitor) -> None:
    logger.info("%s: connected", connection.peer)
    monitor.connected()
    try:
        await service.attend(connection)
    except IsthmusError as error:
        logger.warning("%s: refused: %s", connection.peer, error)
        monitor.refused(_reason(error))
        await connection.fail(getattr(error, "code", "refused"), str(error))
    except StorageFailed as error:
        logger.error("%s: %s", connection.peer, error)
        await connection.fail("refused", f"the server cannot go on: {error}")
    except ConnectionLost as error:
        logger.warning("%s: %s", connection.peer, error)
    except PeerError as error:
        logger.warning("%s: %s", connection.peer, error)
    except WireError as error:
        logger.warning("%s: broke the protocol: %s", connection.peer, error)
        monitor.refused("protocol")
        await connection.fail(getattr(error, "code", "protocol_error"), str(error))
    else:
        logger.info("%s: done", connection.peer)


def _reason(error: IsthmusError) -> str:
    """Why a client was refused, as metrics have it."""
    match error:
        case Crowded() | TooLarge():
            return "memory"
        case DiskFull():
            return "capacity"
        case _:
            return _REASONS.get(getattr(error, "code", "refused"), "job")


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
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(number)  # whoever cannot wait has a second one
        logger.info("shutting down: clients finish the step under way")


def _when_input_ends(loop: asyncio.AbstractEventLoop, then: Callable[[], None]) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    with contextlib.suppress(RuntimeError):  # the loop has ended first
        loop.call_soon_threadsafe(then)
