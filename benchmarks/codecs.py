"""What codecs do to real boundary tensors: GB/s of fp32 encoded and decoded, and bytes left.

    python -m benchmarks.codecs [--quick] [--only CHAIN ...] [--rounds N]

The tensors are those of MobileNetV2's preset for a chunk of 8 digits at 224 px, activations and gradients, at both
cuts, without a bottleneck and with ``conv``; channels-last as the product has them, and for int8 also row-major.

As in the product, a lane is one thread in which torch uses one core: "1 core" is one lane, "2 cores" are two at
once, each with an encoder or decoder and tensors of its own, and "at once" is one that encodes beside one that
decodes. Each lane goes round several tensors and keeps its last few results, as the link does until they are sent.
Everything takes turns, and medians of all rounds are compared with references measured in the same run:

- naive: int8 as one writes it in torch (amin and amax by channel, scale, round, clamp, uint8; and back), in a thread
  of a process as any program has it: glibc's malloc as it is, and torch with as many threads as there are cores;
- tuned: the same in a lane of this process, which keeps freed memory as the product's do; not judged, it tells what
  of the gain is memory and what is kernels;
- memcpy: `numpy.copyto` of as many bytes of fp32 into memory that is there already, a roof for any codec.

Targets, for int8 on two cores and the tensors without a bottleneck: encoding and decoding each reach 5 GB/s of fp32.
And for all: no page faults once running, that is, no new memory. What ``conv`` leaves is
so little that a call's fixed cost outweighs its kernels: those tensors are judged by their time, which must stay
below a fifth of a millisecond a call on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.runtime import default_threads, prepare_process, set_threads

if __name__ == "__main__" and "--child" not in sys.argv:
    prepare_process()  # before torch is imported, as both commands do

import torch

from benchmarks.codec_lanes import (
    CHUNK,
    IMAGE_SIZE,
    Boundary,
    Lane,
    Pair,
    Speed,
    all_boundaries,
    codec_lane,
    lane_threads,
    memcpy_lane,
    naive_lane,
    repeat,
)
from benchmarks.product import clean_environment, machine, today
from wire.codecs.registry import codec_class, codec_names
from wire.codecs.spec import parse_chain
from wire.errors import SpecError

SPECIAL = ("delta", "ragged")  # nothing without another codec, and nothing without a mask
CHAINS = (
    *(
        f"{name}:{codec_class(name).examples[0]}".removesuffix(":")
        for name in codec_names()
        if name not in SPECIAL
    ),
    *("delta+int4", "int4:hadamard", "int8+lz4", "int8+zstd", "fp16+zstd"),
)
NAIVE, TUNED, MEMCPY = "naive", "tuned", "memcpy"
JUDGED = "int8"
TARGET_GB_S = 5.0
TARGET_SMALL_S = 2e-4
MOST_FAULTS = 1.0
"""Page faults a call: a new buffer of 3 MB would have 800."""

COLUMNS = ("encode", "decode", "encode_2", "decode_2", "encode_beside_decode", "decode_beside_encode")
"""Measurements: on one core, on two, and of an encoder and a decoder at once."""


class PlainProcess:
    """The naive way in a process without any of the product's set-up, which measures when asked to."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "benchmarks.codecs", "--child"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean_environment()
        )

    def measure(self, index: int, seconds: float) -> dict[str, Speed]:
        """Encode and decode one of `all_boundaries` on one core and on all, for a while each."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{index} {seconds}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that quantizes the naive way has ended")
        return {what: Speed(**speed) for what, speed in json.loads(answer).items()}

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def child() -> None:
    """For each line of standard input, measure the naive way in a thread, as lanes are, and print its speeds."""
    known = all_boundaries()
    with ThreadPoolExecutor(1, initializer=set_threads) as thread:
        for line in sys.stdin:
            index, seconds = line.split()
            speeds = thread.submit(naive_speeds, known[int(index)], float(seconds)).result()
            print(json.dumps({what: asdict(speed) for what, speed in speeds.items()}), flush=True)


def naive_speeds(boundary: Boundary, seconds: float) -> dict[str, Speed]:
    """Measure the naive way with one of torch's threads, and with one for each core."""
    lane = naive_lane(boundary)
    assert lane.decode is not None
    speeds = {}
    for suffix, threads in (("", 1), ("_2", default_threads())):
        torch.set_num_threads(threads)
        speeds[f"encode{suffix}"] = repeat(lane.encode, seconds)
        speeds[f"decode{suffix}"] = repeat(lane.decode, seconds)
    time.sleep(0.02)  # torch's threads go on spinning for a while: not into what is measured next
    return speeds


