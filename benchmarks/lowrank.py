"""lowrank: what a call takes on one core, and how near its error comes to the best possible one.

    python -m benchmarks.lowrank [--quick] [--json F]

Encoders and decoders as the product has them, on one thread, after a warm-up; times are medians and minima. Tensors
are those of a language model, a chunk of 4 with 128 tokens of width 768, and of MobileNetV2 at 224 px, a chunk of 8 in
both memory orders. Their singular values fall off as a power of their number, and from call to call they change a
little, as from step to step in training.

Errors are compared, in the same run, with those of the truncated singular value decomposition, whose time stands
beside. Targets, for rank 16: 2 ms for the tokens and 15 ms for the first cut's map, and an error within 5 % of the
best after the warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from common.runtime import prepare_process, set_threads

if __name__ == "__main__":
    prepare_process()  # before torch is imported, as both commands do

import torch
from torch import Tensor

from benchmarks.product import machine, today
from wire.codecs.base import Role
from wire.codecs.chain import Decoder, Encoder, parse_chain

RANK = 16
VARIANTS = 4
"""Tensors that a call goes round, each a little different."""

WARM_UP = 8
TARGET_EXCESS = 0.05


@dataclass(frozen=True)
class Case:
    """One kind of tensor.

    Attributes:
        name: what it is.
        shape: of it.
        channels_last: its memory order.
        target_s: most seconds that encoding may take; None where there is no target.
    """

    name: str
    shape: tuple[int, ...]
    channels_last: bool = False
    target_s: float | None = None


CASES = (
    Case("tokens", (4, 128, 768), target_s=2e-3),
    Case("cut 1, NCHW", (8, 32, 112, 112), target_s=15e-3),
    Case("cut 1, NHWC", (8, 32, 112, 112), channels_last=True, target_s=15e-3),
    Case("cut 2, NCHW", (8, 1280, 7, 7)),
    Case("cut 2, NHWC", (8, 1280, 7, 7), channels_last=True),
)


@dataclass(frozen=True)
class Row:
    """What was measured of one case.

    Attributes:
        case: its name.
        chain: the codecs.
        rate: bytes sent over those of fp32.
        encode_s: median seconds a call.
        encode_least_s: the shortest call's.
        decode_s: median seconds a call.
        svd_s: seconds that torch's own decomposition of the same tensor takes.
        excess: error over the best possible one, less 1; of the first call.
        warm_excess: likewise after the warm-up.
    """

    case: str
    chain: str
    rate: float
    encode_s: float
    encode_least_s: float
    decode_s: float
    svd_s: float
    excess: float
    warm_excess: float


def tensors(case: Case) -> list[Tensor]:
    """Some tensors that differ a little, with singular values that fall off as a power of their number."""
    generator = torch.Generator().manual_seed(0)
    count, rows, columns = case.shape[0], case.shape[1], torch.Size(case.shape[2:]).numel()
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(count, rows, size, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(count, columns, size, generator=generator)).Q
    base = (left / torch.arange(1, size + 1)) @ right.transpose(1, 2)
    made = []
    for _ in range(VARIANTS):
        change = 0.02 * base.std() * torch.randn(base.shape, generator=generator)
        x = (base + change).reshape(case.shape)
        made.append(x.contiguous(memory_format=torch.channels_last) if case.channels_last else x)
    return made


def matrices(x: Tensor) -> Tensor:
    """Each sample as a matrix, `[count, rows, columns]`."""
    return x.flatten(2) if x.dim() == 4 else x


def excess(y: Tensor, x: Tensor) -> float:
    """By how much the error is above that of the truncated singular value decomposition, relative to it."""
    best = torch.linalg.svdvals(matrices(x).double())[:, RANK:].square().sum().sqrt()
    return float(matrices(y.double() - x.double()).norm() / best) - 1


def timed(work: Callable[[], object], repeats: int) -> list[float]:
    """The seconds of some calls."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return seconds


def measure(case: Case, chain: str, repeats: int) -> Row:
    """Measure one case in the calling thread."""
    stages = parse_chain(chain)
    encoder, decoder = Encoder(stages, Role.ACTIVATION), Decoder(stages, Role.ACTIVATION)
    variants = tensors(case)
    excesses = []
    for call in range(WARM_UP):
        x = variants[call % VARIANTS]
        encoded = encoder.encode(x, seed=call)
        payload = bytearray(b"".join(encoded.buffers))
        excesses.append(excess(decoder.decode(encoded.desc, payload)[0], x))
    turn = iter(range(WARM_UP, sys.maxsize))
    encodes = timed(lambda: encoder.encode(variants[next(turn) % VARIANTS], seed=0), repeats)
    decodes = timed(lambda: decoder.decode(encoded.desc, payload), repeats)
    svd = timed(lambda: torch.linalg.svd(matrices(variants[0]), full_matrices=False), 1)
    return Row(
        case=case.name,
        chain=chain,
        rate=encoded.size / variants[0].nbytes,
        encode_s=statistics.median(encodes),
        encode_least_s=min(encodes),
        decode_s=statistics.median(decodes),
        svd_s=svd[0],
        excess=excesses[0],
        warm_excess=excesses[-1],
    )


def judge(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Hold the rows of lowrank alone against the targets."""
    cases = {case.name: case for case in CASES}
    verdicts = []
    for row in rows:
        target = cases[row.case].target_s
        if row.chain != f"lowrank:{RANK}":
            continue
        if target is not None:
            text = f"{row.case}: encoding takes {row.encode_s * 1e3:.2f} ms, target {target * 1e3:g}"
            verdicts.append((text, row.encode_s <= target))
        text = f"{row.case}: error {row.warm_excess:.1%} above the best, target {TARGET_EXCESS:.0%}"
        verdicts.append((text, row.warm_excess <= TARGET_EXCESS))
    return verdicts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 where every target is met, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks/lowrank.py", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="F", help="write the results there")
    parser.add_argument("--quick", action="store_true", help="fewer calls")
    options = parser.parse_args(argv)
    repeats = 20 if options.quick else 100
    print(f"{machine()}: ms a call on one core, {repeats} calls; error above the truncated SVD's\n")
    print(
        f"{'':<13}{'':<17}{'bytes':>6}{'encode':>9}{'least':>8}{'decode':>8}{'SVD':>9}{'first':>8}{'warm':>8}"
    )
    rows = []
    with ThreadPoolExecutor(1, initializer=set_threads, initargs=(1,)) as lane:
        for case in CASES:
            for chain in (f"lowrank:{RANK}", f"lowrank:{RANK}+int8"):
                row = lane.submit(measure, case, chain, repeats).result()
                rows.append(row)
                times = (row.encode_s, row.encode_least_s, row.decode_s, row.svd_s)
                cells = "".join(
                    f"{t * 1e3:>{width}.2f}" for t, width in zip(times, (9, 8, 8, 9), strict=True)
                )
                print(
                    f"{row.case:<13}{chain:<17}{row.rate:6.3f}{cells}{row.excess:8.1%}{row.warm_excess:8.1%}",
                    flush=True,
                )
    verdicts = judge(rows)
    print()
    for text, met in verdicts:
        print(f"{text}: {'pass' if met else 'FAIL'}")
    met = all(met for _, met in verdicts)
    if options.json:
        document = {
            "benchmark": "lowrank",
            "date": today(),
            "machine": machine(),
            "targets_met": met,
            "rows": [asdict(row) for row in rows],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
