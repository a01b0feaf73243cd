"""The proxy that makes faults: what it passes on, where it cuts, and that it leaves nothing behind."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import msgpack
import pytest

from benchmarks.fault_plans import DOWN, UP, CutBytes, CutFrames, FrameCut, RandomFaults, mean_gap
from benchmarks.faulty_proxy import FaultyProxy
from wire.frames import encode_frame_head, encode_piece_head, split_frame_head


class Echo:
    """A server that sends everything back, and keeps what each connection brought."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.received: list[bytearray] = []
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def until(self, condition) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, 10), self.received

    def _accept(self) -> None:
        while True:
            try:
                end, _ = self._listener.accept()
            except OSError:
                return
            brought = bytearray()
            self.received.append(brought)
            thread = threading.Thread(target=self._serve, args=(end, brought))
            self._threads.append(thread)
            thread.start()

    def _serve(self, end: socket.socket, brought: bytearray) -> None:
        with end:
            try:
                while data := end.recv(4096):
                    with self._changed:
                        brought += data
                        self._changed.notify_all()
                    end.sendall(data)
            except ConnectionError:
                pass


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@contextmanager
def connected(proxy: FaultyProxy) -> Iterator[socket.socket]:
    host, _, port = proxy.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as end:
        yield end


def exchange(proxy: FaultyProxy, data: bytes) -> bytes:
    """Send data and end; everything that comes back, until the end or a reset."""
    back = bytearray()
    with suppress(OSError), connected(proxy) as end:
        end.sendall(data)
        end.shutdown(socket.SHUT_WR)
        while got := end.recv(4096):
            back += got
    return bytes(back)


def test_without_faults_it_passes_everything_on(echo: Echo) -> None:
    data = os.urandom(300_000)
    with FaultyProxy(echo.address) as proxy, connected(proxy) as end:
        sender = threading.Thread(target=end.sendall, args=(data,))
        sender.start()
        back = bytearray()
        while len(back) < len(data):
            back += end.recv(65536)
        sender.join()
    assert bytes(back) == data
    assert proxy.carried == {UP: len(data), DOWN: len(data)}
    assert not proxy.faults


def test_delay_holds_every_byte_and_loses_none(echo: Echo) -> None:
    with FaultyProxy(echo.address, delay_s=0.02) as proxy:
        assert exchange(proxy, b"some words") == b"some words"


@pytest.mark.parametrize("after", [0, 1, 7, 100])
def test_cut_upwards_comes_after_exactly_so_many_bytes_of_one_connection(echo: Echo, after: int) -> None:
    with FaultyProxy(echo.address, CutBytes(2, UP, after)) as proxy:
        for _ in range(3):
            exchange(proxy, bytes(100) * 2)
    # The connection that was cut may be gone before the server's thread has read what came through it.
    echo.until(lambda: [len(one) for one in echo.received] == [200, after, 200])
    assert proxy.faults == {"cut": 1}


@pytest.mark.parametrize("after", [0, 3])
def test_cut_downwards_comes_after_exactly_so_many_bytes(echo: Echo, after: int) -> None:
    with FaultyProxy(echo.address, CutBytes(1, DOWN, after)) as proxy:
        assert exchange(proxy, b"0123456789") == b"0123456789"[:after]


def frame(payload: bytes = b"", **header: object) -> bytes:
    return encode_frame_head(msgpack.packb(header), len(payload)) + payload


def in_pieces(payload: bytes, between: bytes, **header: object) -> bytes:
    half = len(payload) // 2
    return b"".join(
        (
            split_frame_head(encode_frame_head(msgpack.packb(header), len(payload)), 5),
            *(encode_piece_head(5, half), payload[:half], between),
            *(encode_piece_head(5, len(payload) - half), payload[half:]),
        )
    )


FRAMES = (
    frame(kind="ping", t_ns=1)
    + in_pieces(os.urandom(500), frame(kind="ping", t_ns=2), kind="forward", step=3)
    + frame(os.urandom(100), kind="backward", step=3)
)
COMMIT = frame(kind="commit", step=3, scale=None)