class Contender:
    """One way to carry one tensor; its measurements so far, in GB/s of fp32.

    Args:
        name: the codecs' chain, or a reference's.
        boundary: the tensor.
        round: takes all measurements once, each for so many seconds.
        sent_bytes: what the tensor is encoded to.
    """

    def __init__(
        self,
        name: str,
        boundary: Boundary,
        round: Callable[[float], dict[str, Sequence[Speed]]],
        sent_bytes: int,
    ) -> None:
        self.name = name
        self._boundary, self._round, self._sent_bytes = boundary, round, sent_bytes
        self._rates: dict[str, list[float]] = {}
        self._faults: dict[str, list[float]] = {}

    def measure(self, seconds: float) -> None:
        """Take one round of all measurements."""
        for what, speeds in self._round(seconds).items():
            rate = sum(speed.calls_s for speed in speeds) * self._boundary.nbytes / 1e9
            self._rates.setdefault(what, []).append(rate)
            self._faults.setdefault(what, []).append(max(speed.faults for speed in speeds))

    def row(self) -> dict[str, Any]:
        """Medians: GB/s by measurement, the most page faults a call, and the share of bytes that is sent."""
        return {
            "tensor": self._boundary.label,
            "bottleneck": self._boundary.bottleneck,
            "role": self._boundary.role.value,
            "codec": self.name,
            "fp32_bytes": self._boundary.nbytes,
            "rate": self._sent_bytes / self._boundary.nbytes,
            "gb_per_s": {what: statistics.median(rates) for what, rates in self._rates.items()},
            "faults": max(statistics.median(faults) for faults in self._faults.values()),
        }


def lanes_round(pair: Pair, lanes: Sequence[Lane], seconds: float) -> dict[str, Sequence[Speed]]:
    """Measure two lanes that do the same: one alone, both, and one encoding while the other decodes."""
    one, two = lanes
    speeds = {
        "encode": pair.run([one.encode], seconds),
        "encode_2": pair.run([one.encode, two.encode], seconds),
    }
    if one.decode is None or two.decode is None:
        return speeds
    speeds["decode"] = pair.run([one.decode], seconds)
    speeds["decode_2"] = pair.run([one.decode, two.decode], seconds)
    together = pair.run([one.encode, two.decode], seconds)
    return speeds | {"encode_beside_decode": together[:1], "decode_beside_encode": together[1:]}


def in_lanes(pair: Pair, name: str, boundary: Boundary, make: Callable[[Boundary], Lane]) -> Contender:
    """A contender that runs in this process's two lanes."""
    lanes = [make(boundary), make(boundary)]
    return Contender(name, boundary, partial(lanes_round, pair, lanes), lanes[0].sent_bytes)


def in_plain_process(plain: PlainProcess, index: int, boundary: Boundary) -> Contender:
    """The naive way where nothing is set up."""

    def round(seconds: float) -> dict[str, Sequence[Speed]]:
        return {what: [speed] for what, speed in plain.measure(index, seconds).items()}

    return Contender(NAIVE, boundary, round, boundary.x.numel())


