"""How near `edge-client plan` comes to the steps that are then made, and what its choice is worth.

    python -m benchmarks.planning [--quick] [--rates 10 100 1000]

MobileNetV2's preset, batch 64 in 8 chunks at 224 px, both sides on these cores. At each rate a plan is made over the
relay (`benchmarks.relay`), which takes from the cores, too, what the plan does not know. Then a run is made with each
row of the plan whose steps are not expected to take more than 12 s, and with the one that it names.

What the plan is for is the choice: a step with the row that it names against one with the fastest row, as both were
measured. It takes the mildest within 1.1 of the fastest that it expects, so 1.2 is met where it errs by a tenth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from benchmarks.links import Link, shaped_link
from benchmarks.product import SCRIPTS, clean_environment, machine, run_product
from edge.tuner import MEASURED_STEPS

WORKLOAD = ("--model", "mobilenet_v2", "--data", "digits", "--batch-size", "64", "--chunks", "8")
WARM_UP = max(MEASURED_STEPS)
CHOICE_TARGET = 1.2
LONGEST_STEP_S = 12.0


def plan(link: Link) -> dict[str, Any]:
    """Plan against a server of its own over the link, with the usual candidates at the preset cuts."""
    serve = [str(SCRIPTS / "cloud-server"), "--cpu", "--port", "0", "--quiet"]
    server = link.run_server(serve, env=clean_environment())
    assert server.stdout is not None
    host, port = link.route(int(server.stdout.readline().strip().rpartition(":")[2]))
    argv = [str(SCRIPTS / "edge-client"), "plan", "--server", f"{host}:{port}", "--json", *WORKLOAD]
    # Given, the cuts stay.
    argv += ["--cut", "features.0.1", "--cut", "features.18"]
    done = subprocess.run(argv, env=clean_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def measured_s(rate_bit_s: float, compress: str, steps: int) -> float:
    """Train over such a link; the median seconds of a step."""
    options = [*WORKLOAD, "--compress", compress, "--eval-every", "0", "--steps", str(WARM_UP + steps)]
    with shaped_link(rate_bit_s, relay=True) as link:
        return run_product(link, options, timeout_s=600).median_step_s(WARM_UP)


def main() -> int:
    """Print a table for each rate; return 1 where a choice misses its target."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one rate, fewer steps")
    parser.add_argument("--rates", type=float, nargs="+", help="in Mbit/s")
    arguments = parser.parse_args()
    rates = arguments.rates or ([100.0] if arguments.quick else [10.0, 100.0, 1000.0])
    print(f"{machine()}: MobileNetV2, batch 64 in 8 chunks, 224 px, both sides on these cores")
    met = True
    for rate in rates:
        with shaped_link(rate * 1e6, relay=True) as link:
            report = plan(link)
        up, down = (report["link"][key] / 1e6 for key in ("up_bit_s", "down_bit_s"))
        print(f"\n{rate:g} Mbit/s, measured by the plan as {up:.1f} up and {down:.1f} down", flush=True)
        found: dict[str, float] = {}
        for row in report["rows"]:
            compress, expected_s = " ".join(row["compress"]), row["step_s"]
            if expected_s > LONGEST_STEP_S and row != report["best"]:
                print(f"  {compress:12s} expected {expected_s:7.2f} s: not run", flush=True)
                continue
            found[compress] = step_s = measured_s(rate * 1e6, compress, 3 if arguments.quick else 7)
            print(
                f"  {compress:12s} expected {expected_s:7.2f} s  took {step_s:7.2f} s  ratio {expected_s / step_s:.2f}",
                flush=True,
            )
        best = " ".join(report["best"]["compress"])
        ratio = found[best] / min(found.values())
        passed = ratio <= CHOICE_TARGET
        met &= passed
        verdict = "pass" if passed else "FAIL"
        print(
            f"  takes {best}: {ratio:.2f} times the fastest (target {CHOICE_TARGET}: {verdict})", flush=True
        )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
