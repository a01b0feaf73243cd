"""TLS between two channels, over streams that do only what a test says."""

from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.certificates import make_pair
from tests.wire.pair import SAMPLES, as_sent, to_bytes
from tests.wire.test_channel import End, large
from wire.errors import ConnectionLost, TlsFailed
from wire.messages import Bye
from wire.protocol import Phase, Role
from wire.sender import Traits
from wire.tls import client_context, server_context
from wire.tls_stream import TlsStream

pytestmark = pytest.mark.usefixtures("never_rests")

with TemporaryDirectory() as _folder:
    _PAIR = make_pair(Path(_folder), "server")
    SERVER = server_context(_PAIR.cert, _PAIR.key)
CLIENT = client_context(pinned=True)


class TlsEnd(End):
    """A channel over TLS.

    Attributes:
        soon: what is to be called when the loop is free.
    """

    def __init__(self, role: Role, *, pin: bytes | None = None, **settings: Any) -> None:
        tls = CLIENT if role is Role.CLIENT else SERVER
        super().__init__(role, tls=tls, tls_fingerprint=pin, **settings)
        self.soon: list[Callable[[], None]] = []
        host = "server" if role is Role.CLIENT else None
        self.tls = TlsStream(self.stream, self.channel, role, self.config, host, self.soon.append)
        self.carried = bytearray()  # by the stream, all of it
        self.eof_delivered = False

    def attach(self) -> "TlsEnd":
        self.channel.attach(self.tls, Traits(splits=True, overhead=lambda: self.tls.added_bytes))
        self.tls.begin()
        return self

    def feed(self, data: bytes) -> None:
        unread = memoryview(data)
        while unread:
            buffer = self.tls.next_buffer()
            count = min(len(buffer), len(unread))
            buffer[:count] = unread[:count]
            unread = unread[count:]
            self.tls.received(count)

    def run_soon(self) -> None:
        while self.soon:
            self.soon.pop(0)()


class TlsPair:
    """A client and a server; `exchange` carries what they send."""

    def __init__(self, *, pin: bytes | None = _PAIR.fingerprint, **settings: Any) -> None:
        self.client = TlsEnd(Role.CLIENT, pin=pin)
        self.server = TlsEnd(Role.SERVER, **settings)
        self.client.attach()
        self.server.attach()

    def exchange(self, sizes: Iterator[int] | None = None) -> "TlsPair":
        """Carry everything in pieces of given sizes until both are still."""
        sizes = sizes or repeat(1 << 20)
        moved = True
        while moved:
            moved = False
            for one, other in ((self.client, self.server), (self.server, self.client)):
                taken = one.stream.taken
                while taken and other.stream.reading:
                    piece = bytes(taken[: max(1, next(sizes))])
                    del taken[: len(piece)]
                    one.carried += piece
                    other.feed(piece)
                    other.run_soon()
                    moved = True
                if one.stream.eof and not taken and other.stream.reading and not other.eof_delivered:
                    other.eof_delivered = moved = True
                    other.tls.received_eof()
                one.run_soon()
        return self

    def running(self) -> "TlsPair":
        self.exchange()
        self.client.channel.queue(SAMPLES["open"])
        self.exchange()
        self.server.channel.take()
        self.server.channel.queue(SAMPLES["ready"])
        self.exchange()
        self.client.channel.take()
        assert self.client.channel.protocol.phase is self.server.channel.protocol.phase is Phase.RUNNING
        return self


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 700), max_size=60))
def test_messages_cross_however_the_stream_is_cut(sizes: list[int]) -> None:
    pair = TlsPair().exchange(chain(sizes, repeat(1 << 16)))
    assert pair.client.opened.done()
    assert pair.server.opened.done()
    pair.running()
    pair.client.channel.queue(SAMPLES["forward"])
    pair.client.channel.queue(large(60_032))
    pair.exchange(chain(sizes, repeat(1000)))
    first, second = (pair.server.channel.take() for _ in range(2))
    assert as_sent(first) == as_sent(SAMPLES["forward"])
    assert as_sent(second) == as_sent(large(60_032))
    assert pair.client.channel.sent_bytes == len(pair.client.carried) == pair.server.tls.received_bytes
    assert pair.server.channel.sent_bytes == len(pair.server.carried) == pair.client.tls.received_bytes


def test_nothing_is_said_to_a_server_with_another_certificate() -> None:
    pair = TlsPair(pin=bytes(32)).exchange()
    assert isinstance(pair.client.channel.failure, TlsFailed)
    assert pair.client.channel.failure.final
    assert pair.server.channel.protocol.hello is None
    assert pair.server.channel.protocol.received_bytes == 0
    assert "without saying bye" in str(pair.server.channel.failure)


