"""One-way throughput over loopback between two processes: Isthmus against plain sockets, gloo, ZeroMQ and gRPC.

Every contender sends the same number of messages of the same size from one tensor that is used again and again, to
another process, which answers with one small message once it has all of them. What is printed is payload bytes over
the time from the first send to that answer. The contenders take turns in many short rounds, each in an order drawn by
lot, so that whatever else the machine does meets all of them alike: a shared one copies memory at one of two speeds, a
third apart, for some tenths of a second each. So a ratio is the median of the ratios within a round, not that of the
medians. All use the same TCP congestion control.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection as Pipe
from operator import truediv
from pathlib import Path
from typing import Any

from benchmarks import wire_contenders

SIZES = {"64 KB": 65_536, "1 MB": 1 << 20, "6.4 MB": 6_422_528, "12.8 MB": 12_845_056}
TARGETS = {"raw": 0.9, "gloo": 1.3, "zmq": 1.2, "grpc": 3.0}  # Isthmus over the other, at least
EVERY_SIZE = {"raw"}  # the others' targets hold from 1 MB up
CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")


@contextlib.contextmanager
def congestion_control(wanted: str) -> Iterator[str]:
    """Set the machine's TCP congestion control where that is allowed; yield the one in force."""
    try:
        before = CONGESTION.read_text().strip()
    except OSError:
        yield "unknown"
        return
    try:
        CONGESTION.write_text(wanted)
    except OSError:
        yield before
        return
    try:
        yield wanted
    finally:
        CONGESTION.write_text(before)


class Pair:
    """The two processes of one contender, connected and waiting for work."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._ends: list[Pipe] = []
        self._processes = []
        target: Callable[..., None]
        for target in (wire_contenders.receiver, wire_contenders.sender):
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)
        receiver, sender = self._ends
        sender.send(receiver.recv())  # where the receiver listens
        sender.recv()  # connected

    def measure(self, size: int, count: int) -> float:
        """Return seconds for sending `count` messages of `size` bytes."""
        for end in self._ends:
            end.send((size, count))
        seconds: float = self._ends[1].recv()
        self._ends[0].recv()
        return seconds

    def close(self) -> None:
        """End both processes."""
        for end in reversed(self._ends):
            end.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.terminate()
                process.join()


def measure(names: Sequence[str], sizes: Sequence[str], rounds: int, bytes_a_round: int) -> dict[str, Any]:
    """Return GB/s by size and contender, every round's and the median, and how many times that Isthmus reaches."""
    pairs = [Pair(name) for name in names]
    order = random.Random(0)
    results: dict[str, Any] = {}
    try:
        for label in sizes:
            size = SIZES[label]
            count = max(8, bytes_a_round // size)
            rates: dict[str, list[float]] = {name: [] for name in names}
            for number in range(rounds + 1):
                for pair in order.sample(pairs, len(pairs)):
                    seconds = pair.measure(size, count if number else 8)
                    if number:  # the first is to warm up
                        rates[pair.name].append(count * size / seconds / 1e9)
            results[label] = {
                name: {"median": statistics.median(values), "rounds": values}
                for name, values in rates.items()
            }
            for name, values in rates.items() if "isthmus" in rates else ():
                results[label][name]["ratio"] = statistics.median(map(truediv, rates["isthmus"], values))
    finally:
        for pair in pairs:
            pair.close()
    return results


def report(results: dict[str, Any]) -> bool:
    """Print a table; return whether every target is met."""
    met = True
    names = list(next(iter(results.values())))
    print(
        f"{'payload':>8}  "
        + "  ".join(f"{name:>14}" for name in names)
        + "   (GB/s, and Isthmus over it: medians)"
    )
    for label, row in results.items():
        cells = []
        for name in names:
            rate = row[name]["median"]
            if name == "isthmus":
                cells.append(f"{rate:14.2f}")
                continue
            ratio = row[name]["ratio"]
            applies = name in EVERY_SIZE or SIZES[label] >= 1 << 20
            good = not applies or ratio >= TARGETS[name]
            met &= good
            cells.append(f"{rate:5.2f} {ratio:5.2f}x{'' if good else ' !':2}")
        print(f"{label:>8}  " + "  ".join(cells))
    print("targets: " + ", ".join(f"{target:g}x {name}" for name, target in TARGETS.items() if name in names))
    print("all targets are met" if met else "targets marked ! are missed")
    return met


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 where every target is met, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks/wire.py", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="F", help="write the results there")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--only", nargs="+", choices=["isthmus", *TARGETS], help="these contenders alone")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, help="how many rounds to take the median of")
    options = parser.parse_args(argv)
    names = options.only or ["isthmus", *TARGETS]
    rounds = options.rounds or (5 if options.quick else 60)
    with congestion_control("cubic") as control:
        print(
            f"{platform.machine()}, {os.cpu_count()} CPUs, TCP congestion control {control}, {rounds} rounds"
        )
        results = measure(names, options.sizes, rounds, (64 if options.quick else 128) << 20)
    met = report(results) if "isthmus" in names else True
    if options.json:
        document = {
            "benchmark": "wire",
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
            "congestion_control": control,
            "rounds": rounds,
            "targets": TARGETS,
            "targets_met": met,
            "gb_per_s": results,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
