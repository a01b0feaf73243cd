"""Carries packets between the TUN devices of two network namespaces, each after the same delay.

    python -m benchmarks.delay_line EDGE_NAMESPACE:DEVICE CLOUD_NAMESPACE:DEVICE DELAY_S

Creates both devices, prints ``ready`` and runs until it is ended. The rate is not its business: a ``tc tbf``
on each device lets packets through at the rate, and the delay comes after it, as on a long line. TCP's large
segments pass whole (IFF_VNET_HDR), so that at 1 Gbit/s some 2,000 packets a second are handled, not 80,000. They
are carried in rounds a millisecond apart at least, for every wake-up takes a core from the compute that is being
measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4 = 0x01, 0x02
CLONE_NEWNET = 0x40000000
LARGEST_PACKET = 65536 + 64
ROUND_S = 1e-3


def enter_namespace(name: str) -> None:
    """Move this thread into a named network namespace; open files stay with the one they came from."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if libc.setns(descriptor, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")
    finally:
        os.close(descriptor)


def open_tun(end: str) -> int:
    """Create the TUN device of ``NAMESPACE:DEVICE``; its file, one packet with its offload header a read."""
    namespace, _, device = end.partition(":")
    enter_namespace(namespace)
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", device.encode(), flags))
    fcntl.ioctl(descriptor, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4)
    return descriptor


def carry(edge: int, cloud: int, delay_s: float) -> None:
    """Copy packets both ways, each after ``delay_s``, give or take `ROUND_S`; does not return."""
    other = {edge: cloud, cloud: edge}
    waiting: dict[int, deque[tuple[float, bytes]]] = {edge: deque(), cloud: deque()}
    while True:
        due = min((packets[0][0] for packets in waiting.values() if packets), default=None)
        timeout = None if due is None else max(0.0, due - time.monotonic())
        select.select(list(other), [], [], timeout)
        time.sleep(ROUND_S)
        now = time.monotonic()
        for target, packets in waiting.items():
            while packets and packets[0][0] <= now:
                os.write(target, packets.popleft()[1])
        # A packet waits for one round to be read, and for another to be written.
        due_s = now + delay_s - 2 * ROUND_S
        for source, target in other.items():
            with contextlib.suppress(BlockingIOError):
                while True:
                    waiting[target].append((due_s, os.read(source, LARGEST_PACKET)))


def main(arguments: list[str]) -> None:
    """Open both devices and carry packets between them."""
    edge, cloud = map(open_tun, arguments[:2])
    # The line must not wait for the compute that is being measured: nothing runs before it.
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    print("ready", flush=True)
    carry(edge, cloud, float(arguments[2]))


if __name__ == "__main__":
    main(sys.argv[1:])
