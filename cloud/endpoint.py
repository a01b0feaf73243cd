"""The HTTP port for those who watch over a server: ``GET /metrics`` and ``GET /health``, and nothing else.

It runs on the server's own event loop: an answer says that the loop lives, which one from a thread beside it would
not. A client has a few seconds for all that it does, and where too many come, the oldest goes: quick ones are served
however many slow ones there are.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from cloud.monitoring import Monitor
from common.errors import UserError

MOST_CONNECTIONS = 16
LARGEST_REQUEST = 8192
TIME_LIMIT_S = 5.0

_log = logging.getLogger(__name__)
_TEXT = "text/plain; charset=utf-8"


@asynccontextmanager
async def monitoring_endpoint(
    monitor: Monitor,
    port: int,
    *,
    host: str = "127.0.0.1",
    time_limit_s: float = TIME_LIMIT_S,
) -> AsyncIterator[tuple[str, int]]:
    """Answer on a port while the block runs.

    Args:
        monitor: what to tell.
        port: to listen on; 0 takes a free one.
        host: address to listen on.
        time_limit_s: how long a client may take to ask and to read.

    Yields:
        The address and the port.

    Raises:
        UserError: nobody can listen there.
    """
    endpoint = _Endpoint(monitor, time_limit_s)
    try:
        server = await asyncio.start_server(endpoint.on_client, host, port, limit=LARGEST_REQUEST)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number and number > 0 else str(error)
        raise UserError(
            f"cannot answer to monitoring on {host}:{port}: {reason}; choose another --metrics-port"
        ) from error
    try:
        where = server.sockets[0].getsockname()
        _log.info("metrics and health at http://%s:%d/metrics and /health", where[0], where[1])
        yield where[0], where[1]
    finally:
        server.close()
        await endpoint.close()


class _Endpoint:
    def __init__(self, monitor: Monitor, time_limit_s: float) -> None:
        self._monitor = monitor
        self._time_limit_s = time_limit_s
        self._clients: dict[asyncio.Task[None], None] = {}  # the oldest first

    def on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._clients) == MOST_CONNECTIONS:
            oldest = next(iter(self._clients))
            del self._clients[oldest]
            oldest.cancel()
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._clients[task] = None
        task.add_done_callback(lambda done: self._clients.pop(done, None))

    async def close(self) -> None:
        tasks = list(self._clients)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._time_limit_s):
                writer.write(self._answer(await _read_head(reader)))
                await writer.drain()
                writer.close()
                await writer.wait_closed()  # until the client has had all of it
        except (TimeoutError, OSError, EOFError):
            pass  # slow, or gone; nothing of it concerns the server
        finally:
            writer.transport.abort()

    def _answer(self, head: bytes | None) -> bytes:
        try:
            method, target, version = (head or b"").partition(b"\r\n")[0].split(b" ")
        except ValueError:
            return _response(HTTPStatus.BAD_REQUEST, _TEXT, b"that is no request\n")
        if not version.startswith(b"HTTP/1."):
            return _response(HTTPStatus.BAD_REQUEST, _TEXT, b"HTTP/1.1 is spoken here\n")
        if method not in (b"GET", b"HEAD"):
            return _response(
                HTTPStatus.METHOD_NOT_ALLOWED, _TEXT, b"there are GET and HEAD\n", allow="GET, HEAD"
            )
        status, kind, body = HTTPStatus.OK, _TEXT, b"there are /metrics and /health\n"
        match target.partition(b"?")[0]:
            case b"/metrics":
                kind, body = self._monitor.metrics()
            case b"/health":
                is_well, body = self._monitor.health()
                kind = "application/json"
                status = HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE
            case _:
                status = HTTPStatus.NOT_FOUND
        return _response(status, kind, body, only_head=method == b"HEAD")


async def _read_head(reader: asyncio.StreamReader) -> bytes | None:
    """Read a request up to its empty line; None where it has no end within the limit."""
    with contextlib.suppress(asyncio.LimitOverrunError):
        return await reader.readuntil(b"\r\n\r\n")
    return None


def _response(
    status: HTTPStatus, kind: str, body: bytes, *, only_head: bool = False, allow: str | None = None
) -> bytes:
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if allow:
        lines.append(f"Allow: {allow}")
    head = "\r\n".join(lines).encode("ascii") + b"\r\n\r\n"
    return head if only_head else head + body
