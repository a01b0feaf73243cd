"""Connections over real sockets on loopback, on uvloop and on asyncio's own loop."""

import asyncio
import contextlib
import errno
import logging
import socket
import struct
import sys
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import uvloop

from tests.wire.pair import ROOMY, SAMPLES, frame, to_bytes
from wire.config import WireConfig
from wire.errors import ConnectFailed, ConnectionLost, LocalProtocolError, PeerError, RemoteProtocolError
from wire.frames import PRELUDE_SIZE, FrameReader, Limits, padding, split_frame_head
from wire.loop import Dialer
from wire.messages import (
    Begin,
    Bye,
    Error,
    Forward,
    Hello,
    Message,
    Open,
    Ping,
    Pong,
    Ready,
    Weights,
    Welcome,
)
from wire.serialize import decode
from wire.sockets import dial, explain, spell_address
from wire.transport import Connection, SendReceipt, Server, connect, run, serve

PATIENCE_S = 60  # for what must end by itself
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}

OnConnection = Callable[[Connection], Awaitable[None]]


def on_both_loops(test: Callable[[], Awaitable[None]]) -> Callable[..., None]:
    """Make a test of a coroutine, on either loop in debug mode."""

    @pytest.mark.parametrize("loop", LOOPS)
    def run_it(loop: str) -> None:
        with asyncio.Runner(debug=True, loop_factory=LOOPS[loop]) as runner:
            runner.run(asyncio.wait_for(test(), PATIENCE_S))  # type: ignore[arg-type]

    return run_it


COMING_BACK: Any = (SAMPLES["rejoin"], SAMPLES["welcome"])


# Servers and clients.


async def take_job(connection: Connection) -> None:
    """The server's part up to `ready`."""
    assert isinstance(await connection.receive(), Open)
    await connection.send(SAMPLES["ready"])


async def echo(connection: Connection) -> None:
    """Sends tensors back until bye."""
    await take_job(connection)
    while not isinstance(message := await connection.receive(), Bye):
        if isinstance(message, Forward | Weights):
            await connection.send(message)


async def idle(connection: Connection) -> None:
    """Takes everything, says nothing."""
    await take_job(connection)
    while not isinstance(await connection.receive(), Bye):
        pass


@asynccontextmanager
async def serving(on_connection: OnConnection = idle, **settings: Any) -> AsyncIterator[Server]:
    server = await serve("127.0.0.1", 0, on_connection, WireConfig(**{"close_s": 1.0, **settings}))
    try:
        yield server
    finally:
        await server.close()


async def open_job(server: Server, **settings: Any) -> Connection:
    """A client with a job open."""
    connection = await connect(server.host, server.port, WireConfig(**settings))
    await connection.send(SAMPLES["open"])
    assert isinstance(await connection.receive(), Ready)
    return connection


class Ending:
    """A server's coroutine that notes how its connection ended."""

    def __init__(self) -> None:
        self.error: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def __call__(self, connection: Connection) -> None:
        try:
            while True:
                await connection.receive()
        except Exception as error:
            self.error.set_result(error)


