"""How near a training step comes to its floor, and how far ahead of the usual way it is.

    python -m benchmarks.step_time [--quick] [--no-gloo] [--runs 3] [--rates 10 100 1000] [--delays 0 20]

MobileNetV2's preset, batch 64 in 8 chunks at 224 px. On each link (`benchmarks.links`), one after the other:
the link calibrated with raw sockets, the split written plainly on gloo (`benchmarks.gloo_split`), pipelined
and not, and the product with each ``--compress``. Medians of the steps after a warm-up; the product is started
``--runs`` times, and the row is the run whose ratio is the median one. Where a step takes minutes (10 Mbit/s,
uncompressed) one step is measured, once, and the table says so: its transfer is its own average.

The floor is `common.floor`: bytes as the socket carried them over the link's set rate, and the compute of the
same partitions in plain torch in one process with all cores to itself, bottleneck included and codecs not; measured
right before and right after each run of the product, and the mean of both taken.
Both sides share the cores here, so the compute floor is both sides' sum. Where packets are carried by a process
that takes cores too (`benchmarks.delay_line`), what it took is part of that floor; the ratio without it is printed
besides. The set rate counts Ethernet, IP and TCP headers, which plain sockets cannot get around: the ratio at the
rate that calibration measured is printed too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.calibration import Calibration, calibrate
from benchmarks.links import Link, end, shaped_link
from benchmarks.mobilenet_split import MALLOC_HELP, RUNTIME_HELP
from benchmarks.product import ProductRun, clean_environment, machine, run_json, run_product, today
from common.cost import ChunkCost, Message, StepModel
from common.cost import Link as LinkCost
from common.floor import Floor, floor
from edge.tuner import MEASURED_STEPS

CHUNKS = 8
WORKLOAD = ["--model", "mobilenet_v2", "--data", "digits", "--batch-size", "64", "--chunks", str(CHUNKS)]
WORKLOAD += ["--lr", "0.005", "--momentum", "0.1", "--eval-every", "0"]
TARGETS = {"link-bound": 1.10, "compute-bound": 1.20}
SPEED_UP_TARGET = 20
COMPRESSED = "conv+int8"


@dataclass(frozen=True)
class Effort:
    """How many steps one measurement takes: first those left out, then those that count."""

    warm_up: int
    steps: int

    @property
    def slow(self) -> bool:
        """Whether a step takes so long that a single one is measured, once."""
        return self.steps == 1


@dataclass(frozen=True)
class Setting:
    """What all measurements of one run share.

    Attributes:
        image_size: in pixels; 224 but for a try of the benchmark itself.
        specs: each ``--compress`` to measure the product with.
        quick: fewer steps.
        gloo: compare with gloo too.
        runs: of the product for a row.
    """

    image_size: int
    specs: tuple[str, ...]
    quick: bool
    gloo: bool
    runs: int


def effort(rate_bit_s: float, dense: bool, quick: bool) -> Effort:
    """Steps to spend at a rate; a dense step moves 237 MB, which at 10 Mbit/s takes minutes."""
    if dense and rate_bit_s < 50e6:
        return Effort(1, 1)
    if dense and rate_bit_s < 500e6:
        return Effort(1, 2 if quick else 4)
    # The edge makes its plan from what the first steps took.
    return Effort(max(MEASURED_STEPS), 3 if quick else 7)


@dataclass(frozen=True)
class Row:
    """One measurement of the product against its floor.

    Attributes:
        link: the link, in words.
        compress: the ``--compress`` given.
        step_s: median seconds of a step.
        steps: how many the median is of.
        compute_s: the compute alone, in plain torch with all cores.
        floor_s: the floor at the set rate; ``measured_floor_s`` at the rate that calibration measured.
        bound_by: what gives the floor: ``up``, ``down`` or ``cores``.
        line_s: how much of both floors is carrying the packets, on all cores.
    """

    link: str
    compress: str
    step_s: float
    steps: int
    up_bytes: int
    down_bytes: int
    compute_s: float
    floor_s: float
    measured_floor_s: float
    bound_by: str
    line_s: float

    @property
    def ratio(self) -> float:
        """Step time over the floor at the set rate."""
        return self.step_s / self.floor_s

    @property
    def target(self) -> float:
        """The most that `ratio` may be."""
        return TARGETS["compute-bound" if self.bound_by == "cores" else "link-bound"]

    @property
    def met(self) -> bool:
        """Whether it is at most that."""
        return self.ratio <= self.target


def compute_cost(bottleneck: str, setting: Setting) -> dict[str, Any]:
    """Seconds of each chunk's actions in plain torch with all cores, and elements at each cut."""
    argv = ["benchmarks.plain_compute", "--bottleneck", bottleneck]
    argv += ["--steps", "2" if setting.quick else "4", "--image-size", str(setting.image_size)]
    return run_json(argv, clean_environment(MALLOC_HELP))


