"""A shaped link between two hosts on one machine.

Two network namespaces stand for the edge and the cloud. Without added delay a veth pair joins them, with a
``tc tbf`` at both ends, so that each direction has the rate to itself:

    edge namespace [veth e0, tbf] ============ [veth c0, tbf] cloud namespace

With added delay each namespace has a TUN device instead, shaped by ``tc tbf`` all the same, and
``benchmarks.delay_line`` carries the packets from one to the other after that delay. (``tc netem`` would do
it in the kernel, but is missing from many; this way delay is had everywhere, and always in the same way.)

Where namespaces are not allowed, ``benchmarks.relay`` stands between the two on loopback: a process that
holds bytes back to the same rate and delay. ``Link.kind`` tells which of the three was used.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

EDGE_HOST, CLOUD_HOST = "10.77.0.1", "10.77.0.2"
EDGE_DEVICE, CLOUD_DEVICE = "e0", "c0"
FRAME_BYTES = 1514
GSO_BYTES = 68_000
CONGESTION_CONTROL = "cubic"
# Room for the largest window that a link here needs: 1 Gbit/s times 40 ms, and a queue as long.
TCP_BUFFER_BYTES = 32 << 20

_numbers = itertools.count()


class LinkUnavailable(Exception):
    """This machine does not allow network namespaces, or has no ``ip`` or ``tc``."""


@dataclass(frozen=True)
class Shape:
    """What a link lets through.

    Attributes:
        rate_bit_s: bits a second in each direction as the token bucket counts them, all headers included.
        delay_s: added one-way delay, in seconds.
    """

    rate_bit_s: float
    delay_s: float = 0.0

    @property
    def burst_bytes(self) -> int:
        """Size of the token bucket: 5 ms of the rate, and never under two frames.

        Small, so that a short transfer gets no gift; but a bucket overflows while an idle virtual machine
        oversleeps its timer, and with 1 ms of the rate that costs 15 % of it.
        On the delayed link from 50 Mbit/s up one of TCP's large segments fits whole (5.4 ms at 100 Mbit/s),
        which spares the delay line from handling every frame.
        """
        least = GSO_BYTES if self.delay_s and self.rate_bit_s >= 50e6 else 2 * FRAME_BYTES
        return max(least, int(self.rate_bit_s / 8 * 5e-3))

    @property
    def segments(self) -> int:
        """The most frames in one of TCP's large segments, which all fit the bucket at once."""
        return min(self.burst_bytes, GSO_BYTES) // FRAME_BYTES

    @property
    def queue_s(self) -> float:
        """How long a packet may wait before it is dropped: 50 ms, or a round trip where that is longer."""
        return max(0.05, 2 * self.delay_s)

    def __str__(self) -> str:
        added = f" + {self.delay_s * 1e3:g} ms" if self.delay_s else ""
        return f"{self.rate_bit_s / 1e6:g} Mbit/s{added}"


