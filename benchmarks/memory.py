"""What each process keeps in memory: its peak against plain torch's, and whether a long run grows.

    python -m benchmarks.memory [--quick] [--only peak|growth]

Peak: MobileNetV2's preset, batch 64 in 8 chunks at 224 px over a link of 1 Gbit/s, uncompressed, at depth 4. A run with
``--trace`` counts the chunks that each side really has in flight; each side's plain-torch share
(`benchmarks.plain_share`) then runs the same partitions by hand with as many. The product may take three boundary
tensors more for each of those chunks; a boundary tensor is cut 1's, the larger, as fp32.

Growth: 2,000 small steps (images of 32 px, batch 16 in 2 chunks) with ``conv+int8``, each process's resident
memory sampled all along. Flat means that the median of the last tenth is at most 2 % or 8 MiB above that of the
second tenth; the slope of a line through all samples after the first tenth is printed too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.links import shaped_link
from benchmarks.mobilenet_split import MALLOC_HELP
from benchmarks.process_memory import PEAK, RESIDENT, status_bytes
from benchmarks.product import clean_environment, loopback, machine, run_json, run_product, today

RATE_BIT_S = 1e9
BATCH, CHUNKS, DEPTH = 64, 8, 4
BOUNDARY_BYTES = BATCH // CHUNKS * 32 * 112 * 112 * 4
ALLOWED_TENSORS = 3
FIRST_AND_LAST = {"edge": ("0F", "0B"), "cloud": ("1F", "1B")}
FLAT_SHARE, FLAT_BYTES = 0.02, 8 << 20
MIB = 1 << 20


def chunks_in_flight(trace: dict[str, Any]) -> dict[str, int]:
    """The most chunks that each side held at once: from the start of its first action to the end of its last.

    Args:
        trace: what ``--trace`` wrote.
    """
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X" and event["cat"] == "compute"]
    most = {}
    for side, (first, last) in FIRST_AND_LAST.items():
        changes = [(span["ts"], 1) for span in spans if span["name"].startswith(first)]
        changes += [(span["ts"] + span["dur"], -1) for span in spans if span["name"].startswith(last)]
        held = most[side] = 0
        for _, change in sorted(changes):
            held += change
            most[side] = max(most[side], held)
    return most


def measure_peak(quick: bool) -> list[dict[str, Any]]:
    """Each side's peak beside its allowance."""
    peaks: dict[str, int] = {}

    def watch(side: str, pid: int) -> None:
        peaks[side] = max(peaks.get(side, 0), status_bytes(pid, PEAK))

    workload = ["--model", "mobilenet_v2", "--data", "digits", "--image-size", "224", "--eval-every", "0"]
    workload += ["--batch-size", str(BATCH), "--chunks", str(CHUNKS), "--lr", "0.005"]
    # Chosen from measurements, the depth of the second run could be another than that of the first.
    workload += ["--depth", str(DEPTH), "--steps", "4" if quick else "8"]
    with tempfile.TemporaryDirectory() as name, shaped_link(RATE_BIT_S) as link:
        trace = Path(name, "trace.json")
        run_product(link, [*workload, "--trace", str(trace)], timeout_s=1800)
        in_flight = chunks_in_flight(json.loads(trace.read_text()))
        # A second run for the peaks: a trace takes memory itself.
        run_product(link, workload, timeout_s=1800, watch=watch)
    rows = []
    for side, chunks in in_flight.items():
        argv = ["benchmarks.plain_share", side, "--in-flight", str(chunks)]
        plain_bytes = run_json(argv, clean_environment(MALLOC_HELP))["peak_bytes"]
        allowed_bytes = plain_bytes + ALLOWED_TENSORS * BOUNDARY_BYTES * chunks
        rows.append(
            {
                "side": side,
                "chunks_in_flight": chunks,
                "peak_bytes": peaks[side],
                "plain_bytes": plain_bytes,
                "allowed_bytes": allowed_bytes,
                "ratio": peaks[side] / allowed_bytes,
                "met": peaks[side] <= allowed_bytes,
            }
        )
    return rows


def measure_growth(quick: bool) -> list[dict[str, Any]]:
    """Each side's resident memory over many small steps."""
    samples: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def watch(side: str, pid: int) -> None:
        samples[side].append((time.monotonic(), status_bytes(pid, RESIDENT)))

    steps = 300 if quick else 2000
    workload = ["--model", "mobilenet_v2", "--data", "digits", "--image-size", "32", "--eval-every", "0"]
    workload += ["--batch-size", "16", "--chunks", "2", "--lr", "0.005", "--compress", "conv+int8"]
    run_product(
        loopback(), [*workload, "--steps", str(steps)], timeout_s=3600, watch=watch, watch_every_s=0.25
    )
    return [growth(side, taken, steps) for side, taken in samples.items()]


def growth(side: str, samples: Sequence[tuple[float, int]], steps: int) -> dict[str, Any]:
    """Judge one process's samples of (seconds, bytes)."""
    tenth = max(1, len(samples) // 10)
    early = statistics.median(resident for _, resident in samples[tenth : 2 * tenth])
    late = statistics.median(resident for _, resident in samples[-tenth:])
    settled = samples[tenth:]
    slope = statistics.linear_regression(
        [at for at, _ in settled], [resident for _, resident in settled]
    ).slope
    per_step = slope * (samples[-1][0] - samples[0][0]) / steps
    allowed = max(FLAT_SHARE * early, FLAT_BYTES)
    return {
        "side": side,
        "steps": steps,
        "samples": len(samples),
        "early_bytes": early,
        "late_bytes": late,
        "bytes_per_step": per_step,
        "met": late - early <= allowed,
    }


def word(met: bool) -> str:
    """The verdict on a target."""
    return "pass" if met else "FAIL"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 where every target is met, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks/memory.py", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="F", help="write the results there")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--only", choices=["peak", "growth"], help="one of the two")
    options = parser.parse_args(argv)
    print(f"{machine()}: MobileNetV2, both sides on these cores", flush=True)
    peaks = measure_peak(options.quick) if options.only != "growth" else []
    for row in peaks:
        print(
            f"{row['side']:<6} peak {row['peak_bytes'] / MIB:6.0f} MiB with {row['chunks_in_flight']} chunks in"
            f" flight; plain torch {row['plain_bytes'] / MIB:.0f} MiB, with {ALLOWED_TENSORS} boundary tensors a"
            f" chunk {row['allowed_bytes'] / MIB:.0f} MiB; ratio {row['ratio']:.2f}"
            f" (target 1: {word(row['met'])})",
            flush=True,
        )
    grown = measure_growth(options.quick) if options.only != "peak" else []
    for row in grown:
        print(
            f"{row['side']:<6} {row['steps']} steps: {row['early_bytes'] / MIB:.1f} MiB early,"
            f" {row['late_bytes'] / MIB:.1f} MiB late, {row['bytes_per_step'] / 1024:+.2f} KiB a step"
            f" (flat: {word(row['met'])})"
        )
    met = all(row["met"] for row in [*peaks, *grown])
    print("all targets are met" if met else "targets marked FAIL are missed")
    if options.json:
        document = {
            "benchmark": "memory",
            "date": today(),
            "machine": machine(),
            "targets_met": met,
            "peak": peaks,
            "growth": grown,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