@pytest.mark.parametrize("after", [0, 1, 24, len(COMMIT) - 1, len(COMMIT), 999])
@pytest.mark.parametrize("segment", [1, 50, 10_000])
def test_cut_in_a_frame_finds_it_however_the_stream_comes(after: int, segment: int) -> None:
    plan = CutFrames([FrameCut("commit", after, step=3), FrameCut("resume", 2)])
    stream = FRAMES + frame(kind="commit", step=2, scale=None) + COMMIT + frame(kind="bye", reason="")
    passed, cut = b"", False
    for first in range(0, len(stream), segment):
        for item in plan.look(1, UP, stream[first : first + segment]):
            if isinstance(item, bytes):
                passed += item
            else:
                cut = True
        if cut:
            break
    start = stream.index(COMMIT)
    assert passed == stream[: start + min(after, len(COMMIT))]
    assert [one.kind for one in plan.cuts] == ["resume"]
    assert plan.sizes("commit") == [len(COMMIT)] * 2
    assert plan.times("commit").keys() == {2, 3}


def test_watching_passes_even_half_a_frame_on(echo: Echo) -> None:
    with FaultyProxy(echo.address, CutFrames()) as proxy:
        assert exchange(proxy, FRAMES + COMMIT[:30]) == FRAMES + COMMIT[:30]


def test_the_same_seed_makes_the_same_faults_and_another_makes_others() -> None:
    def made(seed: int) -> list[object]:
        plan = RandomFaults(seed, 20, 100.0)
        return [item for _ in range(100) for item in plan.look(1, UP, bytes(100))]

    assert made(3) == made(3)
    assert made(3) != made(4)


def test_faults_are_as_many_as_asked_for_and_lie_anywhere_in_a_segment() -> None:
    plan = RandomFaults(0, 400, 50.0)
    given = [item for _ in range(400) for item in plan.look(1, UP, bytes(100))]
    faults = [item for item in given if not isinstance(item, bytes)]
    assert len(faults) == 400
    assert plan.left == 0
    assert {fault.kind for fault in faults} == {
        *("cut", "truncate", "stall", "delay", "duplicate", "blackhole")
    }
    assert sum(len(item) for item in given if isinstance(item, bytes)) == 400 * 100


def test_denser_faults_have_smaller_gaps() -> None:
    assert mean_gap(1000, 4) < mean_gap(1000, 1) < mean_gap(2000, 1)


@pytest.mark.parametrize("kind", ["cut", "truncate", "stall", "delay", "duplicate", "blackhole"])
def test_a_fault_of_each_kind_and_then_a_plain_proxy(echo: Echo, kind: str) -> None:
    data = bytes(range(256)) * 10
    plan = RandomFaults(1, 1, 500.0, timeout_s=0.05, weights={kind: 1})
    with FaultyProxy(echo.address, plan) as proxy:
        back = exchange(proxy, data)
        if kind in ("stall", "delay", "duplicate"):
            assert back == data
        else:
            assert back == data[: len(back)]
            assert len(back) < len(data)
        if kind == "duplicate":
            echo.until(lambda: len(echo.received) == 2 and len(echo.received[1]) > 0)
        if kind == "blackhole":
            assert exchange(proxy, data) == b""
        assert exchange(proxy, data) == data
        assert proxy.faults == {kind: 1}
    if kind == "duplicate":
        assert all(data.startswith(one) for one in echo.received)


def test_client_of_a_server_that_is_not_there_is_reset() -> None:
    with FaultyProxy("127.0.0.1:1") as proxy:
        assert exchange(proxy, b"hello") == b""


def test_ending_it_leaves_no_thread_and_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    with closing(Echo()) as echo, FaultyProxy(echo.address) as proxy, connected(proxy) as end:
        end.sendall(b"x")
        assert end.recv(1) == b"x"
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
