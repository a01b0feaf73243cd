"""A relay between client and server that counts what the socket really carries."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Relay:
    """Passes one connection on.

    Attributes:
        address: where the client connects to.
        up_bytes: what the client has sent, complete once the connection has ended.
        down_bytes: what the server has sent.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.up_bytes = self.down_bytes = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        """Wait until the connection has ended."""
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        host, _, port = self._server.rpartition(":")
        client, _ = self._listener.accept()
        with client, socket.create_connection((host, int(port))) as server:
            down = threading.Thread(target=self._pass_down, args=(server, client))
            down.start()
            self.up_bytes = _pass(client, server)
            down.join()

    def _pass_down(self, server: socket.socket, client: socket.socket) -> None:
        self.down_bytes = _pass(server, client)


def _pass(source: socket.socket, target: socket.socket) -> int:
    count = 0
    while data := source.recv(1 << 16):
        target.sendall(data)
        count += len(data)
    target.shutdown(socket.SHUT_WR)
    return count


@contextmanager
def counting_relay(server: str) -> Iterator[Relay]:
    """Stand between one client and a server."""
    relay = Relay(server)
    yield relay
    relay.join()
