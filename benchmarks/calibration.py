"""What a shaped link really carries, measured with plain blocking TCP sockets before anything else uses it.

python -m benchmarks.calibration            # calibrates the links that the other benchmarks use
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass

from benchmarks.links import Link, shaped_link

PIECE_BYTES = 1 << 16
SHORT_S = 0.05
PINGS = 11


@dataclass(frozen=True)
class Calibration:
    """What one link was measured to do.

    Attributes:
        set_bit_s: the rate that was asked for.
        up_bit_s: payload bits a second from the edge to the cloud while the other direction is as busy, after
            TCP's start; likewise ``down_bit_s``.
        round_trip_s: median time for one byte there and back on the idle link.
        short_ratio: time that SHORT_S of the rate took on the idle link (edge to cloud, answer included) over
            what rate and delay allow. Far under 1 the token bucket would be making gifts; over 1 with a long
            delay, where TCP has to find its window.
    """

    set_bit_s: float
    up_bit_s: float
    down_bit_s: float
    round_trip_s: float
    short_ratio: float

    @property
    def worst_error(self) -> float:
        """Largest relative distance of a measured rate from the set one."""
        return max(abs(rate / self.set_bit_s - 1) for rate in (self.up_bit_s, self.down_bit_s))


def calibrate(link: Link, seconds: float = 3.0) -> Calibration:
    """Measure a link's rates in both directions at once, its round trip, and a short transfer."""
    rate_bit_s, delay_s = link.shape.rate_bit_s, link.shape.delay_s
    module = [sys.executable, "-m", "benchmarks.calibration"]
    short_bytes = int(rate_bit_s / 8 * SHORT_S)
    lengths = [str(short_bytes), str(seconds)]
    server = link.run_server([*module, "server", link.server_host, *lengths])
    assert server.stdout is not None
    host, port = link.route(int(server.stdout.readline()))
    client = link.run_client([*module, "client", host, str(port), *lengths])
    edge, cloud = json.loads(client.communicate()[0]), json.loads(server.communicate()[0])
    return Calibration(
        set_bit_s=rate_bit_s,
        up_bit_s=cloud["received_bit_s"],
        down_bit_s=edge["received_bit_s"],
        round_trip_s=edge["round_trip_s"],
        short_ratio=edge["short_s"] / (SHORT_S + 2 * delay_s),
    )


def stream_both_ways(connection: socket.socket, seconds: float) -> float:
    """Send for so many seconds while receiving; payload bits a second received, TCP's start left out."""

    def send() -> None:
        piece = bytes(PIECE_BYTES)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    buffer = bytearray(PIECE_BYTES)
    started = time.monotonic()
    counted, counted_from = 0, started
    last = started
    while received := connection.recv_into(buffer):
        now = time.monotonic()
        if now - started < seconds / 3:
            counted_from = now
        elif now - started < seconds:
            counted += received
            last = now
    sender.join()
    return counted * 8 / (last - counted_from)


def serve(host: str, short_bytes: int, seconds: float) -> None:
    """The cloud's half: answer pings, then the short transfer, then stream."""
    with socket.create_server((host, 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        for _ in range(PINGS):
            connection.sendall(connection.recv(1))
        connection.recv(short_bytes, socket.MSG_WAITALL)
        connection.sendall(b".")
        print(json.dumps({"received_bit_s": stream_both_ways(connection, seconds)}))


def dial(host: str, port: int, short_bytes: int, seconds: float) -> None:
    """The edge's half."""
    with socket.create_connection((host, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pings = []
        for _ in range(PINGS):
            began = time.perf_counter()
            connection.sendall(b".")
            connection.recv(1)
            pings.append(time.perf_counter() - began)
        # The bucket is full after a pause: the worst case for an honest short transfer.
        time.sleep(0.2)
        began = time.perf_counter()
        connection.sendall(bytes(short_bytes))
        connection.recv(1)
        short_s = time.perf_counter() - began
        received_bit_s = stream_both_ways(connection, seconds)
    result = {"received_bit_s": received_bit_s, "round_trip_s": statistics.median(pings), "short_s": short_s}
    print(json.dumps(result))


def main(arguments: list[str]) -> None:
    """Run one half, or calibrate all links."""
    if arguments[:1] == ["server"]:
        serve(arguments[1], int(arguments[2]), float(arguments[3]))
    elif arguments[:1] == ["client"]:
        dial(arguments[1], int(arguments[2]), int(arguments[3]), float(arguments[4]))
    else:
        for delay_s in (0.0, 0.02):
            for rate_bit_s in (10e6, 100e6, 1000e6):
                with shaped_link(rate_bit_s, delay_s, relay="--relay" in arguments) as link:
                    measured = calibrate(link)
                    print(f"{link.shape} ({link.kind}, {link.congestion_control}):", asdict(measured))


if __name__ == "__main__":
    main(sys.argv[1:])
