"""Connections over TCP: the one file that knows asyncio.

A `Connection` joins an asyncio transport and a `wire.channel.Channel`, which does the thinking. Received
bytes go straight into payload buffers (`asyncio.BufferedProtocol`), and payloads are sent without being
copied.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, TypeVar, cast

from wire.channel import Channel
from wire.config import WireConfig
from wire.errors import ConnectFailed, ConnectionLost, ForeignProtocol, TlsFailed, WireError
from wire.greeting import Redeem
from wire.limiter import AttemptLimiter
from wire.messages import Bye, Error, Hello, Message, Rejoin, Welcome
from wire.outbox import SendReceipt
from wire.protocol import Role
from wire.sender import Traits
from wire.sockets import (
    LowWater,
    Unsent,
    delivery,
    dial,
    explain,
    explain_refusal,
    is_final,
    speaks_http,
    spell_address,
    tune,
)
from wire.tls_stream import TlsStream

__all__ = ["ComingBack", "Connection", "SendReceipt", "Server", "connect", "run", "serve"]

_HTTP_S = 2.0  # for an answer to an HTTP request, where none came to a hello

T = TypeVar("T")
OnConnection = Callable[["Connection"], Awaitable[None]]
OnRefused = Callable[[WireError], None]
ComingBack = tuple[Rejoin, Welcome]
"""What a client says that comes back, and what the server said when it came first."""

logger = logging.getLogger("isthmus.wire")


class Connection(asyncio.BufferedProtocol):
    """One end of a connection; `connect` and `serve` make them.

    Attributes:
        peer: the other end's address.
    """

    def __init__(
        self, role: Role, config: WireConfig, host: str | None = None, coming_back: ComingBack | None = None
    ) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._role, self._config, self._host = role, config, host
        self._opened: asyncio.Future[None] = loop.create_future()  # or failed
        self._lost: asyncio.Future[None] = loop.create_future()
        self._channel = Channel(role, config, loop.create_future, loop.call_later, self._opened, self._lost)
        if coming_back is not None:
            self._channel.protocol.rejoin(*coming_back)
        self._tls: TlsStream | None = None
        self._limiter: AttemptLimiter | None = None
        self.peer = "?"

    @property
    def hello(self) -> Hello | Rejoin | None:
        """What the client said first."""
        return self._channel.protocol.hello

    @property
    def welcome(self) -> Welcome | None:
        """What the server said of itself."""
        return self._channel.protocol.welcome

    @property
    def sent_bytes(self) -> int:
        """Bytes handed to the kernel: with headers and heartbeats, and as they are encrypted."""
        return self._channel.sent_bytes

    @property
    def received_bytes(self) -> int:
        """Bytes taken from the kernel: with headers and heartbeats, and as they are encrypted."""
        return self._tls.received_bytes if self._tls else self._channel.protocol.received_bytes

    @property
    def bytes_per_s(self) -> float | None:
        """How fast the link takes what is sent; None before it was busy for a while."""
        return self._channel.bytes_per_s

    @property
    def rtt_s(self) -> float | None:
        """Shortest round-trip time of the newest heartbeats; None before the first."""
        rtt_ns = self._channel.protocol.clock.rtt_ns
        return None if rtt_ns is None else rtt_ns / 1e9

    @property
    def clock_offset_ns(self) -> int:
        """The peer's `time.monotonic_ns` minus ours."""
        return self._channel.protocol.clock.offset_ns

    @property
    def busy(self) -> bool:
        """A message is on its way, in either direction; heartbeats see to it that it does not stay there."""
        return self._channel.busy

    def lead(self, chunks: int) -> None:
        """Let activations that are sent from now on be ahead of gradients by so many chunks, see `wire.outbox`."""
        self._channel.lead(chunks)

    async def send(self, message: Message) -> SendReceipt:
        """Queue a message and wait until the queue has room for another.

        The payload is not copied: leave it as it is until the receipt is done. Cancelled while it waits for
        room, the message is sent all the same.

        Returns:
            A receipt; await it to wait until the kernel has the whole frame.

        Raises:
            LocalProtocolError: the message is malformed or not allowed now; the connection goes on.
            ConnectionLost: the connection has ended.
            PeerError: it ended because the peer reported an error.
            RemoteProtocolError: it ended because the peer broke the protocol.
        """
        channel = self._channel
        if channel.failure is not None:
            raise channel.failure.with_traceback(None)
        receipt = channel.queue(message)
        if channel.full:
            await channel.room()
        return receipt

    async def receive(self) -> Message:
        """Wait for the next message and return it.

        A `Bye` is returned as a message; after it comes `ConnectionLost`. A message's payload is memory that
        is used again once nothing refers to it.

        Raises:
            ConnectionLost: the connection has ended, and all messages that came before have been received.
            PeerError: the peer reported an error.
            RemoteProtocolError: the peer broke the protocol.
        """
        channel = self._channel
        if not channel.inbox:
            await channel.arrival()
            if not channel.inbox:
                assert channel.failure is not None
                raise channel.failure.with_traceback(None)
        return channel.take()

    async def close(self, reason: str = "done") -> None:
        """Send what is queued, say bye and wait until both ends have closed.

        Messages that were not received yet are lost.
        """
        self._leave(Bye(reason[:1024]), ConnectionLost("this end closed the connection"))
        await asyncio.shield(self._lost)

    async def fail(self, code: str, message: str) -> None:
        """Report an error and close. The peer's `receive` raises `PeerError(code, message)`."""
        self._leave(
            Error(code[:64], message[:1024]), ConnectionLost(f"this end closed the connection: {message}")
        )
        await asyncio.shield(self._lost)

    def _leave(self, message: Message, failure: WireError) -> None:
        if self._tls is not None and not self._tls.secured:
            self._channel.abort(failure)  # there is nothing to say it through
        else:
            self._channel.leave(message, failure)

    def abort(self) -> None:
        """Drop the connection at once, with all that is queued."""
        self._channel.abort(ConnectionLost("this end dropped the connection"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet the peer."""
        stream = cast(asyncio.Transport, transport)
        stream.set_write_buffer_limits(high=0)
        address = stream.get_extra_info("peername")  # None where the peer has gone again
        self.peer = spell_address(address)
        sock = stream.get_extra_info("socket")
        tune(sock)
        self._low_water, self._unsent = LowWater(sock), Unsent(sock)
        channel, delivered = self._channel, partial(delivery, sock)
        if self._limiter is not None:
            channel.protocol.greeting.door = self._limiter.of(str(address[0]) if address else "?")
        if self._config.tls is not None:
            tls = TlsStream(stream, channel, self._role, self._config, self._host, self._loop.call_soon)
            self._tls = tls
            channel.attach(tls, Traits(splits=True, delivery=delivered, overhead=lambda: tls.added_bytes))
            tls.begin()
        else:
            # uvloop's transports refer to what they cannot send at once; asyncio's copy it.
            splits = not type(stream).__module__.startswith("uvloop")
            channel.attach(stream, Traits(splits=splits, delivery=delivered))
            channel.greet()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes belong."""
        return self._tls.next_buffer() if self._tls else self._channel.protocol.next_buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes came in."""
        if self._tls:  # of which some are TLS's own: how many of a payload have still to come is not known
            self._tls.received(nbytes)
            return
        self._channel.received(nbytes)
        self._low_water.adjust(nbytes, self._channel.protocol.missing)

    def eof_received(self) -> bool:
        """The peer sends nothing more; the transport then closes, unless some is still to be decrypted."""
        if self._tls:
            return self._tls.received_eof()
        self._channel.received_eof()
        return False

    def pause_writing(self) -> None:
        """The kernel has no room for the rest of a frame."""
        self._channel.pause_writing()

    def resume_writing(self) -> None:
        """The kernel has all that the transport was given."""
        self._channel.resume_writing()
        self._unsent.adjust(self._channel.bytes_per_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is closed."""
        self._channel.detach(exc)


class Server:
    """Accepts connections and runs a coroutine for each; `serve` makes it.

    Attributes:
        host: the address it listens on.
        port: the port it listens on.
    """

    def __init__(
        self, on_connection: OnConnection, config: WireConfig, on_refused: OnRefused, redeem: Redeem | None
    ) -> None:
        self._on_connection = on_connection
        self._on_refused = on_refused
        self._redeem = redeem
        self._config = config
        self._limiter = AttemptLimiter() if config.token is not None else None
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[Connection] = set()
        self._strangers: dict[Connection, None] = {}  # those without a task, the oldest first
        self._server: asyncio.AbstractServer
        self.host = ""
        self.port = 0

    def stop_listening(self) -> None:
        """Take no new connections; those that there are go on."""
        self._server.close()

    async def close(self, reason: str = "the server shuts down") -> None:
        """Stop accepting, say bye to everybody who was welcomed and wait until their coroutines have returned."""
        self._server.close()
        for stranger in [*self._strangers]:
            if stranger._channel.failure is None:
                stranger.abort()  # it may never say anything, and would be waited for
        await asyncio.gather(*(connection.close(reason) for connection in [*self._connections]))
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    async def _listen(self, host: str, port: int) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, host, port)
        self.host, self.port = self._server.sockets[0].getsockname()[:2]

    def _accept(self) -> Connection:
        connection = Connection(Role.SERVER, self._config)
        connection._limiter = self._limiter
        if self._redeem is not None:
            connection._channel.protocol.greeting.redeem = self._redeem
        self._connections.add(connection)
        self._strangers[connection] = None
        if len(self._strangers) > self._config.max_strangers:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest._channel.abort(ConnectionLost("too many other connections came before it was welcomed"))
        connection._opened.add_done_callback(lambda _: self._begin(connection))
        connection._lost.add_done_callback(lambda _: self._forget(connection))
        return connection

    def _forget(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._strangers.pop(connection, None)

    def _begin(self, connection: Connection) -> None:
        if connection._channel.failure is not None:
            logger.info("no session with %s: %s", connection.peer, connection._channel.failure)
            self._on_refused(connection._channel.failure)
            return
        if len(self._tasks) >= self._config.max_connections:
            connection._channel.leave(
                Error("busy", f"the server already serves {self._config.max_connections} connections"),
                ConnectionLost("too many connections"),
            )
            return
        self._strangers.pop(connection, None)
        task = asyncio.get_running_loop().create_task(self._run(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, connection: Connection) -> None:
        try:
            await self._on_connection(connection)
            await connection.close()
        except WireError as error:
            logger.info("the session with %s ended: %s", connection.peer, error)
            await connection.close()
        except Exception:
            logger.exception("the session with %s failed", connection.peer)
            await connection.fail("internal_error", "the server failed; its log says why")
        finally:
            if not connection._lost.done():
                connection.abort()


async def serve(
    host: str,
    port: int,
    on_connection: OnConnection,
    config: WireConfig | None = None,
    on_refused: OnRefused = lambda error: None,
    redeem: Redeem | None = None,
) -> Server:
    """Listen, and run `on_connection` for every connection that has said hello, or rejoin with a good ticket.

    When the coroutine returns, its connection is closed; when it raises, the peer gets an `error` and the
    server goes on.

    Args:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        on_connection: what to do with a connection.
        config: settings.
        on_refused: is told why a connection came to nothing before it was welcomed.
        redeem: takes tickets, see `wire.greeting`; None where there are none.

    Raises:
        ConnectFailed: the address cannot be listened on.
    """
    server = Server(on_connection, config or WireConfig(), on_refused, redeem)
    try:
        await server._listen(host, port)
    except OSError as error:
        raise ConnectFailed(host, port, explain(error)) from None
    return server


async def connect(
    host: str, port: int, config: WireConfig | None = None, coming_back: ComingBack | None = None
) -> Connection:
    """Connect to a server and exchange hello and welcome.

    Args:
        host: where it is.
        port: where it listens.
        config: settings.
        coming_back: what to say instead of hello; no answer is waited for then. An answer that is there already is
            for `receive`, as one that comes later.

    Raises:
        ConnectFailed: says why, and what to do.
    """
    config = config or WireConfig()
    loop = asyncio.get_running_loop()
    connection = None
    try:
        async with asyncio.timeout(config.handshake_s):
            sock = await dial(loop, host, port)
            _, connection = await loop.create_connection(
                lambda: Connection(Role.CLIENT, config, host, coming_back), sock=sock
            )
            await connection._opened
    except OSError as error:
        if connection is None:
            raise ConnectFailed(host, port, explain(error)) from None
        connection.abort()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(_HTTP_S, config.handshake_s)):
                if await speaks_http(loop, host, port):
                    raise ConnectFailed(host, port, explain_refusal(ForeignProtocol(b"HTTP"))) from None
        reason = f"something listens there but did not answer within {config.handshake_s:g} s"
        raise ConnectFailed(host, port, f"{reason}; check that it is a cloud-server") from None
    except BaseException:
        if connection is not None:
            connection.abort()
        raise
    failure = connection._channel.failure
    if failure is not None and not isinstance(connection.hello, Rejoin):
        await connection.close()
        reason, final = explain_refusal(failure), is_final(failure)
        hung_up = isinstance(failure, ConnectionLost) and not isinstance(failure, TlsFailed)
        raise ConnectFailed(host, port, reason, final=final, hung_up=hung_up) from None
    return connection


def run(main: Coroutine[Any, Any, T], *, debug: bool | None = None) -> T:
    """Run a coroutine to its end, on uvloop where it is installed, else on asyncio's own loop."""
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    with contextlib.suppress(ImportError):
        import uvloop

        new_loop = uvloop.new_event_loop
    with asyncio.Runner(debug=debug, loop_factory=new_loop) as runner:
        return runner.run(main)