def step_floor(run: ProductRun, cost: dict[str, Any], link: LinkCost) -> Floor:
    """The floor of a step with this run's bytes and that compute over this link."""
    # A message's share of its direction's bytes is its tensor's share of the elements.
    first, second = (elements / sum(cost["cut_elements"]) for elements in cost["cut_elements"])
    up, down = (run.median_bytes(f"{way}_bytes") / CHUNKS for way in ("up", "down"))
    sizes = {"0F": up * first, "2T": up * second, "1F": down * second, "1B": down * first}
    chunk = ChunkCost(
        seconds={kind: seconds for kind, seconds in cost["action_s"].items() if kind != "update"},
        messages={kind: Message(size_bytes=round(size)) for kind, size in sizes.items()},
    )
    update_s = cost["action_s"]["update"]
    return floor(StepModel(chunks=(chunk,) * CHUNKS, link=link, shared_cores=True, update_s=update_s))


def measure_gloo(link: Link, schedule: str, setting: Setting, spent: Effort) -> dict[str, Any]:
    """Median step of the plain gloo version on this link."""
    warm_up = 0 if spent.slow else spent.warm_up
    shared = [sys.executable, "-m", "benchmarks.gloo_split"]
    settings = ["--host", link.server_host, "--schedule", schedule, "--image-size", str(setting.image_size)]
    settings += ["--warm-up", str(warm_up), "--steps", str(spent.steps)]
    environment = clean_environment(RUNTIME_HELP)
    cloud = link.run_server([*shared, "cloud", "--device", link.cloud_device, *settings], env=environment)
    edge = link.run_client([*shared, "edge", "--device", link.edge_device, *settings], env=environment)
    try:
        output = edge.communicate(timeout=3600)[0]
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        return result
    finally:
        end(edge)
        end(cloud)


