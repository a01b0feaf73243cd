"""The contenders of `benchmarks/wire.py`: each a receiver and a sender, in processes of their own.

A receiver is a generator function: it yields the address it listens on, then takes (size, count) for each round. A
sender takes the address, and yields the seconds a round took. The sent memory is a torch tensor's, as in training.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import Iterator
from functools import cache
from multiprocessing.connection import Connection as Pipe
from typing import Any

import torch

HEAD = struct.Struct("!4sBBHIQI")
FIELDS = b"x" * 110  # about as long as a real header
LOOPBACK = "127.0.0.1"


def receiver(name: str, pipe: Pipe) -> None:
    """Run the receiving process of a contender until the pipe says None."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    RECEIVERS[name](pipe)


def sender(name: str, pipe: Pipe) -> None:
    """Run the sending process of a contender until the pipe says None."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    SENDERS[name](pipe)


def rounds(pipe: Pipe) -> Iterator[tuple[int, int]]:
    """Yield (size, count) for every round."""
    while (job := pipe.recv()) is not None:
        yield job


@cache
def payload(size: int) -> Any:
    """Return a tensor's memory as an array of bytes, the same every time."""
    return (torch.arange(size, dtype=torch.int64) % 251).to(torch.uint8).numpy()


# Isthmus


def isthmus_receiver(pipe: Pipe) -> None:
    """Receive messages as a session of the server does."""
    from wire.config import WireConfig
    from wire.messages import Ready, Weights
    from wire.transport import Connection, run, serve

    async def session(connection: Connection) -> None:
        await connection.receive()
        await connection.send(Ready(0, False, False, "cpu", "contiguous", bytes(32), None, {}))
        loop = asyncio.get_running_loop()
        while (job := await loop.run_in_executor(None, pipe.recv)) is not None:
            for _ in range(job[1]):
                await connection.receive()
            await connection.send(Weights(0, True, [], []))
            pipe.send(None)
        done.set_result(None)

    async def main() -> None:
        global done
        done = asyncio.get_running_loop().create_future()
        server = await serve(LOOPBACK, 0, session, WireConfig())
        pipe.send(server.port)
        await done
        await server.close()

    run(main())


