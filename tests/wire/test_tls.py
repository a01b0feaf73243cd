"""Connections over TLS, on uvloop and on asyncio's own loop: what they carry, and whom they refuse in which words."""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from tests.wire.certificates import Pair, make_pair
from tests.wire.pair import SAMPLES, TOKEN, to_bytes
from tests.wire.test_transport import (
    Ending,
    echo,
    idle,
    noise,
    on_both_loops,
    open_job,
    raw_peer,
    raw_server,
    say_nothing,
    serving,
    speak_http,
    take_job,
    tensor_message,
)
from wire.config import WireConfig
from wire.errors import ConnectFailed, ConnectionLost, PeerError
from wire.messages import Bye, Forward, Message
from wire.tls import client_context, parse_fingerprint, server_context, spell_fingerprint
from wire.transport import Connection, connect, serve

_FOLDER = TemporaryDirectory()
FOLDER = Path(_FOLDER.name)
AUTHORITY = make_pair(FOLDER, "authority", authority=True)
SERVER = make_pair(FOLDER, "server", signer=AUTHORITY)
SELF_SIGNED = make_pair(FOLDER, "self-signed")
CLIENT = make_pair(FOLDER, "client", signer=AUTHORITY)
STRANGER = make_pair(FOLDER, "stranger")
ELSEWHERE = make_pair(FOLDER, "elsewhere", signer=AUTHORITY, hosts=("elsewhere.example",))
EXPIRED = make_pair(FOLDER, "expired", signer=AUTHORITY, days=(-9, -2))

PINNED: dict[str, Any] = {
    "tls": client_context(pinned=True),
    "tls_fingerprint": SELF_SIGNED.fingerprint,
}
VERIFIED: dict[str, Any] = {"tls": client_context(pinned=False, ca=AUTHORITY.cert)}


def of_server(pair: Pair = SELF_SIGNED, client_ca: Path | None = None) -> dict[str, Any]:
    return {"tls": server_context(pair.cert, pair.key, client_ca)}


class Log(logging.Handler):
    """What the wire logs."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._more = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self._more.set()

    async def until(self, text: str) -> None:
        """Wait for a line; no line has a traceback."""
        while not any(text in record.getMessage() for record in self.records):
            self._more.clear()
            await self._more.wait()
        assert not any(record.exc_info for record in self.records)
        assert all("\n" not in record.getMessage() for record in self.records)


@contextmanager
def logged() -> Iterator[Log]:
    """Listen to what the wire logs."""
    log, logger = Log(), logging.getLogger("isthmus.wire")
    logger.addHandler(log)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield log
    finally:
        logger.setLevel(before)
        logger.removeHandler(log)


async def refused(port: int, **settings: Any) -> str:
    """Why no connection comes about, in the client's words."""
    with pytest.raises(ConnectFailed) as caught:
        await connect("127.0.0.1", port, WireConfig(**{"close_s": 0.2, **settings}))
    assert "\n" not in caught.value.reason
    return caught.value.reason


@asynccontextmanager
async def tls_serving(on_connection: Any = idle, **settings: Any) -> AsyncIterator[Any]:
    async with serving(on_connection, **{**of_server(), **settings}) as server:
        yield server


# What is carried.


@on_both_loops
async def test_tensors_cross_whole_under_a_pinned_certificate() -> None:
    async with tls_serving(echo) as server:
        connection = await open_job(server, **PINNED)
        for nbytes in (1, 64, 16_384, 100_003, 5 << 20):
            await connection.send(tensor_message(noise(nbytes)))
            answer = await connection.receive()
            assert isinstance(answer, Forward)
            assert np.array_equal(np.frombuffer(answer.payload, np.uint8, nbytes), noise(nbytes))
        await connection.close()


@on_both_loops
async def test_nothing_of_what_is_sent_can_be_read_on_the_way() -> None:
    carried = bytearray()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward = await asyncio.open_connection(server.host, server.port)

        async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65_536):
                carried.extend(data)
                sink.write(data)
            sink.write_eof()

        await asyncio.gather(pass_on(reader, onward[1]), pass_on(onward[0], writer))
        onward[1].close()
        await onward[1].wait_closed()

    async with tls_serving(echo, token=TOKEN) as server, raw_server(relay) as port:
        connection = await connect("127.0.0.1", port, WireConfig(token=TOKEN, **PINNED))
        await connection.send(SAMPLES["open"])
        await connection.receive()
        await connection.send(tensor_message(np.full(100_000, 7, np.uint8)))
        await connection.receive()
        await connection.close()
    assert len(carried) > 200_000
    for secret in (b"ISTH", b"hello", b"isthmus", TOKEN, bytes([7]) * 64):
        assert secret not in carried