@dataclass
class Link:
    """Two hosts and what joins them; what was started on either ends with it.

    Attributes:
        shape: rate and delay.
        kind: ``veth``, ``tun`` or ``relay``.
        congestion_control: TCP's, the same on both hosts.
        edge_prefix: words to put before a command to run it on the edge's host; likewise ``cloud_prefix``.
        server_host: address of the cloud's host, to listen on.
        line: the process that carries the packets, where one does.
    """

    shape: Shape
    kind: str
    congestion_control: str
    server_host: str
    edge_prefix: tuple[str, ...] = ()
    cloud_prefix: tuple[str, ...] = ()
    edge_device: str = "lo"
    cloud_device: str = "lo"
    line: subprocess.Popen[str] | None = None
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def run_client(self, argv: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Start a command on the edge's host; its output comes through pipes, as text."""
        return self._start([*self.edge_prefix, *argv], options)

    def run_server(self, argv: Sequence[str], **options: object) -> subprocess.Popen[str]:
        """Start a command on the cloud's host; its output comes through pipes, as text."""
        return self._start([*self.cloud_prefix, *argv], options)

    def route(self, port: int) -> tuple[str, int]:
        """Address to dial on the edge to reach a port that the cloud listens on."""
        if self.kind != "relay":
            return self.server_host, port
        argv = [sys.executable, "-m", "benchmarks.relay", f"{self.server_host}:{port}"]
        argv += [str(self.shape.rate_bit_s), str(self.shape.delay_s)]
        output = self._start(argv, {}).stdout
        assert output is not None
        host, _, relayed = output.readline().strip().rpartition(":")
        return host, int(relayed)

    def line_cpu_s(self) -> float:
        """Seconds of one core that carrying the packets took so far, in a process of its own."""
        return 0.0 if self.line is None else sum(psutil.Process(self.line.pid).cpu_times()[:2])

    def close(self) -> None:
        """End every process started here; closing twice is allowed."""
        while self._processes:
            end(self._processes.pop())

    def _start(self, argv: Sequence[str], options: Mapping[str, object]) -> subprocess.Popen[str]:
        defaults: dict[str, object] = {"stdout": subprocess.PIPE, "text": True}
        process: subprocess.Popen[str] = subprocess.Popen(argv, **(defaults | dict(options)))  # type: ignore[call-overload]
        self._processes.append(process)
        return process


@contextlib.contextmanager
def shaped_link(rate_bit_s: float, delay_s: float = 0.0, *, relay: bool = False) -> Iterator[Link]:
    """A link of this rate (bit/s, each direction) and added one-way delay (s), taken down at the end.

    Args:
        rate_bit_s: as in `Shape`.
        delay_s: as in `Shape`.
        relay: use the relay even where namespaces are allowed.
    """
    shape = Shape(rate_bit_s, delay_s)
    with contextlib.ExitStack() as cleanup:
        # atexit too: an exception in another thread, or sys.exit inside a signal's handler, must not leave
        # namespaces behind.
        atexit.register(cleanup.close)
        cleanup.callback(atexit.unregister, cleanup.close)
        cleanup.enter_context(_terminated_as_exit())
        link = None
        if not relay:
            try:
                link = _namespaces(shape, cleanup)
            except LinkUnavailable as reason:
                print(f"no network namespaces ({reason}): using the relay", file=sys.stderr)
        if link is None:
            link = Link(shape, "relay", _sysctl_read("net.ipv4.tcp_congestion_control"), "127.0.0.1")
        cleanup.callback(link.close)
        yield link


def end(process: subprocess.Popen[str], wait_s: float = 10) -> None:
    """Ask a process to end, wait, and kill it if it does not."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _namespaces(shape: Shape, cleanup: contextlib.ExitStack) -> Link:
    _remove_left_over()
    name = f"isth-{os.getpid()}-{next(_numbers)}"
    edge, cloud = f"{name}-edge", f"{name}-cloud"
    for namespace in (edge, cloud):
        _run("ip", "netns", "add", namespace)
        cleanup.callback(_run, "ip", "netns", "del", namespace)
        _run("ip", "-n", namespace, "link", "set", "lo", "up")
        _name_hosts(namespace, cleanup)
    line = None
    if shape.delay_s:
        line = _join_by_delay_line(edge, cloud, shape, cleanup)
    else:
        veth = ["link", "add", EDGE_DEVICE, "type", "veth", "peer", "name", CLOUD_DEVICE, "netns", cloud]
        _run("ip", "-n", edge, *veth)
    ends = [(edge, EDGE_DEVICE, EDGE_HOST, CLOUD_HOST), (cloud, CLOUD_DEVICE, CLOUD_HOST, EDGE_HOST)]
    for namespace, device, host, peer in ends:
        _run("ip", "-n", namespace, "addr", "add", host, "peer", peer, "dev", device)
        # A TUN's queue drops what its reader is late for: deep enough for a busy machine.
        _run("ip", "-n", namespace, "link", "set", device, "txqueuelen", "10000", "up")
        # One of TCP's large segments that is larger than the bucket is cut into frames that pass one by one, and that
        # takes both cores: they are made to fit it.
        _run("ip", "-n", namespace, "link", "set", device, "gso_max_segs", str(shape.segments))
        bucket = ["rate", f"{shape.rate_bit_s:.0f}bit", "burst", f"{shape.burst_bytes}b"]
        bucket += ["latency", f"{shape.queue_s * 1e3:.0f}ms"]
        _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *bucket)
    enter = ("ip", "netns", "exec")
    with _congestion_control_allowed():
        congestion_control = _tune(enter, edge, cloud)
    return Link(
        shape,
        "tun" if shape.delay_s else "veth",
        congestion_control,
        CLOUD_HOST,
        (*enter, edge),
        (*enter, cloud),
        EDGE_DEVICE,
        CLOUD_DEVICE,
        line,
    )


def _name_hosts(namespace: str, cleanup: contextlib.ExitStack) -> None:
    """Give the namespace a hosts file of its own: what looks an address up must not wait for a name server."""
    directory = Path("/etc/netns", namespace)
    directory.mkdir(parents=True)
    cleanup.callback(shutil.rmtree, directory)
    hosts = {"127.0.0.1": "localhost", EDGE_HOST: "edge", CLOUD_HOST: "cloud"}
    lines = [f"{prefix}{address} {name}\n" for address, name in hosts.items() for prefix in ("", "::ffff:")]
    (directory / "hosts").write_text("".join(lines))


def _join_by_delay_line(
    edge: str, cloud: str, shape: Shape, cleanup: contextlib.ExitStack
) -> subprocess.Popen[str]:
    ends = [f"{edge}:{EDGE_DEVICE}", f"{cloud}:{CLOUD_DEVICE}"]
    argv = [sys.executable, "-m", "benchmarks.delay_line", *ends, str(shape.delay_s)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    cleanup.callback(end, process)
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise LinkUnavailable("the delay line could not open its TUN devices")
    return process


def _tune(enter: tuple[str, ...], *namespaces: str) -> str:
    """Give all namespaces the same congestion control and room for the window; what is in force."""
    in_force = set()
    for namespace in namespaces:
        buffers = f"4096 131072 {TCP_BUFFER_BYTES}"
        wanted = [f"net.ipv4.tcp_congestion_control={CONGESTION_CONTROL}"]
        wanted += [f"net.ipv4.tcp_rmem={buffers}", f"net.ipv4.tcp_wmem={buffers}"]
        for setting in wanted:
            # A kernel without cubic keeps its own: what is in force is read back and printed.
            subprocess.run([*enter, namespace, "sysctl", "-qw", setting], capture_output=True, check=False)
        in_force.add(_sysctl_read("net.ipv4.tcp_congestion_control", (*enter, namespace)))
    if len(in_force) != 1:
        raise LinkUnavailable(f"the two hosts differ in congestion control: {sorted(in_force)}")
    return in_force.pop()


@contextlib.contextmanager
def _congestion_control_allowed() -> Iterator[None]:
    """While inside, namespaces may choose CONGESTION_CONTROL: the host's own list need not name it."""
    setting = "net.ipv4.tcp_allowed_congestion_control"
    before = _sysctl_read(setting)
    if CONGESTION_CONTROL in before.split():
        yield
        return
    subprocess.run(
        ["sysctl", "-qw", f"{setting}={before} {CONGESTION_CONTROL}"], capture_output=True, check=False
    )
    try:
        yield
    finally:
        subprocess.run(["sysctl", "-qw", f"{setting}={before}"], capture_output=True, check=False)


def _sysctl_read(name: str, prefix: tuple[str, ...] = ()) -> str:
    done = subprocess.run([*prefix, "sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _run(*argv: str) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError as missing:
        raise LinkUnavailable(f"{argv[0]} is not installed") from missing
    if done.returncode != 0:
        raise LinkUnavailable(f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}")


def _remove_left_over() -> None:
    """Delete the namespaces of runs that were killed before they could."""
    left_over = Path("/run/netns")
    for path in left_over.glob("isth-*") if left_over.is_dir() else ():
        with contextlib.suppress(ValueError, LinkUnavailable):
            if not Path(f"/proc/{int(path.name.split('-')[1])}").exists():
                _run("ip", "netns", "del", path.name)
                shutil.rmtree(Path("/etc/netns", path.name), ignore_errors=True)


@contextlib.contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """While inside, SIGTERM and SIGHUP unwind the stack as an exit does."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
