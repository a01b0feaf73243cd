"""The published tables that train nothing, and the picture of all that do; see `benchmarks.reproduce`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import published
from benchmarks.links import shaped_link
from benchmarks.mobilenet_split import MALLOC_HELP
from benchmarks.product import clean_environment, run_json, run_product
from benchmarks.published import IMAGE_BASELINE, TEXT_BASELINE
from benchmarks.reproduce import (
    NONE,
    TABLES,
    Record,
    longer_schedule,
    read_records,
    recorded_as,
    write_section,
)
from benchmarks.step_time import WORKLOAD
from edge.flops import columns

DOCS = Path(__file__).resolve().parent.parent / "docs"
ALLOWED = 0.01
MIB = 1 << 20
_STEPS, _WARM_UP = 6, 3


def flops(options: argparse.Namespace) -> bool:
    """Multiply-accumulates of MobileNetV2's partitions; returns whether one is further than 1 % off."""
    from edge.flops import FlopsConfig, count_flops

    lines = [("type", "part", "published", "counted so", "off by", "true count", "")]
    missed = False
    for label, compress, theirs in published.FLOPS:
        parts = [
            count_flops(FlopsConfig(compress=(compress,), count=count))[0].partitions
            for count in ("published", "true")
        ]
        for number, macs in enumerate(theirs):
            counted, true = (part[number].macs for part in parts)
            # Published figures have three digits.
            off = abs(counted - macs) / macs
            missed |= off > ALLOWED
            lines.append(
                (
                    label if number == 0 else "",
                    str(number + 1),
                    f"{macs:.2e}",
                    f"{counted:.3e}",
                    f"{off:.2%}",
                    f"{true:.3e}",
                    "FAIL" if off > ALLOWED else "pass",
                )
            )
    printed = columns(lines)
    print(printed)
    about = (
        "`python -m benchmarks.reproduce flops`: MobileNetV2, 224 px, 1000 classes, batch of 64; target 1 %."
    )
    write_section("Reproduced: flops", about, printed)
    return missed


def time(options: argparse.Namespace) -> bool:
    """Seconds a batch at 1 Gbit/s, and the link rate that compute could fill; no target, for machines differ."""
    size = "64" if options.quick else "224"
    steps = 3 if options.quick else _STEPS
    head = ("compression", "s a batch", "published", "MiB a batch", "compute s", "fills MiB/s", "published")
    lines = [head]
    with shaped_link(1e9) as link:
        for compress, filled, seconds in published.TIMES:
            argv = ["benchmarks.plain_compute", "--steps", "2", "--image-size", size]
            argv += ["--bottleneck", "conv" if compress == "conv" else "none"]
            cost: dict[str, Any] = run_json(argv, clean_environment(MALLOC_HELP))
            run = run_product(
                link,
                [*WORKLOAD, "--image-size", size, "--compress", compress, "--steps", str(_WARM_UP + steps)],
                timeout_s=3600,
            )
            nbytes = run.median_bytes("up_bytes") + run.median_bytes("down_bytes")
            lines.append(
                (
                    compress,
                    f"{run.median_step_s(_WARM_UP):.2f}",
                    f"{seconds:.2f}",
                    f"{nbytes / MIB:.1f}",
                    f"{cost['median_step_s']:.2f}",
                    f"{nbytes / MIB / cost['median_step_s']:.1f}",
                    f"{filled:.1f}",
                )
            )
        words = f"{link.shape}, {link.kind}"
    printed = f"{words}\n\n{columns(lines)}"
    print(printed)
    if not options.quick:
        about = (
            "`python -m benchmarks.reproduce time`: MobileNetV2, 224 px, batch of 64 in 8 chunks, 1 Gbit/s. Both sides "
            "compute on the same cores here; the published edge was a CPU and its cloud a GPU."
        )
        write_section("Reproduced: time", about, printed)
    return False


def plot(options: argparse.Namespace) -> bool:
    """Draw accuracy against bytes per sample, ours beside the published points."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        matplotlib.rcParams["svg.hashsalt"] = "isthmus"  # the same picture is the same file
        from matplotlib import pyplot
    except ImportError:
        print("skipped: matplotlib is not installed; pip install 'isthmus[bench]'")
        return False
    setting = "full" if options.full else "cpu"
    records = [r for r in read_records() if r.setting.partition("-")[0] == setting]
    plain = {(r.setting, r.table, r.seed): r.accuracy for r in records if r.row == NONE.label}
    kinds = (
        ("images", "CIFAR-10, MobileNetV2", "image", IMAGE_BASELINE, ("conv", "int8", "lowrank-image")),
        ("text", "CoLA", "text", TEXT_BASELINE, ("decay", "lowrank")),
    )
    for name, title, kind, baseline, published_tables in kinds:
        mine = [r for r in records if r.table in _tables(kind, setting)]
        if not mine:
            print(f"{name}: nothing was measured yet")
            continue
        figure, axes = pyplot.subplots(figsize=(9, 5.5))
        for table, of in sorted({(r.table, r.setting) for r in mine}):
            points = list(_means([r for r in mine if (r.table, r.setting) == (table, of)], plain))
            axes.plot(*zip(*points, strict=True), "o", label=f"here: {table}{longer_schedule(of)}")
        # A published rate is drawn of the dense bytes of its table here, whose images or sentences have another size;
        # accuracies are differences from no compression.
        dense = {r.table: r.bytes_per_sample for r in mine if r.row == NONE.label}
        theirs = [
            (row.rate * dense[base], row.accuracy - baseline)
            for table in published_tables
            if (base := recorded_as(table, NONE, setting)) in dense
            for row in TABLES[table][1]
            if row.rate and row.accuracy
        ]
        axes.plot(*zip(*theirs, strict=True), "x", color="black", label="published")
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.set_xscale("log")
        axes.set_xlabel("bytes per sample on the link, both ways")
        axes.set_ylabel("points of accuracy against no compression")
        axes.set_title(f"{title}: accuracy against bytes")
        axes.legend()
        path = DOCS / f"reproduced-{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        print(f"written to {path}")
    return False


def _means(
    records: Sequence[Record], plain: Mapping[tuple[str, str, int], float]
) -> Iterator[tuple[float, float]]:
    """Yield bytes and the difference from the uncompressed run of the same kind and seed, a row at a time."""
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record.row, []).append(record)
    for group in rows.values():
        lost = [r.accuracy - plain.get((r.setting, _baseline(r), r.seed), math.nan) for r in group]
        yield sum(r.bytes_per_sample for r in group) / len(group), sum(lost) / len(lost)


def _baseline(record: Record) -> str:
    """The table that holds the uncompressed run to compare with: its own, where it is one."""
    return record.table if record.row == NONE.label else recorded_as(record.table, NONE, record.setting)


def _tables(kind: str, setting: str) -> set[str]:
    """The tables of a kind, those of their uncompressed runs included."""
    names = {name for name, (of, _) in TABLES.items() if of == kind}
    return names | {recorded_as(name, NONE, setting) for name in names}
