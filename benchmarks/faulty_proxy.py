"""A TCP proxy between clients and a server that makes faults as a plan says.

    python -m benchmarks.faulty_proxy HOST:PORT [--seed S] [--faults N] [--mean-gap BYTES] [--timeout S]
                                      [--delay S] [--port P]

prints the address it listens on and then, once SIGINT or SIGTERM ends it, how many faults of each kind it made. In
a test it runs in a thread of its own::

    with FaultyProxy(address, RandomFaults(seed, 200, mean_gap=50_000)) as proxy:
        train(proxy.address)
    print(proxy.faults)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, NamedTuple

from benchmarks.fault_plans import DOWN, UP, Fault, Plan, RandomFaults

SEGMENT = 1 << 16
RECORD_LIMIT = 64 << 20
GOODBYE_S = 0.5
"""How long a connection that was ended by FIN is still read, so that its last bytes are not lost to a reset."""
REPLAY_S = 2.0
"""How long the answers to a replay are read."""


class Event(NamedTuple):
    """When (monotonic seconds) something happened to a connection: a fault's kind, or ``connected``."""

    at_s: float
    kind: str
    connection: int


class FaultyProxy:
    """Listens while the block runs, in a thread of its own.

    Args:
        server: where connections go, ``HOST:PORT``; may be changed while it runs.
        plan: which faults to make.
        delay_s: one-way delay; connecting takes a round trip then.
        port: to listen on; 0 takes a free one.

    Attributes:
        address: where clients connect to.
        faults: how many were made, by kind.
        events: faults and connections, in order.
        connections: how many clients have connected so far.
        carried: bytes that were passed on, by direction.
    """

    def __init__(self, server: str, plan: Plan | None = None, *, delay_s: float = 0.0, port: int = 0) -> None:
        self.server = server
        self.plan = plan if plan is not None else Plan()
        self.delay_s = delay_s
        self.faults: Counter[str] = Counter()
        self.events: list[Event] = []
        self.connections = 0
        self.carried = {UP: 0, DOWN: 0}
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> FaultyProxy:
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=256)
        self._listener.setblocking(False)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="faulty-proxy")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._listener.close()

    def note(self, kind: str, connection: int) -> None:
        """Keep that a fault was made, or a connection."""
        self.events.append(Event(time.monotonic(), kind, connection))
        if kind != "connected":
            self.faults[kind] += 1

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something on the side while the proxy runs."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.spawn(self._accept())
        await self._stop.wait()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self) -> None:
        while True:
            client, _ = await self._loop.sock_accept(self._listener)
            self.connections += 1
            self.note("connected", self.connections)
            self.spawn(_Connection(self, self.connections, client).run())

    def replay(self, connection: int, data: bytes) -> None:
        """Send once more, on a connection of its own, what a client has sent."""
        self.spawn(_replay(self.server, data))


