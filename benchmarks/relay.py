"""A TCP relay that holds bytes back to a rate and a delay, for machines without network namespaces.

    python -m benchmarks.relay TARGET_HOST:PORT RATE_BIT_S DELAY_S

Prints the address it listens on, ``127.0.0.1:PORT``, and relays every connection to the target until it is
ended. Each direction of each connection has the rate to itself. Unlike a real line it ends TCP at both sides,
so TCP's own behaviour over a long delay is not part of what is measured.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections import deque

BURST_S = 1e-3
QUEUE_S = 0.05


class Line:
    """One direction: bytes go in as fast as the queue has room and come out at the rate, after the delay."""

    def __init__(
        self, source: socket.socket, target: socket.socket, rate_bit_s: float, delay_s: float
    ) -> None:
        self.source, self.target = source, target
        self.rate_byte_s, self.delay_s = rate_bit_s / 8, delay_s
        self.room_bytes = int(self.rate_byte_s * (QUEUE_S + delay_s)) + 65536
        self.piece_bytes = max(1448, min(65536, int(self.rate_byte_s * BURST_S)))
        self.queue: deque[tuple[float, bytes]] = deque()
        self.queued_bytes = 0
        self.changed = threading.Condition()

    def start(self) -> None:
        """Relay in two threads until the source ends."""
        for work in (self._receive, self._send):
            threading.Thread(target=work, daemon=True).start()

    def _receive(self) -> None:
        free_at = 0.0
        while True:
            try:
                data = self.source.recv(self.piece_bytes)
            except OSError:
                data = b""
            # The line is busy for as long as these bytes take; they arrive when the last of them has crossed.
            free_at = max(free_at, time.monotonic()) + len(data) / self.rate_byte_s
            with self.changed:
                self.queue.append((free_at + self.delay_s, data))
                self.queued_bytes += len(data)
                self.changed.notify_all()
                if not data:
                    return
                while self.queued_bytes > self.room_bytes:
                    self.changed.wait()

    def _send(self) -> None:
        while True:
            with self.changed:
                while not self.queue:
                    self.changed.wait()
                due, data = self.queue.popleft()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                if data:
                    self.target.sendall(data)
                else:
                    self.target.shutdown(socket.SHUT_WR)
            except OSError:
                data = b""
            with self.changed:
                self.queued_bytes -= len(data)
                self.changed.notify_all()
            if not data:
                return


def main(arguments: list[str]) -> None:
    """Listen, and relay every connection until the process is ended."""
    host, _, port = arguments[0].rpartition(":")
    rate_bit_s, delay_s = map(float, arguments[1:])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
        while True:
            client, _ = listener.accept()
            server = socket.create_connection((host, int(port)))
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            Line(client, server, rate_bit_s, delay_s).start()
            Line(server, client, rate_bit_s, delay_s).start()


if __name__ == "__main__":
    main(sys.argv[1:])