def test_what_was_decrypted_waits_while_the_channel_does_not_read() -> None:
    pair = TlsPair(receive_queue=2).running()
    for _ in range(7):
        pair.client.channel.queue(SAMPLES["begin"])
    pair.client.channel.leave(Bye("done"), ConnectionLost("the test ends it"))
    pair.exchange()
    taken = []
    while pair.server.channel.inbox:
        assert len(pair.server.channel.inbox) <= 8
        taken.append(pair.server.channel.take().kind)
        pair.exchange()
    assert taken == ["begin"] * 7 + ["bye"]


def test_end_of_the_stream_waits_for_what_is_not_decrypted_yet() -> None:
    pair = TlsPair(receive_queue=1).running()
    server = pair.server
    for _ in range(3):
        pair.client.channel.queue(large(30_016))
    data = bytes(pair.client.stream.taken)
    server.feed(data)
    assert not server.stream.reading
    assert server.tls.received_eof()  # stay open
    assert server.channel.failure is None
    taken = []
    while server.channel.inbox:
        taken.append(server.channel.take().kind)
        server.run_soon()
    assert taken == ["forward"] * 3
    assert "without saying bye" in str(server.channel.failure)
    assert server.stream.closed


def test_stream_that_buffers_is_given_one_slice_at_a_time() -> None:
    pair = TlsPair().running()
    stream = pair.client.stream
    stream.room = 0
    before = pair.client.channel.sent_bytes
    receipt = pair.client.channel.queue(large(1 << 20))
    sizes = []
    while stream.buffered:
        sizes.append(stream.get_write_buffer_size())
        assert receipt.end_ns is None
        stream.drain(50_000)
    assert max(sizes) < 257 * 1024
    assert receipt.end_ns is not None
    assert pair.client.channel.sent_bytes - before == len(stream.taken) > 1 << 20
    stream.room = None
    pair.exchange()
    assert pair.server.channel.take().kind == "forward"


def test_last_words_come_before_the_end() -> None:
    pair = TlsPair().running()
    pair.server.channel.leave(SAMPLES["error"], ConnectionLost("the test ends it"))  # type: ignore[arg-type]
    pair.exchange()
    assert "what was that?" in str(pair.client.channel.failure)
    assert pair.server.stream.eof
    assert pair.client.stream.eof


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_changed_bytes_end_the_connection_in_good_order(data: st.DataObject) -> None:
    pair = TlsPair().running()
    pair.client.channel.queue(SAMPLES["forward"])
    pair.client.channel.queue(SAMPLES["begin"])
    stream = pair.client.stream.taken
    at = data.draw(st.integers(0, len(stream) - 1))
    stream[at] ^= data.draw(st.integers(1, 255))
    pair.exchange()
    failure = pair.server.channel.failure
    if failure is None:  # a length that waits for more
        pair.server.tls.received_eof()
        failure = pair.server.channel.failure
    assert isinstance(failure, ConnectionLost)
    assert [m.kind for m in pair.server.channel.inbox] in ([], ["forward"])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000), st.booleans())
def test_whatever_comes_instead_of_a_handshake_is_a_typed_error(noise: bytes, eof: bool) -> None:
    for role in Role:
        end = TlsEnd(role).attach()
        end.feed(noise)
        if eof:
            end.tls.received_eof()
        failure = end.channel.failure
        assert failure is None or isinstance(failure, TlsFailed)
        assert failure is not None or not eof
        assert not end.tls.secured


def test_client_that_speaks_no_tls_is_answered_without_it() -> None:
    end = TlsEnd(Role.SERVER).attach()
    end.feed(to_bytes(SAMPLES["hello"]))
    (error,) = end.sent()
    assert error.code == "tls_wanted"  # type: ignore[attr-defined]
    assert end.stream.eof
    assert end.channel.sent_bytes == len(end.stream.taken)


def test_writing_after_a_failure_goes_nowhere_and_raises_nothing() -> None:
    pair = TlsPair().running()
    pair.server.feed(b"\x17\x03\x03\x00\x20" + bytes(32))
    assert isinstance(pair.server.channel.failure, TlsFailed)
    before = len(pair.server.stream.taken)
    pair.server.tls.write(memoryview(b"more"))
    assert len(pair.server.stream.taken) == before
    with pytest.raises(ConnectionLost, match="TLS failed"):
        raise pair.server.channel.failure