class RawPeer:
    """A client by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._frames = FrameReader(ROOMY)

    async def receive(self) -> Message:
        """The next message that is no ping."""
        while True:
            while (one := self._frames.next_frame()) is not None:
                if not isinstance(message := decode(one), Ping):
                    return message
            data = await self.reader.read(1)
            assert data, "the stream ended"
            self._frames.next_buffer()[:1] = data
            self._frames.advance(1)

    async def greet(self) -> None:
        self.writer.write(to_bytes(SAMPLES["hello"]))
        assert isinstance(await self.receive(), Welcome)


@asynccontextmanager
async def raw_peer(server: Server) -> AsyncIterator[RawPeer]:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        yield RawPeer(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@asynccontextmanager
async def raw_server(answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> Any:
    """Something that listens; yields its port."""
    writers = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await answer(reader, writer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        await server.wait_closed()


def tensor_message(values: np.ndarray[Any, Any], chunk: int = 0) -> Forward:
    desc = {"dtype": "uint8", "shape": [values.nbytes], "order": "C", "size": values.nbytes}
    return Forward(1, chunk, False, ["x"], [desc], [values, padding(values.nbytes)])


def noise(nbytes: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)


# Connecting.


@on_both_loops
async def test_both_ends_know_each_other_once_connected() -> None:
    seen: list[Hello | None] = []

    async def look(connection: Connection) -> None:
        seen.append(connection.hello)
        await idle(connection)

    async with serving(look, software="cloud/2", device="cuda:7") as server:
        connection = await open_job(server, software="edge/1")
        assert connection.welcome is not None
        assert (connection.welcome.software, connection.welcome.device) == ("cloud/2", "cuda:7")
        assert connection.peer == f"{server.host}:{server.port}"
        assert seen[0] is not None
        assert seen[0].software == "edge/1"
        await connection.close()


@on_both_loops
async def test_clocks_of_one_machine_agree() -> None:
    async with serving() as server:
        connection = await open_job(server)  # the first pong comes before `ready`
        assert connection.rtt_s is not None
        assert abs(connection.clock_offset_ns) <= connection.rtt_s * 1e9
        await connection.close()


@on_both_loops
async def test_nothing_listening_is_said_in_plain_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConnectFailed, match=f"127.0.0.1:{port}: nothing is listening there") as caught:
        await connect("127.0.0.1", port)
    assert (caught.value.host, caught.value.port) == ("127.0.0.1", port)


async def speak_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


async def await_a_line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n")


async def speak_ssh(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.9\r\n")


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.close()


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


@on_both_loops
async def test_port_that_is_another_programs_is_said_to_be_one() -> None:
    for answer, says in (
        (speak_http, "that port speaks HTTP, not the Isthmus protocol"),
        (speak_ssh, "that port speaks something else"),
        (hang_up, "hung up before saying welcome"),
    ):
        async with raw_server(answer) as port:
            with pytest.raises(ConnectFailed, match=says):
                await connect("127.0.0.1", port, WireConfig(close_s=0.1))


@on_both_loops
async def test_http_server_that_waits_for_a_line_is_said_to_be_one() -> None:
    async with raw_server(await_a_line) as port:
        with pytest.raises(ConnectFailed, match="that port speaks HTTP"):
            await connect("127.0.0.1", port, WireConfig(handshake_s=0.5))


@on_both_loops
async def test_port_that_says_nothing_is_given_up() -> None:
    async with raw_server(say_nothing) as port:
        with pytest.raises(ConnectFailed, match=r"did not answer within 0\.1 s"):
            await connect("127.0.0.1", port, WireConfig(handshake_s=0.1))


@on_both_loops
async def test_connecting_can_be_cancelled() -> None:
    reached = asyncio.Event()

    async def keep_waiting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.set()
        await reader.read()

    async with raw_server(keep_waiting) as port:
        connecting = asyncio.ensure_future(connect("127.0.0.1", port))
        await reached.wait()
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting


@on_both_loops
async def test_no_version_in_common_is_said_to_be_the_reason() -> None:
    async with serving(versions=(1,)) as server:
        with pytest.raises(ConnectFailed, match="one side speaks version 1, the other version 7, 9"):
            await connect(server.host, server.port, WireConfig(versions=(7, 9)))


@on_both_loops
async def test_port_that_is_taken_cannot_be_listened_on() -> None:
    async with serving() as server:
        with pytest.raises(ConnectFailed, match="another program listens on that port"):
            await serve(server.host, server.port, idle)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (socket.gaierror(), "there is no host of that name"),
        (ConnectionRefusedError(), "nothing is listening there"),
        (TimeoutError(), "the host does not answer"),
        (OSError(errno.EHOSTUNREACH, "x"), "no route"),
        (OSError(errno.EADDRNOTAVAIL, "x"), "not this machine's"),
        (OSError(errno.EIO, "input or output failed"), "input or output failed"),
        (OSError(), "OSError"),
    ],
)
def test_errors_of_the_system_are_explained(error: OSError, says: str) -> None:
    assert says in explain(error)


def test_addresses_are_written_as_people_write_them() -> None:
    assert spell_address(("127.0.0.1", 80)) == "127.0.0.1:80"
    assert spell_address(("::1", 80, 0, 0)) == "[::1]:80"
    assert spell_address(None) == "?"


# Tensors.


@on_both_loops
async def test_large_payload_comes_back_as_it_went() -> None:
    async with serving(echo) as server:
        connection = await open_job(server)
        for nbytes in (1, 64, 100_003, 16 << 20):
            values = noise(nbytes)
            receipt = await connection.send(tensor_message(values))
            answer = await connection.receive()
            assert isinstance(answer, Forward)
            assert np.array_equal(np.frombuffer(answer.payload, np.uint8, nbytes), values)
            assert (await receipt).size > nbytes
        await connection.close()


@on_both_loops
async def test_payload_is_received_into_the_memory_that_the_allocator_gave() -> None:
    blocks = []

    def allocate(nbytes: int) -> np.ndarray[Any, Any]:
        blocks.append(np.empty(nbytes, np.uint8))
        return blocks[-1]

    async with serving(echo) as server:
        connection = await open_job(server, allocate=allocate)
        await connection.send(tensor_message(noise(1 << 20)))
        answer = await connection.receive()
        assert isinstance(answer, Forward)
        payload = np.frombuffer(answer.payload, np.uint8)
        assert any(np.shares_memory(payload, block) for block in blocks)
        assert not answer.payload.readonly
        await connection.close()


@on_both_loops
async def test_both_directions_carry_much_at_once() -> None:
    count = 24
    async with serving(echo, send_queue=2, receive_queue=2) as server:
        connection = await open_job(server, send_queue=2, receive_queue=2)

        async def send() -> None:
            for chunk in range(count):
                await connection.send(tensor_message(noise(500_000 + chunk), chunk))

        sending = asyncio.create_task(send())
        for chunk in range(count):
            answer = await connection.receive()
            assert isinstance(answer, Forward)
            assert answer.chunk == chunk
            assert np.array_equal(
                np.frombuffer(answer.payload, np.uint8, 500_000 + chunk), noise(500_000 + chunk)
            )
        await sending
        await connection.close()


@on_both_loops
async def test_bytes_are_counted_alike_on_both_ends() -> None:
    ends: list[Connection] = []

    async def count(connection: Connection) -> None:
        ends.append(connection)
        await echo(connection)

    async with serving(count) as server:
        connection = await open_job(server)
        await connection.send(tensor_message(noise(300_000)))
        await connection.receive()
        await connection.close()
    assert connection.sent_bytes == ends[0].received_bytes > 300_000
    assert connection.received_bytes == ends[0].sent_bytes > 300_000


@on_both_loops
async def test_slow_receiver_slows_the_sender_and_fills_no_memory() -> None:
    count, nbytes, queue = 60, 1 << 20, 2
    allocated = 0
    go_on = asyncio.Event()
    stuck = asyncio.Event()

    def allocate(size: int) -> np.ndarray[Any, Any]:
        nonlocal allocated
        allocated += size
        return np.empty(size, np.uint8)

    async def receive_late(connection: Connection) -> None:
        await take_job(connection)
        await go_on.wait()
        for chunk in range(count):
            message = await connection.receive()
            assert isinstance(message, Forward)
            assert message.chunk == chunk
            del message
        await idle_until_bye(connection)

    async with serving(receive_late, receive_queue=queue, allocate=allocate) as server:
        connection = await open_job(server, send_queue=queue)
        unsent: list[SendReceipt] = []

        async def send() -> None:
            for chunk in range(count):
                receipt = await connection.send(tensor_message(np.zeros(nbytes, np.uint8), chunk))
                unsent[:] = [one for one in (*unsent, receipt) if one.end_ns is None]
                assert len(unsent) <= queue + 1
                if allocated >= queue * nbytes:
                    stuck.set()

        sending = asyncio.create_task(send())
        await stuck.wait()
        go_on.set()
        await sending
        await connection.close()
    # What waits to be taken, what is being received, and what the application holds.
    assert allocated <= (queue + 3) * nbytes * 1.2


async def idle_until_bye(connection: Connection) -> None:
    while not isinstance(await connection.receive(), Bye):
        pass


@on_both_loops
async def test_malformed_message_is_refused_and_the_connection_goes_on() -> None:
    async with serving(echo) as server:
        connection = await open_job(server)
        with pytest.raises(LocalProtocolError):
            await connection.send(Begin(-1, 0, False))
        with pytest.raises(LocalProtocolError):
            await connection.send(SAMPLES["committed"])
        await connection.send(SAMPLES["forward"])
        assert isinstance(await connection.receive(), Forward)
        await connection.close()


@on_both_loops
async def test_receiving_can_be_cancelled_and_nothing_is_lost() -> None:
    async with serving(echo) as server:
        connection = await open_job(server)
        receiving = asyncio.ensure_future(connection.receive())
        await asyncio.sleep(0)
        with pytest.raises(LocalProtocolError, match="only one"):
            await connection.receive()
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        await connection.send(SAMPLES["forward"])
        assert isinstance(await connection.receive(), Forward)
        await connection.close()


# Endings.


@on_both_loops
async def test_client_that_closes_says_bye() -> None:
    messages: list[Message] = []
    ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def listen(connection: Connection) -> None:
        await take_job(connection)
        try:
            while True:
                messages.append(await connection.receive())
        except ConnectionLost as lost:
            ended.set_result(lost)

    async with serving(listen) as server:
        connection = await open_job(server)
        await connection.send(SAMPLES["forward"])
        await connection.close("that was all")
        assert "that was all" in str(await ended)
        assert [message.kind for message in messages] == ["forward", "bye"]
        for use in (connection.receive(), connection.send(SAMPLES["forward"])):
            with pytest.raises(ConnectionLost, match="this end closed"):
                await use
        await connection.close()  # once more does no harm
        connection.abort()


@on_both_loops
async def test_everything_that_was_sent_before_closing_arrives() -> None:
    received: list[int] = []

    async def count(connection: Connection) -> None:
        await take_job(connection)
        while isinstance(message := await connection.receive(), Forward):
            received.append(message.chunk)

    async with serving(count) as server:
        connection = await open_job(server, send_queue=32)
        for chunk in range(20):
            await connection.send(tensor_message(np.zeros(400_000, np.uint8), chunk))
        await connection.close()
    assert received == list(range(20))


@on_both_loops
async def test_server_that_shuts_down_says_bye_to_everybody() -> None:
    async with serving() as server:
        connections = [await open_job(server) for _ in range(3)]
    for connection in connections:
        assert await connection.receive() == Bye("the server shuts down")
        with pytest.raises(ConnectionLost, match="said bye"):
            await connection.receive()
        await connection.close()
    with pytest.raises(ConnectFailed):
        await connect(server.host, server.port)


@on_both_loops
async def test_failure_is_reported_to_the_other_end() -> None:
    async def refuse(connection: Connection) -> None:
        await connection.receive()
        await connection.fail("refused", "there is no such model")

    async with serving(refuse) as server:
        connection = await connect(server.host, server.port)
        await connection.send(SAMPLES["open"])
        with pytest.raises(PeerError, match="there is no such model") as caught:
            await connection.receive()
        assert caught.value.code == "refused"
        with pytest.raises(PeerError):
            await connection.send(SAMPLES["open"])
        await connection.close()


@on_both_loops
async def test_long_report_is_cut_to_what_a_message_holds() -> None:
    async def refuse(connection: Connection) -> None:
        await connection.fail("c" * 100, "m" * 5000)

    async with serving(refuse) as server:
        connection = await connect(server.host, server.port)
        with pytest.raises(PeerError) as caught:
            await connection.receive()
        assert (len(caught.value.code), len(caught.value.message)) == (64, 1024)
        await connection.close()


@on_both_loops
async def test_coroutine_that_raises_ends_its_connection_and_not_the_server() -> None:
    records: list[logging.LogRecord] = []
    watch = logging.Handler()
    watch.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("isthmus.wire")
    logger.addHandler(watch)

    async def fail_first(connection: Connection) -> None:
        if not records:
            raise ZeroDivisionError("a defect")
        await idle(connection)

    try:
        async with serving(fail_first) as server:
            unlucky = await connect(server.host, server.port)
            with pytest.raises(PeerError) as caught:
                await unlucky.receive()
            assert caught.value.code == "internal_error"
            assert "a defect" not in str(caught.value)
            await unlucky.close()
            lucky = await open_job(server)
            await lucky.close()
    finally:
        logger.removeHandler(watch)
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in records)


@on_both_loops
async def test_aborted_connection_is_lost_on_both_ends() -> None:
    endings: list[Ending] = []

    async def listen(connection: Connection) -> None:
        await take_job(connection)
        endings.append(Ending())
        await endings[0](connection)

    async with serving(listen) as server:
        connection = await open_job(server)
        receipt = await connection.send(tensor_message(np.zeros(32 << 20, np.uint8)))
        connection.abort()
        for use in (connection.receive(), connection.send(SAMPLES["forward"]), wait_for(receipt)):
            with pytest.raises(ConnectionLost, match="this end dropped"):
                await use
        assert isinstance(await endings[0].error, ConnectionLost)


async def wait_for(receipt: SendReceipt) -> None:
    await receipt


# Peers that go, hang or break the protocol.


@on_both_loops
async def test_peer_that_goes_is_missed() -> None:
    for last_words, says in (
        (b"", "without saying bye"),
        (to_bytes(SAMPLES["open"])[:-1], "in the middle of a frame"),
    ):
        ending = Ending()
        async with serving(ending) as server, raw_peer(server) as peer:
            await peer.greet()
            peer.writer.write(last_words)
            peer.writer.write_eof()
            assert says in str(await ending.error)


@on_both_loops
async def test_peer_that_resets_the_connection_is_missed() -> None:
    ending = Ending()
    async with serving(ending) as server:
        sock = socket.create_connection((server.host, server.port))
        loop = asyncio.get_running_loop()
        sock.setblocking(False)
        await loop.sock_sendall(sock, to_bytes(SAMPLES["hello"]))
        assert await loop.sock_recv(sock, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        error = await ending.error
        assert isinstance(error, ConnectionLost)
        assert "reset" in str(error) or "had closed" in str(error)


@on_both_loops
async def test_silent_client_is_noticed_by_its_heartbeats() -> None:
    ending = Ending()
    async with serving(ending, heartbeat_s=0.02) as server, raw_peer(server) as peer:
        await peer.greet()
        assert "nothing came from the peer" in str(await ending.error)


@on_both_loops
async def test_silent_server_is_noticed_by_its_heartbeats() -> None:
    async def welcome_and_fall_asleep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(to_bytes(Welcome(3, "x", 1 << 20, 1 << 30, bytes(32), None, 0.02, "cpu")))
        await reader.read()

    async with raw_server(welcome_and_fall_asleep) as port:
        connection = await connect("127.0.0.1", port)
        with pytest.raises(ConnectionLost, match="nothing came from the peer"):
            await connection.receive()


@on_both_loops
async def test_every_ping_is_answered_while_the_application_does_nothing() -> None:
    async with serving() as server, raw_peer(server) as peer:
        await peer.greet()
        for number in range(20):
            peer.writer.write(to_bytes(Ping(number)))
        answers = [await peer.receive() for _ in range(20)]
        assert [answer.t_ns for answer in answers if isinstance(answer, Pong)] == list(range(20))


@on_both_loops
async def test_oversized_payload_is_refused_before_it_is_allocated() -> None:
    allocated: list[int] = []

    def allocate(nbytes: int) -> bytearray:
        allocated.append(nbytes)
        return bytearray(nbytes)

    ending = Ending()
    limits = Limits(max_header=1 << 20, max_payload=1 << 20)
    async with serving(ending, limits=limits, allocate=allocate) as server, raw_peer(server) as peer:
        await peer.greet()
        fields = struct.pack("!4sBBHIQ", b"ISTH", 1, 0, 0, 0, 1 << 40)
        peer.writer.write(fields + struct.pack("!I", zlib.crc32(fields)))
        error = await peer.receive()
        assert isinstance(error, Error)
        assert error.code == "limit_exceeded"
        assert await peer.reader.read() == b""
        assert isinstance(await ending.error, RemoteProtocolError)
    assert allocated == []


@on_both_loops
async def test_peer_that_breaks_the_protocol_is_told_why() -> None:
    for data, code in (
        (b"GARBAGE" * 10, "bad_frame"),
        (frame({"kind": "dance"}), "bad_header"),
        (frame({"kind": "ping", "t_ns": 1}, b"x"), "corrupt_payload"),
        (to_bytes(SAMPLES["begin"]), "protocol_error"),
    ):
        ending = Ending()
        async with serving(ending) as server, raw_peer(server) as peer:
            await peer.greet()
            peer.writer.write(data)
            error = await peer.receive()
            assert isinstance(error, Error)
            assert error.code == code
            failure = await ending.error
            assert isinstance(failure, RemoteProtocolError)
            assert failure.code == code


@on_both_loops
async def test_client_that_speaks_http_gets_no_answer() -> None:
    async with serving() as server, raw_peer(server) as peer:
        peer.writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await peer.reader.read() == b""


@on_both_loops
async def test_client_that_never_greets_is_hung_up_on() -> None:
    async with serving(handshake_s=0.05) as server, raw_peer(server) as peer:
        with contextlib.suppress(ConnectionResetError):
            assert await peer.reader.read() == b""


# Peers that are alive and too slow.


@on_both_loops
async def test_client_that_stops_in_the_middle_of_a_message_is_dropped_though_it_answers_pings() -> None:
    ending = Ending()
    async with serving(ending, slow_s=0.1, heartbeat_s=0.02) as server, raw_peer(server) as peer:
        await peer.greet()
        whole = to_bytes(SAMPLES["forward"])
        head = whole[: PRELUDE_SIZE + int.from_bytes(whole[8:12], "big")]
        peer.writer.write(split_frame_head(head, 1))  # the pieces never come, and pongs can go between them
        answering = asyncio.create_task(answer_pings(peer))
        assert "began a message and sent less than 1024 bytes/s" in str(await ending.error)
        await answering


@on_both_loops
async def test_client_that_does_not_read_is_dropped_with_what_waits_for_it() -> None:
    failed: asyncio.Future[ConnectionLost] = asyncio.get_running_loop().create_future()

    async def send_much(connection: Connection) -> None:
        await take_job(connection)
        try:
            for chunk in range(100):
                await connection.send(tensor_message(np.zeros(1 << 20, np.uint8), chunk))
        except ConnectionLost as lost:
            failed.set_result(lost)

    # Much too little is sent to keep such a peer for long, and pings of its own are no help.
    async with serving(send_much, unread_s=0.2, heartbeat_s=0.05) as server, raw_peer(server) as peer:
        await peer.greet()
        peer.writer.write(to_bytes(SAMPLES["open"]))
        pinging = asyncio.create_task(ping_on(peer))
        assert "took less than 1024 bytes/s" in str(await failed)
        pinging.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await pinging


@on_both_loops
async def test_client_that_opens_no_job_is_dropped_though_it_answers_pings() -> None:
    ending = Ending()
    async with serving(ending, open_s=0.1, heartbeat_s=0.02) as server, raw_peer(server) as peer:
        await peer.greet()
        answering = asyncio.create_task(answer_pings(peer))
        assert "opened no job within 0.1 s" in str(await ending.error)
        await answering


async def answer_pings(peer: RawPeer) -> None:
    """Be alive, until the other end has enough."""
    with contextlib.suppress(OSError):
        while await peer.reader.read(1000):
            peer.writer.write(to_bytes(Pong(0, 0, 0)))


async def ping_on(peer: RawPeer) -> None:
    """Be alive without reading."""
    while True:
        peer.writer.write(to_bytes(Ping(0)))
        await asyncio.sleep(0.01)


# Many connections.


async def refusal(server: Server) -> Exception | None:
    """Why a client that wants a job gets none; None where it gets one."""
    try:
        connection = await connect(server.host, server.port)
    except ConnectFailed as error:  # the refusal came together with the welcome
        return error
    try:
        await connection.send(SAMPLES["open"])
        await connection.receive()
    except PeerError as error:
        return error
    finally:
        await connection.close()
    return None


@on_both_loops
async def test_connection_too_many_is_told_so() -> None:
    async with serving(max_connections=1) as server:
        first = await open_job(server)
        assert "already serves 1 connections" in str(await refusal(server))
        await first.close()
        while await refusal(server) is not None:  # until the server has noticed too
            pass


@on_both_loops
async def test_connections_that_say_nothing_do_not_count() -> None:
    async with serving(max_connections=1, close_s=0.05) as server, raw_peer(server), raw_peer(server):
        connection = await open_job(server)
        await connection.close()


@on_both_loops
async def test_many_connections_are_served_at_once() -> None:
    async with serving(echo) as server:
        connections = await asyncio.gather(*(open_job(server) for _ in range(20)))
        assert len({connection.welcome.nonce for connection in connections if connection.welcome}) == 20
        for number, connection in enumerate(connections):
            await connection.send(tensor_message(np.full(1000, number, np.uint8)))
        for number, connection in enumerate(connections):
            answer = await connection.receive()
            assert isinstance(answer, Forward)
            assert set(answer.payload[:1000]) == {number}
        await asyncio.gather(*(connection.close() for connection in connections))


# The loop.


async def loop_module() -> str:
    return type(asyncio.get_running_loop()).__module__


def test_programs_run_on_uvloop_where_it_is_installed() -> None:
    assert run(loop_module()).startswith("uvloop")


def test_programs_run_on_asyncio_where_uvloop_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert run(loop_module()).startswith("asyncio")


def test_settings_that_make_no_sense_are_refused() -> None:
    for name in ("heartbeat_s", "handshake_s", "close_s", "send_queue", "receive_queue", "max_connections"):
        with pytest.raises(ValueError, match=f"{name} has to be above 0"):
            WireConfig(**{name: 0})


@on_both_loops
async def test_client_that_comes_back_does_not_wait_for_an_answer() -> None:
    seen: list[Message] = []
    all_seen = asyncio.Event()

    async def take(connection: Connection) -> None:
        seen.extend([await connection.receive(), await connection.receive()])
        all_seen.set()
        await connection.send(SAMPLES["ready"])
        assert isinstance(await connection.receive(), Bye)

    server = await serve("127.0.0.1", 0, take, redeem=lambda message: message == COMING_BACK[0])
    connection = await connect(server.host, server.port, None, COMING_BACK)
    await connection.send(SAMPLES["begin"])
    await all_seen.wait()
    assert seen == [SAMPLES["rejoin"], SAMPLES["begin"]]
    assert await connection.receive() == SAMPLES["ready"]
    await connection.close()
    await server.close()


async def is_told_of_a_stale_ticket(connection: Connection) -> None:
    with pytest.raises(PeerError, match="greet, and resume") as told:
        await connection.receive()
    assert told.value.code == "stale_ticket"
    await connection.close()


@on_both_loops
async def test_client_that_comes_back_with_a_bad_ticket_is_told() -> None:
    async with serving() as server:
        connection = await connect(server.host, server.port, None, COMING_BACK)
        await is_told_of_a_stale_ticket(connection)


@on_both_loops
async def test_client_that_comes_back_is_told_alike_where_the_answer_is_there_at_once() -> None:
    """Not that the connection could not be made: who is told that keeps the ticket, and tries it again."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(to_bytes(Error("stale_ticket", "greet, and resume")))
        await reader.read()

    async def late(loop: Dialer, host: str, port: int) -> socket.socket:
        sock = await dial(loop, host, port)
        await asyncio.sleep(0.1)  # until the answer is there
        return sock

    async with raw_server(refuse) as port:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("wire.transport.dial", late)
            connection = await connect("127.0.0.1", port, None, COMING_BACK)
        await is_told_of_a_stale_ticket(connection)


@on_both_loops
async def test_slow_link_is_read_seldom_and_brings_everything() -> None:
    """Two megabytes a second, in packets of 1 kB, each of which would wake the loop."""
    reads = 0

    def count(connection: Connection, nbytes: int) -> None:
        nonlocal reads
        reads += 1
        updated(connection, nbytes)

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(to_bytes(SAMPLES["ready"]))
        for number in range(2):
            frame = to_bytes(tensor_message(np.full(200_000, number, np.uint8)))
            for at in range(0, len(frame), 1000):
                writer.write(frame[at : at + 1000])
                await asyncio.sleep(0.0005)
        await reader.read()  # to its end

    updated = Connection.buffer_updated
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "buffer_updated", count)
        async with raw_server(trickle) as port:
            connection = await connect("127.0.0.1", port, None, COMING_BACK)
            assert await connection.receive() == SAMPLES["ready"]
            for number in range(2):
                message = await connection.receive()
                assert isinstance(message, Forward)
                assert set(message.payload[:200_000]) == {number}
            assert reads < 150  # of more than 400
            await connection.close()