def isthmus_sender(pipe: Pipe) -> None:
    """Send forward messages as the edge does."""
    from wire.config import WireConfig
    from wire.messages import Forward, Open
    from wire.transport import connect, run

    async def main() -> None:
        connection = await connect(LOOPBACK, pipe.recv(), WireConfig())
        await connection.send(Open(bytes(16), bytes(32), {}))
        await connection.receive()
        pipe.send(None)
        loop = asyncio.get_running_loop()
        while (job := await loop.run_in_executor(None, pipe.recv)) is not None:
            size, count = job
            data = payload(size)
            descs = [{"dtype": "float32", "shape": [8, 32, size // 1024, 1], "order": "C", "size": size}]
            started = time.perf_counter()
            for chunk in range(count):
                await connection.send(Forward(1, chunk, False, ["x"], descs, data))
            await connection.receive()
            pipe.send(time.perf_counter() - started)
        await connection.close()

    run(main())


# Plain blocking sockets


def receive_exactly(sock: socket.socket, view: memoryview) -> None:
    """Fill the view, or fail where the peer has gone."""
    while view.nbytes:
        received = sock.recv_into(view)
        if not received:
            raise EOFError("the sender has closed its connection")
        view = view[received:]


def raw_receiver(pipe: Pipe) -> None:
    """Receive header and payload with blocking calls, into one buffer again and again."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        pipe.send(listener.getsockname()[1])
        sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = memoryview(bytearray(HEAD.size + len(FIELDS)))
    with sock:
        for size, count in rounds(pipe):
            buffer = memoryview(payload(size))
            for _ in range(count):
                receive_exactly(sock, head)
                receive_exactly(sock, buffer[: HEAD.unpack_from(head)[5]])
            sock.sendall(b"!")
            pipe.send(None)


def raw_sender(pipe: Pipe) -> None:
    """Send header and payload with one gathering call."""
    with socket.create_connection((LOOPBACK, pipe.recv())) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pipe.send(None)
        for size, count in rounds(pipe):
            data = memoryview(payload(size))
            started = time.perf_counter()
            for _ in range(count):
                head = HEAD.pack(b"ISTH", 1, 0, 0, len(FIELDS), size, 0) + FIELDS
                sent = sock.sendmsg([head, data])
                while sent < len(head) + size:
                    sent += sock.send(data[sent - len(head) :])
            sock.recv(1)
            pipe.send(time.perf_counter() - started)


# torch.distributed with gloo


def gloo_receiver(pipe: Pipe) -> None:
    """Receive with `torch.distributed`'s point-to-point call."""
    import torch.distributed as dist

    with socket.create_server((LOOPBACK, 0)) as probe:
        port = probe.getsockname()[1]
    pipe.send(port)
    dist.init_process_group("gloo", init_method=f"tcp://{LOOPBACK}:{port}", rank=0, world_size=2)
    for size, count in rounds(pipe):
        buffer = torch.from_numpy(payload(size))
        for _ in range(count):
            dist.recv(buffer, 1)
        dist.send(torch.zeros(1), 1)
        pipe.send(None)
    dist.destroy_process_group()


def gloo_sender(pipe: Pipe) -> None:
    """Send with `torch.distributed`'s point-to-point call."""
    import torch.distributed as dist

    port = pipe.recv()
    dist.init_process_group("gloo", init_method=f"tcp://{LOOPBACK}:{port}", rank=1, world_size=2)
    pipe.send(None)
    answer = torch.zeros(1)
    for size, count in rounds(pipe):
        data = torch.from_numpy(payload(size))
        started = time.perf_counter()
        for _ in range(count):
            dist.send(data, 0)
        dist.recv(answer, 0)
        pipe.send(time.perf_counter() - started)
    dist.destroy_process_group()


# ZeroMQ


def zmq_receiver(pipe: Pipe) -> None:
    """Receive frames of two parts without a copy."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.PAIR) as sock:
        sock.rcvhwm = 8
        pipe.send(sock.bind_to_random_port(f"tcp://{LOOPBACK}"))
        for _, count in rounds(pipe):
            for _ in range(count):
                sock.recv(copy=False)  # the header
                sock.recv(copy=False)
            sock.send(b"!")
            pipe.send(None)


def zmq_sender(pipe: Pipe) -> None:
    """Send frames of two parts without a copy."""
    import zmq

    with zmq.Context() as context, context.socket(zmq.PAIR) as sock:
        sock.sndhwm = 8
        sock.connect(f"tcp://{LOOPBACK}:{pipe.recv()}")
        pipe.send(None)
        for size, count in rounds(pipe):
            data = payload(size)
            started = time.perf_counter()
            for _ in range(count):
                sock.send(FIELDS, zmq.SNDMORE)
                sock.send(data, copy=False)
            sock.recv()
            pipe.send(time.perf_counter() - started)


# gRPC, client streaming of raw bytes

GRPC_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def grpc_receiver(pipe: Pipe) -> None:
    """Serve a client-streaming call that takes raw bytes."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    def take(messages: Iterator[bytes], context: Any) -> bytes:
        for _ in messages:
            pass
        return b"!"

    service = grpc.method_handlers_generic_handler(
        "bench", {"take": grpc.stream_unary_rpc_method_handler(take)}
    )
    server = grpc.server(ThreadPoolExecutor(2), options=GRPC_OPTIONS)
    server.add_generic_rpc_handlers((service,))
    pipe.send(server.add_insecure_port(f"{LOOPBACK}:0"))
    server.start()
    for _ in rounds(pipe):
        pipe.send(None)
    server.stop(None).wait()


def grpc_sender(pipe: Pipe) -> None:
    """Stream raw bytes."""
    import grpc

    with grpc.insecure_channel(f"{LOOPBACK}:{pipe.recv()}", options=GRPC_OPTIONS) as channel:
        take = channel.stream_unary("/bench/take")
        pipe.send(None)
        for size, count in rounds(pipe):
            data = payload(size).tobytes()  # gRPC sends nothing else; the copy is not counted
            started = time.perf_counter()
            take(data for _ in range(count))
            pipe.send(time.perf_counter() - started)


RECEIVERS = {
    "isthmus": isthmus_receiver,
    "raw": raw_receiver,
    "gloo": gloo_receiver,
    "zmq": zmq_receiver,
    "grpc": grpc_receiver,
}
SENDERS = {
    "isthmus": isthmus_sender,
    "raw": raw_sender,
    "gloo": gloo_sender,
    "zmq": zmq_sender,
    "grpc": grpc_sender,
}
