"""Runs the benchmarks and writes docs/results.md.

    python -m benchmarks.run_all [--quick] [--only NAME ...] [--output docs/results.md]

Each benchmark is a module with ``--quick`` that prints its ratios beside their targets and exits with 0 where all
are met. Its section of the results holds what it printed, with the date and the machine; sections of benchmarks
that were not run now, and those written by hand, stay as they are.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.product import machine, today

ROOT = Path(__file__).resolve().parent.parent
HEAD = """# Results

Every number here was printed by a program in `benchmarks/`, on the machine and the day that its section names;
`make bench` measures all of it again. A ratio stands beside its target and says whether it is met.
"""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its module in this package, its section's title, and what it is about."""

    module: str
    title: str
    about: str


BENCHMARKS = (
    Benchmark(
        "wire",
        "Wire throughput",
        "Loopback, two processes, one way, against plain sockets, gloo, ZeroMQ and gRPC in the same run.",
    ),
    Benchmark("codecs", "Codecs", "Encoding and decoding of boundary tensors."),
    Benchmark(
        "lowrank", "Low rank", "Time and error of `lowrank:16`, on one core, against the truncated SVD."
    ),
    Benchmark(
        "cpu_compute",
        "Compute on a CPU",
        "A training step of MobileNetV2 in plain torch, with and without what both commands set up by themselves.",
    ),
    Benchmark(
        "schedule_order",
        "Order of the schedule",
        "Simulated: what goes first where more than one action is ready, this schedule against PipeDream's rule.",
    ),
    Benchmark(
        "step_time",
        "Step time against the floor and against gloo",
        "Two network namespaces joined by a shaped link; `benchmarks/step_time.py` defines the floor.",
    ),
    Benchmark(
        "planning",
        "Plans",
        "Step times that `edge-client plan` expects against those of the runs that follow, over a relay on loopback.",
    ),
    Benchmark("memory", "Memory", "Peak against plain torch's share, and growth over many steps."),
    Benchmark(
        "accuracy",
        "Accuracy",
        "CIFAR-10 fine-tuned with and without a bottleneck, three seeds, in a setting for two CPU cores; the demo.",
    ),
)


def run(benchmark: Benchmark, quick: bool) -> tuple[int, str]:
    """Run one benchmark, showing what it prints; its exit status and its output."""
    argv = [sys.executable, "-u", "-m", f"benchmarks.{benchmark.module}", *(["--quick"] if quick else [])]
    print(f"== {benchmark.title}: {' '.join(argv[2:])}", flush=True)
    printed = []
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            printed.append(line)
    return process.returncode, "".join(printed)


def section(benchmark: Benchmark, quick: bool, status: int, printed: str, seconds: float) -> str:
    """The benchmark's section of the results, in Markdown."""
    verdict = {0: "All targets are met.", 1: "Some targets are missed."}.get(status, "It did not finish.")
    shortened = " with `--quick`" if quick else ""
    return (
        f"## {benchmark.title}\n\n{benchmark.about}\n"
        f"`python -m benchmarks.{benchmark.module}`{shortened}, {today()}, {machine()}; {seconds / 60:.0f} min."
        f" {verdict}\n\n```text\n{printed.strip()}\n```\n"
    )


def with_section(document: str, new: str) -> str:
    """The document with the section of the same title replaced, or added at the end."""
    title = new.partition("\n")[0]
    before, found, after = document.partition(f"{title}\n")
    if not found:
        return f"{document.rstrip()}\n\n{new}"
    following = re.search(r"^## ", after, re.MULTILINE)
    rest = after[following.start() :] if following else ""
    return f"{before}{new}\n{rest}" if rest else f"{before}{new}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; return 0 where every target of every one is met, else 1."""
    names = [benchmark.module for benchmark in BENCHMARKS]
    parser = argparse.ArgumentParser(prog="benchmarks/run_all.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter runs of everything")
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names)
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args(argv)
    statuses = {}
    for benchmark in BENCHMARKS:
        if benchmark.module not in options.only:
            continue
        began = time.monotonic()
        status, printed = run(benchmark, options.quick)
        statuses[benchmark.title] = status
        # Written after each: what was measured so far survives whatever comes after.
        document = options.output.read_text(encoding="utf-8") if options.output.exists() else HEAD
        new = section(benchmark, options.quick, status, printed, time.monotonic() - began)
        options.output.write_text(with_section(document, new), encoding="utf-8")
    print()
    for title, status in statuses.items():
        print(f"{title}: {'pass' if status == 0 else 'FAIL'}")
    print(f"written to {options.output}")
    return 0 if not any(statuses.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