@on_both_loops
async def test_bytes_that_are_counted_are_those_of_the_socket() -> None:
    ends: list[Connection] = []
    carried = [0, 0]

    async def count(connection: Connection) -> None:
        ends.append(connection)
        await echo(connection)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward = await asyncio.open_connection(server.host, server.port)

        async def pass_on(way: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65_536):
                carried[way] += len(data)
                sink.write(data)
            sink.write_eof()

        await asyncio.gather(pass_on(0, reader, onward[1]), pass_on(1, onward[0], writer))
        onward[1].close()
        await onward[1].wait_closed()

    async with tls_serving(count) as server, raw_server(relay) as port:
        connection = await connect("127.0.0.1", port, WireConfig(**PINNED))
        await connection.send(SAMPLES["open"])
        await connection.receive()
        await connection.send(tensor_message(noise(300_000)))
        await connection.receive()
        await connection.close()
    assert [connection.sent_bytes, connection.received_bytes] == carried
    assert [ends[0].received_bytes, ends[0].sent_bytes] == carried
    assert min(carried) > 300_000


@on_both_loops
async def test_both_directions_carry_much_at_once_through_short_queues() -> None:
    count = 24
    async with tls_serving(echo, send_queue=2, receive_queue=2) as server:
        connection = await open_job(server, send_queue=2, receive_queue=2, **PINNED)

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
async def test_everything_that_was_sent_before_closing_arrives() -> None:
    received: list[int] = []

    async def count(connection: Connection) -> None:
        await take_job(connection)
        while isinstance(message := await connection.receive(), Forward):
            received.append(message.chunk)
            await asyncio.sleep(0.005)  # reading stops in between
        assert isinstance(message, Bye)

    async with tls_serving(count, receive_queue=2) as server:
        connection = await open_job(server, send_queue=32, **PINNED)
        for chunk in range(20):
            await connection.send(tensor_message(np.zeros(400_000, np.uint8), chunk))
        await connection.close()
    assert received == list(range(20))


@on_both_loops
async def test_small_messages_before_the_end_are_not_lost_while_reading_is_paused() -> None:
    received: list[int] = []
    go_on = asyncio.Event()

    async def count(connection: Connection) -> None:
        await take_job(connection)
        await go_on.wait()
        while isinstance(message := await connection.receive(), Forward):
            received.append(message.chunk)

    async with tls_serving(count, receive_queue=2) as server:
        connection = await open_job(server, **PINNED)
        for chunk in range(50):  # all in a few records, which come at once
            await connection.send(tensor_message(np.zeros(64, np.uint8), chunk))
        closing = asyncio.create_task(connection.close())
        go_on.set()
        await closing
    assert received == list(range(50))


@on_both_loops
async def test_report_of_a_failure_is_the_last_that_arrives() -> None:
    async def refuse(connection: Connection) -> None:
        await connection.receive()
        await connection.fail("refused", "there is no such model")

    async with tls_serving(refuse) as server:
        connection = await connect(server.host, server.port, WireConfig(**PINNED))
        await connection.send(SAMPLES["open"])
        with pytest.raises(PeerError, match="there is no such model"):
            await connection.receive()
        await connection.close()


@on_both_loops
async def test_client_comes_back_in_one_flight() -> None:
    coming_back: Any = (SAMPLES["rejoin"], SAMPLES["welcome"])
    seen: list[Message] = []

    async def take(connection: Connection) -> None:
        seen.extend([await connection.receive(), await connection.receive()])
        await connection.send(SAMPLES["ready"])
        assert isinstance(await connection.receive(), Bye)

    config = WireConfig(token=TOKEN, **of_server())
    server = await serve("127.0.0.1", 0, take, config, redeem=lambda message: True)
    connection = await connect(server.host, server.port, WireConfig(token=TOKEN, **PINNED), coming_back)
    await connection.send(SAMPLES["begin"])
    assert await connection.receive() == SAMPLES["ready"]
    assert seen == [SAMPLES["rejoin"], SAMPLES["begin"]]
    await connection.close()
    await server.close()


@on_both_loops
async def test_silence_is_noticed() -> None:
    ending = Ending()
    async with tls_serving(ending, heartbeat_s=0.02) as server:
        reader, writer = await asyncio.open_connection(
            server.host, server.port, ssl=PINNED["tls"], server_hostname="x"
        )
        writer.write(to_bytes(SAMPLES["hello"]))
        assert "nothing came from the peer" in str(await ending.error)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        del reader


@on_both_loops
async def test_server_shuts_down_while_connections_are_at_every_stage() -> None:
    for server_tls, client_tls in ((of_server(), PINNED), ({}, {})):
        async with serving(handshake_s=60.0, close_s=60.0, **server_tls) as server:
            silent = socket.create_connection((server.host, server.port))
            job = await open_job(server, **client_tls)
        assert await job.receive() == Bye("the server shuts down")
        await job.close()
        silent.close()


