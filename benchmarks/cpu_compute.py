"""What the process's own set-up is worth: MobileNetV2's training step in plain torch, on the CPU.

python -m benchmarks.cpu_compute            # batch 64 in 8 chunks at 224 px, 2 threads

Five processes take turns, one step each, so that whatever else the machine does touches all alike: glibc's
malloc as it is, without and with chunks; its thresholds raised; channels-last as well; and huge pages as well, as
in the product. Torch computes on a thread of its own, as there. The ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SEEN = {"glibc, unchunked": 9.9, "glibc": 4.0, "thresholds": 3.0, "thresholds, channels-last": 2.0}
"""Seconds a step that were seen elsewhere, on another machine of this kind."""

PRODUCT = "all, huge pages"
"""The setting that is the product's."""

TARGET = 1.5
"""How many times faster than with glibc as it is a step must be with everything set."""


@dataclass(frozen=True)
class Setting:
    """How one process runs its steps."""

    chunks: int
    thresholds: bool = False
    channels_last: bool = False
    huge_pages: bool = False
    batch: int = 64
    image_size: int = 224
    threads: int = 2


SETTINGS = {
    "glibc, unchunked": Setting(chunks=1),
    "glibc": Setting(chunks=8),
    "thresholds": Setting(chunks=8, thresholds=True),
    "thresholds, channels-last": Setting(chunks=8, thresholds=True, channels_last=True),
    PRODUCT: Setting(chunks=8, thresholds=True, channels_last=True, huge_pages=True),
}


@dataclass(frozen=True)
class Step:
    """One measured step.

    Attributes:
        seconds: from its start to its end.
        cpu_s: processor time of all threads, which other work on the machine disturbs least.
        page_faults: pages taken from the system.
        peak_bytes: the process's peak memory so far.
    """

    seconds: float
    cpu_s: float
    page_faults: int
    peak_bytes: int


class Trainer:
    """A process of its own that runs a step whenever it is asked to."""

    def __init__(self, setting: Setting) -> None:
        command = [sys.executable, "-m", "benchmarks.cpu_compute", "--child", json.dumps(asdict(setting))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> Step:
        """Run one step and return what it took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return Step(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def child(setting: Setting) -> None:
    """Run a step for each line of standard input, and print what it took."""
    from common import runtime

    if setting.huge_pages:
        runtime.prepare_process()
    elif setting.thresholds:
        runtime.raise_malloc_thresholds()
        runtime.wait_without_spinning()
    orders: queue.Queue[bool] = queue.Queue()
    compute = threading.Thread(target=_train, args=(setting, orders))
    compute.start()
    for _ in sys.stdin:
        orders.put(True)
    orders.put(False)
    compute.join()


def _train(setting: Setting, orders: queue.Queue[bool]) -> None:
    import torch

    from common import runtime
    from common.vision import models

    runtime.set_threads(setting.threads)
    torch.manual_seed(0)
    memory_format = torch.channels_last if setting.channels_last else torch.contiguous_format
    model = models.mobilenet_v2().train().to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.1)
    images = torch.randn(setting.batch, 3, setting.image_size, setting.image_size)
    images = images.to(memory_format=memory_format)
    labels = torch.randint(1000, (setting.batch,))
    while orders.get():
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        for x, y in zip(images.chunk(setting.chunks), labels.chunk(setting.chunks), strict=True):
            loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum") / setting.batch
            torch.autograd.backward(loss)
        optimizer.step()
        seconds, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        print(json.dumps(asdict(Step(seconds, cpu_s, faults, runtime.peak_rss_bytes()))), flush=True)


def measure(names: Sequence[str], rounds: int) -> dict[str, list[Step]]:
    """Run the named settings in turns; the first round of each is left out."""
    trainers = {name: Trainer(SETTINGS[name]) for name in names}
    try:
        for trainer in trainers.values():
            trainer.step()
        steps: dict[str, list[Step]] = {name: [] for name in names}
        for _ in range(rounds):
            for name, trainer in trainers.items():
                steps[name].append(trainer.step())
        return steps
    finally:
        for trainer in trainers.values():
            trainer.close()


def report(steps: dict[str, list[Step]]) -> dict[str, Any]:
    """Print a table, and return its numbers."""
    baseline_s = statistics.median(step.seconds for step in steps["glibc"])
    rows = {}
    print(
        f"{'':28}{'s a step':>10}{'CPU s':>8}{'times faster':>14}{'page faults':>13}{'peak':>10}{'seen':>8}"
    )
    for name, taken in steps.items():
        seconds = statistics.median(step.seconds for step in taken)
        cpu_s = statistics.median(step.cpu_s for step in taken)
        faults = round(statistics.median(step.page_faults for step in taken))
        peak_bytes = max(step.peak_bytes for step in taken)
        rows[name] = {
            "step_s": seconds,
            "cpu_s": cpu_s,
            "times_faster": baseline_s / seconds,
            "page_faults": faults,
            "peak_bytes": peak_bytes,
        }
        print(
            f"{name:28}{seconds:10.2f}{cpu_s:8.2f}{baseline_s / seconds:14.2f}{faults:13,}"
            f"{peak_bytes / 2**20:7.0f} MB{SEEN.get(name, ''):>8}"
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 where the target is met, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks/cpu_compute.py", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="F", help="write the results there")
    parser.add_argument("--quick", action="store_true", help="two rounds, and none unchunked")
    parser.add_argument("--rounds", type=int, help="how many rounds to take the median of")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(Setting(**json.loads(options.child)))
        return 0
    rounds = options.rounds or (2 if options.quick else 7)
    names = [name for name in SETTINGS if not options.quick or "unchunked" not in name]
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    print(f"{machine}: MobileNetV2, batch 64 in 8 chunks, 224 px, 2 threads, medians of {rounds} steps")
    rows = report(measure(names, rounds))
    reached = rows[PRODUCT]["times_faster"]
    met = reached >= TARGET
    verdict = "met" if met else "MISSED"
    print(f"{PRODUCT}: {reached:.2f} times faster than glibc as it is (target {TARGET}: {verdict})")
    if options.json:
        document = {
            "benchmark": "cpu_compute",
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine,
            "rounds": rounds,
            "targets": {"thresholds, channels-last": TARGET},
            "targets_met": met,
            "settings": rows,
            "seen_elsewhere_s": SEEN,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
