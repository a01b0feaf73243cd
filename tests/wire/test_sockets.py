"""What the kernel is told of a connection."""

import socket
import sys

import pytest

from wire.sockets import LowWater, Unsent, delivery

MS = 1_000_000


class FakeSocket:
    """Remembers the options it was given."""

    def __init__(self) -> None:
        self.options: list[tuple[int, int, int]] = []

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self.options.append((level, option, value))

    @property
    def last(self) -> int:
        return self.options[-1][2] if self.options else 1


class Received:
    """A low-water mark under a clock that a test sets."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.sock = FakeSocket()
        self.low_water = LowWater(self.sock, lambda: self.now_ns)  # type: ignore[arg-type]

    def come(self, nbytes: int, missing: int, *, after_ns: int) -> int:
        """Bytes come; returns how many are gathered from now on."""
        self.now_ns += after_ns
        self.low_water.adjust(nbytes, missing)
        return self.sock.last


def test_fast_link_is_gathered_from_and_a_slow_one_is_not() -> None:
    fast, slow = Received(), Received()
    for _ in range(30):
        fast.come(64_000, 10 << 20, after_ns=MS // 2)  # 128 MB/s
        slow.come(6_400, 10 << 20, after_ns=5 * MS)
    assert 200_000 < fast.sock.last <= 256 * 1024
    assert slow.sock.options == []


def test_link_within_one_machine_is_not_gathered_from() -> None:
    loopback = Received()
    for _ in range(30):
        loopback.come(200_000, 10 << 20, after_ns=MS // 20)  # 4 GB/s
    assert loopback.sock.last == 1


def test_never_more_is_waited_for_than_is_sure_to_come() -> None:
    received = Received()
    for missing in [*range(4_000_000, 0, -64_000), 0]:
        assert received.come(64_000, missing, after_ns=MS // 2) <= max(missing, 1)
    assert received.sock.last == 1


def test_one_slow_arrival_ends_the_gathering() -> None:
    received = Received()
    for _ in range(30):
        received.come(64_000, 10 << 20, after_ns=MS // 2)
    assert received.come(256 * 1024, 10 << 20, after_ns=1000 * MS) == 1


@pytest.mark.parametrize(
    ("bytes_per_s", "allowed"),
    [(None, 64 * 1024), (1.25e6, 32 * 1024), (5e6, 100_000), (5e9, 1 << 20)],
)
def test_unsent_bytes_are_those_of_twenty_milliseconds(bytes_per_s: float | None, allowed: int) -> None:
    sock = FakeSocket()
    Unsent(sock).adjust(bytes_per_s)  # type: ignore[arg-type]
    assert sock.last == allowed


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_delivery_is_what_the_peer_has() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sock,
    ):
        before = delivery(sock)
        peer, _ = server.accept()
        with peer:
            sock.sendall(bytes(1000))
            while not (now := delivery(sock)).idle:  # type: ignore[union-attr]
                pass
            assert before is not None
            assert now is not None
            assert now.bytes == before.bytes + 1000
            assert 0 < now.rtt_ns < 10**9
            # More than both kernels buffer.
            sock.setblocking(False)
            sent = sum(iter(lambda: send_some(sock), 0))
            now = delivery(sock)
            assert now is not None
            assert not now.idle
            assert now.bytes < before.bytes + 1000 + sent


def send_some(sock: socket.socket) -> int:
    try:
        return sock.send(bytes(1 << 20))
    except BlockingIOError:
        return 0


def test_socket_without_the_options_does_without() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        assert delivery(sock) is None
        Unsent(sock).adjust(1e6)
        LowWater(sock).adjust(1, 1 << 20)