class _Connection:
    """One client's connection and the one to the server that belongs to it."""

    def __init__(self, proxy: FaultyProxy, number: int, client: socket.socket) -> None:
        self._proxy, self._number = proxy, number
        self._client = _prepared(client)
        self._server: socket.socket | None = None
        self._record = bytearray()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Carry it to its end."""
        try:
            with contextlib.suppress(OSError):
                await self._run()
        finally:
            for end in (self._client, self._server):
                if end is not None:
                    end.close()

    async def _run(self) -> None:
        fault = self._proxy.plan.on_connect(self._number)
        if fault is not None:
            await asyncio.sleep(fault.seconds)
            _reset(self._client)
            return
        try:
            self._server = await _connect(self._proxy.server)
        except OSError:  # as where nobody listens
            _reset(self._client)
            raise
        await asyncio.sleep(2 * self._proxy.delay_s)
        pumps = [
            asyncio.ensure_future(self._pump(self._client, self._server, UP)),
            asyncio.ensure_future(self._pump(self._server, self._client, DOWN)),
        ]
        both = asyncio.gather(*pumps)
        both.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await asyncio.wait([both, self._ended], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        if self._ended.done() and self._ended.result() == "fin":
            await self._goodbye(self._client, self._server)
        elif self._ended.done() or both.exception() is not None:
            _reset(self._client)
            _reset(self._server)

    async def _pump(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        plan, loop = self._proxy.plan, asyncio.get_running_loop()
        async for data in self._segments(source):
            if direction == UP and plan.needs_record and len(self._record) < RECORD_LIMIT:
                self._record += data
            for item in plan.look(self._number, direction, data):
                await self._flowing.wait()
                if isinstance(item, Fault):
                    await self._make(item, target)
                else:
                    await loop.sock_sendall(target, item)
                    self._proxy.carried[direction] += len(item)
        await self._flowing.wait()
        await loop.sock_sendall(target, plan.rest(self._number, direction))
        target.shutdown(socket.SHUT_WR)

    async def _make(self, fault: Fault, target: socket.socket) -> None:
        self._proxy.note(fault.kind, self._number)
        match fault.kind:
            case "stall":
                self._flowing.clear()
                await asyncio.sleep(fault.seconds)
                self._flowing.set()
            case "delay":
                await asyncio.sleep(fault.seconds)
            case "duplicate":
                self._proxy.replay(self._number, bytes(self._record))
            case "truncate" if fault.how == "one":
                target.shutdown(socket.SHUT_WR)
                await asyncio.sleep(GOODBYE_S)  # the other direction goes on
                await self._end("fin")
            case _:
                await self._end("rst" if fault.how in ("rst", "") else "fin")

    async def _end(self, how: str) -> None:
        """End the connection: by RST, or by FIN. Does not return, for this cancels the pump that calls it."""
        if not self._ended.done():
            self._ended.set_result(how)
        await asyncio.get_running_loop().create_future()

    async def _segments(self, source: socket.socket) -> AsyncIterator[bytes]:
        """What comes from a socket, late by the delay."""
        loop, delay_s = asyncio.get_running_loop(), self._proxy.delay_s
        if not delay_s:
            while data := await loop.sock_recv(source, SEGMENT):
                yield data
            return
        line: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(4096)

        async def read() -> None:
            data = b"-"
            while data:
                with contextlib.suppress(ConnectionError):
                    data = await loop.sock_recv(source, SEGMENT)
                await line.put((loop.time() + delay_s, data))

        reading = loop.create_task(read())
        try:
            while True:
                due, data = await line.get()
                await asyncio.sleep(due - loop.time())
                if not data:
                    return
                yield data
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _goodbye(self, *ends: socket.socket) -> None:
        """End both sides by FIN, and let them read what was sent before."""
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_WR)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await asyncio.gather(*map(_drain, ends), return_exceptions=True)


async def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    end = socket.socket()
    end.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(end, (host, int(port)))
    except BaseException:
        end.close()
        raise
    return _prepared(end)


def _prepared(end: socket.socket) -> socket.socket:
    end.setblocking(False)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return end


def _reset(end: socket.socket) -> None:
    """Close by RST; what is on its way in the kernel is dropped."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


async def _drain(end: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(end, SEGMENT):
        pass


async def _replay(server: str, data: bytes) -> None:
    with contextlib.suppress(OSError, TimeoutError):
        end = await _connect(server)
        try:
            async with asyncio.timeout(REPLAY_S):
                await asyncio.gather(asyncio.get_running_loop().sock_sendall(end, data), _drain(end))
        finally:
            end.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a proxy until it is ended."""
    parser = argparse.ArgumentParser(prog="benchmarks/faulty_proxy.py", description=__doc__.splitlines()[0])
    parser.add_argument("server", metavar="HOST:PORT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=0)
    parser.add_argument("--mean-gap", type=float, default=100_000, metavar="BYTES")
    parser.add_argument("--timeout", type=float, default=15.0, metavar="S", help="of the ends' heartbeats")
    parser.add_argument("--delay", type=float, default=0.0, metavar="S", help="one way")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args(argv)
    plan = RandomFaults(options.seed, options.faults, options.mean_gap, timeout_s=options.timeout)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with FaultyProxy(options.server, plan, delay_s=options.delay, port=options.port) as proxy:
        print(proxy.address, flush=True)
        ended.wait()
    print(f"seed {options.seed}: {dict(proxy.faults)}, {plan.left} left", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