def mean_cost(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The mean of two measurements of the same compute."""
    actions = {kind: (seconds + other["action_s"][kind]) / 2 for kind, seconds in one["action_s"].items()}
    median_step_s = (one["median_step_s"] + other["median_step_s"]) / 2
    return one | {"action_s": actions, "median_step_s": median_step_s}


def run_steps(link: Link, compress: str, setting: Setting, spent: Effort) -> ProductRun:
    """Run the product on this link."""
    options = [*WORKLOAD, "--image-size", str(setting.image_size), "--compress", compress]
    options += ["--steps", str(spent.warm_up + spent.steps)]
    return run_product(link, options, timeout_s=3600)


def hold_against_floor(
    run: ProductRun,
    link: Link,
    measured: Calibration,
    compress: str,
    cost: dict[str, Any],
    line_cpu_s: float,
    spent: Effort,
) -> Row:
    """Median step of a run beside its floor; with the core seconds a step that carrying packets took."""
    delay_s, rate_bit_s = link.shape.delay_s, link.shape.rate_bit_s
    ideal = step_floor(run, cost, LinkCost(up_bit_s=rate_bit_s, down_bit_s=rate_bit_s, delay_s=delay_s))
    real = LinkCost(up_bit_s=measured.up_bit_s, down_bit_s=measured.down_bit_s, delay_s=delay_s)
    line_s = line_cpu_s / cost["threads"] if ideal.bound_by == "cores" else 0.0
    return Row(
        link=str(link.shape),
        compress=compress,
        step_s=run.median_step_s(spent.warm_up),
        steps=spent.steps,
        up_bytes=run.median_bytes("up_bytes"),
        down_bytes=run.median_bytes("down_bytes"),
        compute_s=cost["median_step_s"],
        floor_s=ideal.total_s + line_s,
        measured_floor_s=step_floor(run, cost, real).total_s + line_s,
        bound_by=ideal.bound_by,
        line_s=line_s,
    )


def median_run(
    link: Link, measured: Calibration, compress: str, setting: Setting, spent: Effort
) -> tuple[Row, list[float]]:
    """Run the product some times; the run with the median ratio (the lower of two), and all ratios in their order."""
    rows = []
    bottleneck = "conv" if "conv" in compress else "none"
    # Before and after each: a shared machine's speed is not the same some minutes later.
    before = compute_cost(bottleneck, setting)
    for _ in range(1 if spent.slow else setting.runs):
        began_s = link.line_cpu_s()
        run = run_steps(link, compress, setting, spent)
        carried_s = (link.line_cpu_s() - began_s) / len(run.steps)
        after = compute_cost(bottleneck, setting)
        cost = mean_cost(before, after)
        rows.append(hold_against_floor(run, link, measured, compress, cost, carried_s, spent))
        before = after
    ratios = [row.ratio for row in rows]
    return rows[ratios.index(statistics.median_low(ratios))], ratios


def word(met: bool) -> str:
    """The verdict on a target."""
    return "pass" if met else "FAIL"


def measure_link(rate_bit_s: float, delay_s: float, setting: Setting) -> dict[str, Any]:
    """Everything on one link; prints as it goes."""
    with shaped_link(rate_bit_s, delay_s) as link:
        measured = calibrate(link)
        print(f"\n{link.shape}: {link.kind}, TCP {link.congestion_control}; raw sockets, both ways at once:")
        print(
            f"  up {measured.up_bit_s / 1e6:.2f} and down {measured.down_bit_s / 1e6:.2f} Mbit/s"
            f" ({measured.worst_error:.1%} from the set rate, headers included in it),"
            f" round trip {measured.round_trip_s * 1e3:.2f} ms"
        )
        dense = effort(rate_bit_s, dense=True, quick=setting.quick)
        gloo: dict[str, float] = {}
        # gloo's processes find each other by addresses of their own, which a relay does not carry.
        for schedule in ("gpipe", "sequential") if setting.gloo and link.kind != "relay" else ():
            try:
                gloo[schedule] = measure_gloo(link, schedule, setting, dense)["median_step_s"]
                print(f"  gloo {schedule:<11}{gloo[schedule]:9.3f} s  (of {dense.steps})", flush=True)
            except subprocess.TimeoutExpired:
                print(f"  gloo {schedule:<11} not done in an hour")
        rows = []
        for compress in setting.specs:
            spent = effort(rate_bit_s, dense=compress == "none", quick=setting.quick)
            row, ratios = median_run(link, measured, compress, setting, spent)
            rows.append(row)
            spread = f" of {' '.join(f'{ratio:.3f}' for ratio in ratios)}" if len(ratios) > 1 else ""
            without = (
                f"; {row.step_s / (row.floor_s - row.line_s):.3f} without the line's" if row.line_s else ""
            )
            print(
                f"  {compress:<16}{row.step_s:9.3f} s  (of {row.steps})  floor {row.floor_s:8.3f} s, bound by"
                f" {row.bound_by:<5}  ratio {row.ratio:.3f}{spread} (target {row.target:.2f}: {word(row.met)};"
                f" {row.step_s / row.measured_floor_s:.3f} at the measured rate{without});"
                f" compute {row.compute_s:.3f} s",
                flush=True,
            )
    return {
        "rate_bit_s": rate_bit_s,
        "delay_s": delay_s,
        "kind": link.kind,
        "congestion_control": link.congestion_control,
        "calibration": asdict(measured),
        "gloo_s": gloo,
        "rows": [asdict(row) | {"ratio": row.ratio, "target": row.target, "met": row.met} for row in rows],
    }


def judge(links: Sequence[dict[str, Any]]) -> bool:
    """Print every comparison with the usual way; whether all targets are met, the floors' included."""
    if any(link["gloo_s"] for link in links):
        print("\nagainst the usual way (gloo), same link, same run:")
    met = all(row["met"] for link in links for row in link["rows"])
    for link in links:
        steps = {row["compress"]: row for row in link["rows"]}
        name = next(iter(steps.values()))["link"]
        for schedule, gloo_s in link["gloo_s"].items():
            if "none" in steps:
                times = gloo_s / steps["none"]["step_s"]
                met &= times > 1
                print(f"  {name:<22} none {times:.2f}x gloo {schedule} (target over 1: {word(times > 1)})")
            if COMPRESSED in steps:
                times = gloo_s / steps[COMPRESSED]["step_s"]
                slow = link["rate_bit_s"] < 50e6
                good = times >= SPEED_UP_TARGET or not slow
                met &= good
                target = f" (target {SPEED_UP_TARGET}: {word(good)})" if slow else ""
                print(f"  {name:<22} {COMPRESSED} {times:.1f}x uncompressed gloo {schedule}{target}")
        if COMPRESSED in steps and link["rate_bit_s"] >= 100e6:
            good = steps[COMPRESSED]["bound_by"] == "cores"
            met &= good
            print(
                f"  {name:<22} {COMPRESSED} is bound by {steps[COMPRESSED]['bound_by']} (cores: {word(good)})"
            )
    return met


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 where every target is met, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks/step_time.py", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="F", help="write the results there")
    parser.add_argument("--quick", action="store_true", help="fewer steps, and no delay at 10 Mbit/s")
    parser.add_argument("--rates", nargs="+", type=float, default=[1000, 100, 10], help="Mbit/s")
    parser.add_argument("--delays", nargs="+", type=float, default=[0, 20], help="added, one way, in ms")
    parser.add_argument("--compress", nargs="+", default=["none", COMPRESSED])
    parser.add_argument("--image-size", type=int, default=224, help="smaller to try this benchmark itself")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of the product for each row; 3")
    parser.add_argument("--no-gloo", action="store_true", help="the product alone, in a third of the time")
    options = parser.parse_args(argv)
    setting = Setting(
        options.image_size,
        tuple(options.compress),
        options.quick,
        gloo=not options.no_gloo,
        runs=1 if options.quick else options.runs,
    )
    pixels = f"{setting.image_size} px"
    print(f"{machine()}: MobileNetV2, batch 64 in {CHUNKS} chunks, {pixels}, both sides on these cores")
    links = [
        measure_link(rate * 1e6, delay * 1e-3, setting)
        for delay in options.delays
        for rate in options.rates
        if not (options.quick and delay and rate < 50)
    ]
    met = judge(links)
    print("all targets are met" if met else "targets marked FAIL are missed")
    if options.json:
        document = {
            "benchmark": "step_time",
            "date": today(),
            "machine": machine(),
            "targets": TARGETS | {"speed-up": SPEED_UP_TARGET},
            "targets_met": met,
            "links": links,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