def measure(contenders: Sequence[Contender], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Measure all ways to carry a tensor, in turns; their rows, with ratios to the references."""
    for number in range(rounds):
        for contender in contenders if number % 2 else contenders[::-1]:
            contender.measure(seconds)
    rows = [contender.row() for contender in contenders]
    speeds = {row["codec"]: row["gb_per_s"] for row in rows}
    for row in rows:
        both = [what for what in ("encode_2", "decode_2") if what in row["gb_per_s"]]
        row["times_naive"] = {
            what: row["gb_per_s"][what] / speeds[NAIVE][what] for what in both if row["codec"] != MEMCPY
        }
        row["of_memcpy"] = {what: row["gb_per_s"][what] / speeds[MEMCPY]["encode_2"] for what in both}
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print one tensor's rows."""
    print(f"\n{rows[0]['tensor']}, {rows[0]['fp32_bytes'] / 1e6:.2f} MB")
    print(
        f"  {'':<16}{'':>6}{'1 core':>13}{'2 cores':>13}{'at once':>13}{'x naive':>13}{'of memcpy':>13}{'':>8}"
    )
    print(f"  {'':<16}{'bytes':>6}{'   enc    dec' * 5}{'faults':>8}")
    for row in rows:
        cells = [f"{row['gb_per_s'][what]:.1f}" if what in row["gb_per_s"] else "" for what in COLUMNS]
        for ratios, digits in ((row["times_naive"], 1), (row["of_memcpy"], 2)):
            cells += [f"{ratios[w]:.{digits}f}" if w in ratios else "" for w in ("encode_2", "decode_2")]
        text = "".join(f"{cell:>{width}}" for cell, width in zip(cells, (6, 7) * 5, strict=True))
        print(f"  {row['codec']:<16}{row['rate']:6.3f}{text}{row['faults']:8.1f}", flush=True)


@dataclass(frozen=True)
class Verdict:
    """One target and what was reached, the worst of all tensors.

    Attributes:
        text: what it is about, the number and the tensor.
        met: whether the target is.
    """

    text: str
    met: bool

    def __str__(self) -> str:
        return f"{self.text}: {'pass' if self.met else 'FAIL'}"


def judge(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Hold int8's rows against the targets."""
    judged = [row for row in rows if row["codec"] == JUDGED]
    large = [row for row in judged if row["bottleneck"] == "none"]
    small = [row for row in judged if row["bottleneck"] != "none"]
    verdicts = []
    for what in ("encode", "decode"):
        slowest = min(large, key=lambda row: row["gb_per_s"][f"{what}_2"])
        speed = slowest["gb_per_s"][f"{what}_2"]
        text = f"{JUDGED} {what}, 2 cores: at least {speed:.1f} GB/s of fp32 ({slowest['tensor']})"
        verdicts.append(Verdict(f"{text}, target {TARGET_GB_S:g}", speed >= TARGET_GB_S))
    for what in ("encode", "decode"):
        seconds, tensor = max(
            (row["fp32_bytes"] / 1e9 / row["gb_per_s"][what], row["tensor"]) for row in small
        )
        text = f"{JUDGED} {what}, 1 core, behind conv: at most {seconds * 1e3:.2f} ms a call ({tensor})"
        verdicts.append(Verdict(f"{text}, target {TARGET_SMALL_S * 1e3:g}", seconds <= TARGET_SMALL_S))
    faults = max(row["faults"] for row in judged)
    text = f"{JUDGED}: at most {faults:.1f} page faults a call, target under {MOST_FAULTS:g}"
    return [*verdicts, Verdict(text, faults < MOST_FAULTS)]


def measure_all(chains: Sequence[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Measure and print tensor by tensor."""
    rows = []
    plain = PlainProcess()
    try:
        with lane_threads() as pair:
            for index, boundary in enumerate(all_boundaries()):
                channels_last = boundary.x.is_contiguous(memory_format=torch.channels_last)
                fitting = [chain for chain in chains if channels_last or chain == JUDGED]
                if not fitting:
                    continue
                contenders = [
                    in_lanes(pair, MEMCPY, boundary, memcpy_lane),
                    in_plain_process(plain, index, boundary),
                    in_lanes(pair, TUNED, boundary, naive_lane),
                    *(in_lanes(pair, chain, boundary, partial(codec_lane, chain)) for chain in fitting),
                ]
                taken = measure(contenders, rounds, seconds)
                show(taken)
                rows += taken
    finally:
        plain.close()
    return rows


def chain(text: str) -> str:
    """A chain from the command line, if it is one."""
    try:
        parse_chain(text)
    except SpecError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 where every target is met, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks/codecs.py", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="F", help="write the results there")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument(
        "--only", nargs="+", type=chain, default=CHAINS, metavar="CHAIN", help="these, such as lowrank:16"
    )
    parser.add_argument("--rounds", type=int, help="how many rounds to take the median of")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child()
        return 0
    rounds = options.rounds or (3 if options.quick else 7)
    seconds = 0.01 if options.quick else 0.015
    print(f"{machine()}: GB/s of fp32, a chunk of {CHUNK} at {IMAGE_SIZE} px, medians of {rounds} rounds")
    rows = measure_all(options.only, rounds, seconds)
    verdicts = judge(rows) if JUDGED in options.only else []
    print()
    for verdict in verdicts:
        print(verdict)
    met = all(verdict.met for verdict in verdicts)
    if verdicts:
        print("all targets are met" if met else "targets marked FAIL are missed")
    if options.json:
        document = {
            "benchmark": "codecs",
            "date": today(),
            "machine": machine(),
            "rounds": rounds,
            "targets": [str(verdict) for verdict in verdicts],
            "targets_met": met,
            "rows": rows,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