# Whom either end refuses.


@on_both_loops
async def test_certificates_that_are_right_are_taken() -> None:
    both = client_context(pinned=True, ca=AUTHORITY.cert)
    for server_settings, client_settings in (
        (of_server(SELF_SIGNED), PINNED),
        (of_server(SELF_SIGNED), {"tls": client_context(pinned=False, ca=SELF_SIGNED.cert)}),
        (of_server(SERVER), VERIFIED),
        (of_server(SERVER), {"tls": both, "tls_fingerprint": SERVER.fingerprint}),
        (
            of_server(SERVER, AUTHORITY.cert),
            {"tls": client_context(pinned=False, ca=AUTHORITY.cert, cert=CLIENT.cert, key=CLIENT.key)},
        ),
    ):
        async with tls_serving(**server_settings) as server:
            connection = await open_job(server, **client_settings)
            await connection.close()


@on_both_loops
async def test_another_certificate_is_refused_before_anything_is_said() -> None:
    with logged() as log:
        async with tls_serving(**of_server(SERVER)) as server:
            reason = await refused(server.port, **PINNED)
            await log.until("without saying bye")
    assert f"another certificate, of fingerprint {spell_fingerprint(SERVER.fingerprint)}" in reason
    assert "somebody is in between" in reason


@on_both_loops
async def test_certificates_that_are_not_right_are_refused_in_plain_words() -> None:
    for pair, client, says in (
        (SELF_SIGNED, VERIFIED, "cannot be verified"),
        (SELF_SIGNED, {"tls": client_context(pinned=False)}, "cannot be verified"),
        (ELSEWHERE, VERIFIED, "is for another name"),
        (EXPIRED, VERIFIED, "has expired"),
    ):
        with logged() as log:
            async with tls_serving(**of_server(pair)) as server:
                assert says in await refused(server.port, **client)
                await log.until(f"no session with {server.host}:")


@on_both_loops
async def test_server_that_wants_a_client_certificate_gets_a_right_one_or_none_of_the_job() -> None:
    strange = client_context(pinned=True, cert=STRANGER.cert, key=STRANGER.key)
    for tls, client_says, server_says in (
        (PINNED["tls"], "give --tls-cert and --tls-key", "the client shows no certificate"),
        (strange, "--tls-client-ca signed", "the client's certificate cannot be verified"),
    ):
        with logged() as log:
            async with tls_serving(**of_server(SELF_SIGNED, AUTHORITY.cert)) as server:
                assert client_says in await refused(server.port, **{**PINNED, "tls": tls})
                await log.until(server_says)


@on_both_loops
async def test_client_without_tls_is_told_what_to_give() -> None:
    with logged() as log:
        async with tls_serving() as server:
            assert "the server wants TLS; give --tls-fingerprint" in await refused(server.port)
            await log.until("the client speaks no TLS")


@on_both_loops
async def test_server_without_tls_is_said_to_be_one() -> None:
    with logged() as log:
        async with serving() as server:
            assert "leave out the --tls options" in await refused(server.port, **PINNED)
            await log.until("the peer speaks TLS, and this end does not")
    async with raw_server(speak_http) as port:
        assert "that port speaks no TLS" in await refused(port, **PINNED)


@on_both_loops
async def test_older_tls_is_refused() -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with logged() as log:
        async with tls_serving() as server:
            with pytest.raises(ssl.SSLError):
                await asyncio.open_connection(server.host, server.port, ssl=old)
            await log.until("the client speaks no TLS 1.3")


@on_both_loops
async def test_handshake_that_is_not_finished_is_given_up() -> None:
    with logged() as log:
        async with tls_serving(handshake_s=0.1) as server, raw_peer(server) as peer:
            peer.writer.write(b"\x16\x03\x01\x02\x00\x01")  # the beginning of one
            with contextlib.suppress(ConnectionResetError):
                assert await peer.reader.read() == b""
            await log.until("within 0.1 s")
    async with raw_server(say_nothing) as port:
        assert "did not answer within 0.1 s" in await refused(port, handshake_s=0.1, **PINNED)


@on_both_loops
async def test_handshake_of_noise_is_no_traceback() -> None:
    with logged() as log:
        async with tls_serving() as server:
            for seed in range(10):
                async with raw_peer(server) as peer:
                    peer.writer.write(np.random.default_rng(seed).bytes(3000))
                    with contextlib.suppress(ConnectionResetError):
                        await peer.reader.read()
            await log.until("no session with")
            connection = await open_job(server, **PINNED)
            await connection.close()


@on_both_loops
async def test_record_that_was_changed_on_the_way_ends_the_connection() -> None:
    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward = await asyncio.open_connection(server.host, server.port)

        async def back() -> None:
            while data := await onward[0].read(65_536):
                writer.write(data)
            writer.write_eof()

        answering = asyncio.create_task(back())
        while data := await reader.read(65_536):
            if len(data) > 10_000:
                data = data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]
            onward[1].write(data)
        onward[1].close()
        with contextlib.suppress(OSError):
            await onward[1].wait_closed()
        await answering

    ending = Ending()

    async def listen(connection: Connection) -> None:
        await take_job(connection)
        await ending(connection)

    async with tls_serving(listen) as server, raw_server(relay) as port:
        connection = await connect("127.0.0.1", port, WireConfig(close_s=0.2, **PINNED))
        await connection.send(SAMPLES["open"])
        await connection.receive()
        await connection.send(tensor_message(noise(100_000)))
        assert "TLS failed: decryption failed or bad record mac" in str(await ending.error)
        with pytest.raises(ConnectionLost, match=r"TLS failed: .* bad record mac"):
            await connection.receive()
        await connection.close()


# Tokens, on real sockets.


@on_both_loops
async def test_token_is_asked_for_with_and_without_tls() -> None:
    for server_tls, client_tls in (({}, {}), (of_server(), PINNED)):
        async with serving(token=TOKEN, **server_tls) as server:
            connection = await open_job(server, token=TOKEN, **client_tls)
            await connection.close()
            assert "give the --token-file" in await refused(server.port, token=b"x" * 16, **client_tls)
            assert await refused(server.port, **client_tls) == ("the server wants a token; give --token-file")
        async with serving(**server_tls) as server:
            assert "does not ask for the token" in await refused(server.port, token=TOKEN, **client_tls)


@on_both_loops
async def test_address_that_guesses_is_refused_even_with_the_right_token() -> None:
    async with serving(token=TOKEN) as server:
        for _ in range(5):
            assert "give the --token-file" in await refused(server.port, token=b"x" * 16)
        with pytest.raises(ConnectFailed, match=r"too many wrong tokens .* try again in 30 s") as caught:
            await connect(server.host, server.port, WireConfig(token=TOKEN))
        assert not caught.value.final


@on_both_loops
async def test_refusals_that_last_are_told_from_those_that_pass() -> None:
    async with serving(token=TOKEN, max_connections=1) as server:
        for settings, final in (({"token": b"x" * 16}, True), ({}, True), ({"versions": (1,)}, True)):
            with pytest.raises(ConnectFailed) as caught:
                await connect(server.host, server.port, WireConfig(**settings))
            assert caught.value.final is final
    with pytest.raises(ConnectFailed) as caught:
        await connect(server.host, server.port)
    assert not caught.value.final


@on_both_loops
async def test_strangers_are_few_and_the_newest_are_heard() -> None:
    async with serving(max_strangers=8, handshake_s=60.0, close_s=0.2) as server:
        silent = [await asyncio.open_connection(server.host, server.port) for _ in range(30)]
        job = await open_job(server)
        for reader, _ in silent[: 30 - 8]:
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        assert len(server._strangers) <= 8
        await job.close()
        for _, writer in silent:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


# Contexts and fingerprints.


def test_fingerprint_is_read_as_people_write_it() -> None:
    value = bytes(range(32))
    for text in (value.hex(), value.hex().upper(), spell_fingerprint(value), f" {value.hex(':')}\n"):
        assert parse_fingerprint(text) == value
    for text in ("", "abc", value.hex()[:-2], value.hex() + "00", "zz" * 32, value.hex(" ")):
        with pytest.raises(ValueError, match="is no fingerprint; give the 64 hexadecimal digits"):
            parse_fingerprint(text)


def test_files_that_cannot_be_used_are_named() -> None:
    hidden = make_pair(FOLDER, "hidden", password=b"secret")
    noise_file = FOLDER / "noise"
    noise_file.write_bytes(b"no PEM at all")
    for make, says in (
        (lambda: server_context(FOLDER / "none", SERVER.key), "none cannot be read: No such file"),
        (lambda: server_context(SERVER.cert, CLIENT.key), "client.key is not that of the certificate"),
        (lambda: server_context(hidden.cert, hidden.key), "the key without a password"),
        (lambda: server_context(noise_file, noise_file), "both have to be PEM"),
        (lambda: server_context(SERVER.cert, SERVER.key, noise_file), "noise holds no certificates"),
        (lambda: client_context(pinned=False, ca=FOLDER / "none"), "none cannot be read"),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_only_tls_1_3_is_spoken() -> None:
    for context in (client_context(pinned=True), server_context(SERVER.cert, SERVER.key)):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_3
